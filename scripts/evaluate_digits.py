"""Sample the bundled model, let a held-out classifier judge it, and draw a grid of samples.

    python scripts/evaluate_digits.py --picture docs/images/digits.png

The classifier is a support-vector machine trained on the training split of `train_digits.py`; its
accuracy on the held-out split is printed first, and bounds what the agreement can mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional
from train_digits import digit_images

from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import sample
from ditas_export.dit.checkpoint import BUNDLED_MODEL, load_dit
from ditas_export.runtime.torch_runner import TorchRunner

CLASSES = 10
GRID_ROWS = 8
PIXEL_SIZE = 3
"""Screen pixels per image pixel in the picture, each way."""


def train_classifier() -> tuple[SVC, float]:
    """Return a digit classifier and its accuracy on images that it never saw."""
    images, labels, held_out_images, held_out_labels = digit_images()
    classifier = SVC(C=10.0, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())
    accuracy = classifier.score(held_out_images.flatten(1).numpy(), held_out_labels.numpy())
    return classifier, float(accuracy)


def sample_digits(runner: Runner, *, count: int, steps: int, cfg_scale: float, seed: int) -> Tensor:
    """Return `count` images (M, 1, 16, 16) in [-1, 1], of the classes 0 to 9 in turn."""
    classes = [index % CLASSES for index in range(count)]
    images = sample(runner, classes=classes, steps=steps, cfg_scale=cfg_scale, seed=seed)
    return images.clamp(-1, 1)


def draw_grid(images: Tensor, path: Path) -> None:
    """Write a PNG of the first images, ten to a row, one class to a column."""
    rows = min(GRID_ROWS, len(images) // CLASSES)
    framed = functional.pad(images[: rows * CLASSES, 0], (1, 1, 1, 1), value=-1.0)
    side = framed.shape[-1]
    cells = framed.reshape(rows, CLASSES, side, side)
    sheet = cells.permute(0, 2, 1, 3).reshape(rows * side, CLASSES * side)
    pixels = ((sheet + 1) * 127.5).round().to(torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(pixels, np.ones((PIXEL_SIZE, PIXEL_SIZE), np.uint8))).save(
        path, optimize=True
    )


def main() -> None:
    """Sample, judge, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--num", type=int, default=400)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="write a grid of samples here (PNG)")
    args = parser.parse_args()

    classifier, accuracy = train_classifier()
    print(f"classifier: {accuracy:.1%} right on held-out images")
    loaded = load_dit(args.model)
    print(f"model: {loaded.source}, sha256 {loaded.sha256}")
    with TorchRunner(loaded.model) as runner:
        images = sample_digits(
            runner, count=args.num, steps=args.steps, cfg_scale=args.cfg_scale, seed=args.seed
        )
    predicted = torch.from_numpy(classifier.predict(images.flatten(1).numpy()))
    agrees = predicted == torch.arange(len(images)) % CLASSES
    print(
        f"agreement: {agrees.float().mean():.1%} of {len(images)} samples "
        f"(seed {args.seed}, {args.steps} DDPM steps, CFG {args.cfg_scale})"
    )
    by_class = [agrees[digit::CLASSES].float().mean() for digit in range(CLASSES)]
    print("by class: " + "  ".join(f"{digit}: {part:.0%}" for digit, part in enumerate(by_class)))
    if args.picture:
        draw_grid(images, args.picture)
        print(f"wrote {args.picture}: {args.picture.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
