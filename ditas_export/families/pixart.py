"""PixArt-α and -Σ: adaptive layer norm by one vector for all blocks, and attention to a prompt.

| linear           | x comes from                | 1/s folds into                                  |
|------------------|-----------------------------|-------------------------------------------------|
| attn1.to_q, k, v | modulate(norm1, rows 0, 1)  | these rows of the block's table, and the vector |
| attn1.to_out.0   | softmax(q kᵀ) v             | attn1.to_v                                      |
| attn2.to_q       | the residual stream itself  | stays: one multiplication of x by 1/s           |
| attn2.to_k, v    | the prompt's tokens         | stays                                           |
| attn2.to_out.0   | softmax(q kᵀ + mask) v      | attn2.to_v                                      |
| ff.net.0.proj    | modulate(norm2, rows 3, 4)  | these rows of the table, and the vector         |
| ff.net.2         | GELU, not homogeneous       | stays                                           |

diffusers is imported when a model is made, and by no other family. Source: Chen et al., "PixArt-α",
ICLR 2024; "PixArt-Σ", ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ditas_export.families.base import (
    ALL,
    Block,
    FusedAttention,
    Group,
    ModelInputs,
    Multiply,
    Rows,
    Shapes,
    Stage,
    State,
    Table,
    Wide,
)
from ditas_export.families.pixart_config import PixArtConfig
from ditas_export.families.prompt_conditioned import MASK, PromptConditioned

if TYPE_CHECKING:
    from ditas_export.families.pixart_model import PixArt

VECTOR = "adaln_single.linear"
CHUNKS = 6

_PROVED_TOKENS = 5
"""Tokens of a prompt where shapes are asked for: any number would do."""


def _piece(name: str) -> Callable[[nn.Module, State, State], State]:
    """Return a piece of a block's forward by its name; diffusers is imported when it runs."""

    def run(block: nn.Module, state: State, constants: State) -> State:
        from ditas_export.families import pixart_model

        piece: Callable[..., State] = getattr(pixart_model, name)
        return piece(block, state, constants)

    return run


def _table(*, scale: int, shift: int) -> Table:
    """Return the fold into two rows of a block's table."""
    return Table(
        table="scale_shift_table",
        multiplier="scale_shift_multiplier",
        vector=VECTOR,
        scale=scale,
        shift=shift,
    )


def _attention(path: str) -> tuple[Group, ...]:
    """Return the groups of q, k and v and of the output, by the attention's path."""
    q, k, v, out = (f"{path}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    made_of_values = Group(linears=(out,), folds=(Rows(linear=v, rows=ALL),))
    if path == "attn1":
        read = Group(linears=(q, k, v), folds=(_table(scale=1, shift=0),), is_token_wise=True)
        return read, made_of_values
    return (
        Group(linears=(q,), folds=(Multiply(),), is_token_wise=True),
        Group(linears=(k, v), folds=(Multiply(),), mask=MASK),
        made_of_values,
    )


STAGES = (
    Stage(groups=_attention("attn1"), run=_piece("attend")),
    Stage(groups=_attention("attn2"), run=_piece("attend_to_captions")),
    Stage(
        groups=(
            Group(
                linears=("ff.net.0.proj",), folds=(_table(scale=4, shift=3),), is_token_wise=True
            ),
            Group(linears=("ff.net.2",), folds=(Multiply(),), is_token_wise=True),
        ),
        run=_piece("transform"),
    ),
)


@dataclass(frozen=True)
class PixArtFamily(PromptConditioned):
    """diffusers' `PixArtTransformer2DModel`."""

    name: str = "pixart"

    @property
    def config_type(self) -> type[PixArtConfig]:
        """The class of its configurations."""
        return PixArtConfig

    def serves(self, _config: PixArtConfig) -> bool:
        """Return whether a model is of the family: all of the class are."""
        return True

    def module(self, config: PixArtConfig, *, folded: bool = False) -> PixArt:
        """Return the model, as published or as folding leaves it."""
        from ditas_export.families.pixart_model import PixArt

        return PixArt(config, folded=folded)

    def blocks(self, config: PixArtConfig) -> tuple[Block, ...]:
        """Return its blocks, in order."""
        paths = (f"transformer_blocks.{index}" for index in range(config.num_layers))
        return tuple(Block(path=path, stages=STAGES) for path in paths)

    def enter(self, model: PixArt, inputs: ModelInputs) -> tuple[State, State]:
        """Return the first hidden state x (N, T, D), and vector, captions and mask's bias."""
        return model.embed(inputs)

    def shapes(self, config: PixArtConfig, rows: int, tokens: int) -> tuple[Shapes, Shapes]:
        """Return the shapes of what `enter` gives."""
        width = config.hidden_size
        constants = {
            "t": (rows, CHUNKS * width),
            "captions": (rows, _PROVED_TOKENS, width),
            "bias": (rows, 1, _PROVED_TOKENS),
        }
        return {"x": (rows, tokens, width)}, constants

    def modulations(self, _config: PixArtConfig) -> Mapping[str, tuple[slice, ...]]:
        """Return the linear of the shared vector; the 1 of scales is in the blocks' tables."""
        return {VECTOR: ()}

    def float_linears(self, _config: PixArtConfig) -> tuple[str, ...]:
        """Return the projection to pixels."""
        return ("proj_out",)

    def attentions(self, _config: PixArtConfig) -> Sequence[FusedAttention]:
        """Return none: no one linear gives q, k and v."""
        return []

    def wides(self, _config: PixArtConfig) -> Sequence[Wide]:
        """Return none."""
        return []
