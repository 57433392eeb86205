"""A flow transformer over frames, as speech and action models have them. Plain PyTorch.

What is made are T frames of C channels. Two streams condition it, joined with them at the input:
frames that are given (a voice to go on with, what a robot saw), and a vector a frame (its text). Of
each block's heads some are turned by the frames' positions (RoPE), the others know none. Frames
that are padding are no keys of attention.

It imports nothing of `ditas_export`. The one concession is the argument `modulate`: a folded model
has the 1 of `1 + scale` in its biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES = 64
"""Width of the sinusoids of time."""

Modulate = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model."""

    in_channels: int  # C
    text_width: int  # E
    num_tokens: int  # frames, T
    hidden_size: int  # D
    depth: int
    num_heads: int
    rotary_heads: int


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x · (1 + scale) + shift; x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def modulate_by_factor(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Return x · factor + shift: the same, where the biases hold the 1."""
    return x * factor[:, None] + shift[:, None]


def time_features(time: Tensor) -> Tensor:
    """Return sinusoids of t in 0 to 1; (N,) to (N, 64) float32."""
    steps = torch.arange(FEATURES // 2, dtype=torch.float32, device=time.device)
    angles = 1000 * time.float()[:, None] * torch.exp(-math.log(1e4) * steps / (FEATURES // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def turns(frames: int, width: int, device: torch.device) -> Tensor:
    """Return cosines and sines of RoPE's angles, (1, T, d) float32: d/2 of each."""
    steps = torch.arange(width // 2, dtype=torch.float32, device=device)
    places = torch.arange(frames, dtype=torch.float32, device=device)
    angles = places[:, None] * torch.exp(-math.log(1e4) * steps / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)[None]


def turned(heads: Tensor, turn: Tensor, count: int) -> Tensor:
    """Return heads (N, heads, T, d), the first `count` of them turned by (N, T, d)."""
    cos, sin = turn.to(heads.dtype)[:, None].chunk(2, dim=-1)
    first, second = heads[:, :count].chunk(2, dim=-1)
    moved = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([moved, heads[:, count:]], dim=1)


class Block(nn.Module):
    """A transformer block under AdaLN: attention and an MLP, each between a norm and a gate."""

    def __init__(self, shape: Shape, modulate: Modulate) -> None:
        super().__init__()
        width, self.modulate = shape.hidden_size, modulate
        self.heads, self.rotary_heads = shape.num_heads, shape.rotary_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.ff_in, self.ff_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, c: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        """Return the next hidden state; x (N, T, D), c (N, D), mask (N, T), 0 at padding."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(c).chunk(6, dim=-1)
        x = x + gate[:, None] * self.attend(self.modulate(self.norm(x), shift, scale), turn, mask)
        read = self.modulate(self.norm(x), ff_shift, ff_scale)
        made: Tensor = self.ff_out(functional.gelu(self.ff_in(read), approximate="tanh"))
        return x + ff_gate[:, None] * made

    def attend(self, x: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        """Return what the frames take from each other, (N, T, D)."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (turned(each, turn, self.rotary_heads) for each in (q, k))
        keys = (mask != 0)[:, None, None]  # (N, 1, 1, T)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class FrameTransformer(nn.Module):
    """Frames, time, what is given and a mask to the velocity of the frames."""

    def __init__(self, shape: Shape, modulate: Modulate = modulate) -> None:
        super().__init__()
        self.config, self.modulate, width = shape, modulate, shape.hidden_size
        self.join = nn.Linear(2 * shape.in_channels + shape.text_width, width)
        self.embed_time = nn.Sequential(
            nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.blocks = nn.ModuleList(Block(shape, modulate) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_frames = nn.Linear(width, shape.in_channels)

    def embed(
        self, frames: Tensor, time: Tensor, given: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first hidden state (N, T, D), c (N, D) and RoPE's turns (1, T, d)."""
        joined = torch.cat([frames.transpose(1, 2), given.transpose(1, 2), text], dim=-1)
        turn = turns(joined.shape[1], self.config.hidden_size // self.config.num_heads, time.device)
        return self.join(joined), self.of_time(time), turn

    def of_time(self, time: Tensor) -> Tensor:
        """Return what the modulation reads at times (N,), (N, D)."""
        embedded: Tensor = self.embed_time(time_features(time).to(self.join.weight.dtype))
        return embedded

    def forward(
        self, frames: Tensor, time: Tensor, given: Tensor, text: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Return the velocity, (N, C, T).

        Args:
            frames: (N, C, T), what is denoised.
            time: (N,), t from 0 (noise) to 1 (data).
            given: (N, C, T), frames that are known, 0 elsewhere.
            text: (N, T, E), a vector a frame.
            attention_mask: (N, T), 0 where a frame is padding.
        """
        x, c, turn = self.embed(frames, time, given, text)
        for block in self.blocks:
            x = block(x, c, turn, attention_mask)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        made: Tensor = self.to_frames(self.modulate(self.norm(x), shift, scale))
        return made.transpose(1, 2)
