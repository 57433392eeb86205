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


def feed_of(config: DiTConfig, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Feed:
    """Return the three inputs as arrays in the types of the interface of a model's files."""
    time_dtype = config.process.time_dtype
    return {
        "latents": latents.detach().cpu().float().contiguous().numpy(),
        "timesteps": timesteps.detach().cpu().to(time_dtype).contiguous().numpy(),
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
        timesteps: (N,) of whole numbers, steps of the full schedule, from 0; for a flow of floats,
            from 0 to 1.
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
    _require_vector("timesteps", timesteps, len(latents))
    _require_vector("class_labels", class_labels, len(latents))
    first, last = config.process.times
    if not config.process.time_dtype.is_floating_point:
        _require_whole("timesteps", timesteps)
        _require_range("timesteps", timesteps, first, last, "of the schedule")
    elif not timesteps.is_floating_point():
        raise RunnerError(
            f"timesteps are {timesteps.dtype}; the model takes floats from {first:g} to {last:g}"
        )
    else:
        _require_range("timesteps", timesteps, first, last, "of the flow")
    _require_whole("class_labels", class_labels)
    _require_range("class_labels", class_labels, 0, config.label_rows - 1, _last_label(config))


def _require_vector(name: str, vector: Tensor, rows: int) -> None:
    """Refuse other than one value per row."""
    if tuple(vector.shape) != (rows,):
        raise RunnerError(
            f"{name} are {tuple(vector.shape)}; with {rows} latents the model takes ({rows},)"
        )


def _require_whole(name: str, vector: Tensor) -> None:
    """Refuse what are no whole numbers by their type."""
    if vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool:
        raise RunnerError(f"{name} are {vector.dtype}; the model takes whole numbers")


def _require_range(name: str, vector: Tensor, first: float, last: float, what: str) -> None:
    """Refuse values beyond the first and the last; what lies on a GPU is not looked at."""
    if not vector.is_cpu:
        return
    readable = vector if vector.is_floating_point() else vector.long()
    low, high = readable.amin().item(), readable.amax().item()
    if not first <= low <= high <= last:
        found, known = _text(low, high), _text(first, last)
        raise RunnerError(f"{name} run from {found}; the model knows {known}, {what}")


def _text(low: float, high: float) -> str:
    """Return a range; floats to the digits that float32 has."""
    ends = (str(end) if isinstance(end, int) else f"{end:.7g}" for end in (low, high))
    return " to ".join(ends)


def _last_label(config: DiTConfig) -> str:
    """Return what the last row of the label table is."""
    return "the last for no class" if config.null_row else "its classes"
