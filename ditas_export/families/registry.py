"""Which family a configuration is of, and what follows from its tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ditas_export.dit.checkpoint import embeddings_path
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import CheckpointError
from ditas_export.families.base import AnyFamily, Conditions, ModelConfig
from ditas_export.families.dit import DiTFamily
from ditas_export.families.entry_points import family_named, loaded_families, package_of
from ditas_export.families.pixart import PixArtFamily
from ditas_export.options import FamilyChoice
from ditas_export.process import FlowProcess, Process
from ditas_export.saved_records import from_record

FAMILIES: list[AnyFamily] = [
    DiTFamily("dit", Process),
    DiTFamily("sit", FlowProcess),
    PixArtFamily(),
]
"""All that come with the package; the first that serves a configuration is its family, before those
of other packages."""

_FAMILY, _PACKAGE = "family", "package"
"""Entries of a recorded configuration: its family, and the other package that brings it."""


def known_names() -> list[str]:
    """Return what families of this package are called, in files and by `--family`."""
    return list(dict.fromkeys([*get_args(FamilyChoice), *(family.name for family in FAMILIES)]))


def family_of(config: ModelConfig) -> AnyFamily:
    """Return the family of a model: the first of its configuration's class that serves it.

    Raises:
        CheckpointError: there is none.
    """
    for family in (*FAMILIES, *loaded_families()):
        if isinstance(config, family.config_type) and family.serves(config):
            return family
    raise CheckpointError(
        f"no family serves a {type(config).__name__} that {config.process}; known are "
        f"{', '.join(family.name for family in FAMILIES)}"
    )


def record_of(config: ModelConfig) -> dict[str, Any]:
    """Return a configuration as JSON values that name its family, and who else brings it.

    A `DiTConfig` names none, as before there were others: its process tells a DiT from a SiT.
    """
    if isinstance(config, DiTConfig):
        return config.to_dict()
    family = family_of(config)
    package = package_of(family)
    whose = {_FAMILY: family.name} if package is None else {_FAMILY: family.name, _PACKAGE: package}
    return {**whose, **config.to_dict()}


def config_of(values: object) -> ModelConfig:
    """Return the configuration that `record_of` gave, of this version or an earlier one.

    Fields that a record of an earlier version lacks have the values that it meant: the defaults.
    The family of another package is imported.

    Raises:
        UnknownFamilyError: a family that is not known and that no package here brings.
        CheckpointError: no mapping, a family that does not load, an unknown name, or a value that
            no model of the family has.
    """
    if not isinstance(values, Mapping) or _FAMILY not in values:
        return DiTConfig.from_dict(values)
    name = values[_FAMILY]
    package = values.get(_PACKAGE)
    if not isinstance(name, str) or not isinstance(package, str | None):
        raise CheckpointError(f"family={str(name)[:40]!r} of {str(package)[:40]!r}; expected names")
    known = {family.name: family for family in FAMILIES}
    family = known.get(name) or family_named(name, known=known_names(), package=package)
    stated = {key: value for key, value in values.items() if key not in (_FAMILY, _PACKAGE)}
    config: ModelConfig = from_record(family.config_type, stated)
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
