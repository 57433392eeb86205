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
from ditas_export.errors import NonFiniteError, RunnerError
from ditas_export.families.base import ModelConfig, ModelInputs, output_shape
from ditas_export.families.registry import family_of
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

    def __init__(self, config: ModelConfig, *, one_at_a_time: bool = False) -> None:
        self._config = config
        self._backend: Any = None
        self._turn = threading.RLock() if one_at_a_time else nullcontext()

    @property
    def config(self) -> ModelConfig:
        """Of the model behind the runner."""
        return self._config

    @property
    @abstractmethod
    def description(self) -> str:
        """One line: backend, version, device, and the kernels really used where known."""

    @torch.no_grad()
    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Return ε and any learned variance, or the velocity; see `Runner`.

        Raises:
            RunnerError: inputs that do not fit the model, a fault of the backend, an output that is
                not finite, or a closed runner.
        """
        require_fitting(self._config, inputs)
        with self._turn:
            backend = self._open_backend()
            with faults_as_errors(self.description):
                output = self._infer(backend, _in_types(self._config, inputs))
                _require_output(output, len(inputs.latents), self._config)
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
    def _infer(self, backend: Any, inputs: ModelInputs) -> Tensor:
        """Return the output, float32 on the latents' device, of memory that nothing else writes.

        Features are in the float type that they came in, all else in the types of the interface.
        """

    def _open_backend(self) -> Any:
        """Return the backend; RunnerError once the runner is closed."""
        if self._backend is None:
            raise RunnerError("this runner is closed; open the model again")
        return self._backend

    def close(self) -> None:
        """Let go of the backend, once no call has its turn; calls that are under way end well."""
        with self._turn:
            self._backend = None


def _in_types(config: ModelConfig, inputs: ModelInputs) -> ModelInputs:
    """Return the inputs in the types of the interface, features as they are."""
    wanted = family_of(config).inputs(config)
    return inputs.replaced(
        {each.name: inputs[each.name].to(each.dtype) for each in wanted if not each.is_feature}
    )


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


def _require_output(output: Tensor, rows: int, config: ModelConfig) -> None:
    """Refuse an output that is not the model's; the caller names who gave it."""
    expected = (rows, *output_shape(config))
    if tuple(output.shape) != expected or output.dtype != torch.float32:
        raise ValueError(
            f"it gave {tuple(output.shape)} {output.dtype}, expected {expected} torch.float32"
        )
