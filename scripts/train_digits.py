"""Train the bundled model: a small class-conditional DiT on scikit-learn's handwritten digits.

    python scripts/train_digits.py --steps 5000 --output ditas_export/dit/bundled/digits.safetensors

Loss: the simple noise loss plus the variational bound for the learned variance, mean detached
(Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021). Writes the
exponential moving average of the weights in fp16. Prints its own progress; on Ctrl-C nothing is
written, and with `--checkpoint FILE` the same command goes on. Same seed, thread count and
versions: the same bytes, taken up or not.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.artifact_files import atomic_path
from ditas_export.dit.model import DiT, DiTConfig, initialize_adaln_zero

CONFIG = DiTConfig(
    input_size=16,
    patch_size=2,
    in_channels=1,
    hidden_size=192,
    depth=5,
    num_heads=6,
    num_classes=10,
)
TRAIN_TIMESTEPS = 1000
CLASS_DROPOUT = 0.1
HELD_OUT = 397
"""Images kept from training; the classifier that judges samples is scored on them."""

CHECKPOINT_STEPS = 250
"""Steps between two states of an unfinished training."""


class Stateful(Protocol):
    """What an unfinished training keeps: models, the optimizer, its schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take up a state."""
        ...


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Draws times and noise for images (N, 1, 16, 16) and labels (N,); returns the mean loss."""


def digit_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images, train labels, held-out images, held-out labels.

    Images are (M, 1, 16, 16) float32 in [-1, 1], upsampled bicubically from 8×8.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = functional.interpolate(images, scale_factor=2, mode="bicubic").clamp(-1, 1)
    labels = torch.from_numpy(digits.target).long()
    train, held_out = train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    return images[train], labels[train], images[held_out], labels[held_out]


class DiffusionLoss:
    """The hybrid loss of a learned-range DDPM with linear betas; tables in float64, (1000,)."""

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, TRAIN_TIMESTEPS, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior[0] = posterior[1]  # zero at the last step; its log is clipped, as is customary
        self.signal = alphas_cumprod.sqrt().float()
        self.noise = (1 - alphas_cumprod).sqrt().float()
        self.log_beta = betas.log().float()
        self.log_posterior = posterior.log().float()
        # Squared error of the posterior mean per squared error of ε.
        self.mean_weight = (betas**2 / ((1 - betas) * (1 - alphas_cumprod))).float()

    def __call__(self, model: nn.Module, x_start: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of one batch."""
        t = torch.randint(TRAIN_TIMESTEPS, (len(x_start),))
        eps = torch.randn_like(x_start)
        at = (slice(None), None, None, None)
        noisy = self.signal[t][at] * x_start + self.noise[t][at] * eps
        with torch.autocast("cpu", torch.bfloat16):
            output = model(noisy, t, labels)
        predicted, variance = output.float().chunk(2, dim=1)
        squared_error = (predicted - eps) ** 2
        fraction = (variance + 1) / 2
        log_variance = fraction * self.log_beta[t][at] + (1 - fraction) * self.log_posterior[t][at]
        true_log_variance = self.log_posterior[t][at]
        gap = self.mean_weight[t][at] * squared_error.detach()
        kl = 0.5 * (
            log_variance - true_log_variance - 1
            + torch.exp(true_log_variance - log_variance)
            + gap * torch.exp(-log_variance)
        )  # fmt: skip
        return squared_error.mean() + kl.mean()


def new_dit(config: DiTConfig, seed: int) -> DiT:
    """Return an untrained model with the published initial values."""
    model = DiT(config)
    initialize_adaln_zero(model, seed=seed)
    return model


def train(
    new_model: Callable[[int], nn.Module], loss_of: Loss, args: argparse.Namespace
) -> nn.Module:
    """Train and return the averaged model in float32.

    Args:
        new_model: an untrained model, from a seed.
        loss_of: called with the label 10 where the class was dropped.
        args: of `training_parser`.
    """
    torch.manual_seed(args.seed)
    images, labels, _, _ = digit_images()
    model = new_model(args.seed)
    average = copy.deepcopy(model).requires_grad_(requires_grad=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    averaged = [mean for mean, p in pairs if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.99)
    )
    warmup = min(200, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    states = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    first = taken_up(states, args.checkpoint)
    start, running = time.perf_counter(), 0.0
    for step in range(first, args.steps):
        chosen = torch.randint(len(images), (args.batch,))
        y = labels[chosen].masked_fill(torch.rand(args.batch) < CLASS_DROPOUT, CONFIG.null_class)
        loss = loss_of(model, images[chosen], y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 - decay)
        running += loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.perf_counter() - start) / (step + 1 - first)
            print(
                f"step {step + 1}/{args.steps}  loss {running / 100:.4f}  {pace:.3f} s/step  "
                f"{pace * (args.steps - step - 1) / 60:.0f} min left",
                flush=True,
            )
            running = 0.0
        if (step + 1) % CHECKPOINT_STEPS == 0:
            keep(states, step + 1, args.checkpoint)
    return average


def keep(states: Mapping[str, Stateful], step: int, path: Path | None) -> None:
    """Write an unfinished training, the random numbers' state included, if it is to be kept."""
    if path is None:
        return
    kept = {name: each.state_dict() for name, each in states.items()}
    with atomic_path(path) as partial:
        torch.save(kept | {"step": step, "random": torch.get_rng_state()}, partial)


def taken_up(states: Mapping[str, Stateful], path: Path | None) -> int:
    """Take up an unfinished training, if there is one; return how many steps it has made."""
    if path is None or not path.exists():
        return 0
    kept = torch.load(path, weights_only=True)
    for name, each in states.items():
        each.load_state_dict(kept[name])
    torch.set_rng_state(kept["random"])
    print(f"goes on at step {kept['step']} of {path}", flush=True)
    return int(kept["step"])


def training_parser(summary: str) -> argparse.ArgumentParser:
    """Return the command line of a training, but for what it writes."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--checkpoint", type=Path, help="where unfinished work is kept")
    parser.add_argument("--output", type=Path, required=True)
    return parser


def train_and_write(
    config: DiTConfig, loss_of: Loss, summary: str, *, metadata: Mapping[str, str]
) -> None:
    """Train a DiT as the command line says and write the average in fp16.

    The metadata have one entry: safetensors writes several in any order.
    """
    args = training_parser(summary).parse_args()
    model = train(functools.partial(new_dit, config), loss_of, args)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(args.output) as partial:
        save_file(tensors, partial, metadata=dict(metadata))
    print(f"wrote {args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    train_and_write(
        CONFIG,
        DiffusionLoss(),
        str(__doc__).partition("\n")[0],
        metadata={"num_heads": str(CONFIG.num_heads)},
    )
