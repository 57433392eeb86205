"""The proof that a family's tables are right: random smoothing, folded, in float64.

It is for whoever writes a family, and asks no checkpoint and no calibration: weights of any values
will do. Three things are held against each other: the model's own forward, the stages that the walk
runs, and the model that folding leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditas_export.calibration.fold import FoldedLinear, fold_smoothing
from ditas_export.calibration.fold_proof import BOUND, fold_errors, relative_error
from ditas_export.calibration.modules import FakeQuantLinear, model_of_linears
from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.errors import QuantizationError
from ditas_export.families import registry
from ditas_export.families.base import AnyFamily, Block, FamilyModel, ModelInputs
from ditas_export.families.identity import identity_of
from ditas_export.quantization.integer import round_to_rows

ROWS, TOKENS = 2, 5
"""Rows of the inputs, and the size of their first dynamic dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyProof:
    """Relative errors in float64; 1e-12 is far above what rounding leaves."""

    groups: Mapping[str, float]
    """Largest error of a group's linears through folding, by their module paths in the model,
    "a.to_q, a.to_k"."""
    stages: float  # of the blocks' linears run by the stages, against the model's own forward
    output: float  # of the folded model's output, against the unfolded one's

    def require(self, bound: float) -> None:
        """Refuse errors beyond a bound.

        Raises:
            QuantizationError: names each, and its size.
        """
        errors = {
            **{f"the folds of {names}": error for names, error in self.groups.items()},
            "the stages, against the model's forward": self.stages,
            "the folded model's output": self.output,
        }
        odd = [f"{what}: {error:.1e}" for what, error in errors.items() if not error <= bound]
        if odd:
            raise QuantizationError(
                f"the tables change what the model computes, by more than {bound:.0e} in float64: "
                f"{'; '.join(odd)}. Correct the folds or the stages that are named"
            )


def prove_folds(
    family: AnyFamily, model: FamilyModel, *, bound: float = BOUND, seed: int = 0
) -> FamilyProof:
    """Prove a family's tables on a model of it, whose weights may be random.

    Every group's s is e^N(0,1), drawn anew. The linears are W·s rounded to eight bits: what is
    rounded is the same before and after folding.

    Args:
        family: need not be registered.
        model: float32, on the CPU, small: it is held four times in float64; left untouched.
        bound: largest relative error.
        seed: of smoothing and inputs.

    Raises:
        QuantizationError: an error beyond the bound; names every group, the stages or the output.
    """
    generator = torch.Generator().manual_seed(seed)
    with _registered(family):
        blocks = family.blocks(model.config)
        quantized = _randomly_smoothed(model, blocks, generator)
        errors = dict(fold_errors(quantized, torch.float64))
        inputs = _random_inputs(family, model, generator)
        unfolded = _unfolded(quantized, family)
        wanted = _through_forward(unfolded, blocks, inputs)
        found = _through_stages(family, unfolded, blocks, inputs)
        folded = model_of_linears(
            fold_smoothing(quantized, dtype=torch.float64),
            lambda linear: _in_float64(linear),
        ).double()
        with torch.no_grad():
            outputs = [each(**inputs) for each in (unfolded, folded)]
    proof = FamilyProof(
        groups={
            ", ".join(names): max(errors[name] for name in names)
            for names in (
                tuple(map(block.name, group.linears))
                for block in blocks
                for group in block.groups()
            )
        },
        stages=max(relative_error(wanted[name], found[name]) for name in wanted),
        output=relative_error(*outputs),
    )
    proof.require(bound)
    return proof


@contextmanager
def _registered(family: AnyFamily) -> Iterator[None]:
    """Put a family before all others for a while."""
    registry.FAMILIES.insert(0, family)
    try:
        yield
    finally:
        registry.FAMILIES.remove(family)


