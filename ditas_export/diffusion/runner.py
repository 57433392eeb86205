"""What every backend looks like to the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from ditas_export.families.base import ModelConfig, ModelInputs


class Runner(Protocol):
    """A model that can be run, whatever runs it; a context manager.

    What every runner promises, and `runtime/checked_runner.py` keeps:

    - Threads may call one runner at the same time, and get what they would get alone. Backends
      whose memory would be shared take them one after another.
    - Inputs are held against the model first: names, shapes, types, labels, time steps. What lies
      on a GPU is not read back for that.
    - The output is finite, and in memory that later calls do not write to.
    - Everything else is a RunnerError: inputs that do not fit, an output that is not finite, a
      fault of the backend, a call after the end.
    """

    @property
    def config(self) -> ModelConfig:
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

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Return ε and any learned variance, or the velocity.

        Args:
            inputs: N rows of what the model's family says that it is fed.

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
