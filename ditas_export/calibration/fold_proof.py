"""The proof that folding changed nothing: every block in float64, with and without its smoothing.

No figure in decibels shows a smoothing that was folded wrong in one place: with INT8 activations it
may cost less than the rounding. In float64, without any rounding, the two functions are the same to
1e-15 or they are not the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.fold import final_modulation, fold_block
from ditas_export.calibration.quantized_dit import QuantizedDiT, QuantizedLinear
from ditas_export.dit.model import DiTBlock, Modulate, modulate, modulate_by_factor
from ditas_export.dit.sites import FINAL_ADALN, adaln_name, value_rows
from ditas_export.errors import QuantizationError
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


def prove_folds(
    quantized: QuantizedDiT,
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
    generator = torch.Generator().manual_seed(0)
    config, worst = quantized.config, FoldProof(relative_error=0.0, where="")
    shape = (ROWS, TOKENS, config.hidden_size)
    for block in range(config.depth):
        hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
        c = torch.randn(shape[0], shape[2], generator=generator, dtype=torch.float64)
        unfolded = _outputs(_unfolded_block(quantized, block), hidden, c)
        folded = _outputs(_folded_block(quantized, block, dtype), hidden, c)
        for name, wanted in unfolded.items():
            worst = _worse(worst, f"blocks.{block}.{name}", wanted, folded[name])
        on_block(block + 1, config.depth)
    c = torch.randn(shape[0], shape[2], generator=generator, dtype=torch.float64)
    return _worse(worst, FINAL_ADALN, *_final_factors(quantized, c))


def _worse(worst: FoldProof, where: str, wanted: Tensor, found: Tensor) -> FoldProof:
    """Return the finding of the larger error; refuse one beyond the bound, or not a number."""
    error = float((found - wanted).norm())
    relative = error / float(wanted.norm()) if error else 0.0
    if not relative <= BOUND:
        raise QuantizationError(
            f"folding changed what the model computes: {where} differs by {relative:.1e} in "
            f"float64, where {BOUND:.0e} is allowed. This is a bug, nothing was written; please "
            f"report it with the command"
        )
    if relative <= worst.relative_error:
        return worst
    return FoldProof(relative_error=relative, where=where)


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


def _block(
    quantized: QuantizedDiT, linears: Mapping[str, nn.Module], modulate: Modulate
) -> DiTBlock:
    """Return a block of the model's shape with other linears; module path in it -> linear."""
    with torch.device("meta"):
        block = DiTBlock(quantized.config, modulate)
    for path, linear in linears.items():
        block.set_submodule(path, linear)
    return block


def _unfolded_block(quantized: QuantizedDiT, block: int) -> DiTBlock:
    """Return a block as it was quantized: every input divided by its s."""
    prefix, name = f"blocks.{block}.", adaln_name(block)
    linears: dict[str, nn.Module] = {
        path.removeprefix(prefix): _Linear(
            _matrix(linear), linear.bias, linear.smoothing_scale.double().reciprocal()
        )
        for path, linear in quantized.linears.items()
        if path.startswith(prefix)
    }
    weight = _modulation(quantized, name)
    bias = quantized.float_parameters[f"{name}.bias"]
    linears[name.removeprefix(prefix)] = _Linear(weight, bias)
    return _block(quantized, linears, modulate)


def _folded_block(quantized: QuantizedDiT, block: int, dtype: torch.dtype) -> DiTBlock:
    """Return a block as it ships, but for rounding."""
    prefix, name = f"blocks.{block}.", adaln_name(block)
    exact = fold_block(quantized, block, dtype)
    linears: dict[str, nn.Module] = {
        path.removeprefix(prefix): _Linear(
            _matrix(linear), linear.bias, exact.multipliers.get(path)
        )
        for path, linear in exact.linears.items()
    }
    weight = _modulation(quantized, name) / exact.divisor[:, None]
    linears[name.removeprefix(prefix)] = _Linear(weight, exact.bias)
    return _block(quantized, linears, modulate_by_factor)


def _modulation(quantized: QuantizedDiT, name: str) -> Tensor:
    """Return a modulation linear's weight, (N, K) float64."""
    if name in quantized.adaln:
        weight = quantized.adaln[name]
        return replace(weight, scale=weight.scale.double()).dequantize()
    return quantized.float_parameters[f"{name}.weight"].double()


def _outputs(block: DiTBlock, hidden: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Return what every linear of a block but the modulation gives; module path in it -> output.

    Of qkv q and k alone: V is meant to differ, by the s of proj, which proj shows.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for path, module in block.named_modules():
            if isinstance(module, _Linear) and not path.startswith("adaLN_modulation"):

                def keep(_module: nn.Module, _x: Any, y: Tensor, path: str = path) -> None:
                    kept = value_rows(y.shape[-1] // 3).start if path == "attn.qkv" else None
                    found[path] = y[..., :kept]

                handle = module.register_forward_hook(keep)
                stack.callback(handle.remove)
        block(hidden, c)
    return found


def _final_factors(quantized: QuantizedDiT, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 + scale and shift of the last norm, unfolded and folded, (rows, 2D) each."""
    weight = _modulation(quantized, FINAL_ADALN)
    bias = quantized.float_parameters[f"{FINAL_ADALN}.bias"].double()
    wanted = functional.linear(functional.silu(c), weight, bias)
    wanted[:, quantized.config.hidden_size :] += 1
    return wanted, functional.linear(functional.silu(c), weight, final_modulation(quantized))
