"""Sample digits from models in turns, let a held-out classifier judge them, and draw them.

    python scripts/evaluate_digits.py digits --picture docs/images/digits.png
    python scripts/evaluate_digits.py digits-sit --picture docs/images/digits-sit.png
    python scripts/evaluate_digits.py fp32.onnx out.onnx --picture docs/images/float_above_w4a8.png
    python scripts/evaluate_digits.py digits-pixart --embeddings digits-pixart --rows 50

Models are what `ditas-sample` takes; each is sampled by the first sampler of its process (DDPM, or
Euler for a flow). All sample the same noise; a batch of one, then the same batch of the next, one
live session at a time, so that their speeds compare. The classifier is a support-vector machine
trained on the training split of `train_digits.py`; its accuracy on the held-out split is printed
first, and bounds what the agreement can mean. One model is drawn as eight rows of the ten digits,
several as rows of digits under each other, first model on top.

A text-conditioned model is asked by the rows of its embeddings in turn, of which row r asks for the
digit r % 10. `--ask-for 3` asks for another digit, 3 more than the one that is looked for: a model
that listens to its words then agrees as often as chance has it, or less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor
from train_digits import digit_images

from ditas_export.families.registry import conditions_of
from ditas_export.generation.pixels import grid, to_pixels, write_png
from ditas_export.generation.sampler import Sampler, SamplingSettings
from ditas_export.runtime.open_runner import open_runner

CLASSES = 10
PICTURE_ROWS = 8


@dataclass(kw_only=True)
class Judged:
    """What one model made, batch by batch."""

    runtime: str = ""
    sha256: str = ""
    images: list[Tensor] = field(default_factory=list)
    images_per_second: list[float] = field(default_factory=list)


def train_classifier() -> tuple[SVC, float]:
    """Return a digit classifier and its accuracy on images that it never saw."""
    images, labels, held_out_images, held_out_labels = digit_images()
    classifier = SVC(C=10.0, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())
    accuracy = classifier.score(held_out_images.flatten(1).numpy(), held_out_labels.numpy())
    return classifier, float(accuracy)


def sample_in_turns(
    models: list[str],
    settings: SamplingSettings,
    *,
    embeddings: Path | None,
    runtime: str,
    threads: int,
) -> dict[str, Judged]:
    """Sample every batch with every model before the next batch."""
    found = {model: Judged() for model in models}
    batches = -(-len(settings.classes) // settings.batch)
    for batch in range(batches):
        for model, judged in found.items():
            opened = open_runner(model, runtime=runtime, threads=threads)
            with opened.runner as runner:
                conditions = conditions_of(runner.config, embeddings)
                sampler = Sampler(runner, settings, conditions=conditions)
                judged.runtime, judged.sha256 = runner.description, opened.sha256
                first = replace(settings, steps=2)  # the first run allocates
                Sampler(runner, first, conditions=conditions).run(batch)
                start = time.perf_counter()
                made = sampler.run(batch).latents
                judged.images_per_second.append(len(made) / (time.perf_counter() - start))
                judged.images.append(made)
        print(f"batch {batch + 1}/{batches}", flush=True)
    return found


def asked(index: int, rows: int, shift: int) -> int:
    """Return the label that asks for an image's digit, or for the one `shift` after it."""
    row = index % rows
    return row - row % CLASSES + (row + shift) % CLASSES


def agreement(classifier: SVC, images: Tensor) -> Tensor:
    """Return for each image, digits 0 to 9 in turn, whether the classifier sees its digit."""
    pixels = images.clamp(-1, 1).flatten(1).numpy()
    predicted: Tensor = torch.from_numpy(classifier.predict(pixels))
    return predicted == torch.arange(len(images)) % CLASSES


def picture(judged: list[Tensor]) -> np.ndarray:
    """Return the first rows of digits of every model, first model on top."""
    rows = PICTURE_ROWS if len(judged) == 1 else 1
    shown = [image for images in judged for image in to_pixels(images[: rows * CLASSES])]
    return grid(shown, columns=CLASSES)


def main() -> None:
    """Sample, judge, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--num", type=int, default=400)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--embeddings", type=Path, help="of a text-conditioned model")
    parser.add_argument("--rows", type=int, default=CLASSES, help="classes or prompts, in turn")
    parser.add_argument(
        "--ask-for", type=int, default=0, help="digits more than the one looked for"
    )
    parser.add_argument("--sampler", help="of ditas-sample (default: the first of the process)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="write a grid of samples here (PNG)")
    args = parser.parse_args()

    classifier, accuracy = train_classifier()
    print(f"classifier: {accuracy:.1%} right on held-out images")
    settings = SamplingSettings(
        classes=tuple(asked(index, args.rows, args.ask_for) for index in range(args.num)),
        sampler=args.sampler,
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        seed=args.seed,
        batch=args.batch,
    )
    found = sample_in_turns(
        args.models,
        settings,
        embeddings=args.embeddings,
        runtime=args.runtime,
        threads=args.threads,
    )
    print(
        f"{args.num} samples, seed {args.seed}, {args.steps} steps, CFG {args.cfg_scale}, "
        f"batches of {args.batch}; {platform.machine()}, {args.threads} threads"
    )
    for model, judged in found.items():
        agrees = agreement(classifier, torch.cat(judged.images))
        speed = statistics.median(judged.images_per_second)
        print(f"{model} (sha256 {judged.sha256[:12]}…), {judged.runtime}")
        print(f"  agreement {agrees.float().mean():.1%}, {speed:.2f} images/s")
        parts = [agrees[digit::CLASSES].float().mean() for digit in range(CLASSES)]
        print("  by class " + "  ".join(f"{digit}: {part:.0%}" for digit, part in enumerate(parts)))
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(args.picture, picture([torch.cat(judged.images) for judged in found.values()]))
        print(f"wrote {args.picture}: {args.picture.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
