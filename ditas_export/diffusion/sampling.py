"""The sampling loop over a `Runner`; `schedules.py` has its samplers.

Noise belongs to an image, not to a batch: each image has a generator of its own on the CPU, seeded
from the seed and the image's index. It draws x_T first, then the noise of every step, so an image
depends on its batch mates by float rounding at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ditas_export.diffusion.diffusion_schedules import make_scheduler as make_scheduler
from ditas_export.diffusion.guidance import (
    blends,
    guide,
    guided_channel_count,
    model_inputs,
    require_guidance,
    require_interval,
    resolved_cfg_channels,
    scale_at,
)
from ditas_export.diffusion.options import CfgChannels, Interval, SamplerName
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.schedules import Time, make_schedule, time_words
from ditas_export.errors import NonFiniteError, RunnerError
from ditas_export.families.base import Conditions, ModelConfig, plural
from ditas_export.families.registry import conditions_of

OnStep = Callable[[int, Time, Tensor], None]
"""Called after a step with its index, its time and the new latents; may raise to stop."""

_GOLDEN_RATIO = 0x9E3779B1  # 2^32 / golden ratio, odd: i -> i * it is a bijection modulo 2^32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One step of a trajectory."""

    index: int  # 0 for the first, noisiest step
    timestep: Time  # of the full schedule, from 0; of a flow t, 0 to 1
    latents: Tensor  # (N, C, H, W) float32, before the step
    labels: Tensor  # (N,) int64, of the conditions
    model_output: Tensor  # (N, 2C or C, H, W) float32, ε or velocity guided
    next_latents: Tensor  # (N, C, H, W) float32, after the step


