"""Models that many tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditas_export.dit.model import DiT, DiTConfig, randomize

TINY = DiTConfig(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=48,
    depth=2,
    num_heads=4,
    num_classes=10,
)


def random_dit(config: DiTConfig = TINY, *, seed: int = 0) -> DiT:
    """Return a DiT in evaluation mode whose blocks are no identities."""
    model = DiT(config)
    randomize(model, seed=seed)
    return model.eval().requires_grad_(requires_grad=False)


@pytest.fixture
def tiny_dit() -> DiT:
    """A randomised DiT: 4 channels of 8×8, width 48, 2 blocks, 4 heads, 10 classes."""
    return random_dit()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the `tiny_dit()` of `quantized_fixture`; never write to it."""
    from quantized_fixture import save_checkpoint, tiny_dit

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, tiny_dit())
    return path


@pytest.fixture
def hide_openvino(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call to the test's end OpenVINO is as if not installed."""
    find = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "openvino" else find(name, *rest)

    return lambda: monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def random_vae(*, seed: int = 0, **changes: Any) -> Any:
    """Return a random `AutoencoderKL`: 4 latent channels, 4 pixels per latent pixel."""
    from diffusers import AutoencoderKL

    options = {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 8,
    }
    torch.manual_seed(seed)
    vae = AutoencoderKL(**{**options, **changes}).eval()
    return vae.requires_grad_(requires_grad=False)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `random_vae()`; never write to it."""
    folder = tmp_path_factory.mktemp("vae")
    random_vae().save_pretrained(folder)
    return folder
