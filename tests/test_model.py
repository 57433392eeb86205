"""The DiT: shapes, fixed constants, initialisations, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_dit
from hypothesis import given
from hypothesis import strategies as st
from reference import published_dit

from ditas_export.dit.model import (
    DiT,
    DiTConfig,
    initialize_adaln_zero,
    position_embedding,
    randomize,
    timestep_features,
)
from ditas_export.errors import CheckpointError


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, patch_size=4, in_channels=1, mlp_ratio=2.5),
        replace(TINY, input_size=12, hidden_size=32, num_heads=2, depth=1, num_classes=1),
    ],
    ids=["tiny", "patch-4", "grid-6"],
)
def test_output_has_twice_the_channels(config: DiTConfig) -> None:
    side = config.input_size
    latents = torch.randn(3, config.in_channels, side, side)
    labels = torch.tensor([0, config.num_classes - 1, config.null_class])
    out = random_dit(config)(latents, torch.tensor([0, 500, 999]), labels)
    assert out.shape == (3, 2 * config.in_channels, side, side)
    assert out.isfinite().all()


def test_every_input_and_every_patch_counts(tiny_dit: DiT) -> None:
    latents, t, y = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.tensor([3])
    base = tiny_dit(latents, t, y)
    assert not torch.allclose(tiny_dit(latents, t + 1, y), base)
    assert not torch.allclose(tiny_dit(latents, t, y + 1), base)
    flipped = tiny_dit(latents.flip(-1), t, y)
    assert not torch.allclose(flipped.flip(-1), base)  # positions break the symmetry


def test_unpatchify_inverts_the_patch_order(tiny_dit: DiT) -> None:
    image = torch.arange(8 * 8 * 8, dtype=torch.float32).reshape(1, 8, 8, 8)
    patches = image.reshape(1, 8, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1)  # (N, h, w, p, q, C)
    assert torch.equal(tiny_dit.unpatchify(patches.reshape(1, 16, 32)), image)


def test_state_dict_has_the_published_names() -> None:
    block = [
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    ]
    outside = [
        "pos_embed",
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    ]
    blocks = [f"blocks.{i}.{name}" for i in range(TINY.depth) for name in block]
    assert sorted(DiT(TINY).state_dict()) == sorted(outside + blocks)


@pytest.mark.parametrize(("hidden_size", "grid_size"), [(48, 4), (1152, 16), (8, 1)])
def test_position_embedding_is_the_published_one(hidden_size: int, grid_size: int) -> None:
    ours = position_embedding(hidden_size, grid_size)
    expected = torch.from_numpy(published_dit.positions(hidden_size, grid_size))
    assert ours.dtype == torch.float32
    # Computed in float64: only the last rounding to float32 differs from the transcription.
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=6e-8)


@given(timestep=st.integers(0, 999))
def test_timestep_features_are_the_published_ones(timestep: int) -> None:
    ours = timestep_features(torch.tensor([timestep]))
    expected = torch.from_numpy(published_dit.timestep_features(timestep))
    # Phases up to 999 in float32: an ulp of 999 is 6e-5, and frequencies carry two roundings.
    torch.testing.assert_close(ours[0].double(), expected, rtol=0, atol=2e-4)


def test_timestep_features_stay_float32_in_a_half_precision_model(tiny_dit: DiT) -> None:
    assert timestep_features(torch.tensor([999], dtype=torch.int64)).dtype == torch.float32
    half = tiny_dit.bfloat16()
    out = half(torch.zeros(1, 4, 8, 8).bfloat16(), torch.tensor([999]), torch.tensor([0]))
    assert out.dtype == torch.bfloat16


def test_randomize_is_reproducible_and_leaves_no_identity() -> None:
    first, second, other = random_dit(seed=1), random_dit(seed=1), random_dit(seed=2)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert name == "pos_embed" or not torch.equal(a, c), name
    hidden, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    for block in first.blocks:
        moved = (block(hidden, c) - hidden).norm() / hidden.norm()
        assert moved > 0.05


def test_randomize_keeps_the_position_embedding() -> None:
    model = DiT(TINY)
    before = model.pos_embed.clone()
    randomize(model, seed=0)
    assert torch.equal(model.pos_embed, before)


def test_adaln_zero_starts_as_identity_with_zero_output() -> None:
    model = DiT(TINY)
    initialize_adaln_zero(model, seed=0)
    hidden, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    for block in model.blocks:
        assert torch.equal(block(hidden, c), hidden)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "input_size=8 is no multiple of patch_size=3"),
        ({"num_heads": 5}, "hidden_size=48 is no multiple of num_heads=5; pass the right --num"),
        ({"hidden_size": 50, "num_heads": 5}, "hidden_size=50 must be a multiple of 4"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(TINY, **change)
