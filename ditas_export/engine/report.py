"""The layer report: whether an engine computes what its file says, and in how many kernels."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditas_export.engine.layers import (
    BuiltLinear,
    EngineLayer,
    Kernel,
    built_linears,
)
from ditas_export.families.base import ModelConfig
from ditas_export.families.registry import family_of, linear_names
from ditas_export.onnx_export.form import FileForm


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltBlock:
    """What became of one block."""

    kernels: int  # layers that compute; one shared by two blocks counts for the first
    has_fused_attention: bool  # q·kᵀ, softmax and ·v in one kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What the builder made of a file."""

    linears: Mapping[str, BuiltLinear]  # every quantized linear, by module path
    expected: Mapping[str, Kernel]  # the same linears: what their form in the file asks for
    blocks: tuple[BuiltBlock, ...]
    kernels: int
    extra_streams: int

    @property
    def unknown(self) -> tuple[str, ...]:
        """Linears of which nothing shows how the builder multiplies them."""
        return tuple(
            path
            for path, built in self.linears.items()
            if built.kernel == Kernel.UNKNOWN
            or (
                built.kernel == Kernel.FLOAT
                and self.expected[path] == Kernel.WEIGHT_ONLY
                and not built.lists_weights
            )
        )

    @property
    def lost(self) -> tuple[str, ...]:
        """Linears that the builder multiplies in another way than the file asks for."""
        unknown = self.unknown
        return tuple(
            path
            for path, built in self.linears.items()
            if built.kernel != self.expected[path] and path not in unknown
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "linears": {
                path: {"expected": self.expected[path], **dataclasses.asdict(built)}
                for path, built in self.linears.items()
            },
            "lost": list(self.lost),
            "unknown": list(self.unknown),
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "kernels": self.kernels,
            "extra_streams": self.extra_streams,
        }


def layer_report(layers: list[EngineLayer], config: ModelConfig, form: FileForm) -> LayerReport:
    """Return what became of an exported file.

    Args:
        layers: of the engine, in their order.
        config: of the model that the file holds.
        form: how the file was written, as `read_form` says.
    """
    expected = expected_kernels(config, form)
    return LayerReport(
        linears=built_linears(layers, expected),
        expected=expected,
        blocks=_blocks(layers, config),
        kernels=sum(layer.is_kernel for layer in layers),
        extra_streams=len({layer.stream for layer in layers}) - 1,
    )


def with_known_of(inspected: LayerReport, logged: LayerReport) -> LayerReport:
    """Return an inspector's report, or the build log's where the inspector knows less.

    Args:
        inspected: of a plan's inspector.
        logged: of the log of that plan's build.
    """
    unknown = inspected.unknown
    if not unknown:
        return inspected
    known = {path: built for path, built in inspected.linears.items() if path not in unknown}
    return dataclasses.replace(logged, linears={**logged.linears, **known})


def expected_kernels(config: ModelConfig, form: FileForm) -> dict[str, Kernel]:
    """Return how each quantized linear of a file asks to be multiplied; none in a float file."""
    expected = {}
    if form.is_quantized:
        kernel = Kernel.INTEGER if form.activation_bits == 8 else Kernel.WEIGHT_ONLY
        expected = dict.fromkeys(linear_names(config), kernel)
    if form.adaln_bits != 16:
        inside = tuple(f"{block.path}." for block in family_of(config).blocks(config))
        names = [name for name in family_of(config).modulations(config) if name.startswith(inside)]
        expected |= dict.fromkeys(names, Kernel.WEIGHT_ONLY)
    return expected


def _blocks(layers: list[EngineLayer], config: ModelConfig) -> tuple[BuiltBlock, ...]:
    """Count kernels block by block and look for fused attention; modulations are no block's."""
    family = family_of(config)
    paths = [block.path for block in family.blocks(config)]
    modulations = tuple(_made_with(name, paths) for name in family.modulations(config))
    kernels: Counter[str] = Counter()
    for layer in layers:
        nodes = [node for node in layer.onnx_nodes if not node.startswith(modulations)]
        found = [path for path in paths if any(_is_in(node, path) for node in nodes)]
        if found and layer.is_kernel:
            kernels[found[0]] += 1
    return tuple(
        BuiltBlock(kernels=kernels[path], has_fused_attention=_has_fused_attention(layers, path))
        for path in paths
    )


def _is_in(node: str, path: str) -> bool:
    """Return whether a node is of a module or of one within it, by its name."""
    return node.startswith((f"{path}.", f"{path}/"))


def _made_with(modulation: str, blocks: Sequence[str]) -> str:
    """Return how names of nodes begin that make a modulation, the SiLU before its linear too."""
    module = modulation.rpartition(".")[0]
    return f"{modulation}/" if module in ("", *blocks) else f"{module}."


def _has_fused_attention(layers: list[EngineLayer], block: str) -> bool:
    """Return whether a block has attention, and each is in one kernel."""
    softmaxes = {
        node
        for layer in layers
        for node in layer.onnx_nodes
        if _is_in(node, block) and node.endswith("/Softmax")
    }
    return bool(softmaxes) and all(
        any(
            {node.replace("/Softmax", f"/{part}") for part in ("MatMul", "Softmax", "MatMul_1")}
            <= layer.onnx_nodes
            for layer in layers
        )
        for node in softmaxes
    )
