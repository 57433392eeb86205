"""Sampling flows, held against the ODE and the SDE written out in float64; what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY, random_dit
from quantized_fixture import fed
from torch import Tensor

from ditas_export.diffusion.options import FlowSampler
from ditas_export.diffusion.sampling import (
    image_generator,
    initial_noise,
    sample,
    trajectory,
)
from ditas_export.diffusion.schedules import make_schedule, time_words
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.errors import NonFiniteError, RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.process import FlowProcess
from ditas_export.runtime.torch_runner import TorchRunner

SIT = FlowProcess(time_ends_at="data", velocity_towards="data")
REPA = FlowProcess(time_ends_at="noise", velocity_towards="noise")
MIXED = FlowProcess(time_ends_at="data", velocity_towards="noise")
PROCESSES = {"SiT": SIT, "REPA": REPA, "mixed": MIXED}

CLASSES = [3, 7]
NOISE = 4e-6
"""Relative rounding of float32 latents over a few steps."""

Velocity = Callable[[Tensor, float], Tensor]
"""x (N, C, H, W) float64 and σ -> noise − data, guided."""


def config_of(process: FlowProcess) -> DiTConfig:
    return replace(TINY, learn_sigma=False, process=process)


def flow(process: FlowProcess) -> DiT:
    return random_dit(config_of(process))


def guided_velocity(
    process: FlowProcess, *, scale: float, channels: int, interval: tuple[float, float]
) -> Callable[[float], Velocity]:
    """Return what gives the velocity of a step that starts at a σ, all in float64."""
    model = flow(process).double()
    labels, nulls = torch.tensor(CLASSES), torch.full((2,), TINY.null_class)

    def raw(x: Tensor, sigma: float, which: Tensor) -> Tensor:
        t = 1 - sigma if process.time_ends_at == "data" else sigma
        v = model(x, torch.full((2,), t, dtype=torch.float64), which)
        return -v if process.velocity_towards == "data" else v

    def at(start: float) -> Velocity:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            v = raw(x, sigma, labels)
            if interval[0] <= start <= interval[1]:
                null = raw(x, sigma, nulls)
                first = null[:, :channels] + scale * (v - null)[:, :channels]
                v = torch.cat([first, v[:, channels:]], dim=1)
            return v

        return velocity

    return at


def written_out(
    at: Callable[[float], Velocity], x: Tensor, *, heun: bool, steps: int, shift: float
) -> Tensor:
    """Return where the ODE ends: Euler's or Heun's rule, the last step always Euler's."""
    even = [1 - i / steps for i in range(steps + 1)]
    sigmas = [shift * u / (1 + (shift - 1) * u) for u in even]
    for i in range(steps):
        h, velocity = sigmas[i + 1] - sigmas[i], at(sigmas[i])
        slope = velocity(x, sigmas[i])
        if heun and i + 1 < steps:
            slope = (slope + velocity(x + h * slope, sigmas[i + 1])) / 2
        x = x + h * slope
    return x


def start(seed: int = 0) -> Tensor:
    return initial_noise(TINY, [image_generator(seed, index) for index in range(len(CLASSES))])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    ("scale", "interval"), [(1.0, None), (3.0, None), (3.0, (0.15, 0.65))], ids=str
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_ode_samplers_follow_the_equation(
    process: FlowProcess,
    sampler: FlowSampler,
    shift: float,
    scale: float,
    interval: tuple[float, float] | None,
) -> None:
    channels = 4 if process.velocity_towards == "noise" else 3
    at = guided_velocity(process, scale=scale, channels=channels, interval=interval or (0, 1))
    heun = sampler == "heun"
    wanted = written_out(at, start().double(), heun=heun, steps=8, shift=shift)
    with TorchRunner(flow(process)) as runner:
        found = sample(
            runner,
            classes=CLASSES,
            steps=8,
            sampler=sampler,
            shift=shift,
            cfg_scale=scale,
            guidance_interval=interval,
        )
    assert error(found, wanted) < NOISE
    others = [
        written_out(at, start().double(), heun=not heun, steps=8, shift=shift),
        written_out(at, start().double(), heun=heun, steps=8, shift=4 - shift),
    ]
    assert all(error(found, other) > 100 * NOISE for other in others)  # the oracle tells them apart


