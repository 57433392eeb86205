"""The bundled PixArt: it draws the digit that it is asked for in words, and hears nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.dit.checkpoint import bundled_path
from ditas_export.families.load import load_model
from ditas_export.families.registry import conditions_of
from ditas_export.family_model import FamilyModel
from ditas_export.generation.sampler import Sampler, SamplingSettings
from ditas_export.runtime.torch_runner import TorchRunner

NAME = "digits-pixart"
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"


@pytest.fixture(scope="module")
def model() -> FamilyModel:
    return load_model(NAME).model


@pytest.fixture(scope="module")
def embeddings(model: FamilyModel) -> PromptEmbeddings:
    found = conditions_of(model.config, Path(NAME))
    assert isinstance(found, PromptEmbeddings)
    return found


def test_it_is_small_enough_to_bundle() -> None:
    sizes = [path.stat().st_size for path in bundled_path(NAME).rglob("*") if path.is_file()]
    assert sum(sizes) < 7 * 2**20


def test_each_digit_is_asked_for_in_five_ways_of_different_lengths(
    embeddings: PromptEmbeddings,
) -> None:
    assert embeddings.count == embeddings.null == 50
    assert embeddings.prompts[3::10] == (
        "three", "3", "the digit three", "number 3 please",
        "a handwritten three in white on black",
    )  # fmt: skip
    lengths = embeddings.tensors[MASK].sum(dim=1)
    assert lengths[:50].reshape(5, 10).unique(dim=1).flatten().tolist() == [2, 2, 4, 4, 8]
    assert lengths[50] == 1  # the end of the sequence alone
    rows = embeddings.tensors[STATES].flatten(1)
    assert len(rows.unique(dim=0)) == 51


def _predicted(model: FamilyModel, asked: dict[str, Tensor]) -> Tensor:
    """Return what a model makes of a fixed noise at times from 0 to 999."""
    rows = len(asked[MASK])
    noise = torch.randn(rows, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    output: Tensor = model(
        hidden_states=noise, timestep=torch.linspace(0, 999, rows).long(), **asked
    )
    return output


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_what_stands_in_padding_changes_no_bit(
    model: FamilyModel, embeddings: PromptEmbeddings, size: float
) -> None:
    asked = embeddings.inputs(torch.arange(0, 51, 5))
    padding = asked[MASK] == 0
    assert padding.any(dim=1).sum() == 9  # the longest way has none
    filled = asked[STATES].clone()
    filled[padding] = size * torch.randn(int(padding.sum()), 64)
    found = _predicted(model, asked)
    assert torch.equal(_predicted(model, {**asked, STATES: filled}), found)
    heard = filled.clone()
    heard[:, 0] += 1
    assert not torch.equal(_predicted(model, {**asked, STATES: heard}), found)


def test_it_draws_what_it_is_asked_for(model: FamilyModel, embeddings: PromptEmbeddings) -> None:
    """And another digit where it is asked for another: the same noise says nothing."""
    classifiers = pytest.importorskip("sklearn.svm")
    images, labels = _digit_images()
    judge = classifiers.SVC(C=10.0, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())
    rows = torch.arange(50).reshape(5, 10)[::2].flatten()  # three ways, in letters
    others = rows - rows % 10 + (rows + 3) % 10
    agrees = {}
    for name, asked in {"own": rows, "others": others}.items():
        settings = SamplingSettings(
            classes=tuple(asked.tolist()), sampler="dpm++", steps=12, cfg_scale=1.5, batch=30
        )
        made = Sampler(TorchRunner(model), settings, conditions=embeddings).run(0).latents
        seen = torch.from_numpy(judge.predict(made.clamp(-1, 1).flatten(1).numpy()))
        agrees[name] = float((seen == rows % 10).float().mean())
    assert agrees["own"] >= 0.9  # of 30
    assert agrees["others"] <= 0.1


def _digit_images() -> tuple[Tensor, Tensor]:
    """Return the digits that the model was trained on, as it saw them."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="bicubic")
    return larger.clamp(-1, 1), torch.from_numpy(digits.target).long()
