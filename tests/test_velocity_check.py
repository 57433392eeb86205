"""A flow's velocity holds the noise, with its family's sign and end; others are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import random_dit
from flows import State, flow_config, turned
from torch import Tensor

from ditas_export.calibration.noise_check import check_noise
from ditas_export.calibration.velocity_check import LEAST_VELOCITY_DB
from ditas_export.dit.flow_tensors import velocity_alone
from ditas_export.dit.model import DiT, DiTConfig, initialize_adaln_zero
from ditas_export.families.load import BUNDLED_FLOW, BUNDLED_MODEL, load_model
from ditas_export.process import DIT_PROCESS, FlowProcess


@pytest.fixture(scope="module")
def sit() -> DiT:
    return load_model(BUNDLED_FLOW).model


@pytest.fixture(scope="module")
def dit() -> DiT:
    return load_model(BUNDLED_MODEL).model


def model_of(state: State, config: DiTConfig) -> DiT:
    model = DiT(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(requires_grad=False)


def as_dit(config: DiTConfig) -> DiTConfig:
    return replace(config, process=replace(DIT_PROCESS, variance="fixed_large"))


def test_the_bundled_flow_holds_noise(sit: DiT) -> None:
    check = check_noise(sit)
    assert check.passes
    assert check.warning is None
    assert check.timestep == 0.0
    assert check.to_dict()["finding"] is None
    assert 20 < check.worst_db < 30
    assert check.to_dict()["least_db"] == LEAST_VELOCITY_DB
    assert check == check_noise(sit), "the same noise every time"


def test_its_twin_holds_it_at_the_other_end(sit: DiT) -> None:
    twin = model_of(turned(sit.state_dict()), flow_config(sit.config, "repa"))
    check, theirs = check_noise(twin), check_noise(sit)
    assert check.passes
    assert check.timestep == 1.0
    assert check.class_db == pytest.approx(theirs.class_db, abs=0.01)
    assert check.null_db == pytest.approx(theirs.null_db, abs=0.01)


@pytest.mark.parametrize(("signed", "told"), [("sit", "repa"), ("repa", "sit")])
def test_a_swapped_family_is_named(sit: DiT, signed: str, told: str) -> None:
    state = sit.state_dict() if signed == "sit" else turned(sit.state_dict())
    check = check_noise(model_of(state, flow_config(sit.config, told)))
    assert not check.passes
    assert check.finding == f"its output looks as with --family {signed}"
    assert check.warning is not None
    assert f"fed pure noise at t = {check.timestep:g}, the model returns it to" in check.warning
    assert "\n" not in check.warning
    check = check_noise(model_of(state, as_dit(sit.config)))
    assert not check.passes
    assert check.finding == f"its output looks as with --family {signed}"


def test_signs_of_neither_family_are_told(sit: DiT) -> None:
    state = sit.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name]
    check = check_noise(model_of(state, sit.config))
    assert "whose t = 1 at the data and whose velocity is towards the noise" in check.finding
    process = FlowProcess(velocity_towards="noise")
    assert check_noise(model_of(state, replace(sit.config, process=process))).passes


@pytest.mark.parametrize("family", ["sit", "repa"])
def test_a_dit_told_to_be_a_flow_is_named(dit: DiT, family: str) -> None:
    config = flow_config(dit.config, family)
    check = check_noise(model_of(velocity_alone(dit.state_dict(), config), config))
    assert check.finding == "it returns the noise at step 999, as with --family dit"


def test_untrained_flows_are_warned_of(sit: DiT) -> None:
    for seed in (0, 1):
        check = check_noise(random_dit(sit.config, seed=seed))
        assert check.class_db < 0
        assert "times the noise, as where nothing was trained" in check.finding
    fresh = DiT(sit.config)
    initialize_adaln_zero(fresh, seed=0)
    assert "+0.0 times the noise, as where nothing was trained" in check_noise(fresh).finding


Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


def answering(config: DiTConfig, answer: Answer) -> DiT:
    model = random_dit(config)
    model.forward = lambda **inputs: answer(*inputs.values())  # type: ignore[method-assign]
    return model


def test_the_figure_is_the_formula(sit: DiT) -> None:
    """Of the opposite of nine tenths of the noise and any image, 20 dB."""
    image = torch.linspace(-3, 3, 256).reshape(1, 1, 16, 16)
    check = check_noise(answering(sit.config, lambda x, t, y: (image - 0.9 * x) * (1 - t.mean())))
    assert check.class_db == pytest.approx(20, abs=1e-4)
    assert check.null_db == pytest.approx(20, abs=1e-4)
    assert check.passes
    check = check_noise(answering(sit.config, lambda x, t, y: x * float("nan")))
    assert check.finding == "it puts out NaN or infinity"
