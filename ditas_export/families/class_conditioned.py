"""What DiTs are asked and fed: a class, a time, latents; and what their modulation makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.conditions.labels import CLASS_LABELS, ClassLabels
from ditas_export.dit.model import DiTConfig, LabelEmbedder, TimestepEmbedder
from ditas_export.errors import ConditionsError
from ditas_export.families.base import Bounds, Input, Shapes

LABELS_PER_TIME = 8
"""Labels seen at each time by the modulation: seven classes in turn, and the null class."""

TIMES = 1000
"""Times of a flow at which the modulation is seen, evenly spaced."""


class ClassConditioned:
    """The part of a family that embeds inputs as DiT does."""

    def modulation_inputs(self, config: DiTConfig, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return SiLU(c) of every time step, or of 1000 times of a flow, with eight labels each.

        The null class, which guidance asks for in every second row, comes at each time; the others
        take turns, so that all are seen. Without a null class all rows of the label table take
        turns.
        """
        times = _times(config)
        in_turn = LABELS_PER_TIME - 1 if config.is_guidable else LABELS_PER_TIME
        labels = (torch.arange(len(times) * in_turn) % config.num_labels).reshape(-1, in_turn)
        if config.is_guidable:
            labels = functional.pad(labels, (0, 1), value=config.null_class)
        with torch.no_grad():
            of_times = _loaded(TimestepEmbedder(config), "t_embedder", parameters)(times)
            of_labels = _loaded(LabelEmbedder(config), "y_embedder", parameters)(labels)
            return functional.silu(of_times[:, None] + of_labels).flatten(0, 1)

    def embedders(self) -> tuple[str, ...]:
        """Return how names of what embeds the inputs begin."""
        return ("x_embedder", "t_embedder", "y_embedder", "pos_embed")

    def tables(self, config: DiTConfig) -> Shapes:
        """Return shapes of the embedders' tables."""
        patch = config.patch_size
        return {
            "y_embedder.embedding_table.weight": (config.label_rows, config.hidden_size),
            "pos_embed": (1, config.num_tokens, config.hidden_size),
            "x_embedder.proj.weight": (config.hidden_size, config.in_channels, patch, patch),
        }

    def inputs(self, config: DiTConfig) -> tuple[Input, ...]:
        """Return latents, times and labels."""
        side, process = config.input_size, config.process
        first, last = process.times
        times = "of the flow" if process.time_dtype.is_floating_point else "of the schedule"
        labels = "the last for no class" if config.null_row else "its classes"
        return (
            Input(
                name="latents",
                dtype=torch.float32,
                shape=(config.in_channels, side, side),
                is_feature=True,
            ),
            Input(
                name="timesteps",
                dtype=process.time_dtype,
                shape=(),
                bounds=Bounds(first=first, last=last, what=times),
            ),
            Input(
                name=CLASS_LABELS,
                dtype=torch.int64,
                shape=(),
                bounds=Bounds(first=0, last=config.label_rows - 1, what=labels),
            ),
        )

    def sizes(self, _config: DiTConfig) -> Mapping[str, tuple[int, int, int]]:
        """Return nothing: the batch alone is dynamic."""
        return {}

    def conditions(self, config: DiTConfig, embeddings: Path | None) -> ClassLabels:
        """Return the classes.

        Raises:
            ConditionsError: embeddings, which a model of classes does not read.
        """
        if embeddings is not None:
            raise ConditionsError(
                f"{embeddings} holds embeddings of prompts, and this model is asked by classes; "
                f"leave --embeddings out"
            )
        return ClassLabels(config)


def _times(config: DiTConfig) -> Tensor:
    """Return the times at which the modulation is seen: every step, or evenly those of a flow."""
    first, last = config.process.times
    if config.process.time_dtype == torch.int64:
        return torch.arange(int(first), int(last) + 1)
    return torch.linspace(first, last, TIMES)


def _loaded(module: nn.Module, path: str, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with its parameters of the model."""
    module.load_state_dict({name: parameters[f"{path}.{name}"] for name in module.state_dict()})
    return module
