"""Which form a quantized linear is written in, and why; the forms are files of `forms/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.calibration.modules import in_onnxruntime_form
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.form import ActivationCodes, Layout
from ditas_export.onnx_export.forms.floats import lower_with_float_activations
from ditas_export.onnx_export.forms.joined import lower_joined
from ditas_export.onnx_export.forms.portable import lower_cut, lower_portable
from ditas_export.onnx_export.forms.tensorrt import lower_with_shared_scale
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.options import Target
from ditas_export.quantization.ranges import Ranges

LinearForm = Literal["float activations", "joined", "shared scale", "cut", "portable"]
"""Each is one function of `forms/`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A form, and why it is taken."""

    form: LinearForm
    reason: str
    bias_rank: Literal[1, 3]


def choose_form(
    *,
    has_branch: bool,
    dtype: torch.dtype,
    ranges: Ranges,
    activation_bits: int,
    splits_output: bool,
    target: Target = "portable",
) -> Choice:
    """Return the form that a linear is written in.

    A bias that follows a product is of rank 3, (1, 1, N), and so is every bias in ONNX Runtime's
    form. It turns MatMul + Add of rank 1, where the shapes are fixed, into a Gemm that 1.24 runs in
    float and that 1.31 refuses; and Add of rank 1 + Gelu into a FastGelu that is slower than the
    two.

    Args:
        has_branch: the linear has low-rank factors.
        dtype: of the float side.
        ranges: of the activations.
        activation_bits: 8, or 16 for float activations.
        splits_output: the output is cut into parts, as qkv's is.
        target: the runtime whose form to write, where they differ.
    """
    static = ranges == "static"
    own_form = in_onnxruntime_form(target, dtype)
    if activation_bits == 16:
        return Choice(
            form="float activations",
            reason="activations stay float, so kernels take the integers of weights alone",
            bias_rank=1 if has_branch else 3,
        )
    if has_branch and own_form:
        return Choice(
            form="joined",
            reason="onnxruntime's float32 side takes linear and branch as one product of UINT8",
            bias_rank=3,
        )
    if has_branch and target == "tensorrt":
        return Choice(
            form="shared scale",
            reason="TensorRT makes one GEMM of linear and branch where both have one scalar scale",
            bias_rank=1,
        )
    if not has_branch and static and splits_output:
        return Choice(
            form="cut",
            reason="TensorRT for RTX cuts the rows of a static product whose output is cut",
            bias_rank=3,
        )
    return Choice(
        form="portable",
        reason="every runtime takes it, and none has a better one of this linear",
        bias_rank=3 if own_form or (static and not has_branch) else 1,
    )


def choose_forms(
    branches: Mapping[str, bool],
    *,
    dtype: torch.dtype,
    ranges: Ranges,
    activation_bits: int,
    target: Target = "portable",
) -> dict[str, Choice]:
    """Return the form of every linear, by module path; `branches` says which have factors."""
    return {
        module: choose_form(
            has_branch=has_branch,
            dtype=dtype,
            ranges=ranges,
            activation_bits=activation_bits,
            splits_output=module.endswith("attn.qkv"),
            target=target,
        )
        for module, has_branch in branches.items()
    }


def activation_codes(activation_bits: int, choices: Iterable[Choice]) -> ActivationCodes | None:
    """Return "uint8" where all linears are joined with their branches, None for float."""
    if activation_bits == 16:
        return None
    return "uint8" if all(choice.form == "joined" for choice in choices) else "int8"


def lower_linear(
    graph: Subgraph,
    inputs: Sequence[ir.Value],
    linear: FoldedLinear,
    choice: Choice,
    *,
    layout: Layout,
    ranges: Ranges,
    outputs: int = 1,
) -> Sequence[ir.Value]:
    """Write one quantized linear in the form that was chosen for it, and return its outputs.

    Args:
        graph: where to write; its path is the linear's.
        inputs: (…, K), the linear's input; in the joined form, any number of equal parts of it.
        linear: what to write.
        choice: of `choose_form`, for this linear and these ranges.
        layout: storage of the weight.
        ranges: of the activations.
        outputs: 1; in the joined form, any number of equal parts of the output.

    Raises:
        OnnxExportError: a layout or block size that the weight cannot take, or parts of a linear
            that is in another form than the joined one.
    """
    if linear.weight.bits == 8 and layout == "int4":
        raise OnnxExportError("8-bit weights have no int4 layout; use layout int8")
    low_rank = linear.low_rank
    bias = linear.bias if choice.bias_rank == 1 else linear.bias[None, None]
    if choice.form == "joined":
        assert low_rank is not None  # the choice says so
        return lower_joined(
            graph, inputs, linear, low_rank, bias, layout=layout, ranges=ranges, outputs=outputs
        )
    if len(inputs) != 1 or outputs != 1:
        raise OnnxExportError(
            f"a linear of {len(inputs)} inputs and {outputs} outputs in the form {choice.form!r}; "
            f"only the joined form is written in parts"
        )
    (x,) = inputs
    match choice.form:
        case "float activations":
            return [lower_with_float_activations(graph, x, linear, bias, layout=layout)]
        case "shared scale":
            assert low_rank is not None  # the choice says so
            y = lower_with_shared_scale(
                graph, x, linear, low_rank, bias, layout=layout, ranges=ranges
            )
        case "cut":
            y = lower_cut(graph, x, linear, bias, layout=layout)
        case "portable":
            y = lower_portable(graph, x, linear, bias, layout=layout, ranges=ranges)
    return [y]
