"""What stands for a training here: a checkpoint of random numbers, and what it can be asked.

`python -m own_family.make frames.safetensors asked.safetensors` writes both.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.families.packaged import save_checkpoint

from .family import FRAMES, FrameModel, FramesConfig

CONFIG = FramesConfig(
    in_channels=16,
    text_width=8,
    num_tokens=24,
    hidden_size=96,
    depth=2,
    num_heads=4,
    rotary_heads=1,
)


def random_model(config: FramesConfig = CONFIG, *, seed: int = 0) -> FrameModel:
    """Return a model of random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return FRAMES.module(config).eval().requires_grad_(requires_grad=False)


def random_conditions(
    config: FramesConfig = CONFIG, *, count: int = 6, seed: int = 0
) -> PromptEmbeddings:
    """Return what can be asked for: clips of different lengths, padded, and the row of nothing."""
    random = torch.Generator().manual_seed(seed)
    channels, frames = config.latent_shape
    lengths = torch.arange(count) * frames // (2 * count) + frames // 2
    mask = (torch.arange(frames) < lengths[:, None]).float()
    given = torch.randn(count, channels, frames, generator=random) * mask[:, None]
    given[:, :, frames // 4 :] = 0  # the first quarter is known
    text = torch.randn(count, frames, config.text_width, generator=random) * mask[..., None]
    rows = {"given": given, "text": text, "attention_mask": mask}
    return PromptEmbeddings(
        tensors={name: torch.cat([rows[name], nothing(rows[name])]) for name in rows},
        has_null=True,
    )


def nothing(rows: Tensor) -> Tensor:
    """Return the row of "no condition" of a stream: zeros; of the mask, all frames."""
    return torch.ones_like(rows[:1]) if rows.ndim == 2 else torch.zeros_like(rows[:1])


if __name__ == "__main__":
    checkpoint, asked = sys.argv[1:]
    save_checkpoint(FRAMES, random_model(), checkpoint)
    random_conditions().save(asked)
