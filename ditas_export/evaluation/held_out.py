"""Held-out trajectories: what models sample to be judged, from noise that calibration never sees.

All that sample do so with the same noise, and are probed at the same x_t. Seeds are added until the
mean over images is known well enough. What the float model samples is the same for every file of
it: it can be made beforehand, and is kept with the quantized model, as is what a file sampled: the
same numbers need not be sampled twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.guidance import blends
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import trajectory
from ditas_export.diffusion.schedules import time_words
from ditas_export.errors import NonFiniteError
from ditas_export.evaluation.inputs import inputs_at
from ditas_export.evaluation.metrics import snr_db
from ditas_export.families.base import (
    Conditions,
    FamilyModel,
    ModelConfig,
    ModelInputs,
    output_shape,
)
from ditas_export.families.registry import conditions_of, family_of
from ditas_export.figures import confidence_interval, finite_or_none
from ditas_export.kept_parts import KeptParts, Part
from ditas_export.runtime.torch_runner import TorchRunner

PROBES = 5
"""Steps of a trajectory at which single-step outputs are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationSettings:
    """How much is sampled to verify a file."""

    seeds: tuple[int, ...]  # in turn, as many as settle the mean
    classes: tuple[int, ...]  # of every seed
    steps: int = 25
    cfg_scale: float = 1.5
    least_seeds: int = 2
    widest_db: float = 2.0  # of the mean's 95 % interval, where sampling ends

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """The seeds that are sampled whatever they give."""
        return self.seeds[: self.least_seeds]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalLatents:
    """SNR of final latents against float's, in dB."""

    seeds_db: tuple[float, ...]  # of all images of a seed together
    images_db: tuple[float, ...]  # of each image alone

    @classmethod
    def between(cls, reference: Sampled, other: Sampled) -> FinalLatents:
        """Return the figures of what `other` sampled, seed by seed and image by image."""
        pairs = [(wanted, got) for wanted, got in zip(reference.finals, other.finals, strict=False)]
        return cls(
            seeds_db=tuple(snr_db(*pair) for pair in pairs),
            images_db=tuple(
                snr_db(*images) for pair in pairs for images in zip(*pair, strict=True)
            ),
        )

    @property
    def mean_db(self) -> float:
        """Mean over images."""
        return sum(self.images_db) / len(self.images_db)

    @property
    def interval_db(self) -> tuple[float, float]:
        """95 % interval of that mean, over noise: every seed draws the same classes."""
        return confidence_interval(self.images_db, strata=len(self.images_db) // len(self.seeds_db))

    def seeds_needed(self, settings: VerificationSettings) -> int:
        """Return how many seeds are expected to settle the mean, as many as there are now at least.

        An interval narrows with the root of the number of images; one that is not finite is no
        matter of more of them.
        """
        now = len(self.seeds_db)
        low, high = self.interval_db
        if not math.isfinite(high - low) or high - low <= settings.widest_db:
            return now
        wanted = math.ceil(now * ((high - low) / settings.widest_db) ** 2)
        return min(max(wanted, now + 1), len(settings.seeds))

    def to_list(self) -> list[float | None]:
        """Return the figures by seed as JSON values."""
        return [finite_or_none(value) for value in self.seeds_db]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """What one backend gave at the probed inputs."""

    outputs: list[Tensor]
    runtime: str
    not_finite: str | None  # why there are no numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """What one backend sampled."""

    finals: list[Tensor]  # final latents, one per seed
    not_finite: str | None


FLOAT = "float"
"""The name under which the float model samples; the first to do so, and never allowed to fail."""


FILE, FAKE = "file", "fake"
"""The names under which the file samples, and the fake-quantized forward where no file runs."""

STATES = "states"
"""What goes with the first trajectory of a backend that is judged: its x_t where the float model is
probed, (probes, images, C, H, W)."""


@dataclass(slots=True, kw_only=True)
class HeldOut:
    """Runs one backend after the other; the float model gathers the inputs that are probed."""

    settings: VerificationSettings
    config: ModelConfig
    conditions: Conditions
    floats: KeptParts  # of the float model, for whatever file of it
    others: KeptParts  # of one file and its fake-quantized forward
    count: Callable[[int], None] = lambda _: None
    probes: int = PROBES  # of the steps of a trajectory, at most twice as many
    inputs: list[ModelInputs] = field(default_factory=list)

    def sampled(self, name: str, runner: Callable[[], Runner], seeds: Sequence[int]) -> Sampled:
        """Sample seeds, but for those that are kept.

        Raises:
            NonFiniteError: the float model itself puts out NaN or infinity.
        """
        parts: list[Part] = []
        for seed in seeds:
            make = partial(self._trajectory, name, runner, seed)
            found = self._store(name).find(f"{name}-{seed}")
            if found is not None and self._is_trajectory(name, seed, found):
                self.count(self.settings.steps)
            else:
                found = self._store(name).make(f"{name}-{seed}", make)
            parts.append(found)
            self.inputs = self.inputs or self._probed_inputs(found)
        return Sampled(
            finals=[part.tensors["final"] for part in parts],
            not_finite=_first_not_finite(*parts),
        )

    def probed(self, name: str, runner: Callable[[], Runner]) -> Probed:
        """Answer at the probed inputs, unless the answers are kept."""
        store, key = self._store(name), f"{name}-probes"
        part = store.find(key)
        if part is None or not self._are_answers(part):
            part = store.make(key, partial(self._answers, runner))
        return Probed(
            outputs=[part.tensors[str(index)] for index in range(len(self.inputs))],
            runtime=part.facts["runtime"],
            not_finite=_first_not_finite(part),
        )

    def kept(self, name: str, part: str) -> Mapping[str, Tensor]:
        """Return the tensors of a part that a backend has made."""
        found = self._store(name).find(part)
        assert found is not None  # made in this verification, or kept before it
        return found.tensors

    def _store(self, name: str) -> KeptParts:
        """Return where the parts of a backend are kept."""
        return self.floats if name == FLOAT else self.others

    @property
    def _latents_shape(self) -> tuple[int, ...]:
        """(images, C, …) of one seed."""
        return (len(self.settings.classes), *self.config.latent_shape)

    def _is_trajectory(self, name: str, seed: int, part: Part) -> bool:
        """Return whether a kept part is what `_trajectory` makes."""
        images, *shape = self._latents_shape
        rows = images * (2 if blends(self.settings.cfg_scale) else 1)
        wanted, probes = {"final": (images, *shape)}, len(self.probed_steps)
        if name == FLOAT and seed == self.settings.seeds[0]:
            row = self.conditions.inputs(torch.tensor(self.settings.classes[:1]))
            what, when, *others = self.names
            wanted |= {what: (probes, rows, *shape), when: (probes, rows)}
            wanted |= {name: (probes, rows, *row[name].shape[1:]) for name in others}
        elif seed == self.settings.seeds[0]:
            wanted |= {STATES: (probes, images, *shape)}
        return {name: tuple(tensor.shape) for name, tensor in part.tensors.items()} == wanted

    @property
    def names(self) -> list[str]:
        """What a probe is made of: the model's inputs, in order."""
        return [each.name for each in family_of(self.config).inputs(self.config)]

    def _are_answers(self, part: Part) -> bool:
        """Return whether a kept part is what `_answers` makes at the probed inputs."""
        shapes = {tuple(tensor.shape[1:]) for tensor in part.tensors.values() if tensor.ndim > 1}
        return (
            list(part.tensors) == [str(index) for index in range(len(self.inputs))]
            and shapes <= {output_shape(self.config)}
            and isinstance(part.facts.get("runtime"), str)
        )

    def _probed_inputs(self, part: Part) -> list[ModelInputs]:
        """Return the inputs that were gathered with a seed; none where it is not the first."""
        names = self.names
        if names[0] not in part.tensors:
            return []
        stacked = (part.tensors[name] for name in names)
        return [
            ModelInputs(dict(zip(names, tensors, strict=True)))
            for tensors in zip(*stacked, strict=True)
        ]

    @property
    def probed_steps(self) -> range:
        """Steps of a trajectory at which models are probed."""
        return range(0, self.settings.steps, max(1, self.settings.steps // self.probes))

    def _trajectory(self, name: str, runner: Callable[[], Runner], seed: int) -> Part:
        """Sample one seed; with its final latents goes what the very first run is probed at."""
        settings, states = self.settings, list[Tensor]()
        probes: list[ModelInputs] = []
        facts: dict[str, Any] = {}
        steps = trajectory(
            runner(),
            classes=settings.classes,
            conditions=self.conditions,
            steps=settings.steps,
            cfg_scale=settings.cfg_scale,
            seed=seed,
        )
        try:
            for step in steps:
                if step.index in self.probed_steps:
                    states.append(step.latents)
                    if not self.inputs:
                        probes.append(
                            inputs_at(step, settings.cfg_scale, self.config, self.conditions)
                        )
                last = step.next_latents
                self.count(1)
        except NonFiniteError as error:
            if name == FLOAT:
                raise
            last = torch.full(self._latents_shape, torch.nan)
            facts["not_finite"] = str(error)
            states += [last] * (len(self.probed_steps) - len(states))
        gathered = {
            name: torch.stack([probe[name] for probe in probes])
            for name in (self.names if probes else ())
        }
        if name != FLOAT and seed == settings.seeds[0]:
            gathered[STATES] = torch.stack(states)
        return Part(tensors={"final": last, **gathered}, facts=facts)

    def _answers(self, runner: Callable[[], Runner]) -> Part:
        """Answer at the probed inputs."""
        facts: dict[str, Any] = {"runtime": runner().description}
        answers = {}
        for index, probe in enumerate(self.inputs):
            try:
                answer = runner()(probe)
            except NonFiniteError as error:
                answer = torch.full((1,), torch.nan)
                where = time_words(probe.timesteps[0].item())
                facts.setdefault("not_finite", f"{where}: {error}")
            answers[str(index)] = answer
        return Part(tensors=answers, facts=facts)


def sample_held_out(
    model: FamilyModel,
    settings: VerificationSettings,
    kept: KeptParts,
    *,
    conditions: Conditions | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Let the float model sample what every file of it will be held against, into `kept`.

    Args:
        model: float32.
        settings: its first seeds are sampled.
        kept: of this model and these settings alone; what it has is not sampled again.
        conditions: what the classes of the settings name; the model's own if not given.
        device: where the model computes.
        on_step: called with (sampling steps done, in all).

    Raises:
        NonFiniteError: the model puts out NaN or infinity.
    """
    done, total = 0, len(settings.first_seeds) * settings.steps

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        on_step(done, total)

    held_out = HeldOut(
        settings=settings,
        config=model.config,
        conditions=conditions_of(model.config) if conditions is None else conditions,
        floats=kept,
        others=KeptParts(),
        count=count,
    )
    with opened(lambda: TorchRunner(model, device=device)) as runner:
        held_out.sampled(FLOAT, runner, settings.first_seeds)
        held_out.probed(FLOAT, runner)


@contextmanager
def opened(open_runner: Callable[[], Runner]) -> Iterator[Callable[[], Runner]]:
    """Yield what gives a runner, opened when it is first asked for and closed in the end."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(open_runner()))


def _first_not_finite(*parts: Part) -> str | None:
    """Return where the first of some parts put out NaN or infinity, None if none did."""
    return next((part.facts["not_finite"] for part in parts if "not_finite" in part.facts), None)
