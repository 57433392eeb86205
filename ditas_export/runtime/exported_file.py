"""What every backend of an exported file has in common."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.families.base import ModelInputs
from ditas_export.onnx_export.external_data import require_external_data
from ditas_export.onnx_export.file_facts import read_config
from ditas_export.paths import StrPath
from ditas_export.runtime.checked_runner import CheckedRunner
from ditas_export.runtime.inputs import Feed, feed_of


class ExportedFileRunner(CheckedRunner):
    """A `Runner` of an ONNX file; a backend gives `_run`."""

    def __init__(self, path: StrPath) -> None:
        path = Path(path)
        super().__init__(read_config(path))
        require_external_data(path)

    @property
    def device(self) -> torch.device:
        """The CPU: files are fed and answer in NumPy arrays, whatever computes between."""
        return torch.device("cpu")

    def _infer(self, backend: Any, inputs: ModelInputs) -> Tensor:
        """Feed the file and return its output on the latents' device."""
        output = self._run(backend, feed_of(self._config, inputs))
        return torch.from_numpy(output).to(inputs.latents.device)

    @abstractmethod
    def _run(self, session: Any, feed: Feed) -> np.ndarray[Any, Any]:
        """Return `model_output`, an array that the backend does not write to again.

        Several threads may be in here at once.
        """
