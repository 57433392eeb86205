"""Flows for tests: a model's twin of the other family, and the shortest sampler of either."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ditas_export.dit.flows import FLOWS
from ditas_export.dit.model import FREQUENCY_EMBEDDING_SIZE, MAX_PERIOD, DiT, DiTConfig

State = dict[str, Tensor]


def turned(state: State) -> State:
    """Return the state of v'(x, t) = -v(x, 1 - t): SiT's convention to REPA's, and back.

    The first linear of the time embedder sees cosines and sines of t f. By the angle-sum identities
    those of (1 - t) f are linear in them, so that it can take the turn into its weights:
    cos((1 - t) f) = cos f cos(t f) + sin f sin(t f), sin((1 - t) f) = sin f cos(t f) - cos f
    sin(t f). The sign goes into the last linear. Exact but for rounding to the float type.
    """
    half = FREQUENCY_EMBEDDING_SIZE // 2
    indices = torch.arange(half, dtype=torch.float32)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * indices / half).double()
    cos, sin = frequencies.cos(), frequencies.sin()
    first = state["t_embedder.mlp.0.weight"]
    of_cos, of_sin = first.double().split(half, dim=1)
    both = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    return state | {
        "t_embedder.mlp.0.weight": both.to(first.dtype),
        "final_layer.linear.weight": -state["final_layer.linear.weight"],
        "final_layer.linear.bias": -state["final_layer.linear.bias"],
    }


def flow_config(config: DiTConfig, family: str = "sit") -> DiTConfig:
    """Return the configuration of a flow of some family in a DiT's shape."""
    return replace(config, learn_sigma=False, process=FLOWS[family])  # type: ignore[index]


@torch.no_grad()
def euler(model: DiT, noise: Tensor, labels: Tensor, *, steps: int, scale: float = 1.0) -> Tensor:
    """Return what a flow of either family makes of noise (N, C, H, W) in equal steps."""
    process = model.config.process
    sign = 1.0 if process.velocity_towards == "data" else -1.0
    x = noise
    for step in range(steps):
        t = step / steps if process.time_ends_at == "data" else 1 - step / steps
        times = torch.full((len(x),), t)
        velocity = model(x, times, labels)
        if scale != 1:
            none = model(x, times, torch.full_like(labels, model.config.null_class))
            velocity = none + scale * (velocity - none)
        x = x + sign * velocity / steps
    return x
