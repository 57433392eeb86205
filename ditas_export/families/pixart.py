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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.errors import ConditionsError
from ditas_export.families.base import (
    ALL,
    Block,
    Bounds,
    FusedAttention,
    Group,
    Input,
    ModelInputs,
    Multiply,
    Rows,
    Shapes,
    Stage,
    State,
    Table,
    Wide,
)
from ditas_export.families.pixart_config import PIXELS_PER_LATENT, PixArtConfig

if TYPE_CHECKING:
    from ditas_export.families.pixart_model import PixArt

MASK = "encoder_attention_mask"
VECTOR = "adaln_single.linear"
CHUNKS = 6

_PROVED_TOKENS = 5
"""Tokens of a prompt where shapes are asked for: any number would do."""


def _attend(block: nn.Module, state: State, constants: State) -> State:
    """Run attention among the image's tokens."""
    from ditas_export.families import pixart_model

    return pixart_model.attend(block, state, constants)


def _attend_to_captions(block: nn.Module, state: State, constants: State) -> State:
    """Run attention to the prompt's tokens."""
    from ditas_export.families import pixart_model

    return pixart_model.attend_to_captions(block, state, constants)


def _transform(block: nn.Module, state: State, constants: State) -> State:
    """Run the MLP."""
    from ditas_export.families import pixart_model

    return pixart_model.transform(block, state, constants)


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
    Stage(groups=_attention("attn1"), run=_attend),
    Stage(groups=_attention("attn2"), run=_attend_to_captions),
    Stage(
        groups=(
            Group(
                linears=("ff.net.0.proj",), folds=(_table(scale=4, shift=3),), is_token_wise=True
            ),
            Group(linears=("ff.net.2",), folds=(Multiply(),), is_token_wise=True),
        ),
        run=_transform,
    ),
)


@dataclass(frozen=True, slots=True)
class PixArtFamily:
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

    def modulation_inputs(self, config: PixArtConfig, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return SiLU of the embedding of every time step, of square images of the model's size."""
        with torch.device("meta"):
            embedder = self.module(config).adaln_single.emb
        prefix = "adaln_single.emb."
        state = {name: parameters[f"{prefix}{name}"] for name in embedder.state_dict()}
        embedder.load_state_dict(state, assign=True)
        first, last = config.process.times
        times = torch.arange(int(first), int(last) + 1)
        side = float(config.sample_size * PIXELS_PER_LATENT)
        with torch.no_grad():
            embedded: Tensor = embedder(
                times,
                resolution=torch.full((len(times), 2), side),
                aspect_ratio=torch.ones(len(times), 1),
                batch_size=len(times),
                hidden_dtype=torch.float32,
            )
        return functional.silu(embedded)

    def float_linears(self, _config: PixArtConfig) -> tuple[str, ...]:
        """Return the projection to pixels."""
        return ("proj_out",)

    def embedders(self) -> tuple[str, ...]:
        """Return how names of what embeds the inputs begin."""
        return ("pos_embed", "adaln_single.emb", "caption_projection")

    def tables(self, config: PixArtConfig) -> Shapes:
        """Return shapes of the embedders' tables."""
        width, patch = config.hidden_size, config.patch_size
        return {"pos_embed.proj.weight": (width, config.in_channels, patch, patch)}

    def inputs(self, config: PixArtConfig) -> tuple[Input, ...]:
        """Return latents, times, the prompts' tokens and mask, and α's micro-conditions."""
        side = config.sample_size
        first, last = config.process.times
        steps = Bounds(first=first, last=last, what="of the schedule")
        kept = Bounds(first=0, last=1, what="1 for a token, 0 for padding")
        real, whole = torch.float32, torch.int64
        latents, captions = (config.in_channels, side, side), ("tokens", config.caption_channels)
        asked = (
            Input(name="hidden_states", dtype=real, shape=latents, is_feature=True),
            Input(name="timestep", dtype=whole, shape=(), bounds=steps),
            Input(name="encoder_hidden_states", dtype=real, shape=captions, is_feature=True),
            Input(name=MASK, dtype=whole, shape=("tokens",), bounds=kept),
        )
        if not config.use_additional_conditions:
            return asked
        return (
            *asked,
            Input(name="resolution", dtype=real, shape=(2,)),
            Input(name="aspect_ratio", dtype=real, shape=(1,)),
        )

    def sizes(self, _config: PixArtConfig) -> Mapping[str, tuple[int, int, int]]:
        """Return how many tokens a prompt has: α's have 120 at most, Σ's 300."""
        return {"tokens": (1, 300, 512)}

    def conditions(self, config: PixArtConfig, embeddings: Path | None) -> PromptEmbeddings:
        """Return the prompts of an embeddings file.

        Raises:
            ConditionsError: none is given.
            ArtifactError: it does not fit.
        """
        if embeddings is None:
            raise ConditionsError(
                "this model is asked by prompts; pass their embeddings, --embeddings "
                "FILE.safetensors (ditas-embed PIPELINE --output FILE.safetensors writes it)"
            )
        return PromptEmbeddings.load(embeddings, inputs=self.inputs(config)[2:])

    def attentions(self, _config: PixArtConfig) -> Sequence[FusedAttention]:
        """Return none: no one linear gives q, k and v."""
        return []

    def wides(self, _config: PixArtConfig) -> Sequence[Wide]:
        """Return none."""
        return []
