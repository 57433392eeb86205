"""Which family a configuration is of, and what follows from its tables."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ditas_export.dit.model import DiTConfig
from ditas_export.process import FlowProcess, Process
from ditas_export.families.base import Family
from ditas_export.families.dit import DiTFamily

FAMILIES: list[Family] = [DiTFamily("dit", Process), DiTFamily("sit", FlowProcess)]
"""All that are known; the first that serves a configuration is its family."""


def family_of(config: DiTConfig) -> Family:
    """Return the family of a model."""
    return next(family for family in FAMILIES if family.serves(config))


def linear_names(config: DiTConfig) -> tuple[str, ...]:
    """Return the module paths of every quantized linear, in walk order."""
    return tuple(name for block in family_of(config).blocks(config) for name in block.linears)


@functools.lru_cache(maxsize=8)
def linear_shapes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of every quantized linear, (N, K) by module path, in walk order."""
    with torch.device("meta"):
        model = family_of(config).module(config)
    shapes: dict[str, tuple[int, int]] = {}
    for name in linear_names(config):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes[name] = (linear.out_features, linear.in_features)
    return shapes
