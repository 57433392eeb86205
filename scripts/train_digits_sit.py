"""Train the bundled flow: the digits' DiT with SiT's loss, time and signs.

    python scripts/train_digits_sit.py --batch 32 --steps 4500 \
        --output ditas_export/dit/bundled/digits-sit.safetensors

Loss: x = t data + (1 - t) noise with t uniform in [0, 1]; the squared error of the velocity
data - noise (Ma et al., "SiT", ECCV 2024; Lipman et al., "Flow Matching", ICLR 2023). Data,
optimizer and file are those of `train_digits.py`. On shared cores OMP_WAIT_POLICY=passive spares
what waiting threads burn.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_digits import CONFIG, train_and_write

from ditas_export.process import FlowProcess

SIT_CONFIG = replace(CONFIG, learn_sigma=False, process=FlowProcess())


def velocity_loss(model: nn.Module, x_start: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of one batch; images (N, 1, 16, 16), labels (N,)."""
    t = torch.rand(len(x_start))
    noise = torch.randn_like(x_start)
    at = t[:, None, None, None]
    # The fused kernel's backward takes a third of a step on CPUs; 64 tokens need none.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        velocity = model(at * x_start + (1 - at) * noise, t, labels)
    return functional.mse_loss(velocity.float(), x_start - noise)


if __name__ == "__main__":
    record = {"family": "sit", "num_heads": CONFIG.num_heads, "num_classes": CONFIG.num_classes}
    train_and_write(
        SIT_CONFIG,
        velocity_loss,
        str(__doc__).partition("\n")[0],
        metadata={"config": json.dumps(record)},
    )
