"""What every backend of an exported file has in common."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.diffusion.runner import Closing
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError
from ditas_export.onnx_export.export import read_config
from ditas_export.onnx_export.external_data import require_external_data
from ditas_export.runtime.inputs import require_inputs

Feed = dict[str, np.ndarray[Any, Any]]
"""The three inputs by name, in the types of the files' interface."""


class ExportedFileRunner(Closing):
    """A `Runner` of an ONNX file: checks what it is fed and whether it is still open.

    A backend gives `_session`, None once closed, and `_infer`.
    """

    def __init__(self, path: Path) -> None:
        self._config = read_config(path)
        require_external_data(path)
        self._session: Any = None

    @property
    def config(self) -> DiTConfig:
        """Shape of the model behind the runner."""
        return self._config

    @property
    def device(self) -> torch.device:
        """The CPU: files are fed and answer in NumPy arrays, whatever computes between."""
        return torch.device("cpu")

    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Return ε and the learned variance, (N, 2C, H, W) float32 on the latents' device.

        Raises:
            RunnerError: inputs that do not fit the model, or a closed runner.
        """
        if self._session is None:
            raise RunnerError("this runner is closed; open the file again")
        feed = require_inputs(self._config, latents, timesteps, class_labels)
        return torch.from_numpy(self._infer(feed)).to(latents.device)

    @abstractmethod
    def _infer(self, feed: Feed) -> np.ndarray[Any, Any]:
        """Return `model_output`, an array that the backend does not write to again."""

    def close(self) -> None:
        """Free the session; its threads may spin after a run, so do not keep idle ones."""
        self._session = None
