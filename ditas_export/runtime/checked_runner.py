"""The one boundary of every runner: it checks, a backend only infers.

What `Runner` promises is kept here: inputs are held against the model before a backend sees them,
threads may call at the same time, an output that is not finite is an error, and so is every fault
of a backend and every call after `close`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.diffusion.runner import Closing
from ditas_export.diffusion.sampling import REMEDY
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import NonFiniteError, RunnerError
from ditas_export.runtime.faults import faults_as_errors
from ditas_export.runtime.inputs import require_fitting


class CheckedRunner(Closing):
    """A `Runner` whose backend gives `device`, `description` and `_infer`.

    A backend sets `_backend` once it is open, to what `_infer` is called with; `close` lets go of
    it.

    Args:
        config: of the model.
        one_at_a_time: whether calls of several threads wait for each other: for backends whose
            memory they would share.
    """

    def __init__(self, config: DiTConfig, *, one_at_a_time: bool = False) -> None:
        self._config = config
        self._backend: Any = None
        self._turn = threading.RLock() if one_at_a_time else nullcontext()

    @property
    def config(self) -> DiTConfig:
        """Of the model behind the runner."""
        return self._config

    @property
    @abstractmethod
    def description(self) -> str:
        """One line: backend, version, device, and the kernels really used where known."""

    @torch.no_grad()
    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Return ε and any learned variance, or the velocity; see `Runner`.

        Raises:
            RunnerError: inputs that do not fit the model, a fault of the backend, an output that is
                not finite, or a closed runner.
        """
        require_fitting(self._config, latents, timesteps, class_labels)
        with self._turn:
            backend = self._open_backend()
            with faults_as_errors(self.description):
                times = timesteps.to(self._config.process.time_dtype)
                output = self._infer(backend, latents, times, class_labels.long())
                _require_output(output, len(latents), self._config)
                odd = _rows_that_are_not_finite(output)
        if odd:
            error = NonFiniteError(
                f"{self.description} put out NaN or infinity in rows "
                f"{', '.join(map(str, odd[:8]))} of a batch; {REMEDY}"
            )
            error.rows = tuple(odd)
            raise error
        return output

    @abstractmethod
    def _infer(
        self, backend: Any, latents: Tensor, timesteps: Tensor, class_labels: Tensor
    ) -> Tensor:
        """Return the output, float32 on the latents' device, of memory that nothing else writes."""

    def _open_backend(self) -> Any:
        """Return the backend; RunnerError once the runner is closed."""
        if self._backend is None:
            raise RunnerError("this runner is closed; open the model again")
        return self._backend

    def close(self) -> None:
        """Let go of the backend, once no call has its turn; calls that are under way end well."""
        with self._turn:
            self._backend = None


def _rows_that_are_not_finite(output: Tensor) -> list[int]:
    """Return the rows of a batch that hold NaN or infinity.

    NumPy looks where it can: torch takes its threads for 32 768 numbers, and these spin on for a
    while, in the way of the backend's own at the next call (a seventh of two blocks' time).
    """
    if output.is_cpu:
        in_rows = np.isfinite(output.numpy()).reshape(len(output), -1).all(axis=1)
        return np.flatnonzero(~in_rows).tolist()
    finite = output.flatten(1).isfinite().all(dim=1)
    return [] if bool(finite.all()) else finite.logical_not().nonzero().flatten().tolist()


def _require_output(output: Tensor, rows: int, config: DiTConfig) -> None:
    """Refuse an output that is not the model's; the caller names who gave it."""
    side = config.input_size
    expected = (rows, config.out_channels, side, side)
    if tuple(output.shape) != expected or output.dtype != torch.float32:
        raise ValueError(
            f"it gave {tuple(output.shape)} {output.dtype}, expected {expected} torch.float32"
        )
