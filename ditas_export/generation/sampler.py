"""Images from any runner, in batches that are fixed by the image's index.

Batch b holds the images b·B to (b + 1)·B − 1, and is always B rows (all images, where there are
fewer than B): the last one is filled up with its last image over and over, which is thrown away. So
every batch gives the same bytes wherever and whenever it is run: on another rank, or after a
restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
from torch import Tensor

from ditas_export.diffusion.guidance import (
    guided_channel_count,
    require_interval,
    resolved_cfg_channels,
    resolved_cfg_scale,
)
from ditas_export.diffusion.options import CfgChannels, Interval, SamplerName
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import OnStep, require_labels, sample
from ditas_export.diffusion.schedules import Time, make_schedule, resolved_sampler
from ditas_export.errors import CancelledError, NonFiniteError, RunnerError
from ditas_export.families.base import Conditions, ModelConfig, is_image
from ditas_export.families.registry import conditions_of
from ditas_export.generation.options import CFG_SCALE
from ditas_export.generation.pixels import Pixels, to_pixels
from ditas_export.vae.decoder import Decoder
from ditas_export.vae.shape import require_fitting_vae

PICTURE_CHANNELS = (1, 3)
"""Channels of a model that makes pixels itself: grey or RGB."""


def makes_pixels(config: ModelConfig) -> bool:
    """Return whether what a model makes is a picture already."""
    return is_image(config) and config.in_channels in PICTURE_CHANNELS


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """What is sampled; the defaults are the published ones.

    With `seeds`, an image is what the first image of its seed would be: it does not depend on its
    place in the set.
    """

    classes: tuple[int, ...]  # one per image
    steps: int = 50
    sampler: SamplerName | None = None  # the first that follows the model's process
    shift: float | None = None  # of a flow's times; none
    cfg_scale: float | None = None  # CFG_SCALE; none where a model cannot be guided
    cfg_channels: CfgChannels | None = None  # as published for the model's process
    guidance_interval: Interval | None = None  # all noise levels
    seed: int = 0  # of all images, each with noise of its own
    seeds: tuple[int, ...] | None = None  # one per image, in the place of `seed`
    batch: int = 8

    def __post_init__(self) -> None:
        """Refuse what no sampler can follow.

        Raises:
            RunnerError: an empty batch, no image, or unknown channels to guide.
        """
        if self.batch < 1:
            raise RunnerError(f"batch={self.batch}; a batch has at least one image")
        if not self.classes:
            raise RunnerError("no class to sample; name at least one")
        if self.seeds is not None and len(self.seeds) != len(self.classes):
            raise RunnerError(
                f"{len(self.seeds)} seeds for {len(self.classes)} images; give one each"
            )
        if self.cfg_channels is not None:
            guided_channel_count(1, self.cfg_channels)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; a shift and an interval where there is one."""
        values: dict[str, Any] = {
            "classes": list(self.classes),
            "steps": self.steps,
            "sampler": self.sampler,
            "cfg_scale": self.cfg_scale,
            "cfg_channels": self.cfg_channels,
            "seed": self.seed if self.seeds is None else list(self.seeds),
            "batch": self.batch,
        }
        if self.shift is not None:
            values["shift"] = self.shift
        if self.guidance_interval is not None:
            values["guidance_interval"] = list(self.guidance_interval)
        return values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledBatch:
    """The images of one batch, its filling removed."""

    indices: range  # of the whole set
    latents: Tensor  # (n, C, h, w) float32, as and where the sampler left them
    pixels: Pixels | None  # (n, H, W, 1 or 3) uint8; None where nothing makes pictures of latents


