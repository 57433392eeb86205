"""What a runner is fed: checked once, before any backend sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError

Feed = dict[str, np.ndarray[Any, Any]]
"""The three inputs by name, in the types of the files' interface."""


def feed_of(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Feed:
    """Return the three inputs as arrays in the types of the files' interface."""
    return {
        "latents": latents.detach().cpu().float().contiguous().numpy(),
        "timesteps": timesteps.detach().cpu().long().contiguous().numpy(),
        "class_labels": class_labels.detach().cpu().long().contiguous().numpy(),
    }


def require_fitting(
    config: DiTConfig, latents: Tensor, timesteps: Tensor, class_labels: Tensor
) -> None:
    """Refuse inputs that do not fit a model.

    Labels and time steps that lie on a GPU are not looked at: reading them would make the host
    wait.

    Args:
        config: of the model.
        latents: (N, C, H, W), any float type; one row at least.
        timesteps: (N,) of whole numbers, steps of the full schedule, from 0.
        class_labels: (N,) of whole numbers, rows of the label table.

    Raises:
        RunnerError: a shape, a type, a time step or a label that does not fit the model.
    """
    for name, value in zip(
        ("latents", "timesteps", "class_labels"), (latents, timesteps, class_labels), strict=True
    ):
        if not isinstance(value, Tensor):
            raise RunnerError(f"{name} are {type(value).__name__}; the model takes torch tensors")
    side = config.input_size
    expected = (config.in_channels, side, side)
    if latents.ndim != 4 or tuple(latents.shape[1:]) != expected or not len(latents):
        raise RunnerError(
            f"latents are {tuple(latents.shape)}; the model takes "
            f"(N, {config.in_channels}, {side}, {side}), one row at least"
        )
    if not latents.is_floating_point():
        raise RunnerError(f"latents are {latents.dtype}; the model takes floats")
    for name, vector, count, last in (
        ("timesteps", timesteps, config.process.train_timesteps, "of the schedule"),
        ("class_labels", class_labels, config.label_rows, _last_label(config)),
    ):
        if tuple(vector.shape) != (len(latents),):
            raise RunnerError(
                f"{name} are {tuple(vector.shape)}; with {len(latents)} latents the model takes "
                f"({len(latents)},)"
            )
        if vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool:
            raise RunnerError(f"{name} are {vector.dtype}; the model takes whole numbers")
        if not vector.is_cpu:
            continue
        whole = vector.long()
        if not 0 <= int(whole.amin()) <= int(whole.amax()) < count:
            raise RunnerError(
                f"{name} run from {int(whole.amin())} to {int(whole.amax())}; the model knows 0 "
                f"to {count - 1}, {last}"
            )


def _last_label(config: DiTConfig) -> str:
    """Return what the last row of the label table is."""
    return "the last for no class" if config.null_row else "its classes"
