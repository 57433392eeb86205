"""The quantized model as an artefact: everything that the exporter needs, in one file.

Nothing here is folded: `s` of every linear is kept, the float parameters are the checkpoint's, and
so are the modulation weights, as floats or as the integers nearest to them.
`fold.py` turns it into what ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.dit.model import DiTConfig
from ditas_export.dit.sites import adaln_names, linear_sites
from ditas_export.errors import ArtifactError, QuantizationError
from ditas_export.quantization.integer import IntegerWeight, LowRank, pack_int4, unpack_int4
from ditas_export.quantization.weight_only import WeightOnlyWeight

ARTIFACT_KIND = "ditas-export quantized DiT"
ARTIFACT_FORMAT = f"{ARTIFACT_KIND} 2"


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
class QuantizedDiT:
    """A DiT whose block linears are integers; unfolded."""

    config: DiTConfig
    float_parameters: Mapping[str, Tensor]  # checkpoint name -> float32; what is not integer
    linears: Mapping[str, QuantizedLinear]  # module path -> linear, in walk order
    activation_bits: int  # 8, or 16 for float activations
    adaln: Mapping[str, WeightOnlyWeight] = field(default_factory=dict)  # module path -> integers
    settings: Mapping[str, Any] = field(default_factory=dict)  # what calibration was asked for
    provenance: Mapping[str, Any] = field(default_factory=dict)  # hashes and versions

    def __post_init__(self) -> None:
        """Check that every site is there, once, in order."""
        expected = [site.name for site in linear_sites(self.config.depth)]
        if list(self.linears) != expected:
            odd = sorted(set(self.linears) ^ set(expected)) or "the order"
            raise ArtifactError(f"quantized linears do not match the model's sites: {odd}")
        if self.activation_bits not in (8, 16):
            raise ArtifactError(f"activation bits are 8 or 16, not {self.activation_bits}")
        if self.adaln and tuple(self.adaln) != adaln_names(self.config.depth):
            raise ArtifactError(
                f"integer modulation weights are of all linears or none, not of {list(self.adaln)}"
            )

    @property
    def weight_bits(self) -> int:
        """Bits per code: 4 or 8."""
        return next(iter(self.linears.values())).weight.bits

    @property
    def adaln_bits(self) -> int:
        """Bits of the modulation weights: 8, 4, or 16 where they are float."""
        return next((weight.bits for weight in self.adaln.values()), 16)

    def save(self, path: Path) -> None:
        """Write one safetensors file, 4-bit codes packed two a byte; bit-exact on loading."""
        tensors = {f"float.{name}": tensor for name, tensor in self.float_parameters.items()}
        linears: dict[str, Any] = {}
        for name, linear in self.linears.items():
            parts, facts = linear_to_parts(linear)
            tensors.update({f"{name}.{key}": value for key, value in parts.items()})
            linears[name] = facts
        for name, weight in self.adaln.items():
            tensors[f"{name}.codes"] = pack_int4(weight.codes) if weight.bits == 4 else weight.codes
            tensors[f"{name}.scale"] = weight.scale
        header = {
            "config": self.config.to_dict(),
            "linears": linears,
            "activation_bits": self.activation_bits,
            "adaln_bits": self.adaln_bits,
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
        }
        save_tensors(path, tensors, file_format=ARTIFACT_FORMAT, header=header)

    @classmethod
    def load(cls, path: Path) -> QuantizedDiT:
        """Read an artefact; ArtifactError on any other file."""
        tensors, header = load_tensors(path, file_format=ARTIFACT_FORMAT)
        try:
            config = DiTConfig(**header["config"])
            linears = {
                site.name: linear_from_parts(site.name, tensors, header["linears"][site.name])
                for site in linear_sites(config.depth)
            }
            adaln = _adaln_from_parts(tensors, config, header.get("adaln_bits", 16))
        except (KeyError, TypeError, RuntimeError, QuantizationError) as error:
            raise ArtifactError(f"{path} is damaged: {error!r}; calibrate again") from error
        prefix = "float."
        return cls(
            config=config,
            float_parameters={
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            },
            linears=linears,
            activation_bits=header["activation_bits"],
            adaln=adaln,
            settings=header["settings"],
            provenance=header["provenance"],
        )


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
        "output_snr_db": linear.output_snr_db,
        "rank": linear.low_rank.rank if linear.low_rank else 0,
    }
    return tensors, facts


def linear_from_parts(
    name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> QuantizedLinear:
    """Rebuild the linear `name` from a file's tensors and facts."""
    codes = tensors[f"{name}.codes"]
    if facts["bits"] == 4:
        codes = unpack_int4(codes, tuple(facts["shape"]))
    low_rank = None
    if facts["rank"]:
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
            bits=facts["bits"],
        ),
        low_rank=low_rank,
        bias=tensors[f"{name}.bias"],
        smoothing_scale=tensors[f"{name}.smoothing_scale"],
        alpha=facts["alpha"],
        step_ranges=tensors[f"{name}.step_ranges"],
        output_snr_db=facts["output_snr_db"],
    )


def _adaln_from_parts(
    tensors: Mapping[str, Tensor], config: DiTConfig, bits: int
) -> dict[str, WeightOnlyWeight]:
    """Rebuild the integer modulation weights from a file's tensors; none of them for 16 bits."""
    weights: dict[str, WeightOnlyWeight] = {}
    for name in adaln_names(config.depth) if bits != 16 else ():
        codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        if bits == 4:
            codes = unpack_int4(codes, (scale.shape[0], config.hidden_size))
        weights[name] = WeightOnlyWeight(codes=codes, scale=scale, bits=bits)
    return weights