def published_sde(
    at: Callable[[float], Velocity], draws: Iterator[Tensor], *, steps: int
) -> Tensor:
    """Return where Euler-Maruyama ends: the score by the general formula, √(2t) of noise."""
    times = torch.linspace(1.0, 0.04, steps, dtype=torch.float64).tolist()
    x = next(draws)
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        alpha, sigma, alpha_rate, sigma_rate = 1 - t, t, -1.0, 1.0
        v, h = at(t)(x, t), following - t
        ratio = alpha / alpha_rate
        score = (ratio * v - x) / (sigma**2 - ratio * sigma_rate * sigma)
        diffusion = 2 * t
        x = x + (v - 0.5 * diffusion * score) * h
        if following:
            x = x + (diffusion * abs(h)) ** 0.5 * next(draws)
    return x


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_euler_maruyama_is_the_published_sampler(process: FlowProcess, scale: float) -> None:
    generators = [image_generator(0, index) for index in range(len(CLASSES))]
    draws = (initial_noise(TINY, generators).double() for _ in range(20))
    channels = 4 if process.velocity_towards == "noise" else 3
    at = guided_velocity(process, scale=scale, channels=channels, interval=(0, 1))
    wanted = published_sde(at, draws, steps=20)
    with TorchRunner(flow(process)) as runner:
        found = sample(runner, classes=CLASSES, steps=20, sampler="euler-maruyama", cfg_scale=scale)
    assert error(found, wanted) < NOISE
    assert next(draws, None) is None  # a draw for every step but the last, and the start


class Resigned:
    """A flow in the other convention, of the same network."""

    def __init__(self, runner: TorchRunner, process: FlowProcess) -> None:
        self.runner, self.device, self.description = runner, runner.device, "the other way round"
        self.own, self.config = runner.config.process, replace(runner.config, process=process)

    def __call__(self, inputs: ModelInputs) -> Tensor:
        latents, timesteps, class_labels = inputs.values()
        assert isinstance(self.own, FlowProcess)
        assert isinstance(self.config.process, FlowProcess)
        other = self.config.process
        turned = other.time_ends_at != self.own.time_ends_at
        output = self.runner(fed(latents, 1 - timesteps if turned else timesteps, class_labels))
        return output if other.velocity_towards == self.own.velocity_towards else -output


