"""Models that many tests share."""

from __future__ import annotations

import pytest

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
