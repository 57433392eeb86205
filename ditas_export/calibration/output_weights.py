"""What an error of each output channel of a linear counts downstream, for any block.

To first order an error e of a linear's output moves the block's output by J e. Its expected square
for random errors of one channel is the squared norm of J's column, which one backward pass of
random signs estimates at every token: E[(Jᵀ r)²] (Hutchinson 1990). Rescaling two sides of a
channel against each other, as planted or natural outliers do, then changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ditas_export.calibration.row_shares import Share, row_batches
from ditas_export.families.base import Block, State

SAMPLED_TOKENS = 4096
"""Tokens that the weights are taken on, in whole rows evenly spread over all ranks'. A batch
of them goes through the block at a time, 1024 tokens or a row: what the backward pass keeps of 1024
tokens of width 1152 is about 160 MiB."""

LEAST = 1e-6
"""Of a channel's weight, relative to all channels'."""


def output_weights(
    module: nn.Module,
    block: Block,
    floats: State,
    constants: State,
    share: Share,
    *,
    masks: State | None = None,
) -> dict[str, Tensor]:
    """Return the weights of every quantized linear of a block by module path, alike on all ranks.

    Args:
        module: the block of the float model.
        block: its table.
        floats: this rank's rows of what passes into it.
        constants: this rank's rows of the constants.
        share: which rows they are.
        masks: the masks that groups name, (rows of all ranks, tokens) each: what is padding counts
            nothing. None where no group names one.

    Returns:
        (N,) float32 each, on the rows' device: root mean squares over tokens, `levelled`.
    """
    sums: dict[str, Tensor] = {}
    of_path = {path: group.mask for group in block.groups() for path in group.linears}
    passed_on = next(reversed(of_path.values()), None)  # what the last linears give is added to it
    rows = sampled_rows(share, next(iter(floats.values())).shape[1])
    for batch in row_batches(len(rows), next(iter(floats.values())).shape[1]):
        chosen = rows[batch]
        local = torch.tensor([row - share.rows.start for row in chosen])
        real = {name: mask[chosen] != 0 for name, mask in (masks or {}).items()}
        counted = None if passed_on is None else real[passed_on]
        for path, gradient in _gradients(
            module, block, floats, constants, local, chosen, counted
        ).items():
            name = of_path[path]
            kept = gradient if name is None else gradient[real[name]]
            squares = kept.flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
            sums[path] = sums[path] + squares if path in sums else squares
    found: dict[str, Tensor] = {}
    for group in block.groups():
        for path in group.linears:
            linear = module.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            squares = sums.get(path, linear.bias.new_zeros(linear.out_features).double())
            weights = share.ranks.sum_(squares).sqrt()
            found[block.name(path)] = levelled(weights, group.stacked).float()
    return found


def levelled(weights: Tensor, stacked: int) -> Tensor:
    """Return weights (N,) whose mean square is 1 in each of the linears that are stacked.

    q, k and v of one weight so count as three linears would. On one scale, which the first order
    gives, final latents under planted outliers were 1.1 to 1.7 dB worse (docs/quality.md).
    """
    parts = weights.chunk(stacked)
    typical = [part.square().mean().sqrt() for part in parts]
    level = [
        part / size if float(size) > 0 else torch.ones_like(part)
        for part, size in zip(parts, typical, strict=True)
    ]
    return torch.cat(level).clamp(min=LEAST)


def sampled_rows(share: Share, row_tokens: int) -> list[int]:
    """Return which rows of this rank's share are sampled: the same of all rows for any ranks."""
    stride = -(-share.total // max(1, SAMPLED_TOKENS // row_tokens))
    mine = range(share.rows.start, share.rows.stop)
    return [row for row in range(0, share.total, stride) if row in mine]


def _gradients(
    module: nn.Module,
    block: Block,
    floats: State,
    constants: State,
    local: Tensor,
    rows: list[int],
    counted: Tensor | None,
) -> Mapping[str, Tensor]:
    """Return Jᵀ r at the outputs of the block's linears, by path in the block.

    `counted`, (rows, tokens), says which tokens of the block's output are looked at.
    """
    leaves: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for path in (path for group in block.groups() for path in group.linears):

            def mark(_module: nn.Module, _x: Any, y: Tensor, path: str = path) -> Tensor:
                leaves[path] = torch.zeros_like(y, requires_grad=True)
                return y + leaves[path]

            stack.callback(module.get_submodule(path).register_forward_hook(mark).remove)
        state = {name: value[local.to(value.device)] for name, value in floats.items()}
        fixed = {name: value[local.to(value.device)] for name, value in constants.items()}
        for stage in block.stages:
            state = dict(stage.run(module, state, fixed))
        total = sum((value * _signs(value, rows, counted)).sum() for value in state.values())
    gradients = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]
    return dict(zip(leaves, gradients, strict=True))


def _signs(like: Tensor, rows: list[int], counted: Tensor | None) -> Tensor:
    """Return random signs of a tensor's shape, those of a row by its number; 0 at padding."""
    drawn = [
        torch.randint(0, 2, like.shape[1:], generator=torch.Generator().manual_seed(row))
        for row in rows
    ]
    signs = (2 * torch.stack(drawn) - 1).to(like)
    if counted is None or counted.shape != like.shape[:2]:
        return signs
    return signs * counted.to(like)[..., None]
