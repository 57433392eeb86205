"""What the builder made of each linear, read from its log or from an engine inspector.

The verbose log has one line per engine layer: its type, the data types of its inputs and constants,
and the ONNX nodes that it stands for. TensorRT for RTX 1.7 lists constants; TensorRT 10.10 writes
the same line without them (NVIDIA/TensorRT issue 4397). An inspector says the same as JSON (issue
4020), once there is a GPU to load the engine; of types that depend on shapes it may know nothing.
What is not said is unknown, and is never taken for a float product.
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
    UNKNOWN = "unknown"


UNKNOWN_TYPE = "unknown"
"""Data type of a tensor where none is told: "N/A due to dynamic shapes", or a word unheard of."""

_PRODUCT_KINDS = re.compile(r"gemm|matrixmultiply|convolution", re.IGNORECASE)
"""Kinds of layers that multiply: gemm, MatrixMultiply, CaskGemmMatrixMultiply, …"""

_IDLE_KINDS = ("shape_call", "signal", "wait", "constant", "noop")
"""Kinds of layers that compute nothing, in small letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of an engine."""

    name: str
    kind: str  # gemm, kgen, runtime_fusion, …; MatrixMultiply, … of TensorRT
    input_types: tuple[str, ...]  # Int8, Half, …
    lists_constants: bool
    constant_types: tuple[str, ...]
    constant_names: tuple[str, ...]
    stream: int
    onnx_nodes: frozenset[str]

    @property
    def multiplies(self) -> bool:
        """Whether the layer is a matrix product, not the arithmetic around one."""
        is_product = _PRODUCT_KINDS.search(self.kind) is not None
        return is_product or (self.kind == "runtime_fusion" and "Fc" in self.name)

    @property
    def is_kernel(self) -> bool:
        """Whether the layer computes, and does not wait for a stream or work out a shape."""
        return self.kind.lower() not in _IDLE_KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltLinear:
    """One linear in the engine."""

    kernel: Kernel
    layer: str  # empty where no layer shows it
    lists_weights: bool  # whether the type of its weights is told, so that FLOAT is all of it
    fused_before: tuple[str, ...]  # ONNX nodes of others that share a layer with its input's side
    fused_inside: tuple[str, ...]  # … with the product itself
    fused_after: tuple[str, ...]  # … with its output's side
    keeps_int4: bool  # its codes are an INT4 constant of the engine


_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[.*?\], TacticName: .*?"
    r"StreamId: (?P<stream>\d+), Metadata: (?P<nodes>.*)"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: .*?Datatype: (?P<type>[^,}]+)")
_TYPE = re.compile(
    r"\b(?:U?Int(?:4|8|32|64)|Bool|Half|Float(?:16|32)?|BFloat16|BF16|FP(?:4|8|16|32))\b",
    re.IGNORECASE,
)
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
                input_types=tuple(_data_type(kind) for _, kind in _TENSOR.findall(match["inputs"])),
                lists_constants=match["constants"] is not None,
                constant_types=tuple(_data_type(kind) for _, kind in constants),
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
    """Return the data type in an inspector's words on a tensor."""
    return _data_type(tensor["Datatype"] if "Datatype" in tensor else tensor["Format/Datatype"])


def _data_type(words: str) -> str:
    """Return the data type in a description, such as "Row major linear FP16 format"."""
    found = _TYPE.search(words)
    if found is None:
        return UNKNOWN_TYPE
    return {"int8": "Int8", "int4": "Int4"}.get(found[0].lower(), found[0])


def built_linears(layers: list[EngineLayer], paths: Iterable[str]) -> dict[str, BuiltLinear]:
    """Return what became of linears, by module path.

    Args:
        layers: of an engine, in their order.
        paths: module paths such as "blocks.0.attn.qkv".
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
    holding = [
        index
        for index, layer in enumerate(layers)
        if layer.is_kernel and f"{path}/MatMul" in layer.onnx_nodes
    ]
    indices = [index for index in holding if layers[index].multiplies] or holding
    found = [layers[index] for index in indices]
    before, after = (indices[0], indices[-1] + 1) if indices else (0, 0)
    return BuiltLinear(
        kernel=_kernel(found),
        layer=found[0].name if found else "",
        lists_weights=all(layer.lists_constants for layer in found),
        fused_before=_foreign_nodes(path, layers[:before]),
        fused_inside=_foreign_nodes(path, found),
        fused_after=_foreign_nodes(path, layers[after:]),
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
    """Return the kind of a product that may be spread over several layers, or be in none."""
    kinds = {_kernel_of_layer(layer) for layer in layers}
    order = (Kernel.WEIGHT_ONLY, Kernel.FLOAT, Kernel.UNKNOWN, Kernel.INTEGER)
    return next((kind for kind in order if kind in kinds), Kernel.UNKNOWN)


def _kernel_of_layer(layer: EngineLayer) -> Kernel:
    """Return how a layer multiplies; a GEMM takes two operands of one type, so the first tells.

    A fusion dequantizes first where it does not take the product of its integers: that of TensorRT
    for RTX does (runtime_fusion), of others it is not known.
    """
    activation = layer.input_types[0] if layer.input_types else UNKNOWN_TYPE
    weights = {*layer.input_types[1:], *layer.constant_types}
    if activation == UNKNOWN_TYPE:
        return Kernel.UNKNOWN
    if activation == "Int8" and layer.kind != "runtime_fusion":
        if not layer.multiplies:
            return Kernel.UNKNOWN
        if "Int8" in weights or not layer.lists_constants:
            return Kernel.INTEGER
    if UNKNOWN_TYPE in weights:
        return Kernel.UNKNOWN
    stored = set(layer.constant_types) if layer.lists_constants else weights
    return Kernel.WEIGHT_ONLY if stored & {"Int4", "Int8"} else Kernel.FLOAT