@pytest.mark.parametrize("process", [REPA, MIXED], ids=["REPA", "mixed"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_a_network_resigned_gives_the_same_pictures(
    sampler: FlowSampler, process: FlowProcess
) -> None:
    asked: dict[str, Any] = {"classes": CLASSES, "steps": 6, "sampler": sampler}
    with closing(TorchRunner(flow(SIT))) as runner:
        ours = sample(runner, cfg_channels="all", **asked)
        theirs = sample(Resigned(runner, process), cfg_channels="all", **asked)  # type: ignore[arg-type]
    assert error(theirs, ours.double()) < NOISE


class Recording:
    """A flow whose velocity is its latents: it keeps what it is fed."""

    description = "a formula"
    device = torch.device("cpu")

    def __init__(self, process: FlowProcess = SIT) -> None:
        self.config = config_of(process)
        self.fed: list[tuple[int, float]] = []

    def __call__(self, inputs: ModelInputs) -> Tensor:
        latents, timesteps, class_labels = inputs.values()
        assert timesteps.dtype == torch.float32
        assert class_labels.dtype == torch.int64
        (time,) = set(timesteps.tolist())
        self.fed.append((len(latents), time))
        return latents


@pytest.mark.parametrize("process", [SIT, REPA], ids=["SiT", "REPA"])
def test_models_are_fed_the_noise_level_or_what_is_missing_to_one(process: FlowProcess) -> None:
    runner = Recording(process)
    steps = list(trajectory(runner, classes=CLASSES, steps=4, cfg_scale=1.0))  # type: ignore[arg-type]
    levels = [1.0, 0.75, 0.5, 0.25]
    times = [1 - level for level in levels] if process is SIT else levels
    assert runner.fed == [(2, time) for time in times]
    assert [step.timestep for step in steps] == times
    assert [step.index for step in steps] == list(range(4))


def test_heun_calls_the_model_twice_but_in_the_last_step() -> None:
    runner = Recording(REPA)
    seen: list[int] = []
    sample(
        runner,  # type: ignore[arg-type]
        classes=CLASSES,
        steps=4,
        sampler="heun",
        cfg_scale=1.0,
        on_step=lambda index, *_: seen.append(index),
    )
    assert [time for _, time in runner.fed] == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_an_interval_halves_the_batches_outside_of_it(sampler: FlowSampler) -> None:
    """Both ends belong to it; Heun's second call is guided as its step is, as published."""
    runner = Recording(REPA)
    sample(
        runner,  # type: ignore[arg-type]
        classes=CLASSES,
        steps=10,
        sampler=sampler,
        cfg_scale=2.0,
        guidance_interval=(0.3, 0.7),
    )
    guided = [0.7, 0.6, 0.5, 0.4, 0.3]
    rows = [4 if round(1 - i / 10, 1) in guided else 2 for i in range(10)]
    if sampler == "heun":
        rows = [row for each in rows[:-1] for row in (each, each)] + rows[-1:]
    assert [count for count, _ in runner.fed] == rows


def test_one_step_goes_all_the_way() -> None:
    noise = start()
    for sampler in ("euler", "heun"):
        out = sample(Recording(), classes=CLASSES, steps=1, sampler=sampler, cfg_scale=1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(out, noise + noise)  # x + 1 · v towards the data


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
@pytest.mark.parametrize("steps", [2, 250, 10_000])
def test_times_are_in_order_and_apart_in_float32(sampler: FlowSampler, steps: int) -> None:
    for shift in (None,) if sampler == "euler-maruyama" else (None, 0.01, 100.0):
        for process in (SIT, REPA):
            moments = make_schedule(sampler, steps, process, shift=shift).moments
            times = torch.tensor([moment.time for moment in moments], dtype=torch.float32)
            way = times.diff() * (1 if process is SIT else -1)
            assert len(times) == steps
            assert bool((way > 0).all())
            assert 0 <= float(times.min()) <= float(times.max()) <= 1


def test_without_a_sampler_flows_take_euler_and_publish_their_channels() -> None:
    for process, channels in ((SIT, "3"), (REPA, "all")):
        with TorchRunner(flow(process)) as runner:
            asked: dict[str, Any] = {"classes": CLASSES, "steps": 3, "cfg_scale": 2.0}
            plain = sample(runner, **asked)
            named = sample(runner, **asked, sampler="euler", cfg_channels=channels, shift=1.0)
        assert torch.equal(plain, named)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "diffusion's": (
        {"sampler": "ddpm"},
        "'ddpm' does not follow a flow, which this model is; choose one of euler, heun, euler-mar",
    ),
    "unknown": ({"sampler": "plms"}, "'plms' does not follow a flow"),
    "no step": ({"steps": 0}, "euler takes 1 to 10000 steps, not 0"),
    "too many": ({"steps": 10_001, "sampler": "heun"}, "heun takes 1 to 10000 steps"),
    "one of the SDE": ({"steps": 1, "sampler": "euler-maruyama"}, "takes 2 to 10000 steps, not 1"),
    "shift of the SDE": (
        {"shift": 1.0, "sampler": "euler-maruyama"},
        "shift=1.0, but euler-maruyama keeps to the published times",
    ),
    "no shift": ({"shift": 0.0}, "shift=0.0; expected 0.01 to 100; 1 is none"),
    "odd shift": ({"shift": float("nan")}, "shift=nan; expected 0.01 to 100"),
    "interval": ({"guidance_interval": (0.5, 1.5)}, "guidance_interval=0.5,1.5; expected two"),
    "half an interval": ({"guidance_interval": (0.5,)}, "guidance_interval=0.5; expected two"),
    "odd interval": ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval=nan,1; exp"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_settings_are_refused_before_the_first_step(
    change: dict[str, Any], message: str
) -> None:
    runner = Recording()
    with pytest.raises(RunnerError, match=message):
        sample(runner, **{"classes": [0], **change})  # type: ignore[arg-type]
    assert not runner.fed


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_what_is_not_finite_names_its_time(sampler: FlowSampler) -> None:
    class Overflowing(Recording):
        def __call__(self, inputs: ModelInputs) -> Tensor:
            _, timesteps, _ = inputs.values()
            output = super().__call__(inputs).clone()
            output[1] *= float("inf") if timesteps[0] > 0.2 else 1
            return output

    levels = make_schedule(sampler, 10, SIT).moments
    index = next(i for i, moment in enumerate(levels) if moment.time > 0.2 + 1e-6)
    if sampler == "heun":
        index -= 1  # its second call is at the next step's time
    place = f"^step {index + 1} of 10, {time_words(levels[index].time)}, image 1: "
    with pytest.raises(NonFiniteError, match=place):
        sample(Overflowing(), classes=CLASSES, steps=10, sampler=sampler, cfg_scale=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_an_image_depends_on_its_index_not_on_its_batch_mates(sampler: FlowSampler) -> None:
    with TorchRunner(flow(SIT)) as runner:
        asked: dict[str, Any] = {"steps": 5, "sampler": sampler, "seed": 4}
        together = sample(runner, classes=[1, 2, 3], **asked)
        alone = sample(runner, classes=[3], image_indices=[2], **asked)
    assert error(together[2:], alone.double()) < 1e-5  # products of other sizes round differently


def test_diffusions_have_an_interval_of_time_steps() -> None:
    class Diffusion(Recording):
        def __init__(self) -> None:
            super().__init__()
            self.config = TINY

        def __call__(self, inputs: ModelInputs) -> Tensor:
            latents, timesteps, _ = inputs.values()
            self.fed.append((len(latents), int(timesteps[0])))
            return torch.cat([latents, torch.zeros_like(latents)], dim=1)

    runner = Diffusion()
    sample(runner, classes=[1], steps=4, cfg_scale=2.0, guidance_interval=(0.3, 0.7))  # type: ignore[arg-type]
    assert runner.fed == [(1, 999), (2, 666), (2, 333), (1, 0)]
