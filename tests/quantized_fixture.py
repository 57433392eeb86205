"""Small quantized models made by plain rounding: right for structure, never for quality."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from safetensors.torch import save_file
from torch import Tensor

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import FoldedLinear, FoldedModel, fold_smoothing
from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.conditions.labels import labelled_inputs
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.families.base import FamilyModel
from ditas_export.families.identity import identity_of
from ditas_export.families.registry import family_of
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.lowering import choose_form, lower_linear
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.options import Target
from ditas_export.quantization.integer import (
    LowRank,
    quantize_rows,
    round_to_blocks,
    round_to_rows,
)
from ditas_export.quantization.ranges import Ranges

TINY = DiTConfig(
    input_size=8,
    patch_size=2,
    in_channels=3,
    hidden_size=96,
    depth=2,
    num_heads=4,
    num_classes=10,
)
"""Head dimension 24, 16 tokens: every shape differs from every other."""

_FOLDER = tempfile.TemporaryDirectory(prefix="ditas-export-tests-")
"""Where exported files live until the tests end."""


_ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


def tiny_dit(config: DiTConfig = TINY, *, seed: int = 0) -> DiT:
    """Return a DiT of plausible random weights, in evaluation mode."""
    model = DiT(config)
    randomize(model, seed=seed)
    return model.eval().requires_grad_(requires_grad=False)


def save_checkpoint(path: Path, model: DiT) -> None:
    """Write a DiT as safetensors that say how many heads it has."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"num_heads": str(model.config.num_heads)})


def quantized_tiny_dit(
    model: FamilyModel,
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    block_size: int = 48,
    rank: int = 4,
    seed: int = 0,
) -> QuantizedModel:
    """Round a model's linears to nearest, under random smoothing and random low-rank factors."""
    generator = torch.Generator().manual_seed(seed)
    parameters = model.state_dict()
    linears: dict[str, QuantizedLinear] = {}
    for block in family_of(model.config).blocks(model.config):
        for group in block.groups():
            first = block.name(group.linears[0])
            for name in map(block.name, group.linears):
                linears[name] = _quantize_linear(
                    parameters.pop(f"{name}.weight"),
                    parameters.pop(f"{name}.bias"),
                    weight_bits=weight_bits,
                    block_size=block_size,
                    rank=rank,
                    generator=generator,
                    s=linears[first].smoothing_scale if first in linears else None,
                )
    return QuantizedModel(
        identity=identity_of(model),
        float_parameters=parameters,
        linears=linears,
        activation_bits=activation_bits,
        settings={"ranges": "token"},
    )


def _quantize_linear(
    weight: Tensor,
    bias: Tensor,
    *,
    weight_bits: int,
    block_size: int,
    rank: int,
    generator: torch.Generator,
    s: Tensor | None = None,
) -> QuantizedLinear:
    out_features, in_features = weight.shape
    drawn = torch.exp(0.3 * torch.randn(in_features, generator=generator))
    smoothing_scale = drawn if s is None else s
    smoothed = weight * smoothing_scale
    low_rank = None
    if rank:
        right_codes, _ = quantize_rows(torch.randn(rank, in_features, generator=generator))
        left_codes, _ = quantize_rows(torch.randn(out_features, rank, generator=generator))
        spread = torch.arange(rank, dtype=torch.int32) * 2
        low_rank = LowRank(
            left_codes=left_codes // 2,
            right_codes=right_codes,
            divisor=2 * int(70 * in_features**0.5) + 1 + spread,
        )
    return QuantizedLinear(
        weight=(
            round_to_blocks(smoothed, block_size=block_size)
            if weight_bits == 4
            else round_to_rows(smoothed)
        ),
        low_rank=low_rank,
        bias=bias,
        smoothing_scale=smoothing_scale,
        alpha=None,
        step_ranges=torch.tensor([2.0, 4.0]),
        output_snr_db=float("nan"),
    )


def tiny_folded(
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    block_size: int = 48,
    rank: int = 4,
    adaln_bits: int = 16,
    dtype: torch.dtype = torch.float32,
) -> FoldedModel:
    """Return the tiny model as it ships."""
    quantized = quantized_tiny_dit(
        tiny_dit(),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        block_size=block_size,
        rank=rank,
    )
    return fold_smoothing(quantize_adaln(quantized, adaln_bits), dtype=dtype)


