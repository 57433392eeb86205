"""A folded model, or the float one, to one ONNX file that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from ditas_export import __version__
from ditas_export.artifact_files import require_writable, staging_folder
from ditas_export.calibration.fold import FoldedModel
from ditas_export.calibration.modules import in_onnxruntime_form
from ditas_export.errors import OnnxExportError
from ditas_export.families.base import FamilyModel
from ditas_export.families.identity import ModelIdentity, identity_of
from ditas_export.families.registry import family_of, record_of
from ditas_export.onnx_export.contract import check_contract
from ditas_export.onnx_export.external_data import data_name, install
from ditas_export.onnx_export.file_facts import (
    CONFIG_KEY,
    FAMILY_KEY,
    FLOAT_TYPES,
    FORM_KEY,
    IDENTITY_KEY,
)
from ditas_export.onnx_export.form import FileForm, Layout
from ditas_export.onnx_export.forms.digits import modulation_in_digits
from ditas_export.onnx_export.forms.floats import lower_float_linear, lower_weight_only_linear
from ditas_export.onnx_export.lowered import record_linears
from ditas_export.onnx_export.lowering import Choice, activation_codes, choose_forms, lower_linear
from ditas_export.onnx_export.manifest import tensor_bytes
from ditas_export.onnx_export.onnxruntime_form import share_inputs, to_onnxruntime_form
from ditas_export.onnx_export.skeleton import PLACEHOLDER_DOMAIN, export_skeleton
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.options import Precision, Target
from ditas_export.paths import StrPath
from ditas_export.quantization.ranges import Ranges

REASONS_KEY = "ditas_export.linear_forms"

LARGEST_INLINE_BYTES = 2**31 - 2**24
"""Tensors beyond this go to a file of their own: protobuf holds 2 GiB, nodes included."""

Lower = Callable[[Subgraph, str, Sequence[ir.Value], int], Sequence[ir.Value]]
"""From a placeholder's place, module path, inputs and number of outputs to what it gives."""


def export_onnx(
    folded: FoldedModel,
    path: StrPath,
    *,
    layout: Layout = "int4",
    ranges: Ranges = "token",
    target: Target = "portable",
) -> None:
    """Write a quantized model as standard QDQ ONNX, checked against the rules of the runtimes.

    Past 2 GB the tensors go to `<path>.<digest>.data`. Either file is there whole or not at all.

    Args:
        folded: what to write, in its own float type; latents and output are float32 all the same.
        path: the file.
        layout: "int4" stores 4-bit weights as such, "int8" the same numbers as INT8 rows.
        ranges: of the activations; without effect where activations are float.
        target: the runtime whose forms to write; TensorRT does not take all of ONNX Runtime's.

    Raises:
        OnnxExportError: a float type other than fp32, fp16 and bf16, a layout that the
            weights cannot take, or a graph that breaks a rule.
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    float_type = _float_type(folded.dtype)
    require_writable(path)
    parameters = folded.float_parameters
    choices = choose_forms(
        {module: linear.low_rank is not None for module, linear in folded.linears.items()},
        dtype=folded.dtype,
        ranges=ranges,
        activation_bits=folded.activation_bits,
        target=target,
    )

    def lower(
        graph: Subgraph, module: str, inputs: Sequence[ir.Value], outputs: int
    ) -> Sequence[ir.Value]:
        if module in folded.linears:
            return lower_linear(
                graph,
                inputs,
                folded.linears[module],
                choices[module],
                layout=layout,
                ranges=ranges,
                outputs=outputs,
            )
        (x,) = inputs
        bias = parameters[f"{module}.bias"]
        if module in folded.adaln:
            return [lower_weight_only_linear(graph, x, folded.adaln[module], bias)]
        return [lower_float_linear(graph, x, parameters[f"{module}.weight"], bias)]

    codes = activation_codes(folded.activation_bits, choices.values())
    model = export_skeleton(folded.config, parameters, dtype=folded.dtype, folded=True)
    if in_onnxruntime_form(target, folded.dtype):
        to_onnxruntime_form(model, folded.config, in_parts=codes == "uint8")
    lower_placeholders(model, lower)
    if codes == "uint8":
        share_inputs(model, folded.config)
    if in_onnxruntime_form(target, folded.dtype):
        modulation_in_digits(model, family_of(folded.config).modulations(folded.config))
    if target == "portable":
        record_linears(model, folded.linears)
    form = FileForm(
        float_type=float_type,
        weight_bits=next(iter(folded.linears.values())).weight.bits,
        activation_bits=folded.activation_bits,
        adaln_bits=folded.adaln_bits,
        layout=layout,
        ranges=ranges if folded.activation_bits == 8 else None,
        activation_codes=codes,
        target=target,
    )
    describe(model, folded.identity, form)
    record_choices(model, choices)
    save_model(model, path)


def record_choices(model: ir.Model, choices: Mapping[str, Choice]) -> None:
    """Write why linears are in the form they are in: form, and reason by kind of linear."""
    reasons: dict[str, dict[str, str]] = {}
    for module, choice in choices.items():
        kind = ".".join(module.split(".")[2:])  # of blocks.N.attn.qkv, attn.qkv
        reasons.setdefault(choice.form, {})[kind] = choice.reason
    model.metadata_props[REASONS_KEY] = json.dumps(reasons, sort_keys=True)


def export_reference(
    model: FamilyModel, path: StrPath, *, identity: ModelIdentity | None = None
) -> None:
    """Write the float model with the interface of the quantized file.

    Args:
        model: in the float type to write; left untouched.
        path: the file; past 2 GB the tensors go to `<path>.<digest>.data`.
        identity: of the float32 model, where the caller has it; else that of `model` in float32.

    Raises:
        OnnxExportError: a float type other than fp32, fp16 and bf16.
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    parameters = model.state_dict()
    dtype = model.dtype
    float_type = _float_type(dtype)
    require_writable(path)

    def lower(
        graph: Subgraph, module: str, inputs: Sequence[ir.Value], _outputs: int
    ) -> Sequence[ir.Value]:
        (x,) = inputs
        weight, bias = parameters[f"{module}.weight"], parameters[f"{module}.bias"]
        return [lower_float_linear(graph, x, weight, bias)]

    graph_model = export_skeleton(model.config, parameters, dtype=dtype, folded=False)
    lower_placeholders(graph_model, lower)
    identity = identity or identity_of(model)
    describe(graph_model, identity, FileForm(float_type=float_type))
    check_contract(graph_model)
    _leave_types_to_tensors(graph_model.graph)
    write_model(graph_model, path)