def _randomly_smoothed(
    model: FamilyModel, blocks: tuple[Block, ...], generator: torch.Generator
) -> QuantizedModel:
    """Return a model whose groups have random s, and nearest codes of W·s."""
    parameters = model.state_dict()
    linears: dict[str, QuantizedLinear] = {}
    for block in blocks:
        for group in block.groups():
            s: Tensor | None = None
            for name in map(block.name, group.linears):
                weight = parameters.pop(f"{name}.weight")
                if s is None:
                    s = torch.randn(weight.shape[1], generator=generator).exp()
                linears[name] = QuantizedLinear(
                    weight=round_to_rows(weight * s),
                    low_rank=None,
                    bias=parameters.pop(f"{name}.bias"),
                    smoothing_scale=s,
                    alpha=None,
                    step_ranges=torch.ones(1),
                    output_snr_db=float("nan"),
                )
    return QuantizedModel(
        identity=identity_of(model),
        float_parameters=parameters,
        linears=linears,
        activation_bits=16,
        settings={"ranges": "token"},
    )


def _random_inputs(
    family: AnyFamily, model: FamilyModel, generator: torch.Generator
) -> ModelInputs:
    """Return inputs of a model: floats at random, whole numbers within their bounds."""
    inputs = family.inputs(model.config)
    names = sorted({size for each in inputs for size in each.shape if isinstance(size, str)})
    sizes = {name: TOKENS + index for index, name in enumerate(names)}
    drawn: dict[str, Tensor] = {}
    for each in inputs:
        shape = (ROWS, *(sizes[size] if isinstance(size, str) else size for size in each.shape))
        first, last = (each.bounds.first, each.bounds.last) if each.bounds else (0, 1)
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        if each.dtype.is_floating_point:
            is_free = each.bounds is None
            normal = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn[each.name] = normal if is_free else first + values * (last - first)
        else:
            drawn[each.name] = (first + values * (last - first)).round().to(each.dtype)
    return ModelInputs(drawn)


def _unfolded(quantized: QuantizedModel, family: AnyFamily) -> FamilyModel:
    """Return the model before folding in float64, every linear's weight what the codes say."""
    with torch.device("meta"):
        model: FamilyModel = family.module(quantized.config)
    state = dict(quantized.float_parameters)
    for name, linear in quantized.linears.items():
        weight = linear.weight.to(torch.float64).dequantize()
        state[f"{name}.weight"] = weight / linear.smoothing_scale.double()
        state[f"{name}.bias"] = linear.bias
    model.load_state_dict(state, assign=True)
    return model.double().eval().requires_grad_(requires_grad=False)


def _in_float64(linear: FoldedLinear) -> nn.Module:
    """Return a folded linear without activation bits, its numbers float64."""
    return FakeQuantLinear(linear, ranges="token", activation_bits=16)


def _through_forward(
    model: FamilyModel, blocks: tuple[Block, ...], inputs: ModelInputs
) -> dict[str, Tensor]:
    """Return what the blocks' linears give in the model's own forward."""
    with _kept(model, blocks) as kept, torch.no_grad():
        model(**inputs)
    return kept


def _through_stages(
    family: AnyFamily, model: FamilyModel, blocks: tuple[Block, ...], inputs: ModelInputs
) -> dict[str, Tensor]:
    """Return what the blocks' linears give in the stages."""
    with _kept(model, blocks) as kept, torch.no_grad():
        state, constants = family.enter(model, inputs)
        for block in blocks:
            module = model.get_submodule(block.path)
            for stage in block.stages:
                state = stage.run(module, state, constants)
    return kept


@contextmanager
def _kept(model: FamilyModel, blocks: tuple[Block, ...]) -> Iterator[dict[str, Tensor]]:
    """Yield what the blocks' linears give while the model runs, by module path."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, _x: Any, y: Tensor) -> None:
            kept[name] = y

        return keep

    handles = [
        model.get_submodule(name).register_forward_hook(keeper(name))
        for block in blocks
        for name in block.linears
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