@cache
def exported(
    *,
    layout: Layout = "int4",
    ranges: Ranges = "token",
    target: Target = "portable",
    **settings: Any,
) -> Path:
    """Return the tiny model exported, once per test run; never write to it.

    `settings` are those of `tiny_folded`.
    """
    path = Path(_FOLDER.name) / f"{len(list(Path(_FOLDER.name).iterdir()))}.onnx"
    folded = tiny_folded(**settings)
    export_onnx(folded, path, layout=layout, ranges=ranges, target=target)
    return path


@cache
def exported_reference(dtype: torch.dtype = torch.float32) -> Path:
    """Return the tiny float model exported, once per test run; never write to it."""
    path = Path(_FOLDER.name) / f"reference-{dtype}.onnx"
    export_reference(tiny_dit().to(dtype), path, identity=identity_of(tiny_dit()))
    return path


def example_inputs(
    config: DiTConfig = TINY, *, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, time steps and class labels, the null class among them."""
    generator = torch.Generator().manual_seed(seed)
    side = config.input_size
    latents = torch.randn(batch, config.in_channels, side, side, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    labels = torch.randint(0, config.num_classes + 1, (batch,), generator=generator)
    labels[-1] = config.null_class
    return latents, timesteps, labels


fed = labelled_inputs
"""What a runner of a DiT is called with."""


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Return 10·log10(Σ ref² / Σ (other − ref)²)."""
    noise = (other.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def folded_linear(
    in_features: int = 96,
    out_features: int = 80,
    *,
    weight_bits: int = 4,
    block_size: int = 48,
    rank: int = 4,
    multiplies_input: bool = False,
    static_range: float = 3.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> FoldedLinear:
    """Return one linear as it ships, in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    linear = _quantize_linear(
        torch.randn(out_features, in_features, generator=generator) / in_features**0.5,
        torch.randn(out_features, generator=generator),
        weight_bits=weight_bits,
        block_size=block_size,
        rank=rank,
        generator=generator,
    )
    return FoldedLinear(
        weight=replace(linear.weight, row_scale=linear.weight.row_scale.to(dtype)),
        low_rank=linear.low_rank,
        bias=linear.bias.to(dtype),
        input_multiplier=(
            linear.smoothing_scale.reciprocal().to(dtype) if multiplies_input else None
        ),
        static_range=static_range,
    )


def write_linear(
    path: Path,
    linear: FoldedLinear,
    *,
    layout: Layout,
    ranges: Ranges,
    inputs: int = 1,
    outputs: int = 1,
    **choice: Any,
) -> None:
    """Write one linear alone: input `x` (N, T, K), output `y` (N, T, out), in its float type.

    It reads and gives as many parts of them as `inputs` and `outputs` say; `choice` is what
    `choose_form` looks at beside the ranges.
    """
    dtype = _ONNX_TYPES[linear.bias.dtype]
    out_features, in_features = linear.weight.codes.shape
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(("N", 5, in_features)))
    anchor = ir.Node("", "Identity", [x], name="anchor")
    graph = ir.Graph([x], [], nodes=[anchor], name="linear", opset_imports={"": 21})
    place = Subgraph(anchor, "linear")
    parts = [x] if inputs == 1 else place.split(x, inputs)
    form = choose_form(
        has_branch=linear.low_rank is not None, dtype=linear.bias.dtype, ranges=ranges, **choice
    )
    made = lower_linear(place, parts, linear, form, layout=layout, ranges=ranges, outputs=outputs)
    y = made[0] if outputs == 1 else place.node("Concat", made, name="Whole", axis=-1)
    graph.remove(anchor)
    y.name = "y"
    y.type = ir.TensorType(dtype)
    y.shape = ir.Shape(("N", 5, out_features))
    graph.outputs.append(y)
    ir.save(ir.Model(graph, ir_version=10), path)


def run_linear(path: Path, x: Tensor, **entries: str) -> Tensor:
    """Run what `write_linear` wrote in ONNX Runtime; `entries` are session entries."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
