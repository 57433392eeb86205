"""Literal numpy transcription, in float64, of the sampler that the published DiT uses.

Sources: Ho et al. 2020, eq. 6, 7, 11 and algorithm 2; Nichol and Dhariwal 2021, eq. 15 (the learned
variance interpolates between β̃ and β in the logarithm) and section 4 (respacing: strided steps with
betas made again from the kept ᾱ). The model sees the steps of the full schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def respaced_timesteps(count: int, *, total: int = 1000) -> list[int]:
    """Return `count` steps from 0 to `total` − 1, by accumulating a fractional stride."""
    stride = (total - 1) / (count - 1)
    position, steps = 0.0, []
    for _ in range(count):
        steps.append(round(position))
        position += stride
    return steps


def linear_betas(start: float, end: float, count: int) -> Array:
    """Return Ho et al.'s β, evenly spread."""
    return np.linspace(start, end, count, dtype=np.float64)


def scaled_linear_betas(start: float, end: float, count: int) -> Array:
    """Return β whose roots are evenly spread (latent diffusion)."""
    return np.linspace(start**0.5, end**0.5, count, dtype=np.float64) ** 2


def cosine_betas(count: int) -> Array:
    """Return Nichol and Dhariwal's β (eq. 17), at most 0.999."""
    kept = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - kept[1:] / kept[:-1], 0.999)


class PublishedDDPM:
    """Tables of the respaced process; index i runs over the kept steps, 0 the cleanest."""

    def __init__(
        self, count: int, *, betas: Array | None = None, variance: str = "learned_range"
    ) -> None:
        if betas is None:
            betas = linear_betas(0.0001, 0.02, 1000)
        self.variance = variance
        full = np.cumprod(1.0 - betas)
        self.timesteps = respaced_timesteps(count, total=len(betas))
        kept = full[self.timesteps]
        last, respaced = 1.0, []
        for value in kept:
            respaced.append(1.0 - value / last)
            last = value
        self.betas = np.array(respaced)
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = self.betas * (1.0 - self.previous) / (1.0 - self.alphas_cumprod)

    def step(self, x: Array, output: Array, i: int, noise: Array) -> Array:
        """Return the next, less noisy x; output has ε first, then any learned variance."""
        eps, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
        alpha_bar = self.alphas_cumprod[i]
        x_start = np.sqrt(1.0 / alpha_bar) * x - np.sqrt(1.0 / alpha_bar - 1.0) * eps
        mean = (
            np.sqrt(self.previous[i]) * self.betas[i] / (1.0 - alpha_bar) * x_start
            + np.sqrt(1.0 - self.betas[i]) * (1.0 - self.previous[i]) / (1.0 - alpha_bar) * x
        )
        if i == 0:
            return mean
        if self.variance != "learned_range":
            fixed = {"fixed_small": self.posterior_variance, "fixed_large": self.betas}
            return mean + np.sqrt(fixed[self.variance][i]) * noise
        fraction = (variance + 1.0) / 2.0
        log_variance = fraction * np.log(self.betas[i]) + (1.0 - fraction) * np.log(
            self.posterior_variance[i]
        )
        return mean + np.exp(0.5 * log_variance) * noise

    def sample(
        self, model: Callable[[Array, int], Array], x: Array, noises: list[Array]
    ) -> list[Array]:
        """Return x after every step, noisiest first; `noises[k]` belongs to the k-th step."""
        seen = []
        for i, noise in zip(reversed(range(len(self.timesteps))), noises, strict=True):
            x = self.step(x, model(x, self.timesteps[i]), i, noise)
            seen.append(x)
        return seen


def guided(
    model: Callable[[Array, int, Array], Array], x: Array, t: int, labels: Array, *, null: int,
    scale: float,
) -> Array:  # fmt: skip
    """Return the output with guidance on the first three channels, the class rows for the rest."""
    both = model(np.concatenate([x, x]), t, np.concatenate([labels, np.full_like(labels, null)]))
    eps, rest = both[:, :3], both[:, 3:]
    eps_class, eps_null = np.split(eps, 2)
    eps_guided = eps_null + scale * (eps_class - eps_null)
    return np.concatenate([eps_guided, rest[: len(x)]], axis=1)
