"""The sampler: the published formula, per-image noise, the other schedulers, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from quantized_fixture import fed
from reference.published_ddpm import PublishedDDPM, guided, respaced_timesteps
from torch import Tensor

from ditas_export.diffusion.diffusion_schedules import make_scheduler
from ditas_export.diffusion.options import DiffusionSampler
from ditas_export.diffusion.sampling import (
    image_generator,
    initial_noise,
    sample,
    trajectory,
)
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.errors import NonFiniteError, RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.process import Process
from ditas_export.runtime.torch_runner import TorchRunner


class FakeRunner:
    """Outputs are smooth functions of the inputs, the same in float32 and float64."""

    description = "a formula"

    def __init__(self, config: DiTConfig = TINY) -> None:
        self.config = config
        self.batch_sizes: list[int] = []

    def __call__(self, inputs: ModelInputs) -> Tensor:
        latents, timesteps, class_labels = inputs.values()
        self.batch_sizes.append(len(latents))
        return torch.from_numpy(
            fake_output(latents.numpy(), timesteps.numpy(), class_labels.numpy())
        )

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def fake_output(x: np.ndarray, t: np.ndarray | int, labels: np.ndarray) -> np.ndarray:
    """ε near x at high noise, as a trained model's; a variance across [-1, 1]."""
    step = np.broadcast_to(np.asarray(t), labels.shape)[:, None, None, None].astype(x.dtype)
    label = labels[:, None, None, None].astype(x.dtype)
    eps = x * (0.2 + 0.7 * step / 1000) + 0.1 * np.sin(x[..., ::-1] + label)
    variance = np.cos(x + 0.5 * label + step / 100)
    return np.concatenate([eps, variance], axis=1).astype(x.dtype)


def published(count: int, classes: list[int], cfg_scale: float, noises: Tensor) -> list[np.ndarray]:
    """Return x after every step by the transcription; noises (steps + 1, N, C, H, W)."""
    labels = np.array(classes)

    def model(x: np.ndarray, t: int) -> np.ndarray:
        if cfg_scale == 1.0:
            return fake_output(x, t, labels)
        return guided(fake_output, x, t, labels, null=TINY.null_class, scale=cfg_scale)

    start, *steps = noises.double().numpy()
    return PublishedDDPM(count).sample(model, start, steps)


def noises_of(steps: int, count: int, seed: int) -> Tensor:
    """Return what the images' generators draw: x_T, then one tensor per step."""
    generators = [image_generator(seed, index) for index in range(count)]
    return torch.stack([initial_noise(TINY, generators) for _ in range(steps + 1)])


def test_the_noise_of_an_image_is_pinned() -> None:
    """The same bytes in every version: whoever changes this changes every image of every seed."""
    seeds = [image_generator(*pair).initial_seed() for pair in ((0, 0), (0, 1), (7, 3))]
    assert seeds == GOLDEN_SEEDS
    drawn = torch.randn(4, generator=image_generator(0, 0))
    # torch promises its CPU generator's integers, not the last bits of what it makes of them.
    torch.testing.assert_close(drawn, torch.tensor(GOLDEN_NOISE), rtol=1e-6, atol=1e-6)


