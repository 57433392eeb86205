"""The process of a model: what is refused, what travels, and that samplers follow it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, random_dit
from reference.published_ddpm import (
    PublishedDDPM,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
)
from test_sampling import FakeRunner, fake_output
from torch import Tensor

from ditas_export.diffusion.diffusion_schedules import make_scheduler
from ditas_export.diffusion.sampling import image_generator, initial_noise, sample, trajectory
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.errors import CheckpointError, OtherModelError, RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.families.identity import ModelIdentity, identity_of
from ditas_export.process import DIT_PROCESS, Process, VaeFactors

PROCESS = Process(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    train_timesteps=500,
    variance="fixed_small",
    vae=VaeFactors(scaling_factor=0.13025, shift_factor=0.1),
)


class OtherOutput(FakeRunner):
    """As the fake runner, ε alone where the variance is not learned."""

    def __call__(self, inputs: ModelInputs) -> Tensor:
        return super().__call__(inputs)[:, : self.config.out_channels]


@pytest.mark.parametrize("learn_sigma", [True, False], ids=["2C", "C"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(
    ("process", "betas"),
    [
        ({}, linear_betas(1e-4, 0.02, 1000)),
        ({"beta_start": 2e-4, "beta_end": 0.01}, linear_betas(2e-4, 0.01, 1000)),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            scaled_linear_betas(0.00085, 0.012, 1000),
        ),
        ({"beta_schedule": "squaredcos_cap_v2"}, cosine_betas(1000)),
        ({"beta_schedule": "squaredcos_cap_v2", "train_timesteps": 400}, cosine_betas(400)),
    ],
    ids=["linear", "other-ends", "scaled_linear", "cosine", "cosine-400"],
)
def test_ddpm_follows_the_process(
    process: dict[str, Any], betas: np.ndarray, variance: Any, learn_sigma: bool
) -> None:
    config = replace(TINY, learn_sigma=learn_sigma, process=Process(variance=variance, **process))
    assert_published(config, betas, variance)


@pytest.mark.parametrize("steps", [50, 5])
def test_a_learned_variance_follows_the_cosine_schedule(steps: int) -> None:
    config = replace(TINY, process=Process(beta_schedule="squaredcos_cap_v2"))
    assert_published(config, cosine_betas(1000), "learned_range", steps=steps)


def assert_published(
    config: DiTConfig, betas: np.ndarray, variance: str, *, steps: int = 20
) -> None:
    """Hold every step against the transcription."""
    classes = [3, 7]
    generators = [image_generator(5, index) for index in range(len(classes))]
    noises = [initial_noise(config, generators).double().numpy() for _ in range(steps + 1)]
    labels = np.array(classes)
    expected = PublishedDDPM(steps, betas=betas, variance=variance).sample(
        lambda x, t: fake_output(x, t, labels)[:, : config.out_channels], noises[0], noises[1:]
    )
    runner = OtherOutput(config)
    found = trajectory(runner, classes=classes, steps=steps, cfg_scale=1.0, seed=5)
    for step, x in zip(found, expected, strict=True):
        error = np.linalg.norm(step.next_latents.double().numpy() - x) / np.linalg.norm(x)
        # diffusers' tables are float32; the cosine schedule starts where ᾱ is 2e-9.
        assert error < 5e-4, step.timestep


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_other_samplers_follow_the_schedule(sampler: Any) -> None:
    scheduler = make_scheduler(sampler, 50, PROCESS)
    kept = np.cumprod(1.0 - scaled_linear_betas(0.00085, 0.012, 500))
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), kept, rtol=1e-4)
    assert int(scheduler.timesteps.max()) < 500
    with pytest.raises(RunnerError, match=r"takes 2 to (500|250) steps, not 501"):
        make_scheduler(sampler, 501, PROCESS)


@pytest.mark.parametrize("labels", [{"null_row": False}, {"num_classes": 0}], ids=str)
def test_a_model_that_cannot_be_guided_refuses_guidance(labels: dict[str, Any]) -> None:
    config = replace(TINY, **labels)
    runner = FakeRunner(config)
    sample(runner, classes=[0], steps=2, cfg_scale=1.0)
    assert runner.batch_sizes == [1, 1]
    for scale in (1.5, 0.0):
        with pytest.raises(RunnerError, match=r"has no (null class|classes) to guide with"):
            sample(runner, classes=[0], steps=2, cfg_scale=scale)


@pytest.mark.parametrize("scale", [0.5, -1.0, 0.999, float("nan"), float("inf")])
def test_scales_that_mean_nothing(scale: float) -> None:
    with pytest.raises(RunnerError, match=r"guidance starts at 1|not a finite number"):
        sample(FakeRunner(), classes=[0], steps=2, cfg_scale=scale)


def test_a_scale_of_zero_is_the_null_class() -> None:
    config = replace(TINY, num_classes=12)  # a null class is a class as any other to the formula
    nulls = sample(FakeRunner(), classes=[3], steps=4, cfg_scale=0.0)
    named = sample(FakeRunner(config), classes=[TINY.null_class], steps=4, cfg_scale=1.0)
    assert torch.equal(nulls, named)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "sigmoid"},
        {"beta_start": 0.0},
        {"beta_start": float("nan")},
        {"beta_start": "0.1"},
        {"beta_end": 1.0},
        {"beta_end": 1e-5},
        {"train_timesteps": 1},
        {"train_timesteps": 1000.0},
        {"train_timesteps": True},
        {"prediction": "v_prediction"},
        {"variance": "learned"},
        {"vae": {"scaling_factor": 0.0}},
        {"vae": {"scaling_factor": 1.0, "shift_factor": float("inf")}},
        {"vae": 0.18},
        {"sigma": 1},
    ],
    ids=str,
)
def test_a_process_that_is_not_followed(change: dict[str, Any]) -> None:
    named = "|".join((*change, "scaling_factor", "shift_factor", "VaeFactors", "betas"))
    with pytest.raises(CheckpointError, match=named):
        Process.from_dict(DIT_PROCESS_DICT | change)


DIT_PROCESS_DICT = TINY.to_dict()["process"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 0},
        {"num_heads": 4.0},
        {"depth": True},
        {"hidden_size": "48"},
        {"num_classes": -1},
        {"num_classes": 0, "null_row": False},
        {"null_row": 1},
        {"layer_norm_eps": 0.0},
        {"mlp_norm_eps": float("nan")},
        {"frequency_shift": 128},
        {"learn_sigma": False},  # with a learned variance
        {"process": []},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_configuration_that_no_model_has(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        DiTConfig.from_dict(TINY.to_dict() | change)


def test_a_configuration_survives_json_and_earlier_files_mean_the_defaults() -> None:
    config = replace(TINY, null_row=False, learn_sigma=False, process=PROCESS)
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    earlier = TINY.to_dict()
    for name in ("null_row", "learn_sigma", "process"):
        del earlier[name]
    assert DiTConfig.from_dict(earlier) == TINY
    assert TINY.process == DIT_PROCESS


def changed(config: DiTConfig, name: str) -> DiTConfig:
    """Return a configuration of the same tensors with one field changed."""
    values: dict[str, Any] = {
        "input_size": 16,
        "patch_size": 4,
        "in_channels": 3,
        "hidden_size": 96,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "num_classes": 9,
        "null_row": False,
        "learn_sigma": False,
        "layer_norm_eps": 1e-5,
        "mlp_norm_eps": 1e-5,
        "frequency_shift": 1,
        "process": replace(config.process, beta_end=0.01),
    }
    if name == "learn_sigma":
        fixed = replace(config.process, variance="fixed_small")
        return replace(config, learn_sigma=False, process=fixed)
    return replace(config, **{name: values[name]})


@pytest.mark.parametrize("name", [field.name for field in fields(DiTConfig)])
def test_every_field_is_part_of_the_identity(name: str) -> None:
    one = ModelIdentity(tensors_sha256="0" * 64, config=TINY)
    other = replace(one, config=changed(TINY, name))
    assert one.fingerprint != other.fingerprint
    named = "beta_end 0.02, now 0.01" if name == "process" else name
    with pytest.raises(OtherModelError, match=named):
        one.require_same(other, what="it", remedy="Do something")


@pytest.mark.parametrize("name", [field.name for field in fields(Process)])
def test_every_field_of_the_process_is_part_of_the_identity(name: str) -> None:
    one = ModelIdentity(tensors_sha256="0" * 64, config=TINY)
    value = getattr(PROCESS, name)
    if name == "prediction":
        assert value == "epsilon"  # the only one there is
        return
    other = replace(one, config=replace(TINY, process=replace(DIT_PROCESS, **{name: value})))
    assert one.fingerprint != other.fingerprint


def test_the_identity_is_that_of_the_tensors_too() -> None:
    model = random_dit()
    before = identity_of(model)
    assert identity_of(random_dit()) == before
    assert ModelIdentity.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-3  # type: ignore[union-attr, index, operator]
    after = identity_of(model)
    assert after.config == before.config
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", [{"tensors_sha256": "x"}, {"config": 3}, {"more": 1}], ids=str)
def test_a_damaged_identity(damage: dict[str, Any]) -> None:
    stated = ModelIdentity(tensors_sha256="0" * 64, config=TINY).to_dict()
    with pytest.raises(CheckpointError):
        ModelIdentity.from_dict(stated | damage)
    with pytest.raises(CheckpointError, match="without config"):
        ModelIdentity.from_dict({"tensors_sha256": "0" * 64})


def test_a_model_without_learned_variance_puts_out_its_noise_alone() -> None:
    config = replace(TINY, learn_sigma=False, process=Process(variance="fixed_large"))
    model: DiT = random_dit(config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = model(latents, torch.tensor([999, 0]), torch.tensor([1, 10]))
    assert tuple(out.shape) == (2, 4, 8, 8)
