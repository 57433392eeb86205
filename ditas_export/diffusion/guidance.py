"""Classifier-free guidance: one batch of twice the size, and the blend of its two halves.

ε̂ = ε_null + w (ε_class − ε_null), on the first min(3, C) channels of ε as in the published
sampler, or on all of them. The other ε channels and the learned variance are the class's own.

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6; Peebles and Xie 2023,
section 4 (guidance on three channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ditas_export.errors import RunnerError

CfgChannels = Literal["3", "all"]
"""Which ε channels guidance acts on: the first three at most, or every one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelInputs:
    """What a runner is called with; rows come in pairs when the batch is guided."""

    latents: Tensor  # (N, C, H, W)
    timesteps: Tensor  # (N,) int64
    class_labels: Tensor  # (N,) int64


def plain_inputs(latents: Tensor, timestep: int, class_labels: Tensor) -> ModelInputs:
    """Return the inputs of one step without guidance; latents (N, C, H, W), labels (N,)."""
    timesteps = torch.full_like(class_labels, timestep)
    return ModelInputs(latents=latents, timesteps=timesteps, class_labels=class_labels)


def guided_inputs(
    latents: Tensor, timestep: int, class_labels: Tensor, *, null_class: int
) -> ModelInputs:
    """Return the inputs of one guided step.

    Returns:
        2N rows: N with their class, then the same N latents with the null class.
    """
    nulls = torch.full_like(class_labels, null_class)
    return plain_inputs(torch.cat([latents, latents]), timestep, torch.cat([class_labels, nulls]))


def model_inputs(
    latents: Tensor, timestep: int, class_labels: Tensor, *, cfg_scale: float, null_class: int
) -> ModelInputs:
    """Return the inputs of one step: guided, or plain where a scale of 1 blends nothing."""
    if cfg_scale == 1.0:
        return plain_inputs(latents, timestep, class_labels)
    return guided_inputs(latents, timestep, class_labels, null_class=null_class)


def guided_channel_count(in_channels: int, cfg_channels: CfgChannels) -> int:
    """Return how many ε channels guidance acts on.

    Raises:
        RunnerError: `cfg_channels` is neither "3" nor "all".
    """
    if cfg_channels not in get_args(CfgChannels):
        raise RunnerError(f'cfg_channels is "3" or "all", not {cfg_channels!r}')
    return in_channels if cfg_channels == "all" else min(3, in_channels)


def guide(model_output: Tensor, *, cfg_scale: float, channels: int) -> Tensor:
    """Blend the two halves of a guided batch.

    Args:
        model_output: (2N, 2C, H, W), class rows first, null-class rows second.
        cfg_scale: w; 1 keeps the class rows.
        channels: leading ε channels to guide, at most C.

    Returns:
        (N, 2C, H, W): guided ε, then the class rows' other ε channels and learned variance.
    """
    with_class, without = model_output.chunk(2)
    eps_class, eps_null = with_class[:, :channels], without[:, :channels]
    eps = eps_null + cfg_scale * (eps_class - eps_null)
    return torch.cat([eps, with_class[:, channels:]], dim=1)