def sample(
    runner: Runner,
    *,
    classes: Sequence[int],
    conditions: Conditions | None = None,
    steps: int = 50,
    cfg_scale: float = 1.5,
    cfg_channels: CfgChannels | None = None,
    guidance_interval: Interval | None = None,
    sampler: SamplerName | None = None,
    shift: float | None = None,
    seed: int | Sequence[int] = 0,
    image_indices: Sequence[int] | None = None,
    image_names: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample one image per class label, in one batch.

    Args:
        runner: the model; with guidance it is called with twice as many rows as there are images.
        classes: label of each image, 0 to `conditions.count` − 1.
        conditions: what the labels name; the model's own classes if not given.
        steps: denoising steps, 2 to the length of the schedule; of a flow, 1 to 10 000.
        cfg_scale: strength of guidance, 1 or more; 1 means none, and 0 the null class: both have a
            batch of the plain size.
        cfg_channels: "3" guides the first min(3, C) channels of ε, "all" every one; as published if
            not given.
        guidance_interval: noise levels of the steps that are guided, all if not given: two from 0
            (data) to 1 (noise alone), σ of a flow or a time step over the schedule's length.
        sampler: `ddpm` (published), `ddim` or `dpm++`; of a flow `euler`, `heun`, which calls the
            model twice a step, or `euler-maruyama`. The first of its process if not given.
        shift: of the times of `euler` and `heun`; 1 is none.
        seed: with an image's index, what its noise depends on; one for all images, or one each.
        image_indices: index of each image in the whole set, 0, 1, 2 … if not given.
        image_names: what errors call the images, their indices if not given.
        device: where latents lie from step to step, the runner's for speed. Noise is drawn on the
            CPU in any case; times and conditions stay there.
        on_step: called after every step; raise from it to stop.

    Returns:
        (N, C, H, W) float32 latents, on `device`.

    Raises:
        RunnerError: see `trajectory`.
    """
    steps_done = trajectory(
        runner,
        classes=classes,
        conditions=conditions,
        steps=steps,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        guidance_interval=guidance_interval,
        sampler=sampler,
        shift=shift,
        seed=seed,
        image_indices=image_indices,
        image_names=image_names,
        device=device,
    )
    for step in steps_done:
        if on_step is not None:
            on_step(step.index, step.timestep, step.next_latents)
    return step.next_latents


def trajectory(
    runner: Runner,
    *,
    classes: Sequence[int],
    conditions: Conditions | None = None,
    steps: int = 50,
    cfg_scale: float = 1.5,
    cfg_channels: CfgChannels | None = None,
    guidance_interval: Interval | None = None,
    sampler: SamplerName | None = None,
    shift: float | None = None,
    seed: int | Sequence[int] = 0,
    image_indices: Sequence[int] | None = None,
    image_names: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Step]:
    """Yield the steps that `sample` takes, one by one; the arguments are its.

    Raises:
        NonFiniteError: NaN or infinity in a step; names the step, the images and the remedy.
        RunnerError: at once, before the first step: no class, a class out of range, a setting that
            no sampler has, guidance of a model that has nothing to guide with, or a count of
            indices that differs from the count of classes.
        ConditionsError: no conditions for a model that has no classes of its own.
    """
    config = runner.config
    asked = conditions_of(config) if conditions is None else conditions
    indices = range(len(classes)) if image_indices is None else image_indices
    names = indices if image_names is None else image_names
    require_labels(classes, asked)
    _check_indices(indices, len(classes))
    require_guidance(cfg_scale, asked)
    require_interval(guidance_interval, cfg_scale)
    schedule = make_schedule(sampler, steps, config.process, shift=shift)
    cfg_channels = resolved_cfg_channels(cfg_channels, config)
    channels = guided_channel_count(config.in_channels, cfg_channels)
    seeds = [seed] * len(classes) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(classes):
        raise RunnerError(f"{len(seeds)} seeds for {len(classes)} classes; give one each")
    generators = [image_generator(*pair) for pair in zip(seeds, indices, strict=True)]
    labels = torch.tensor(list(classes), dtype=torch.int64)

    def predict(latents: Tensor, time: Time, *, scale: float, place: str) -> Tensor:
        inputs = model_inputs(
            latents, time, labels, cfg_scale=scale, config=config, conditions=asked
        )
        try:
            output = runner(inputs)
        except NonFiniteError as error:
            images = [names[row % len(classes)] for row in error.rows]
            raise _not_finite(images, place, str(error)) from error
        return guide(output, cfg_scale=scale, channels=channels) if blends(scale) else output

    def walk() -> Iterator[Step]:
        latents = initial_noise(config, generators).to(device)
        for index, moment in enumerate(schedule.moments):
            place = f"step {index + 1} of {steps}, {time_words(moment.time)}"
            scale = scale_at(moment.noise_level, cfg_scale=cfg_scale, interval=guidance_interval)
            ask = partial(predict, scale=scale, place=place)
            output = ask(latents, moment.time)
            moved = schedule.advance(index, latents, output, predict=ask, generators=generators)
            finite = moved.flatten(1).isfinite().all(dim=1)
            if not bool(finite.all()):
                images = [names[row] for row in (~finite).nonzero().flatten().tolist()]
                raise _not_finite(images, place, f"the latents are not finite; {REMEDY}")
            yield Step(
                index=index,
                timestep=moment.time,
                latents=latents,
                labels=labels,
                model_output=output,
                next_latents=moved,
            )
            latents = moved

    return walk()


REMEDY = (
    "what computes in float16 overflows: use bf16 or fp32; else check the checkpoint, or take "
    "another number of steps or another sampler"
)
"""What to do about NaN in a trajectory."""


def _not_finite(images: Sequence[int], place: str, reason: str) -> NonFiniteError:
    """Return the error of a step that is not finite, naming its place and the images."""
    odd = sorted(set(images))
    named = ", ".join(map(str, odd[:8])) + (" …" if len(odd) > 8 else "")
    error = NonFiniteError(f"{place}, image {named}: {reason}")
    error.rows = tuple(odd)
    return error


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the CPU generator of one image's noise.

    Its 32-bit seed is (h + index · 0x9E3779B1) mod 2³², h the first four bytes (big-endian) of
    the SHA-256 of the seed's decimal digits: for one seed no two indices share a generator.
    torch's CPU generator reads the low 32 bits of a seed only.
    """
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    return torch.Generator().manual_seed((start + index * _GOLDEN_RATIO) % 2**32)


def initial_noise(config: ModelConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Return x_T: (N, C, …) float32 standard normal, one image per generator."""
    shape = config.latent_shape
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def require_labels(classes: Sequence[int], conditions: Conditions) -> None:
    """Refuse an empty batch and labels that name nothing.

    Raises:
        RunnerError: names them.
    """
    if not classes:
        raise RunnerError("no class to sample; name at least one")
    last = conditions.count - 1
    odd = sorted({label for label in classes if not 0 <= label <= last})
    if odd:
        raise RunnerError(
            f"{plural(conditions.what)} {odd} are out of range; {conditions.source} knows 0 to "
            f"{last}"
        )


def _check_indices(indices: Sequence[int], count: int) -> None:
    """Refuse image indices that do not pair up with the classes."""
    if len(indices) != count:
        raise RunnerError(f"{len(indices)} image indices for {count} classes; give one each")
    odd = [index for index in indices if not 0 <= index < 2**32]
    if odd:
        raise RunnerError(f"image indices {odd} are out of range; they run from 0 to 2^32 - 1")
