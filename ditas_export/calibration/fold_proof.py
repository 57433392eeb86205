"""The proof that folding changed nothing: every block in float64, with and without its smoothing.

No figure in decibels shows a smoothing that was folded wrong in one place: with INT8 activations it
may cost less than the rounding. In float64, without any rounding, the two functions are the same to
1e-15 or they are not the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.fold import ExactBlock, fold_block, plain_modulation
from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.errors import QuantizationError
from ditas_export.families.base import Block, Rows, State
from ditas_export.families.registry import family_of
from ditas_export.figures import finite_or_none

BOUND = 1e-10
"""Largest relative error of a proof. Float64 leaves 1e-15, and what cancels a few digits of it."""

ROWS, TOKENS = 2, 8
"""Of what a block is fed: random, for the identity holds for every input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldProof:
    """How far a folded model is from the unfolded one, in float64."""

    relative_error: float  # the largest, of any linear's output
    where: str  # module path of that linear

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "relative_error": finite_or_none(self.relative_error),
            "where": self.where,
            "bound": BOUND,
        }


def prove_model(
    quantized: QuantizedModel,
    dtype: torch.dtype = torch.float32,
    *,
    on_block: Callable[[int, int], None] = lambda *_: None,
) -> FoldProof:
    """Hold every folded linear's output against the unfolded model's, block by block.

    A block's linears are multiplied out without activation bits: y = (x / s)(W s)ᵀ + b against
    what folding made of it. Memory is that of one block in float64, twice.

    Args:
        quantized: what is folded.
        dtype: float type that it is folded for.
        on_block: called with (blocks done, in all).

    Raises:
        QuantizationError: a linear's output differs by more than `BOUND`; names the first.
    """
    worst = FoldProof(relative_error=0.0, where="")
    for where, relative in fold_errors(quantized, dtype, on_block=on_block):
        if not relative <= BOUND:
            raise QuantizationError(
                f"folding changed what the model computes: {where} differs by {relative:.1e} in "
                f"float64, where {BOUND:.0e} is allowed. This is a bug, nothing was written; "
                f"please report it with the command"
            )
        if relative > worst.relative_error:
            worst = FoldProof(relative_error=relative, where=where)
    return worst


def fold_errors(
    quantized: QuantizedModel,
    dtype: torch.dtype,
    *,
    on_block: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[str, float]]:
    """Yield every linear that folding reaches, and the relative error of what it gives.

    Modulations outside the blocks come last; arguments as `prove_model`'s.
    """
    generator = torch.Generator().manual_seed(0)
    config = quantized.config
    family = family_of(config)
    blocks = family.blocks(config)
    left = dict.fromkeys(family.modulations(config))
    with torch.device("meta"):
        unfolded, folded = (family.module(config, folded=folded) for folded in (False, True))
    for index, block in enumerate(blocks):
        state, constants = (
            {
                name: torch.randn(shape, generator=generator, dtype=torch.float64)
                for name, shape in shapes.items()
            }
            for shapes in family.shapes(config, ROWS, TOKENS)
        )
        exact = fold_block(quantized, block, dtype)
        for name in exact.modulations:
            del left[name]
        wanted = _outputs(
            unfolded,
            block,
            _unfolded_linears(quantized, block, exact),
            quantized.float_parameters,
            state,
            constants,
        )
        found = _outputs(
            folded,
            block,
            _folded_linears(quantized, exact),
            {**quantized.float_parameters, **exact.parameters},
            state,
            constants,
        )
        for name, output in wanted.items():
            yield name, relative_error(output, found[name])
        on_block(index + 1, len(blocks))
    for name in left:
        yield name, relative_error(*_plain_outputs(quantized, name, generator))


def relative_error(wanted: Tensor, found: Tensor) -> float:
    """Return how far a tensor is from what it should be, in the norm; NaN where it is none."""
    error = float((found - wanted).norm())
    return error / float(wanted.norm()) if error else 0.0


