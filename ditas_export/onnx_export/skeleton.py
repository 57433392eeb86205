"""The float parts of a model as an ONNX graph, with one placeholder node per linear of its blocks.

`torch.onnx.export` sees the model's own forward, but every `nn.Linear` that its family quantizes,
modulates with or names is an empty shell: the graph gets a node `Linear` of a private domain with
the module path as its attribute, and no weight is ever copied or traced. `lowering.py` replaces
each of these nodes; what is left is standard ONNX.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor, nn

from ditas_export.errors import OnnxExportError
from ditas_export.families.base import Input, ModelConfig
from ditas_export.families.registry import family_of, linear_names
from ditas_export.onnx_export.interface import OUTPUT_NAME

OPSET = 21
"""The first opset with INT4 and block scales."""

IR_VERSION = 10
"""The IR version that came with INT4."""

PLACEHOLDER_DOMAIN = "ditas_export.placeholder"
PLACEHOLDER = "Linear"

_TRACED_SIZE = 7
"""Of the first dynamic dimension beside the batch while tracing: unlike any other size."""

_LEAST_SCORE = -10_000.0
"""Score of what a mask of true and false leaves out: exp of it is 0 in every float type."""

_MODEL = "model"
"""Attribute under which `_Interface` holds the model; taken off every name again."""


class _LinearShell(nn.Module):
    """Stands for a linear while tracing: its output shape and its path, no weight."""

    def __init__(self, path: str, out_features: int) -> None:
        super().__init__()
        self.path = path
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor (…, out_features) that only the exporter understands."""
        return torch.onnx.ops.symbolic(
            f"{PLACEHOLDER_DOMAIN}::{PLACEHOLDER}",
            (x,),
            {"module": self.path},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


class _Float32Convolution(nn.Conv2d):
    """A convolution in float32 between casts: opset 21 has none in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; input and result are in one float type."""
        return super().forward(input.float()).to(input.dtype)


class _Interface(nn.Module):
    """float32 in and out, whatever the network's float type; inputs in the file's order."""

    def __init__(self, model: nn.Module, inputs: Sequence[Input], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.dtype = dtype

    def forward(self, *tensors: Tensor) -> Tensor:
        """Run the model in its own float type."""
        fed = {
            each.name: tensor.to(self.dtype) if each.is_feature else tensor
            for each, tensor in zip(self.inputs, tensors, strict=True)
        }
        out: Tensor = self.model(**fed)
        return out.float()


def export_skeleton(
    config: ModelConfig, parameters: Mapping[str, Tensor], *, dtype: torch.dtype, folded: bool
) -> ir.Model:
    """Return the graph of a model, opset 21, its linears placeholders, names by module path.

    The inputs are those of its family, the first dimension N dynamic, and what it names; the output
    is `model_output` (N, 2C or C, H, W) float32.

    Args:
        config: of the model.
        parameters: checkpoint name -> tensor in `dtype`; those outside the placeholders are used.
        dtype: float type of the network.
        folded: whether the graph is that of a folded model.
    """
    family = family_of(config)
    with torch.device("meta"):
        model = family.module(config, folded=folded)
    shells = {
        *linear_names(config),
        *family.modulations(config),
        *family.float_linears(config),
    }
    for path, module in list(model.named_modules()):
        if path in shells:
            assert isinstance(module, nn.Linear)
            model.set_submodule(path, _LinearShell(path, module.out_features))
    kept = {name: parameters[name].detach().cpu() for name, _ in model.named_parameters()}
    if dtype == torch.bfloat16:
        _convolve_in_float32(model, kept)
    model.load_state_dict(kept, strict=True, assign=True)
    inputs = family.inputs(config)
    graph_model = _trace(_Interface(model.eval(), inputs, dtype), inputs)
    _drop_allowzero(graph_model.graph)
    _rename(graph_model.graph)
    strip_metadata(graph_model)
    graph_model.graph.name = family.name
    graph_model.ir_version = IR_VERSION
    return graph_model


def _convolve_in_float32(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Put every convolution between casts and its parameters in float32, both in place."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Conv2d):
            continue
        convolution = _Float32Convolution(
            module.in_channels,
            module.out_channels,
            kernel_size=module.kernel_size,  # type: ignore[arg-type]
            stride=module.stride,  # type: ignore[arg-type]
            device="meta",
        )
        model.set_submodule(path, convolution)
        for name, _ in convolution.named_parameters():
            parameters[f"{path}.{name}"] = parameters[f"{path}.{name}"].float()


def _trace(interface: _Interface, inputs: Sequence[Input]) -> ir.Model:
    """Export the shell of a model; two images stand for a dynamic batch."""
    names = {size for each in inputs for size in each.shape if isinstance(size, str)}
    sizes = {name: _TRACED_SIZE + index for index, name in enumerate(sorted(names))}
    dims = {name: torch.export.Dim(name, min=1) for name in ("N", *sizes)}
    with tidy_exporter():
        program = torch.onnx.export(
            interface,
            tuple(
                torch.zeros(
                    2,
                    *(sizes[size] if isinstance(size, str) else size for size in each.shape),
                    dtype=each.dtype,
                )
                for each in inputs
            ),
            dynamo=True,
            opset_version=OPSET,
            input_names=[each.name for each in inputs],
            output_names=(OUTPUT_NAME,),
            dynamic_shapes=(tuple(_dynamic(each, dims) for each in inputs),),
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
                torch.ops.aten.squeeze.dim: _squeeze,
            },
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    return program.model


def _dynamic(wanted: Input, dims: Mapping[str, Any]) -> dict[int, Any]:
    """Return an input's dynamic dimensions by place; the batch is first."""
    named = {
        place: dims[size] for place, size in enumerate(wanted.shape, 1) if isinstance(size, str)
    }
    return {0: dims["N"], **named}


@contextlib.contextmanager
def tidy_exporter() -> Iterator[None]:
    """Keep the exporter's remarks off the screen, and what it caches out of memory.

    PyTorch keeps a trace's symbolic shapes for ever, and with them all that its cache of fake
    tensors found under them: 1.8 MiB of every export of five blocks (torch 2.13). Without that
    cache 0.6 MiB stay, and tracing takes a tenth longer.
    """
    from torch._dynamo import config as dynamo_config  # a second's work, which the exporter does

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            dynamo_config.patch(fake_tensor_cache_enabled=False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate attention to MatMul – Softmax – MatMul, the scale on q before the first product.

    This is the form that the builders fuse to one kernel, and in which no half overflows. A mask is
    added to the scores: it is a bias, or its false entries are left out.

    Raises:
        OnnxExportError: attention that is more than that.
    """
    asked = {
        "dropout": dropout_p != 0.0,
        "causal order": is_causal,
        "grouped queries": enable_gqa,
    }
    if more := [name for name, is_asked in asked.items() if is_asked]:
        raise OnnxExportError(
            f"the model's attention has {' and '.join(more)}, which the exported form leaves out"
        )
    scale = float(query.shape[-1]) ** -0.5 if scale is None else scale
    factor: Any = op.Constant(value_float=scale)
    factor = op.CastLike(factor, query)
    keys = op.Transpose(key, perm=[0, 1, 3, 2])
    scores = op.MatMul(op.Mul(query, factor), keys)
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        least: Any = op.Constant(value_float=_LEAST_SCORE)
        scores = op.Where(attn_mask, scores, op.CastLike(least, query))
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _squeeze(value: Any, dim: int) -> Any:
    """Translate a squeeze of one dimension, which leaves one of another size than 1 as it is."""
    if value.shape[dim] != 1:
        return op.Identity(value)
    axes: Any = op.Constant(value_ints=[dim])
    return op.Squeeze(value, axes)


def _drop_allowzero(graph: ir.Graph) -> None:
    """Take `allowzero` off every Reshape: no target shape has a zero, and parsers differ on it."""
    for node in graph:
        if node.op_type == "Reshape":
            node.attributes.pop("allowzero", None)


def _rename(graph: ir.Graph) -> None:
    """Name nodes, their outputs and their constants by module path, in graph order."""
    used: dict[str, int] = {}
    for node in graph:
        scope = _scope(node)
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        count = used.get(base, 0)
        used[base] = count + 1
        node.name = f"{base}_{count}" if count else base
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}_output_{index}"
    renamed: set[str] = set()
    for node in graph:
        for index, operand in enumerate(node.inputs):
            if operand is None or not operand.is_initializer() or operand.name in renamed:
                continue
            name = str(operand.name)
            parameter = name.startswith(f"{_MODEL}.")
            operand.name = (
                name.removeprefix(f"{_MODEL}.") if parameter else f"{node.name}_constant_{index}"
            )
            renamed.add(operand.name)


def _scope(node: ir.Node) -> str:
    """Return the module path that a node comes from; "" for the model itself."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:  # made by the exporter's optimizer
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        return _scope(producer) if producer else ""
    modules = ast.literal_eval(scopes)[:-1]
    return str(modules[-1]).removeprefix(_MODEL).removeprefix(".")


def strip_metadata(model: ir.Model) -> None:
    """Remove what says where the graph came from: traces, scopes, producer, inner shapes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = None, None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
