"""A model that predicts noise returns it where there is nothing else; others are warned of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY, random_dit
from torch import Tensor

from ditas_export.calibration.noise_check import LEAST_DB, check_noise
from ditas_export.dit.model import DiT
from ditas_export.families.load import BUNDLED_MODEL, load_model


@pytest.fixture(scope="module")
def trained() -> DiT:
    return load_model(BUNDLED_MODEL).model


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, dim=0)
"""Those of the bundled model's process, from the formula."""

Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From x, the predicted noise, the roots of ᾱ and of 1 − ᾱ to another prediction."""


def x0(x: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return (x - s * eps) / a


def v(x: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return a * eps - s * x0(x, eps, a, s)


def velocity(x: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return eps - x0(x, eps, a, s)


def predicting(model: DiT, formula: Formula, *, clip: bool = False) -> DiT:
    """A model of the same shape that puts out something else of what the given one knows."""
    changed = copy.deepcopy(model)
    predict = changed.forward

    def forward(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        x = latents
        out: Tensor = predict(x, timesteps, class_labels).clone()
        alpha = ALPHAS_CUMPROD[timesteps.long()].float()[:, None, None, None]
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        eps = out[:, : x.shape[1]]
        if clip:  # the image that is meant, as samplers of images clip it
            eps = (x - a * x0(x, eps, a, s).clamp(-1, 1)) / s
        out[:, : x.shape[1]] = formula(x, eps, a, s)
        return out

    changed.forward = forward  # type: ignore[method-assign]
    return changed


def test_the_bundled_model_returns_noise(trained: DiT) -> None:
    check = check_noise(trained)
    assert check.passes
    assert check.warning is None
    assert check.timestep == 999
    assert 35 < check.class_db < 45
    assert check.null_db is not None
    assert 35 < check.null_db < 45
    assert check.to_dict() == {
        "timestep": 999,
        "class_db": pytest.approx(check.class_db, abs=1e-3),
        "null_class_db": pytest.approx(check.null_db, abs=1e-3),
        "least_db": LEAST_DB,
        "passes": True,
        "finding": None,
    }
    assert check == check_noise(trained), "the same noise every time"


def test_the_figure_is_the_formula(trained: DiT) -> None:
    """Of a model that returns its input and a tenth of it more, 20 dB."""
    check = check_noise(predicting(trained, lambda x, *_: 1.1 * x))
    assert check.class_db == pytest.approx(20, abs=1e-4)
    assert check.passes
    check = check_noise(predicting(trained, lambda x, *_: 1.2 * x))
    assert check.class_db == pytest.approx(13.98, abs=1e-2)
    assert not check.passes


STAND_INS: dict[str, tuple[Formula, str]] = {
    "x0": (x0, "as where the image (x0)"),
    "-x0": (lambda *given: -x0(*given), ""),
    "v": (v, ""),
    "-v": (lambda *given: -v(*given), ""),
    "velocity": (velocity, "times the noise and something else, as where a velocity"),
    "-velocity": (lambda *given: -velocity(*given), "its output is -"),
    "-noise": (lambda x, eps, a, s: -eps, "it puts out the noise with the opposite sign"),
    "nothing": (lambda x, eps, a, s: 0 * eps, "hardly any of the noise is in its output"),
    "NaN": (lambda x, eps, a, s: eps * float("nan"), "it puts out NaN or infinity"),
}


@pytest.mark.parametrize("clip", [False, True], ids=["as predicted", "clipped"])
@pytest.mark.parametrize(("formula", "finding"), STAND_INS.values(), ids=STAND_INS)
def test_other_predictions_are_warned_of(
    trained: DiT, formula: Formula, finding: str, clip: bool
) -> None:
    check = check_noise(predicting(trained, formula, clip=clip))
    assert not check.passes
    assert check.warning is not None
    assert finding in check.finding
    assert check.finding in check.warning
    assert "\n" not in check.warning


def test_another_time_scale_is_told(trained: DiT) -> None:
    """Trained on t from 0 to 1: our whole steps are far beyond it."""
    changed = copy.deepcopy(trained)
    predict = changed.forward
    changed.forward = lambda latents, timesteps, class_labels: predict(  # type: ignore[method-assign]
        latents, (1000.0 * timesteps) % 1e5, class_labels
    )
    check = check_noise(changed)
    assert not check.passes
    assert "it does so where time steps run from 0 to 1" in check.finding


@pytest.mark.parametrize("seed", [0, 1])
def test_random_models_are_warned_of(trained: DiT, seed: int) -> None:
    for config in (trained.config, TINY):
        check = check_noise(random_dit(config, seed=seed))
        assert check.warning is not None
        assert check.class_db < 0


def test_a_null_class_alone_counts(trained: DiT) -> None:
    """Untrained rows of the label table show."""
    changed = copy.deepcopy(trained)
    with torch.no_grad():
        changed.y_embedder.embedding_table.weight[-1] = 30 * torch.randn(
            192, generator=torch.Generator().manual_seed(0)
        )
    check = check_noise(changed)
    assert check.class_db > 35
    assert check.null_db is not None
    assert check.null_db < LEAST_DB
    assert not check.passes


@pytest.mark.parametrize(
    "change",
    [{"num_classes": 0}, {"num_classes": 11, "null_row": False}, {"num_classes": 1}],
    ids=str,
)
def test_models_without_null_class_have_one_figure(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    check = check_noise(random_dit(config))
    assert (check.null_db is None) == (not config.is_guidable)