class _Linear(nn.Module):
    """y = (x m) Wᵀ + b in float64."""

    def __init__(self, weight: Tensor, bias: Tensor, multiplier: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.multiplier = weight, bias.double(), multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; x (…, K), the result (…, N)."""
        if self.multiplier is not None:
            x = x * self.multiplier
        return functional.linear(x, self.weight, self.bias)


def _matrix(linear: QuantizedLinear) -> Tensor:
    """Return a linear's weight, branch included, (N, K) float64."""
    weight = linear.weight.to(torch.float64)
    matrix = weight.dequantize()
    if linear.low_rank is not None:
        matrix += linear.low_rank.dequantize(weight.row_scale)
    return matrix


def _unfolded_linears(
    quantized: QuantizedModel, block: Block, exact: ExactBlock
) -> dict[str, nn.Module]:
    """Return a block's linears as they were quantized: every input divided by its s."""
    linears: dict[str, nn.Module] = {}
    for name in block.linears:
        linear = quantized.linears[name]
        s = linear.smoothing_scale.double()
        linears[name] = _Linear(_matrix(linear), linear.bias, s.reciprocal())
    for name in exact.modulations:
        bias = quantized.float_parameters[f"{name}.bias"]
        linears[name] = _Linear(_modulation(quantized, name), bias)
    return linears


def _folded_linears(quantized: QuantizedModel, exact: ExactBlock) -> dict[str, nn.Module]:
    """Return a block's linears as they ship, but for rounding."""
    linears: dict[str, nn.Module] = {
        name: _Linear(_matrix(linear), linear.bias, exact.multipliers.get(name))
        for name, linear in exact.linears.items()
    }
    for name, modulation in exact.modulations.items():
        weight = _modulation(quantized, name) / modulation.divisor[:, None]
        linears[name] = _Linear(weight, modulation.bias)
    return linears


def _modulation(quantized: QuantizedModel, name: str) -> Tensor:
    """Return a modulation linear's weight, (N, K) float64."""
    if name in quantized.adaln:
        weight = quantized.adaln[name]
        return replace(weight, scale=weight.scale.double()).dequantize()
    return quantized.float_parameters[f"{name}.weight"].double()


def _outputs(
    model: nn.Module,
    block: Block,
    linears: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
    state: State,
    constants: State,
) -> dict[str, Tensor]:
    """Return what every quantized linear of a block gives, by module path; `model` is on no device.

    Of `parameters` those of the block are used that are no linear's: tables and norms.

    Rows into which smoothing folds are left out: they are meant to differ, by an s that its reader
    shows.
    """
    folded: dict[str, list[slice]] = {}
    for fold in (fold for group in block.groups() for fold in group.folds):
        if isinstance(fold, Rows):
            folded.setdefault(block.name(fold.linear), []).append(fold.rows)
    found: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():
            model.set_submodule(name, linear)
            stack.callback(model.set_submodule, name, nn.Identity())  # its memory is given back
            if name in block.linears:

                def keep(_module: nn.Module, _x: Any, y: Tensor, name: str = name) -> None:
                    kept = torch.ones(y.shape[-1], dtype=torch.bool)
                    for rows in folded.get(name, ()):
                        kept[rows] = False
                    found[name] = y[..., kept]

                linear.register_forward_hook(keep)
        module = model.get_submodule(block.path)
        for name in [name for name, _ in module.named_parameters()]:
            _lend(stack, module, name, parameters[block.name(name)].double())
        for stage in block.stages:
            state = stage.run(module, state, constants)
    return found


def _lend(stack: ExitStack, module: nn.Module, path: str, value: Tensor) -> None:
    """Put a value in the place of a parameter until the stack is left."""
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    before = getattr(holder, name)
    setattr(holder, name, nn.Parameter(value, requires_grad=False))
    stack.callback(setattr, holder, name, before)


def _plain_outputs(
    quantized: QuantizedModel, name: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what a modulation linear that takes no smoothing gives, unfolded and folded.

    Each with its scales as factors: 1 + scale.
    """
    weight = _modulation(quantized, name)
    x = torch.randn(ROWS, weight.shape[1], generator=generator, dtype=torch.float64)
    wanted = functional.linear(x, weight, quantized.float_parameters[f"{name}.bias"].double())
    for rows in family_of(quantized.config).modulations(quantized.config)[name]:
        wanted[:, rows] += 1
    return wanted, functional.linear(x, weight, plain_modulation(quantized, name).bias)
