"""A portable file in the form of another target: the same integers, another graph.

Every quantized linear gives way to a placeholder again. What the target writes otherwise is written
from the integers that are read back; what it writes alike comes back as it was. But for metadata
the file is the one that `export_onnx` writes for that target from the same quantized model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ditas_export.calibration.modules import in_onnxruntime_form
from ditas_export.errors import OnnxExportError
from ditas_export.families.registry import config_of, family_of, linear_names
from ditas_export.onnx_export.export import (
    lower_placeholders,
    record_choices,
    record_form,
    save_model,
)
from ditas_export.onnx_export.external_data import load_mapped
from ditas_export.onnx_export.file_facts import CONFIG_KEY, FLOAT_TYPES, FORM_KEY, read_form
from ditas_export.onnx_export.form import FileForm
from ditas_export.onnx_export.forms.digits import modulation_in_digits
from ditas_export.onnx_export.lowered import (
    GRAPH_KEY,
    LINEARS_KEY,
    digest_of_graph,
    lowered_linears,
    read_linear,
    recorded_linears,
)
from ditas_export.onnx_export.lowering import (
    Choice,
    activation_codes,
    choose_forms,
    lower_linear,
)
from ditas_export.onnx_export.onnxruntime_form import share_inputs, to_onnxruntime_form
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.paths import StrPath
from ditas_export.text_files import parse_json

OtherTarget = Literal["onnxruntime", "tensorrt"]
"""A target that has a form of its own."""


def relower(source: StrPath, path: StrPath, target: OtherTarget) -> None:
    """Write a portable file in another target's form; float type, ranges and layout stay.

    Args:
        source: written by `export_onnx` for the target "portable".
        path: the file to write; its interface is the source's.
        target: the runtime whose form to write.

    Raises:
        OnnxExportError: no such file, or see `relower_model`.
        ArtifactError: the file cannot be written.
    """
    source = Path(source)
    path = Path(path)
    read_form(source)  # says what is wrong with a file of another origin
    model = load_mapped(source)
    relower_model(model, target)
    ir.external_data.load_to_model(model)  # what is kept may have to lie in the file itself
    save_model(model, path)


def why_not_relowerable(model: ir.Model) -> str | None:
    """Return why a model of this package cannot be written in another form, None if it can.

    It is the float model, or in another target's form, or of an earlier version, which does not
    state all that it takes, or a tool has changed its graph since it was written.
    """
    form = FileForm.from_dict(parse_json(model.metadata_props[FORM_KEY]))
    if not form.is_quantized:
        return "it holds a float model, which has one form"
    if form.target != "portable":
        return f"it is in the form for {form.target}; only --target portable has all others in it"
    if not {LINEARS_KEY, GRAPH_KEY} <= model.metadata_props.keys():
        return "an earlier version wrote it, which does not state what other forms take"
    if model.metadata_props[GRAPH_KEY] != digest_of_graph(model.graph):
        return "its graph was changed since it was exported"
    return None


def relower_model(model: ir.Model, target: OtherTarget) -> None:
    """Turn the model of a portable file into another target's form, in place; see `relower`.

    Raises:
        OnnxExportError: see `why_not_relowerable`, or a record that does not fit its linears.
    """
    if reason := why_not_relowerable(model):
        raise OnnxExportError(
            f"this file cannot be written for {target}: {reason}; export it again"
        )
    form = FileForm.from_dict(parse_json(model.metadata_props[FORM_KEY]))
    config = config_of(parse_json(model.metadata_props[CONFIG_KEY]))
    assert form.activation_bits is not None  # a quantized file's form has them
    assert form.layout is not None
    lowered = lowered_linears(model.graph, linear_names(config))
    dtype, ranges = FLOAT_TYPES[form.float_type], form.ranges or "token"
    was, choices = (
        choose_forms(
            {module: each.has_branch for module, each in lowered.items()},
            dtype=dtype,
            ranges=ranges,
            activation_bits=form.activation_bits,
            target=each,
        )
        for each in ("portable", target)
    )
    records = recorded_linears(model.metadata_props.pop(LINEARS_KEY), lowered)
    del model.metadata_props[GRAPH_KEY]
    layout = form.layout

    def lower(
        graph: Subgraph, module: str, inputs: Sequence[ir.Value], outputs: int
    ) -> Sequence[ir.Value]:
        if _is_alike(was[module], choices[module]):
            (x,) = inputs
            return [lowered[module].put_back(graph.before, x)]
        linear = read_linear(lowered[module], records[module])
        return lower_linear(
            graph, inputs, linear, choices[module], layout=layout, ranges=ranges, outputs=outputs
        )

    for each in lowered.values():
        each.take_out()
    codes = activation_codes(form.activation_bits, choices.values())
    if in_onnxruntime_form(target, dtype):
        to_onnxruntime_form(model, config, in_parts=codes == "uint8")
    lower_placeholders(model, lower)
    if codes == "uint8":
        share_inputs(model, config)
    if in_onnxruntime_form(target, dtype):
        modulation_in_digits(model, family_of(config).modulations(config))
    record_form(model, dataclasses.replace(form, target=target, activation_codes=codes))
    record_choices(model, choices)


def _is_alike(one: Choice, other: Choice) -> bool:
    """Return whether two choices write the same nodes."""
    return (one.form, one.bias_rank) == (other.form, other.bias_rank)
