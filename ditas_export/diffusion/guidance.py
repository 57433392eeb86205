"""Classifier-free guidance: one batch of twice the size, and the blend of its two halves.

ε̂ = ε_null + w (ε_class − ε_null), on the first min(3, C) channels of ε as in the samplers of DiT
and SiT, or on all of them as in REPA's. The other ε channels and the learned variance are the
class's own. Of a flow, ε is the velocity.

Guidance may be kept to an interval of noise levels, as in REPA's samplers: a step that starts
outside it takes the class alone, in a batch of the plain size.

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6; Peebles and Xie 2023,
section 4 (guidance on three channels); Kynkäänniemi et al. 2024 (interval); Yu et al. 2025 (REPA).
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from ditas_export.diffusion.options import CfgChannels, Interval
from ditas_export.diffusion.schedules import Time
from ditas_export.errors import RunnerError
from ditas_export.families.base import Conditions, ModelConfig, ModelInputs, is_image
from ditas_export.families.registry import family_of
from ditas_export.process import FlowProcess


def plain_inputs(
    latents: Tensor, time: Time, labels: Tensor, *, config: ModelConfig, conditions: Conditions
) -> ModelInputs:
    """Return the inputs of one step without guidance.

    Args:
        latents: (N, C, H, W).
        time: of all rows.
        labels: (N,) int64, of the conditions.
        config: of the model, whose family says what it is fed.
        conditions: what the labels name.
    """
    what, when, *others = family_of(config).inputs(config)
    asked = conditions.inputs(labels)
    times = torch.full((len(labels),), time, dtype=when.dtype)
    return ModelInputs(
        {what.name: latents, when.name: times, **{each.name: asked[each.name] for each in others}}
    )


def model_inputs(
    latents: Tensor,
    time: Time,
    labels: Tensor,
    *,
    cfg_scale: float,
    config: ModelConfig,
    conditions: Conditions,
) -> ModelInputs:
    """Return the inputs of one step: guided, or plain where the scale blends nothing.

    A scale of 1 takes the labels alone, one of 0 the null label.

    Returns:
        N rows; guided 2N: N with their labels, then the same N latents with the null label.
    """
    nulls = torch.full_like(labels, -1 if conditions.null is None else conditions.null)
    if blends(cfg_scale):
        latents, labels = torch.cat([latents, latents]), torch.cat([labels, nulls])
    elif cfg_scale == 0:
        labels = nulls
    return plain_inputs(latents, time, labels, config=config, conditions=conditions)


def blends(cfg_scale: float) -> bool:
    """Return whether a scale needs both halves: 1 takes the class alone, 0 the null class."""
    return cfg_scale not in (0.0, 1.0)


def resolved_cfg_scale(asked: float | None, *, default: float, conditions: Conditions) -> float:
    """Return the guidance scale: as asked, else the default, 1 where a model cannot be guided.

    Raises:
        RunnerError: see `require_guidance`.
    """
    if asked is None:
        return 1.0 if conditions.null is None else default
    require_guidance(asked, conditions)
    return asked


def require_guidance(cfg_scale: float, conditions: Conditions) -> None:
    """Refuse a guidance scale that means nothing, or nothing for this model.

    1 is no guidance; above, the condition counts for more; 0 is the null label alone.

    Raises:
        RunnerError: a scale below 1 other than 0, no finite number, or one other than 1 for a model
            that has nothing to guide with.
    """
    if not math.isfinite(cfg_scale):
        raise RunnerError(f"cfg_scale={cfg_scale} is not a finite number")
    if cfg_scale < 1 and cfg_scale != 0:
        raise RunnerError(
            f"cfg_scale={cfg_scale}: guidance starts at 1, which means none; use 1 or more, or 0 "
            f"for images of no {conditions.what} (the null {conditions.what} alone)"
        )
    if cfg_scale != 1 and conditions.null is None:
        raise RunnerError(
            f"cfg_scale={cfg_scale}, but {conditions.source} has no {conditions.lack} to guide "
            f"with; leave the option out"
        )


def require_interval(interval: Interval | None, cfg_scale: float) -> None:
    """Refuse an interval of guidance that no step can follow.

    Raises:
        RunnerError: other than two noise levels in order, or an interval of a scale that blends
            nothing.
    """
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise RunnerError(
            f"guidance_interval={','.join(f'{level:g}' for level in interval[:4])}; expected two "
            f"noise levels LO,HI in order, from 0 (data) to 1 (noise alone)"
        )
    if not blends(cfg_scale):
        raise RunnerError(
            f"guidance_interval={interval[0]:g},{interval[1]:g}, but cfg_scale={cfg_scale:g} "
            f"blends nothing; leave the interval out"
        )


def scale_at(noise_level: float, *, cfg_scale: float, interval: Interval | None) -> float:
    """Return the scale of a step that starts at a noise level: 1 outside of the interval."""
    if interval is None or interval[0] <= noise_level <= interval[1]:
        return cfg_scale
    return 1.0


def resolved_cfg_channels(asked: CfgChannels | None, config: ModelConfig) -> CfgChannels:
    """Return which channels are guided: as asked, else as in the published sampler.

    That is all of them for REPA, whose velocity points to the noise, and for what is no image, and
    three for DiT and SiT.
    """
    if asked is not None:
        return asked
    process = config.process
    is_repa = isinstance(process, FlowProcess) and process.velocity_towards == "noise"
    return "all" if is_repa or not is_image(config) else "3"


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
        model_output: (2N, 2C or C, H, W), class rows first, null-class rows second.
        cfg_scale: w; more than 1.
        channels: leading ε channels to guide, at most C.

    Returns:
        (N, 2C or C, H, W): guided ε, then the class rows' other ε channels and learned variance.
    """
    with_class, without = model_output.chunk(2)
    eps_class, eps_null = with_class[:, :channels], without[:, :channels]
    eps = eps_null + cfg_scale * (eps_class - eps_null)
    return torch.cat([eps, with_class[:, channels:]], dim=1)
