"""Train the bundled digit classifier, whose features judge digits in `ditas-eval`.

    python scripts/train_digit_features.py \
        --output ditas_export/evaluation/bundled/digit-features.safetensors

The training split of `train_digits.py`, each image moved by up to a pixel either way; the accuracy
on the held-out split is printed. Writes the weights in fp16. Same seed, thread count and versions:
the same bytes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from train_digits import digit_images

from ditas_export.artifact_files import atomic_path
from ditas_export.evaluation.digit_features import SIDE, DigitClassifier

BATCH = 64
LEARNING_RATE = 4e-3


def moved(images: Tensor) -> Tensor:
    """Return images (N, 1, 16, 16), each moved by −1, 0 or 1 pixels along either axis."""
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    rows, columns = torch.randint(3, (2, len(images), 1))
    span = torch.arange(SIDE)
    return padded[
        torch.arange(len(images))[:, None, None],
        0,
        (rows + span)[:, :, None],
        (columns + span)[:, None, :],
    ][:, None]


def train(*, epochs: int, seed: int) -> DigitClassifier:
    """Return a trained classifier, float32."""
    torch.manual_seed(seed)
    images, labels, _, _ = digit_images()
    model = DigitClassifier()
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            logits = model(moved(images[chosen]))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = train(epochs=args.epochs, seed=args.seed).half().float()
    _, _, images, labels = digit_images()
    with torch.inference_mode():
        right = (model(images).argmax(1) == labels).float().mean()
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(args.output) as partial:
        save_file(tensors, partial)
    print(f"{right:.1%} of {len(labels)} held-out digits; {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
