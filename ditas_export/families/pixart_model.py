"""PixArt as diffusers has it, and its blocks as folding leaves them.

The forward is diffusers' own. What is written out here is the block once more, in the pieces that
the walk takes it in: of a folded model they are its forward.

Source: diffusers' `PixArtTransformer2DModel`; Chen et al., "PixArt-α", ICLR 2024, section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from ditas_export.families.base import FamilyModel, State
from ditas_export.families.pixart_config import PixArtConfig

CHUNKS = 6
"""Rows of a block's table: shift, scale and gate of attention, then of the MLP."""


class PixArt(PixArtTransformer2DModel, FamilyModel):
    """diffusers' transformer, called with a file's inputs by name."""

    pos_embed: nn.Module
    adaln_single: AdaLayerNormSingle
    caption_projection: nn.Module
    transformer_blocks: nn.ModuleList

    def __init__(self, config: PixArtConfig, *, folded: bool = False) -> None:
        self._family_config: PixArtConfig | None = None
        super().__init__(  # type: ignore[no-untyped-call]
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_layers,
            cross_attention_dim=config.hidden_size,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            norm_eps=config.norm_eps,
            interpolation_scale=config.interpolation_scale,
            use_additional_conditions=config.use_additional_conditions,
            caption_channels=config.caption_channels,
        )
        self._family_config = config
        self.pos_embed.register_buffer("pos_embed", positions(config), persistent=False)
        if folded:
            for block in self.transformer_blocks:
                fold_block(block)

    @property
    def config(self) -> Any:  # type: ignore[override]
        """The family's configuration; while diffusers builds the model, diffusers' own."""
        return self._family_config or self._internal_dict

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        **micro_conditions: Tensor,
    ) -> Tensor:
        """Return ε and any variance, (N, C or 2C, H, W).

        Args:
            hidden_states: (N, C, H, W).
            timestep: (N,) int64.
            encoder_hidden_states: the prompts' tokens, (N, tokens, K).
            encoder_attention_mask: 1 for a token, 0 for padding, (N, tokens).
            micro_conditions: resolution (N, 2) and aspect_ratio (N, 1), where the model takes them.
        """
        for tensor in (timestep, encoder_hidden_states, encoder_attention_mask):
            _require(tensor.shape[0] == hidden_states.shape[0])
        _require(encoder_attention_mask.shape[1] == encoder_hidden_states.shape[1])
        output: Tensor = super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs=micro_conditions or None,
            return_dict=False,
        )[0]
        return output

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[State, State]:
        """Return the first hidden state x (N, T, D), and what every block reads beside it."""
        latents, timesteps, captions, mask, *_ = inputs.values()
        micro_conditions = dict(list(inputs.items())[4:])
        vector, _ = self.adaln_single(
            timesteps, micro_conditions or None, batch_size=len(latents), hidden_dtype=latents.dtype
        )
        bias = (1 - mask.to(latents.dtype)) * -10_000.0
        constants = {
            "t": vector,
            "captions": self.caption_projection(captions),
            "bias": bias[:, None],
        }
        return {"x": self.pos_embed(latents)}, constants


def _require(condition: bool) -> None:
    """Tell the exporter that sizes are the same, which it cannot see."""
    torch._check(condition)  # type: ignore[no-untyped-call]


def positions(config: PixArtConfig) -> Tensor:
    """Return the sin-cos table of positions, (1, T, D) float32, on the CPU."""
    side = config.sample_size // config.patch_size
    with torch.device("cpu"):
        table: Tensor = get_2d_sincos_pos_embed(
            config.hidden_size,
            side,
            base_size=side,
            interpolation_scale=config.interpolation_scale,
            output_type="pt",
            device=torch.device("cpu"),
        )
    return table.float()[None]


class FoldedBlock(BasicTransformerBlock):
    """A block whose table makes factors, and which multiplies the vector that all blocks share."""

    scale_shift_table: nn.Parameter
    scale_shift_multiplier: nn.Parameter

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        **_unused: Any,
    ) -> Tensor:
        """Run the three pieces; arguments and result are those of diffusers' block."""
        constants = {
            "t": timestep,
            "captions": encoder_hidden_states,
            "bias": encoder_attention_mask,
        }
        state: State = {"x": hidden_states}
        for piece in (attend, attend_to_captions, transform):
            state = piece(self, state, constants)
        return state["x"]


def fold_block(block: nn.Module) -> None:
    """Make a block one of a folded model: a parameter more, and factors for scales; in place."""
    block.__class__ = FoldedBlock
    table = block.scale_shift_table
    assert isinstance(table, nn.Parameter)
    block.scale_shift_multiplier = nn.Parameter(torch.ones_like(table))


def _chunks(block: nn.Module, constants: State) -> tuple[Tensor, ...]:
    """Return a block's six chunks, (N, 1, D) each, its scales as factors."""
    vector = torch.unflatten(constants["t"], 1, (CHUNKS, -1))
    table = block.get_parameter("scale_shift_table")[None]
    if isinstance(block, FoldedBlock):
        return (table + vector * block.scale_shift_multiplier[None]).chunk(CHUNKS, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table + vector).chunk(CHUNKS, dim=1)
    return shift, 1 + scale, gate, shift_mlp, 1 + scale_mlp, gate_mlp


def attend(block: nn.Module, state: State, constants: State) -> State:
    """Run attention among the image's tokens."""
    assert isinstance(block, BasicTransformerBlock)
    shift, factor, gate, *_ = _chunks(block, constants)
    x = state["x"]
    return {"x": x + gate * block.attn1(block.norm1(x) * factor + shift)}


def attend_to_captions(block: nn.Module, state: State, constants: State) -> State:
    """Run attention to the prompt's tokens, which no norm goes before."""
    assert isinstance(block, BasicTransformerBlock)
    x, captions, bias = state["x"], constants["captions"], constants["bias"]
    return {"x": x + block.attn2(x, encoder_hidden_states=captions, attention_mask=bias)}


def transform(block: nn.Module, state: State, constants: State) -> State:
    """Run the MLP."""
    assert isinstance(block, BasicTransformerBlock)
    *_, shift, factor, gate = _chunks(block, constants)
    x = state["x"]
    return {"x": x + gate * block.ff(block.norm2(x) * factor + shift)}
