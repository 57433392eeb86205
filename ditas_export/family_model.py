"""What a model is to the package, whatever its family: configuration, inputs, conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ditas_export.process import FlowProcess, Process


@runtime_checkable
class ModelConfig(Protocol):
    """What a model computes beside its tensors: a frozen dataclass of plain values, hashable.

    `families/registry.py` writes it into files and reads it there.
    """

    @property
    def process(self) -> Process | FlowProcess:
        """What the model predicts, and the schedule that it was trained with."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of what is denoised, C."""
        ...

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2C where the variance is learned."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one row of what is denoised, channels first: (C, H, W), or (C, frames)."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the tokens, D."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of what is denoised, T."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a file's header."""
        ...

    def __hash__(self) -> int:
        """Return a hash: what follows from a configuration is worked out once."""
        ...


class FamilyModel(nn.Module):
    """A transformer of a family; modules and parameters have the checkpoint's own names.

    It is called with the inputs of its family by name, N rows each, and returns (N, C or 2C, …), as
    `output_shape` has it: ε and any learned variance, or the velocity.
    """

    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """Where its parameters lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Float type of its parameters."""
        return next(self.parameters()).dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Which values an input may have."""

    first: float
    last: float
    what: str  # the values, for messages, such as "of the schedule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An input of the exported file; the batch is its first dimension, and left out here."""

    name: str
    dtype: torch.dtype  # float32 or int64
    shape: tuple[int | str, ...]
    """Sizes; the name of a dynamic dimension, such as "tokens", has one size in all inputs."""
    bounds: Bounds | None = None  # None: any
    is_feature: bool = False
    """Whether the network takes it in its own float type; all others it takes as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelInputs(Mapping[str, Tensor]):
    """What a model is fed: rows of all inputs by name, in the order of the file's.

    The first is what is denoised, the second the time; all others are conditions.
    """

    tensors: Mapping[str, Tensor]  # (N, …) each

    def __getitem__(self, name: str) -> Tensor:
        """Return an input, (N, …)."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in the order of the file's."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return how many inputs there are."""
        return len(self.tensors)

    @property
    def latents(self) -> Tensor:
        """What is denoised, (N, C, …)."""
        return next(iter(self.tensors.values()))

    @property
    def timesteps(self) -> Tensor:
        """The time of each row, (N,)."""
        return list(self.tensors.values())[1]

    @property
    def conditions(self) -> dict[str, Tensor]:
        """All but these two, by name."""
        return dict(list(self.tensors.items())[2:])

    def with_timesteps(self, timesteps: Tensor) -> ModelInputs:
        """Return the inputs at other times, (N,)."""
        return self.replaced({list(self.tensors)[1]: timesteps})

    def replaced(self, tensors: Mapping[str, Tensor]) -> ModelInputs:
        """Return the inputs with others in the place of some, by name."""
        return ModelInputs({**self.tensors, **tensors})

    def rows(self, rows: slice) -> ModelInputs:
        """Return some of the rows."""
        return ModelInputs({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> ModelInputs:
        """Return the inputs on another device."""
        return ModelInputs({name: tensor.to(device) for name, tensor in self.tensors.items()})


def output_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of one row of a model's output, (C or 2C, …)."""
    return (config.out_channels, *config.latent_shape[1:])


def is_image(config: ModelConfig) -> bool:
    """Return whether a row is an image or an image's latents, (C, H, W)."""
    return len(config.latent_shape) == 3


def plural(word: str) -> str:
    """Return the plural of what a label names."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


class Conditions(Protocol):
    """What images can be asked for, by labels: classes, or the prompts of an embeddings file."""

    @property
    def what(self) -> str:
        """What a label names, for messages: "class" or "prompt"."""
        ...

    @property
    def source(self) -> str:
        """What has them, for messages: "this model", or the name of a file."""
        ...

    @property
    def count(self) -> int:
        """How many can be asked for: the labels 0 … count - 1."""
        ...

    @property
    def null(self) -> int | None:
        """The label of "no condition"; None where there is none, or nothing to tell it from."""
        ...

    @property
    def lack(self) -> str:
        """What the source has none of where `null` is None, for messages, such as "null class"."""
        ...

    @property
    def identity(self) -> str | None:
        """What tells these from others: the SHA-256 of an embeddings file; None for classes."""
        ...

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the inputs that are conditions, (N, …) each on the CPU, by the file's names.

        Args:
            labels: (N,) int64, 0 to count - 1, or `null`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadCheckpoint:
    """What a family read of a checkpoint."""

    model: FamilyModel  # float32, evaluation mode, no gradients; tensors may be mapped from a file
    source: str  # one line: what was read
    dtype: torch.dtype  # float type of the block linears in the file
    notes: tuple[str, ...] = ()  # one line each: what was chosen, stripped, left out or guessed
    vae: str | None = None  # the VAE of a pipeline: its folder, or the hub's id
