"""What every backend looks like to the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from ditas_export.dit.model import DiTConfig


class Runner(Protocol):
    """A DiT that can be run, whatever runs it; a context manager.

    What every runner promises, and `runtime/checked_runner.py` keeps:

    - Threads may call one runner at the same time, and get what they would get alone. Backends
      whose memory would be shared take them one after another.
    - Inputs are held against the model first: shapes, labels, time steps. What lies on a GPU is
      not read back for that.
    - The output is finite, and in memory that later calls do not write to.
    - Everything else is a RunnerError: inputs that do not fit, an output that is not finite, a
      fault of the backend, a call after the end.
    """

    @property
    def config(self) -> DiTConfig:
        """Shape of the model behind the runner."""
        ...

    @property
    def description(self) -> str:
        """One line: backend, version, device, and the kernels really used where known."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents cost the runner no copy to or from the host; it takes them anywhere."""
        ...

    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Return ε and any learned variance, or the velocity.

        Args:
            latents: (N, C, H, W) float32.
            timesteps: (N,) int64, steps of the full schedule, from 0; of a flow (N,) float32, t
                from 0 to 1.
            class_labels: (N,) int64, rows of the label table.

        Returns:
            (N, 2C or C, H, W) float32, on the latents' device.

        Raises:
            RunnerError: see above.
        """
        ...

    def __enter__(self) -> Self:
        """Return the runner, ready."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free what the runner holds."""
        ...


class Closing(ABC):
    """A context manager that closes what it holds at the end."""

    def __enter__(self) -> Self:
        """Return itself, ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Free what is held; it cannot be used afterwards."""
