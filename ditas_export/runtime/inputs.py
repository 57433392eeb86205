"""Checking what a runner is fed, once, before any backend sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError


def require_inputs(
    config: DiTConfig, latents: Tensor, timesteps: Tensor, class_labels: Tensor
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the three inputs as arrays in the types of the files' interface.

    Args:
        config: shape of the model.
        latents: (N, C, H, W), any float type.
        timesteps: (N,) of whole numbers.
        class_labels: (N,) of whole numbers, rows of the label table.

    Raises:
        RunnerError: a shape or a label that does not fit the model.
    """
    require_fitting(config, latents, timesteps, class_labels.cpu())
    return {
        "latents": latents.detach().cpu().float().contiguous().numpy(),
        "timesteps": timesteps.detach().cpu().long().contiguous().numpy(),
        "class_labels": class_labels.detach().cpu().long().contiguous().numpy(),
    }


def require_fitting(
    config: DiTConfig, latents: Tensor, timesteps: Tensor, class_labels: Tensor
) -> None:
    """Refuse inputs that do not fit a model; the arguments are those of `require_inputs`.

    Labels that lie on a GPU are not looked at: reading them would make the host wait.

    Raises:
        RunnerError: a shape or a label that does not fit the model.
    """
    side = config.input_size
    expected = (latents.shape[0], config.in_channels, side, side)
    if tuple(latents.shape) != expected:
        raise RunnerError(
            f"latents are {tuple(latents.shape)}; the model takes "
            f"(N, {config.in_channels}, {side}, {side})"
        )
    for name, vector in (("timesteps", timesteps), ("class_labels", class_labels)):
        if tuple(vector.shape) != (latents.shape[0],):
            raise RunnerError(
                f"{name} are {tuple(vector.shape)}; with {latents.shape[0]} latents the model "
                f"takes ({latents.shape[0]},)"
            )
    if not class_labels.is_cpu or not class_labels.numel():
        return
    last = config.label_rows - 1
    if not 0 <= class_labels.amin() <= class_labels.amax() <= last:
        raise RunnerError(
            f"class labels run from {int(class_labels.amin())} to {int(class_labels.amax())}; the "
            f"model knows 0 to {last}{', the last for no class' if config.null_row else ''}"
        )
