"""The published sizes."""

from __future__ import annotations

import pytest
import torch

from ditas_export.dit.model import DiT
from ditas_export.dit.presets import PRESET_NAMES, preset_config, preset_num_heads
from ditas_export.errors import CheckpointError

PUBLISHED_MILLIONS = {"S": 33, "B": 130, "L": 458, "XL": 675}
"""Parameters of the patch-2 models in the paper's table 1."""


def test_there_are_twelve() -> None:
    sizes = ("S", "B", "L", "XL")
    assert tuple(f"DiT-{size}/{patch}" for size in sizes for patch in (2, 4, 8)) == PRESET_NAMES


@pytest.mark.parametrize("size", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_papers(size: str) -> None:
    with torch.device("meta"):
        model = DiT(preset_config(f"DiT-{size}/2"))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count / 1e6 == pytest.approx(PUBLISHED_MILLIONS[size], abs=0.6)  # printed as integers


@pytest.mark.parametrize("name", PRESET_NAMES)
@pytest.mark.parametrize(("image_size", "latent"), [(256, 32), (512, 64)])
def test_latents_are_an_eighth_of_the_image(name: str, image_size: int, latent: int) -> None:
    config = preset_config(name, image_size=image_size)
    assert config.input_size == latent
    assert name.endswith(f"/{config.patch_size}")
    assert config.num_classes == 1000
    assert preset_num_heads(depth=config.depth, hidden_size=config.hidden_size) == config.num_heads


def test_unpublished_sizes_have_no_known_heads() -> None:
    assert preset_num_heads(depth=5, hidden_size=192) is None
    assert preset_num_heads(depth=12, hidden_size=1152) is None


def test_unknown_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"unknown preset 'DiT-XL/3'; choose one of DiT-S/2"):
        preset_config("DiT-XL/3")


def test_image_that_is_no_whole_number_of_patches_is_refused() -> None:
    with pytest.raises(CheckpointError, match="image_size=300 is no multiple of 64 pixels"):
        preset_config("DiT-XL/8", image_size=300)
