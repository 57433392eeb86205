"""What the builder made of each linear, read from its log.

The verbose log has one line per engine layer: its type, the data types of its inputs and constants,
and the ONNX nodes that it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ditas_export.errors import EngineError


class Kernel(StrEnum):
    """How an engine multiplies a linear."""

    INTEGER = "INT8×INT8 GEMM"
    FLOAT = "float GEMM"
    WEIGHT_ONLY = "float GEMM on integer weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of an engine."""

    name: str
    kind: str  # gemm, kgen, runtime_fusion, …
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    constant_names: tuple[str, ...]
    onnx_nodes: frozenset[str]

    @property
    def multiplies(self) -> bool:
        """Whether the layer is a matrix product, not the arithmetic around one."""
        return self.kind == "gemm" or (self.kind == "runtime_fusion" and "Fc" in self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltLinear:
    """One linear in the engine."""

    kernel: Kernel
    layer: str
    keeps_int4: bool  # its codes are an INT4 constant of the engine


_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[.*?\], TacticName: .*?Metadata: (?P<nodes>.*)"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: .*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


def engine_layers(log: str) -> list[EngineLayer]:
    """Return the layers that a verbose build log lists, in their order.

    Raises:
        EngineError: the log lists none.
    """
    layers = []
    for line in log.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        constants = _TENSOR.findall(match["constants"])
        layers.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                input_types=tuple(kind for _, kind in _TENSOR.findall(match["inputs"])),
                constant_types=tuple(kind for _, kind in constants),
                constant_names=tuple(name for name, _ in constants),
                onnx_nodes=frozenset(_NODE.findall(match["nodes"])),
            )
        )
    if not layers:
        raise EngineError("the build log lists no layers; build with detailed profiling verbosity")
    return layers


def built_linears(log: str, paths: Iterable[str]) -> dict[str, BuiltLinear]:
    """Return what became of linears, by module path.

    Args:
        log: of a build, verbose.
        paths: module paths such as "blocks.0.attn.qkv".

    Raises:
        EngineError: a linear is nowhere in the engine.
    """
    layers = engine_layers(log)
    int4 = {
        name
        for layer in layers
        for name, kind in zip(layer.constant_names, layer.constant_types, strict=True)
        if kind == "Int4"
    }
    return {path: _built_linear(path, layers, int4) for path in paths}


def _built_linear(path: str, layers: list[EngineLayer], int4: set[str]) -> BuiltLinear:
    """Find the product of one linear among the layers."""
    found = [layer for layer in layers if layer.multiplies and f"{path}/MatMul" in layer.onnx_nodes]
    if not found:
        raise EngineError(f"no layer of the engine multiplies {path}; it was fused out of sight")
    return BuiltLinear(
        kernel=_kernel(found),
        layer=found[0].name,
        keeps_int4=any(name.startswith(f"{path}/codes") for name in int4)
        or any("Int4" in layer.constant_types for layer in found),
    )


def _kernel(layers: list[EngineLayer]) -> Kernel:
    """Return the kind of a product that may be spread over several layers."""
    if all(_is_integer(layer) for layer in layers):
        return Kernel.INTEGER
    stored = {kind for layer in layers for kind in layer.constant_types}
    return Kernel.WEIGHT_ONLY if stored & {"Int4", "Int8"} else Kernel.FLOAT


def _is_integer(layer: EngineLayer) -> bool:
    """Return whether a layer multiplies INT8 by INT8."""
    if layer.kind != "gemm" or "Int8" not in layer.input_types[:1]:
        return False
    return layer.input_types.count("Int8") > 1 or "Int8" in layer.constant_types
