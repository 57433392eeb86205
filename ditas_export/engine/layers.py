"""What the builder made of each linear, read from its log or from an engine inspector.

The verbose log has one line per engine layer: its type, the data types of its inputs and constants,
and the ONNX nodes that it stands for. TensorRT for RTX 1.7 lists constants; TensorRT 10.10 writes
the same line without them (NVIDIA/TensorRT issue 4397). An inspector says the same as JSON (issue
4020), once there is a GPU to load the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

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
    lists_constants: bool
    constant_types: tuple[str, ...]
    constant_names: tuple[str, ...]
    stream: int
    onnx_nodes: frozenset[str]

    @property
    def multiplies(self) -> bool:
        """Whether the layer is a matrix product, not the arithmetic around one."""
        return self.kind == "gemm" or (self.kind == "runtime_fusion" and "Fc" in self.name)

    @property
    def is_kernel(self) -> bool:
        """Whether the layer computes, and does not wait for a stream or work out a shape."""
        return self.kind not in ("shape_call", "signal", "wait")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltLinear:
    """One linear in the engine."""

    kernel: Kernel
    layer: str
    fused_before: tuple[str, ...]  # ONNX nodes of others that share a layer with its input's side
    fused_inside: tuple[str, ...]  # … with the product itself
    fused_after: tuple[str, ...]  # … with its output's side
    keeps_int4: bool  # its codes are an INT4 constant of the engine


_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[.*?\], TacticName: .*?"
    r"StreamId: (?P<stream>\d+), Metadata: (?P<nodes>.*)"
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
        constants = _TENSOR.findall(match["constants"] or "")
        layers.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                input_types=tuple(kind for _, kind in _TENSOR.findall(match["inputs"])),
                lists_constants=match["constants"] is not None,
                constant_types=tuple(kind for _, kind in constants),
                constant_names=tuple(name for name, _ in constants),
                stream=int(match["stream"]),
                onnx_nodes=frozenset(_NODE.findall(match["nodes"])),
            )
        )
    if not layers:
        raise EngineError("the build log lists no layers, so what became of them is not known")
    return layers


def layers_from_inspector(text: str) -> list[EngineLayer]:
    """Return the layers in an engine inspector's JSON, in their order.

    Raises:
        EngineError: no such JSON, or layers by name alone.
    """
    try:
        return [_inspected_layer(entry) for entry in json.loads(text)["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"the inspector does not describe layers ({error!r}); build with detailed profiling "
            f"verbosity"
        ) from error


def _inspected_layer(entry: Mapping[str, Any]) -> EngineLayer:
    """Return one layer of an inspector's JSON."""
    constants = entry.get("Constants", [])
    return EngineLayer(
        name=entry["Name"],
        kind=entry["LayerType"],
        input_types=tuple(_inspected_type(tensor) for tensor in entry["Inputs"]),
        lists_constants="Constants" in entry,
        constant_types=tuple(_inspected_type(tensor) for tensor in constants),
        constant_names=tuple(tensor["Name"] for tensor in constants),
        stream=entry["StreamId"],
        onnx_nodes=frozenset(_NODE.findall(entry["Metadata"])),
    )


def _inspected_type(tensor: Mapping[str, str]) -> str:
    """Return a data type; it may end a description, as in "Row major linear FP16 format"."""
    words = tensor["Datatype"] if "Datatype" in tensor else tensor["Format/Datatype"]
    return words.removesuffix(" format").rpartition(" ")[2]


def built_linears(layers: list[EngineLayer], paths: Iterable[str]) -> dict[str, BuiltLinear]:
    """Return what became of linears, by module path.

    Args:
        layers: of an engine, in their order.
        paths: module paths such as "blocks.0.attn.qkv".

    Raises:
        EngineError: a linear is nowhere in the engine.
    """
    int4 = {
        name
        for layer in layers
        for name, kind in zip(layer.constant_names, layer.constant_types, strict=True)
        if kind == "Int4"
    }
    return {path: _built_linear(path, layers, int4) for path in paths}


def _built_linear(path: str, layers: list[EngineLayer], int4: set[str]) -> BuiltLinear:
    """Find the product of one linear among the layers."""
    indices = [
        index
        for index, layer in enumerate(layers)
        if layer.multiplies and f"{path}/MatMul" in layer.onnx_nodes
    ]
    found = [layers[index] for index in indices]
    if not found:
        raise EngineError(f"no layer of the engine multiplies {path}; it was fused out of sight")
    return BuiltLinear(
        kernel=_kernel(found),
        layer=found[0].name,
        fused_before=_foreign_nodes(path, layers[: indices[0]]),
        fused_inside=_foreign_nodes(path, found),
        fused_after=_foreign_nodes(path, layers[indices[-1] + 1 :]),
        keeps_int4=any(name.startswith(f"{path}/codes") for name in int4)
        or any("Int4" in layer.constant_types for layer in found),
    )


def _foreign_nodes(path: str, layers: list[EngineLayer]) -> tuple[str, ...]:
    """Return the nodes of others in the layers that also hold nodes of a linear."""
    own = f"{path}/"
    shared = [layer for layer in layers if any(node.startswith(own) for node in layer.onnx_nodes)]
    nodes = {node for layer in shared for node in layer.onnx_nodes if not node.startswith(own)}
    return tuple(sorted(nodes))


def _kernel(layers: list[EngineLayer]) -> Kernel:
    """Return the kind of a product that may be spread over several layers."""
    if all(_is_integer(layer) for layer in layers):
        return Kernel.INTEGER
    stored = {kind for layer in layers for kind in layer.constant_types}
    return Kernel.WEIGHT_ONLY if stored & {"Int4", "Int8"} else Kernel.FLOAT


def _is_integer(layer: EngineLayer) -> bool:
    """Return whether a layer multiplies INT8 by INT8.

    Where constants are not listed, the first operand tells: a GEMM takes two of one type.
    """
    if layer.kind != "gemm" or "Int8" not in layer.input_types[:1]:
        return False
    if not layer.lists_constants:
        return True
    return layer.input_types.count("Int8") > 1 or "Int8" in layer.constant_types