GOLDEN_SEEDS = [1609362278, 4263798039, 1403573934]
GOLDEN_NOISE = [-0.929446280, 0.017497033, 0.686381221, 0.654233098]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("steps", [50, 7])
def test_ddpm_is_the_published_sampler_step_for_step(steps: int, cfg_scale: float) -> None:
    classes = [3, 7, 0]
    expected = published(steps, classes, cfg_scale, noises_of(steps, len(classes), seed=5))
    ours = list(trajectory(FakeRunner(), classes=classes, steps=steps, cfg_scale=cfg_scale, seed=5))
    assert [step.timestep for step in ours] == respaced_timesteps(steps)[::-1]
    for step, x in zip(ours, expected, strict=True):
        error = np.linalg.norm(step.next_latents.double().numpy() - x) / np.linalg.norm(x)
        # diffusers' tables are float32: 5e-7 along the way, 5e-6 at t = 0, where 1 − ᾱ is 1e-4.
        assert error < 2e-5, step.timestep


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_spacing": "leading"},
        {"clip_sample": True},
        {"beta_schedule": "scaled_linear"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_the_scheduler_matters(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle tells a sampler with one setting changed from the published one."""

    def altered(sampler: DiffusionSampler, steps: int, _process: Process) -> Any:
        scheduler = make_scheduler(sampler, steps)
        other = type(scheduler).from_config(scheduler.config, **change)
        other.set_timesteps(steps)
        return other

    monkeypatch.setattr("ditas_export.diffusion.diffusion_schedules.make_scheduler", altered)
    ours = sample(FakeRunner(), classes=[3, 7, 0], cfg_scale=1.0, seed=5).double().numpy()
    expected = published(50, [3, 7, 0], 1.0, noises_of(50, 3, seed=5))[-1]
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) > 1e-3


@given(steps=st.integers(2, 1000))
def test_ddpm_time_steps_are_the_published_ones(steps: int) -> None:
    timesteps = make_scheduler("ddpm", steps).timesteps.tolist()
    assert timesteps[0] == 999
    assert timesteps[-1] == 0
    assert all(later < earlier for earlier, later in pairwise(timesteps))
    # The published stride is accumulated and may round a tie the other way.
    assert np.abs(np.array(timesteps[::-1]) - respaced_timesteps(steps)).max() <= 1


@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 2), (1.5, 4), (0.0, 2)])
def test_guidance_doubles_the_batch_where_it_blends(cfg_scale: float, rows: int) -> None:
    runner = FakeRunner()
    sample(runner, classes=[1, 2], steps=4, cfg_scale=cfg_scale)
    assert runner.batch_sizes == [rows] * 4


def test_the_fourth_channel_is_guided_only_on_request() -> None:
    def first_output(**options: Any) -> Tensor:
        return next(iter(trajectory(FakeRunner(), classes=[1], steps=4, **options))).model_output

    plain = first_output(cfg_scale=1.0)
    three = first_output(cfg_scale=4.0)
    every = first_output(cfg_scale=4.0, cfg_channels="all")
    assert torch.equal(three[:, :3], every[:, :3])
    assert not torch.allclose(three[:, :3], plain[:, :3])
    assert torch.equal(three[:, 3:], plain[:, 3:])
    assert not torch.allclose(every[:, 3], plain[:, 3])
    assert torch.equal(every[:, 4:], plain[:, 4:])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_an_image_depends_on_its_index_not_on_its_batch_mates(
    sampler: DiffusionSampler, tiny_dit: DiT
) -> None:
    with TorchRunner(tiny_dit) as runner:
        together = sample(runner, classes=[1, 2, 3], steps=10, sampler=sampler, seed=4)
        alone = sample(runner, classes=[3], steps=10, sampler=sampler, seed=4, image_indices=[2])
    # The noise is the same to the bit; matrix products of other batch sizes round differently.
    assert float((together[2] - alone[0]).norm() / alone.norm()) < 1e-5


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, again, other = (
        sample(FakeRunner(), classes=[1, 2], steps=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@given(seed=st.integers(0, 2**40), first=st.integers(0, 2**32 - 1), gap=st.integers(1, 10**6))
def test_no_two_images_of_a_seed_share_a_generator(seed: int, first: int, gap: int) -> None:
    second = (first + gap) % 2**32
    seeds = [image_generator(seed, index).initial_seed() for index in (first, second)]
    assert seeds[0] != seeds[1]
    assert all(0 <= value < 2**32 for value in seeds)  # what the CPU generator really reads


def test_noise_is_standard_normal_and_uncorrelated_between_neighbours() -> None:
    generators = [image_generator(0, index) for index in range(512)]
    noise = initial_noise(TINY, generators)
    assert abs(float(noise.mean())) < 0.01  # 131072 values: σ of the mean is 0.003
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    flat = noise.flatten(1)
    neighbours = (flat[1:] * flat[:-1]).mean()
    assert abs(float(neighbours)) < 0.01


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_deterministic_samplers_recover_the_image_of_an_ideal_model(
    sampler: DiffusionSampler,
) -> None:
    """With the exact ε of a single image, every sampler must end on that image."""
    target = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    class Ideal(FakeRunner):
        def __call__(self, inputs: ModelInputs) -> Tensor:
            latents, timesteps, _ = inputs.values()
            alpha_bar = alphas_cumprod[timesteps].float()[:, None, None, None]
            eps = (latents - alpha_bar.sqrt() * target) / (1 - alpha_bar).sqrt()
            return torch.cat([eps, torch.full_like(eps, torch.nan)], dim=1)  # variance unused

    out = sample(Ideal(), classes=[0, 1], steps=20, cfg_scale=1.0, sampler=sampler)
    # float32 rounding, amplified by 1/√ᾱ = 150 at the first step.
    torch.testing.assert_close(out, target.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [20, 500])
def test_dpmpp_stays_finite_up_to_its_limit(steps: int) -> None:
    out = sample(FakeRunner(), classes=[1], steps=steps, sampler="dpm++")
    assert out.isfinite().all()


def test_ddim_strides_evenly_down_to_zero() -> None:
    timesteps = make_scheduler("ddim", 50).timesteps.tolist()
    assert timesteps == list(range(980, -1, -20))


def test_on_step_sees_every_step_and_may_stop_the_loop() -> None:
    seen: list[tuple[int, int, Tensor]] = []
    out = sample(FakeRunner(), classes=[1], steps=4, on_step=lambda *step: seen.append(step))
    assert [(index, timestep) for index, timestep, _ in seen] == [
        (0, 999), (1, 666), (2, 333), (3, 0)
    ]  # fmt: skip
    assert torch.equal(seen[-1][2], out)

    def stop(index: int, timestep: int, latents: Tensor) -> None:
        raise KeyboardInterrupt

    runner = FakeRunner()
    with pytest.raises(KeyboardInterrupt):
        sample(runner, classes=[1], steps=4, on_step=stop)
    assert len(runner.batch_sizes) == 1


def test_steps_chain_and_record_what_the_model_saw() -> None:
    steps = list(trajectory(FakeRunner(), classes=[1, 2], steps=5, cfg_scale=1.0, seed=9))
    assert [step.index for step in steps] == list(range(5))
    for step, following in pairwise(steps):
        assert step.next_latents is following.latents
    for step in steps:
        assert torch.equal(step.labels, torch.tensor([1, 2]))
        output = FakeRunner()(fed(step.latents, torch.full((2,), step.timestep), step.labels))
        assert torch.equal(step.model_output, output)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"classes": []}, "no class to sample"),
    "class too big": ({"classes": [3, 10, 99]}, r"classes \[10, 99\] are out of range; .* 0 to 9"),
    "class negative": ({"classes": [-1]}, r"classes \[-1\] are out of range"),
    "one step": ({"steps": 1}, "ddpm takes 2 to 1000 steps, not 1"),
    "too many": ({"steps": 1001}, "ddpm takes 2 to 1000 steps, not 1001"),
    "too many dpm++": ({"steps": 501, "sampler": "dpm++"}, r"dpm\+\+ takes 2 to 500 steps"),
    "odd ddim": ({"steps": 30, "sampler": "ddim"}, "divides 1000, not 30; the nearest is 25"),
    "sampler": ({"sampler": "plms"}, r"'plms' does not follow a diffusion, .* ddpm, ddim, dpm"),
    "sampler of flows": ({"sampler": "euler"}, "'euler' does not follow a diffusion"),
    "shift": ({"shift": 1.0}, "shift=1.0, but ddpm has no shift of times; leave it out"),
    "interval": ({"guidance_interval": (0.7, 0.2)}, "guidance_interval=0.7,0.2; expected two"),
    "interval of nothing": (
        {"guidance_interval": (0.0, 0.5), "cfg_scale": 1.0},
        "guidance_interval=0,0.5, but cfg_scale=1 blends nothing",
    ),
    "scale": ({"cfg_scale": float("nan")}, "cfg_scale=nan is not a finite number"),
    "channels": ({"cfg_channels": "4"}, 'cfg_channels is "3" or "all"'),
    "indices": ({"image_indices": [1, 2]}, "2 image indices for 1 classes; give one each"),
    "index": ({"image_indices": [-1]}, r"image indices \[-1\] are out of range"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("function", [sample, trajectory])
def test_bad_settings_are_refused_before_the_first_step(
    function: Callable[..., object], change: dict[str, Any], message: str
) -> None:
    runner = FakeRunner(replace(TINY))
    with pytest.raises(RunnerError, match=message):
        function(runner, **{"classes": [0], **change})
    assert not runner.batch_sizes


class Overflowing(FakeRunner):
    """Puts out infinity for one image, from a step on, in its row with or without class."""

    def __init__(self, *, row: int, calls: int, checked: bool = False) -> None:
        super().__init__()
        self.row, self.calls, self.checked = row, calls, checked

    def __call__(self, inputs: ModelInputs) -> Tensor:
        output = super().__call__(inputs)
        if len(self.batch_sizes) > self.calls:
            output[self.row, 0, 2, 3] = float("inf")
            if self.checked:  # as our own runners do
                error = NonFiniteError("the runner put out infinity")
                error.rows = (self.row,)
                raise error
        return output


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("checked", [False, True], ids=["runner of one's own", "our runner"])
def test_what_is_not_finite_stops_at_its_step_and_names_the_image(
    sampler: DiffusionSampler, checked: bool
) -> None:
    runner = Overflowing(row=4, calls=2, checked=checked)  # the second image's row without class
    steps: list[int] = []
    timestep = int(make_scheduler(sampler, 10).timesteps[2])
    place = rf"^step 3 of 10, time step {timestep}, image 7: "
    with pytest.raises(NonFiniteError, match=place) as caught:
        sample(
            runner,
            classes=[1, 2, 3],
            steps=10,
            cfg_scale=1.5,
            sampler=sampler,
            image_indices=[6, 7, 8],
            on_step=lambda index, *_: steps.append(index),
        )
    assert steps == [0, 1]
    assert caught.value.rows == (7,)
    assert len(runner.batch_sizes) == 3
    if not checked:
        assert "use bf16 or fp32" in str(caught.value)
