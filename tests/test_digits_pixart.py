"""The bundled PixArt: it draws the digit that it is asked for in words, and hears nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditas_export
from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.family_model import Input

FOLDER = Path(ditas_export.__file__).parent / "dit" / "bundled" / "digits-pixart"
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
INPUTS = (
    Input(name=STATES, dtype=torch.float32, shape=("tokens", 64)),
    Input(name=MASK, dtype=torch.int64, shape=("tokens",)),
)


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel.from_pretrained(FOLDER / "transformer").float().eval()


@pytest.fixture(scope="module")
def embeddings() -> PromptEmbeddings:
    return PromptEmbeddings.load(FOLDER / "embeddings.safetensors", inputs=INPUTS)


def test_it_is_small_enough_to_bundle() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
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


def _predicted(transformer: Any, asked: dict[str, Tensor], *, seed: int) -> Tensor:
    """Return what a model makes of one step's noise."""
    random = torch.Generator().manual_seed(seed)
    rows = len(asked[MASK])
    noise = torch.randn(rows, 1, 16, 16, generator=random)
    timestep = torch.linspace(0, 999, rows).long()
    with torch.no_grad():
        output: Tensor = transformer(noise, timestep=timestep, return_dict=False, **asked)[0]
    return output


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_what_stands_in_padding_changes_no_bit(
    transformer: Any, embeddings: PromptEmbeddings, size: float
) -> None:
    asked = embeddings.inputs(torch.arange(51))
    padding = asked[MASK] == 0
    assert padding.any(dim=1).sum() == 41  # the longest way has none
    filled = asked[STATES].clone()
    filled[padding] = size * torch.randn(int(padding.sum()), 64)
    found = _predicted(transformer, asked, seed=0)
    assert torch.equal(_predicted(transformer, {**asked, STATES: filled}, seed=0), found)
    heard = filled.clone()
    heard[:, 0] += 1
    assert not torch.equal(_predicted(transformer, {**asked, STATES: heard}, seed=0), found)


def _sampled(transformer: Any, embeddings: PromptEmbeddings, rows: Tensor) -> Tensor:
    """Return images of the same noise, whatever is asked for: DPM-Solver++, guidance 1.5."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_pretrained(FOLDER / "scheduler")
    scheduler.set_timesteps(12)
    asked = embeddings.inputs(torch.cat([rows, torch.full_like(rows, 50)]))
    images = torch.randn(len(rows), 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = transformer(
                torch.cat([images, images]),
                timestep=timestep.expand(2 * len(rows)),
                return_dict=False,
                **asked,
            )[0][:, :1]
        with_words, without = output.chunk(2)
        guided = without + 1.5 * (with_words - without)
        images = scheduler.step(guided, timestep, images).prev_sample
    return images.clamp(-1, 1)


def test_it_draws_what_it_is_asked_for(transformer: Any, embeddings: PromptEmbeddings) -> None:
    """And something else when it is asked for something else: the noise says nothing."""
    classifier, digit_images = pytest.importorskip("sklearn.svm"), _digit_images()
    images, labels = digit_images
    judge = classifier.SVC(C=10.0, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())
    rows = torch.arange(50).reshape(5, 10)[::2].flatten()  # three ways, in letters
    others = rows - rows % 10 + (rows + 3) % 10
    agrees = {}
    for name, asked in {"own": rows, "others": others}.items():
        made = _sampled(transformer, embeddings, asked).flatten(1).numpy()
        agrees[name] = float((torch.from_numpy(judge.predict(made)) == rows % 10).float().mean())
    assert agrees["own"] >= 0.9  # of 30
    assert agrees["others"] <= 0.1


def _digit_images() -> tuple[Tensor, Tensor]:
    """Return the digits that the model was trained on, as it saw them."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="bicubic")
    return larger.clamp(-1, 1), torch.from_numpy(digits.target).long()