class Sampler:
    """Samples batches of a fixed set of images, for a command or inside a service.

    Args:
        runner: an open runner.
        settings: what to sample.
        conditions: what the classes of the settings name; the model's own if not given.
        decoder: from latents to pictures; models of pixels (1 or 3 channels) need none.

    Raises:
        RunnerError: a class that the model does not have, a sampler that does not follow its
            process, steps or a shift that the sampler does not take, guidance of a model that has
            nothing to guide with, or a decoder of other latents, or of latents scaled otherwise.
        ConditionsError: no conditions for a model that has no classes of its own.
    """

    def __init__(
        self,
        runner: Runner,
        settings: SamplingSettings,
        *,
        conditions: Conditions | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        config = runner.config
        self._conditions = conditions_of(config) if conditions is None else conditions
        require_labels(settings.classes, self._conditions)
        make_schedule(settings.sampler, settings.steps, config.process, shift=settings.shift)
        self._cfg_scale = resolved_cfg_scale(
            settings.cfg_scale, default=CFG_SCALE, conditions=self._conditions
        )
        require_interval(settings.guidance_interval, self._cfg_scale)
        if decoder is not None:
            require_fitting_vae(
                decoder.description,
                in_channels=decoder.in_channels,
                factors=decoder.factors,
                config=config,
            )
        self.runner = runner
        self.settings = replace(
            settings,
            sampler=resolved_sampler(settings.sampler, config.process),
            cfg_scale=self._cfg_scale,
            cfg_channels=resolved_cfg_channels(settings.cfg_channels, config),
        )
        self._rows = min(settings.batch, len(settings.classes))
        self.decoder = decoder

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.settings.classes) // self._rows)

    def __iter__(self) -> Iterator[SampledBatch]:
        """Yield all batches in order."""
        return (self.run(index) for index in range(len(self)))

    def indices(self, batch: int) -> range:
        """Return the indices of a batch's images in the whole set."""
        first = batch * self._rows
        return range(first, min(first + self._rows, len(self.settings.classes)))

    def run(
        self, batch: int, *, on_step: OnStep | None = None, cancel: Event | None = None
    ) -> SampledBatch:
        """Sample one batch.

        Args:
            batch: 0 to len(self) − 1.
            on_step: called after every step with its index, its time and the new latents, filling
                included.
            cancel: set it, from any thread, to stop after the current step.

        Raises:
            CancelledError: `cancel` was set.
            NonFiniteError: NaN or infinity in a step or in a picture; names the image.
            RunnerError: the runner failed.
        """
        settings, wanted = self.settings, self.indices(batch)
        filled = [min(wanted.start + row, wanted[-1]) for row in range(self._rows)]
        seed: int | list[int] = settings.seed
        if settings.seeds is not None:
            seed = [settings.seeds[index] for index in filled]

        def after_step(index: int, time: Time, latents: Tensor) -> None:
            if on_step is not None:
                on_step(index, time, latents)
            if cancel is not None and cancel.is_set():
                raise CancelledError(f"sampling was cancelled after step {index + 1}")

        latents = sample(
            self.runner,
            classes=[settings.classes[index] for index in filled],
            conditions=self._conditions,
            steps=settings.steps,
            cfg_scale=self._cfg_scale,
            cfg_channels=settings.cfg_channels,
            guidance_interval=settings.guidance_interval,
            sampler=settings.sampler,
            shift=settings.shift,
            seed=seed,
            image_indices=filled if settings.seeds is None else [0] * len(filled),
            image_names=filled,
            device=self.runner.device,
            on_step=after_step,
        )[: len(wanted)]
        return SampledBatch(indices=wanted, latents=latents, pixels=self._pixels(latents, wanted))

    def _pixels(self, latents: Tensor, images: range) -> np.ndarray[Any, Any] | None:
        """Return the pictures of latents, where there is a way to make them."""
        if self.decoder is None:
            return to_pixels(latents) if makes_pixels(self.runner.config) else None
        decoded = self.decoder(latents)
        finite = decoded.flatten(1).isfinite().all(dim=1).tolist()
        if not all(finite):
            image = images[finite.index(False)]
            error = NonFiniteError(
                f"image {image}: {self.decoder.description} made NaN or infinity of finite "
                f"latents; take the VAE that the model was trained with, in float32"
            )
            error.rows = (image,)
            raise error
        return to_pixels(decoded)