def _leave_types_to_tensors(graph: ir.Graph) -> None:
    """Write no second record of what initializers are.

    A tool that replaces a weight does not update it: onnxruntime's `quantize_dynamic` transposes
    weights, and then fails on their former shapes.
    """
    for value in graph.initializers.values():
        value.type = value.shape = None


def lower_placeholders(model: ir.Model, lower: Lower) -> None:
    """Replace every placeholder of a skeleton by what `lower` writes for it, in place."""
    for node in list(model.graph):
        if node.domain != PLACEHOLDER_DOMAIN:
            continue
        module = node.attributes["module"].as_string()
        inputs = [value for value in node.inputs if value is not None]
        lowered = lower(Subgraph(node, module), module, inputs, len(node.outputs))
        for output, replacement in zip(node.outputs, lowered, strict=True):
            output.replace_all_uses_with(replacement)
        model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop(PLACEHOLDER_DOMAIN, None)


def describe(model: ir.Model, identity: ModelIdentity, form: FileForm) -> None:
    """Make a file self-describing: which model it holds, and the form it was written in."""
    model.producer_name = "ditas-export"
    model.producer_version = __version__
    model.metadata_props[FAMILY_KEY] = family_of(identity.config).name
    model.metadata_props[CONFIG_KEY] = json.dumps(record_of(identity.config), sort_keys=True)
    model.metadata_props[IDENTITY_KEY] = json.dumps(
        {"tensors_sha256": identity.tensors_sha256, "fingerprint": identity.fingerprint},
        sort_keys=True,
    )
    record_form(model, form)


def record_form(model: ir.Model, form: FileForm) -> None:
    """Write the form that a file is in, over an earlier record of it."""
    model.metadata_props[FORM_KEY] = json.dumps(form.to_dict(), sort_keys=True)


def save_model(model: ir.Model, path: Path) -> None:
    """Check a model's graph against the rules of the runtimes and write it; see `write_model`.

    Raises:
        OnnxExportError: the model breaks a rule, or is no valid ONNX.
        ArtifactError: the file cannot be written.
    """
    check_contract(model)
    write_model(model, path)


def write_model(model: ir.Model, path: Path) -> None:
    """Write any valid graph, with external data when it is too big; atomic.

    Raises:
        OnnxExportError: the model is no valid ONNX.
        ArtifactError: the file cannot be written.
    """
    _order_initializers(model.graph)
    is_large = sum(tensor_bytes(model).values()) > LARGEST_INLINE_BYTES
    data = data_name(model, path.name) if is_large else None
    with staging_folder(path) as folder:
        staged = folder / path.name
        ir.save(model, staged, external_data=data)
        try:
            onnx.checker.check_model(str(staged), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise OnnxExportError(f"the exported graph is no valid ONNX: {error}") from error
        install(staged, path)


def _order_initializers(graph: ir.Graph) -> None:
    """Put initializers in the order of their first use, so that equal graphs are equal bytes."""
    ordered: dict[str, ir.Value] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                ordered.setdefault(str(value.name), value)
    graph.initializers.clear()
    graph.initializers.update(ordered)


def _float_type(dtype: torch.dtype) -> Precision:
    """Return "fp32", "fp16" or "bf16"."""
    for name, known in FLOAT_TYPES.items():
        if dtype == known:
            return name
    raise OnnxExportError(f"an ONNX file is written in fp32, fp16 or bf16, not {dtype}")
