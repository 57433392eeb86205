"""Which family a configuration is of, and what follows from its tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditas_export.dit.checkpoint import embeddings_path
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import CheckpointError
from ditas_export.families.base import AnyFamily, Conditions, ModelConfig
from ditas_export.families.dit import DiTFamily
from ditas_export.families.pixart import PixArtFamily
from ditas_export.process import FlowProcess, Process
from ditas_export.saved_records import from_record

FAMILIES: list[AnyFamily] = [
    DiTFamily("dit", Process),
    DiTFamily("sit", FlowProcess),
    PixArtFamily(),
]
"""All that are known; the first that serves a configuration is its family."""

_FAMILY = "family"
"""The entry of a recorded configuration that names its family."""


def family_of(config: ModelConfig) -> AnyFamily:
    """Return the family of a model: the first of its configuration's class that serves it.

    Raises:
        CheckpointError: there is none.
    """
    for family in FAMILIES:
        if isinstance(config, family.config_type) and family.serves(config):
            return family
    raise CheckpointError(
        f"no family serves a {type(config).__name__} that {config.process}; known are "
        f"{', '.join(family.name for family in FAMILIES)}"
    )


def record_of(config: ModelConfig) -> dict[str, Any]:
    """Return a configuration as JSON values that name its family.

    A `DiTConfig` names none, as before there were others: its process tells a DiT from a SiT.
    """
    if isinstance(config, DiTConfig):
        return config.to_dict()
    return {_FAMILY: family_of(config).name, **config.to_dict()}


def config_of(values: object) -> ModelConfig:
    """Return the configuration that `record_of` gave, of this version or an earlier one.

    Fields that a record of an earlier version lacks have the values that it meant: the defaults.

    Raises:
        CheckpointError: no mapping, a family that is not known, an unknown name, or a value that no
            model of the family has.
    """
    if not isinstance(values, Mapping) or _FAMILY not in values:
        return DiTConfig.from_dict(values)
    name = values[_FAMILY]
    known = {family.name: family for family in FAMILIES}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"family={str(name)[:40]!r}; known are {', '.join(known)}")
    stated = {key: value for key, value in values.items() if key != _FAMILY}
    config: ModelConfig = from_record(known[name].config_type, stated)
    return config


def conditions_of(config: ModelConfig, embeddings: Path | None = None) -> Conditions:
    """Return what images can be asked for; see `Family.conditions`.

    Args:
        config: of the model.
        embeddings: the file, or `digits-pixart` for that of the bundled model.

    Raises:
        ConditionsError: embeddings that are needed and missing, or given and of no use.
    """
    return family_of(config).conditions(config, embeddings_path(embeddings))


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the module paths of every quantized linear, in walk order."""
    return tuple(name for block in family_of(config).blocks(config) for name in block.linears)


@functools.lru_cache(maxsize=8)
def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of every quantized linear, (N, K) by module path, in walk order."""
    with torch.device("meta"):
        model = family_of(config).module(config)
    shapes: dict[str, tuple[int, int]] = {}
    for name in linear_names(config):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes[name] = (linear.out_features, linear.in_features)
    return shapes
