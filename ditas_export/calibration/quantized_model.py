"""The quantized model as an artefact: everything that the exporter needs, in one file.

Nothing here is folded: `s` of every linear is kept, the float parameters are the checkpoint's, and
so are the modulation weights, as floats or as the integers nearest to them.
`fold.py` turns it into what ships.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ditas_export.artifact_files import differences, json_number, load_tensors, save_tensors
from ditas_export.calibration.artifact_header import (
    FLOAT_PREFIX,
    ArtifactHeader,
    LinearFacts,
    artifact_header,
    wanted_tensors,
)
from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.dit.fitting import require_fits
from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import (
    ArtifactError,
    CalibrationError,
    CheckpointError,
    OtherModelError,
    QuantizationError,
)
from ditas_export.families.base import FamilyModel, ModelConfig
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.registry import family_of, linear_names, linear_shapes
from ditas_export.kept_parts import Part
from ditas_export.paths import StrPath
from ditas_export.quantization.integer import IntegerWeight, LowRank, pack_int4, unpack_int4
from ditas_export.quantization.ranges import Ranges
from ditas_export.quantization.weight_only import WeightOnlyWeight
from ditas_export.saved_records import shown

ARTIFACT_KIND = "ditas-export quantized DiT"
ARTIFACT_FORMAT = f"{ARTIFACT_KIND} 3"
EARLIER_FORMAT = f"{ARTIFACT_KIND} 2"
"""Says which tensors and which shape, but not which process; the same otherwise."""

PROOF = "proof."
"""Before the names of tensors that verification sampled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedLinear:
    """One linear: y ≈ x̂ (codes · multipliers · row_scale)ᵀ + bias + its branch, x̂ = Q(x / s)."""

    weight: IntegerWeight  # of W · s, (N, K)
    low_rank: LowRank | None
    bias: Tensor  # (N,) float32
    smoothing_scale: Tensor  # s, (K,) float32, > 0; ones where the method does not smooth
    alpha: float | None  # smoothing exponent that won, None where the method has none
    step_ranges: Tensor  # (steps,) float32: max|x / s| of the float model at each time step
    output_snr_db: float  # of this linear's output on the calibration states, against the target

    @property
    def static_range(self) -> float:
        """Largest |x / s| over all time steps: the range of `static`."""
        return float(self.step_ranges.amax())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedModel:
    """A model whose block linears are integers; unfolded."""

    identity: ModelIdentity  # of the float model that it was made from
    float_parameters: Mapping[str, Tensor]  # checkpoint name -> float32; what is not integer
    linears: Mapping[str, QuantizedLinear]  # module path -> linear, in walk order
    activation_bits: int  # 8, or 16 for float activations
    adaln: Mapping[str, WeightOnlyWeight] = field(default_factory=dict)  # module path -> integers
    settings: Mapping[str, Any] = field(default_factory=dict)  # what calibration was asked for
    provenance: Mapping[str, Any] = field(default_factory=dict)  # versions
    proofs: Mapping[str, Part] = field(default_factory=dict)  # what verification sampled of it

    def __post_init__(self) -> None:
        """Check that every linear and parameter is there, once, of the shape that the model asks.

        Raises:
            ArtifactError: names what is missing or does not fit.
        """
        expected = linear_names(self.config)
        if tuple(self.linears) != expected:
            odd = abbreviated(sorted(set(self.linears) ^ set(expected))) or "the order"
            raise ArtifactError(f"quantized linears do not match the model's sites: {odd}")
        if self.activation_bits not in (8, 16):
            raise ArtifactError(f"activation bits are 8 or 16, not {self.activation_bits}")
        if len({linear.weight.bits for linear in self.linears.values()}) > 1:
            raise ArtifactError("the quantized linears have weights of 4 and of 8 bits")
        if self.settings.get("ranges") not in get_args(Ranges):
            raise ArtifactError(
                f"the settings say ranges={self.settings.get('ranges')!r}, expected one of "
                f"{', '.join(get_args(Ranges))}"
            )
        names = tuple(family_of(self.config).modulations(self.config))
        if self.adaln and tuple(self.adaln) != names:
            raise ArtifactError(
                f"integer modulation weights are of all linears or none, not of "
                f"{abbreviated(list(self.adaln))}"
            )
        if len({weight.bits for weight in self.adaln.values()}) > 1:
            raise ArtifactError("the modulation weights have 4 and 8 bits")
        for name, shape in linear_shapes(self.config).items():
            _require_shapes(name, self.linears[name], shape)
        self._require_groups()
        self._require_parameters()
        self._require_settings()

    def _require_groups(self) -> None:
        """Check that linears that read one input have one smoothing scale."""
        for block in family_of(self.config).blocks(self.config):
            for group in block.groups():
                first, *others = (block.name(path) for path in group.linears)
                s = self.linears[first].smoothing_scale
                for name in others:
                    if not torch.equal(self.linears[name].smoothing_scale, s):
                        raise ArtifactError(f"{first} and {name} read one input, divided by two s")

    def _require_settings(self) -> None:
        """Check what is said of the calibration, where something is."""
        grid = self.settings.get("alpha_grid")
        if grid is not None and not _are_numbers(grid):
            raise ArtifactError(f"alpha_grid={shown(grid)}; expected numbers")
        found = self.settings.get("calibration")
        if found is None:
            return
        try:
            CalibrationSettings.from_dict(found).require_model(self.config)
        except (CheckpointError, CalibrationError) as error:
            raise ArtifactError(f"the settings of its calibration: {error}") from error

    def require_parameters_of(self, model: FamilyModel) -> None:
        """Refuse float parameters that are not those of the model that this was made from.

        Biases of integer modulation weights differ: they take up what rounding lost.

        Raises:
            ArtifactError: names them.
        """
        parameters = model.state_dict()
        odd = [
            name
            for name, tensor in self.float_parameters.items()
            if name.removesuffix(".bias") not in self.adaln
            and not torch.equal(tensor, parameters[name].cpu())
        ]
        if odd:
            raise ArtifactError(
                f"float parameters are not the model's own: {abbreviated(odd)}; the quantized "
                f"model was changed, calibrate again"
            )

    def _require_parameters(self) -> None:
        """Check what is not a quantized linear."""
        with torch.device("meta"):
            model = family_of(self.config).module(self.config)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        for name in self.linears:
            del shapes[f"{name}.weight"], shapes[f"{name}.bias"]
        for name, weight in self.adaln.items():
            shape = shapes.pop(f"{name}.weight")
            if weight.codes.shape != shape:
                raise ArtifactError(
                    f"{name} has codes {tuple(weight.codes.shape)}, expected {tuple(shape)}"
                )
        found = self.float_parameters
        if odd := sorted(shapes.keys() ^ found.keys()):
            raise ArtifactError(f"float parameters are missing or of no use: {abbreviated(odd)}")
        for name, shape in shapes.items():
            _require_float(name, found[name], tuple(shape))

    @property
    def config(self) -> ModelConfig:
        """What the model computes beside its tensors."""
        return self.identity.config

    @property
    def weight_bits(self) -> int:
        """Bits per code: 4 or 8."""
        return next(iter(self.linears.values())).weight.bits

    @property
    def adaln_bits(self) -> int:
        """Bits of the modulation weights: 8, 4, or 16 where they are float."""
        return next((weight.bits for weight in self.adaln.values()), 16)

    def save(self, path: StrPath) -> None:
        """Write one safetensors file, 4-bit codes packed two a byte; bit-exact on loading."""
        path = Path(path)
        tensors = {
            f"{FLOAT_PREFIX}{name}": tensor for name, tensor in self.float_parameters.items()
        }
        linears: dict[str, Any] = {}
        for name, linear in self.linears.items():
            parts, facts = linear_to_parts(linear)
            tensors.update({f"{name}.{key}": value for key, value in parts.items()})
            linears[name] = facts
        for name, weight in self.adaln.items():
            tensors[f"{name}.codes"] = pack_int4(weight.codes) if weight.bits == 4 else weight.codes
            tensors[f"{name}.scale"] = weight.scale
        for name, part in self.proofs.items():
            tensors |= {f"{PROOF}{name}/{key}": value for key, value in part.tensors.items()}
        header = {
            "family": family_of(self.config).name,
            "identity": self.identity.to_dict(),
            "linears": linears,
            "activation_bits": self.activation_bits,
            "adaln_bits": self.adaln_bits,
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
            "proofs": {name: dict(part.facts) for name, part in self.proofs.items()},
        }
        save_tensors(path, tensors, file_format=ARTIFACT_FORMAT, header=header)

    @classmethod
    def load(cls, path: StrPath, *, model: ModelIdentity | None = None) -> QuantizedModel:
        """Read an artefact.

        Args:
            path: the file.
            model: the float model that it must be of; one of an earlier format, which records
                tensors and shape but not the process, needs it, and takes the process from it.

        Raises:
            ArtifactError: another kind of file, a damaged one, an artefact of another model, or one
                of an earlier format without a model.
        """
        path = Path(path)
        tensors, header = load_tensors(path, file_format=ARTIFACT_FORMAT, earlier=EARLIER_FORMAT)
        try:
            stated = artifact_header(header)
            identity = _identity(path, stated, model)
            wanted = wanted_tensors(identity.config, stated.linears, stated.adaln_bits)
            kept = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PROOF)}
            require_fits(tensors, wanted, error=ArtifactError)
            return cls(
                identity=identity,
                float_parameters={
                    name.removeprefix(FLOAT_PREFIX): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(FLOAT_PREFIX)
                },
                linears={
                    name: linear_from_parts(name, tensors, stated.linears[name])
                    for name in linear_names(identity.config)
                },
                activation_bits=stated.activation_bits,
                adaln=_adaln_from_parts(tensors, identity.config, stated.adaln_bits),
                settings=stated.settings,
                provenance=stated.provenance,
                proofs=_proofs(kept, stated.proofs),
            )
        except OtherModelError:
            raise
        except (ArtifactError, CheckpointError, QuantizationError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; calibrate again") from error


def _identity(path: Path, stated: ArtifactHeader, model: ModelIdentity | None) -> ModelIdentity:
    """Return whose artefact this is, refusing that of another model."""
    remedy = "Pass its own model with --model"
    if stated.identity is not None:
        if (family := family_of(stated.identity.config).name) != stated.family:
            raise ArtifactError(f"its family is {stated.family}, its model is a {family}")
        if model is not None:
            stated.identity.require_same(model, what=str(path), remedy=remedy)
        return stated.identity
    if model is None:
        raise OtherModelError(
            f"{path} is of an earlier format, which does not record all of its model; export it "
            f"with --model and --save-artifact, which writes it anew"
        )
    earlier = stated.config or {}
    recorded = {
        "tensors_sha256": stated.provenance.get("checkpoint_sha256"),
        "config": dict(earlier),
    }
    config = model.config.to_dict()
    known = {
        "tensors_sha256": model.tensors_sha256,
        "config": {name: config.get(name) for name in earlier},
    }
    if odd := differences(recorded, known):
        raise OtherModelError(f"{path} was made from another model: {'; '.join(odd)}. {remedy}")
    return model


def _require_shapes(name: str, linear: QuantizedLinear, shape: tuple[int, int]) -> None:
    """Refuse a linear whose tensors are not of the model's shape, or of another type or range."""
    rows, columns = shape
    if tuple(linear.weight.codes.shape) != (rows, columns):
        raise ArtifactError(
            f"{name} has codes {tuple(linear.weight.codes.shape)}, expected {(rows, columns)}"
        )
    branch = linear.low_rank
    if branch is not None:
        found = (branch.left_codes.shape[0], branch.right_codes.shape[1])
        if found != (rows, columns):
            raise ArtifactError(f"{name} has a low-rank branch {found}, expected {(rows, columns)}")
    _require_float(f"{name} bias", linear.bias, (rows,))
    _require_float(f"{name} smoothing scale", linear.smoothing_scale, (columns,))
    if not bool((linear.smoothing_scale > 0).all()):
        raise ArtifactError(f"{name} has a smoothing scale that is not positive")
    steps = linear.step_ranges
    _require_float(f"{name} row scales", linear.weight.row_scale, (rows,))
    _require_float(f"{name} step ranges", steps, (steps.numel(),))
    if linear.alpha is not None and not _are_numbers([linear.alpha]):
        raise ArtifactError(f"{name} has alpha={str(linear.alpha)[:40]}, expected a number")
    if not steps.numel() or bool((steps < 0).any()):
        raise ArtifactError(f"{name} has step ranges that are none or negative")


def _require_float(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that is not float32, finite and of a shape."""
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ArtifactError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} torch.float32"
        )
    if not bool(tensor.isfinite().all()):
        raise ArtifactError(f"{name} has NaN or infinity")


def _are_numbers(values: Any) -> bool:
    """Return whether these are finite numbers, one at least."""
    return (
        isinstance(values, list | tuple)
        and bool(values)
        and all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in values
        )
    )


def _proofs(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Part]:
    """Rebuild what verification sampled; whoever takes a part checks its shapes."""
    proofs: dict[str, dict[str, Tensor]] = {name: {} for name in facts}
    for path, tensor in tensors.items():
        name, _, key = path.removeprefix(PROOF).rpartition("/")
        if name not in proofs:
            raise ArtifactError(f"it holds tensors of no use: {abbreviated([path])}")
        proofs[name][key] = tensor
    return {name: Part(tensors=found, facts=dict(facts[name])) for name, found in proofs.items()}


def linear_to_parts(linear: QuantizedLinear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a linear into tensors and plain facts."""
    weight = linear.weight
    tensors = {
        "codes": pack_int4(weight.codes) if weight.bits == 4 else weight.codes,
        "multipliers": weight.multipliers,
        "row_scale": weight.row_scale,
        "bias": linear.bias,
        "smoothing_scale": linear.smoothing_scale,
        "step_ranges": linear.step_ranges,
    }
    if linear.low_rank is not None:
        tensors["low_rank.left_codes"] = linear.low_rank.left_codes
        tensors["low_rank.right_codes"] = linear.low_rank.right_codes
        tensors["low_rank.divisor"] = linear.low_rank.divisor
    facts = {
        "bits": weight.bits,
        "shape": list(weight.codes.shape),
        "alpha": linear.alpha,
        "output_snr_db": json_number(linear.output_snr_db),
        "rank": linear.low_rank.rank if linear.low_rank else 0,
    }
    return tensors, facts


def linear_from_parts(
    name: str, tensors: Mapping[str, Tensor], facts: LinearFacts
) -> QuantizedLinear:
    """Rebuild the linear `name` from tensors that fit its facts; see `wanted_of_linear`."""
    codes = tensors[f"{name}.codes"]
    if facts.bits == 4:
        codes = unpack_int4(codes, (facts.shape[0], facts.shape[1]))
    low_rank = None
    if facts.rank:
        low_rank = LowRank(
            left_codes=tensors[f"{name}.low_rank.left_codes"],
            right_codes=tensors[f"{name}.low_rank.right_codes"],
            divisor=tensors[f"{name}.low_rank.divisor"],
        )
    return QuantizedLinear(
        weight=IntegerWeight(
            codes=codes,
            multipliers=tensors[f"{name}.multipliers"],
            row_scale=tensors[f"{name}.row_scale"],
            bits=facts.bits,
        ),
        low_rank=low_rank,
        bias=tensors[f"{name}.bias"],
        smoothing_scale=tensors[f"{name}.smoothing_scale"],
        alpha=facts.alpha,
        step_ranges=tensors[f"{name}.step_ranges"],
        output_snr_db=float(facts.output_snr_db),
    )


def _adaln_from_parts(
    tensors: Mapping[str, Tensor], config: ModelConfig, bits: int
) -> dict[str, WeightOnlyWeight]:
    """Rebuild the integer modulation weights from a file's tensors; none of them for 16 bits."""
    weights: dict[str, WeightOnlyWeight] = {}
    for name in family_of(config).modulations(config) if bits != 16 else ():
        codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        if bits == 4:
            codes = unpack_int4(codes, (scale.shape[0], config.hidden_size))
        weights[name] = WeightOnlyWeight(codes=codes, scale=scale, bits=bits)
    return weights
