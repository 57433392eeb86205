"""A file of layout `int4` as the same numbers in layout `int8`: more bytes, quicker to load."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.export import record_form, save_model
from ditas_export.onnx_export.external_data import load_mapped
from ditas_export.onnx_export.file_facts import FORM_KEY, read_form
from ditas_export.onnx_export.form import FileForm
from ditas_export.onnx_export.lowered import GRAPH_KEY, digest_of_graph, record_graph
from ditas_export.onnx_export.patterns import Int4Chain, array, int4_chains, integer_attribute
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.paths import StrPath
from ditas_export.text_files import parse_json


def expand(source: StrPath, target: StrPath) -> None:
    """Write the INT4 chains of a file as INT8 rows, bit for bit the same integers and scales.

    Weight-only INT4 stays as it is: its kernels read it directly.

    Args:
        source: written by `export_onnx` in layout int4.
        target: the file to write; its interface is the source's.

    Raises:
        OnnxExportError: no such file, or nothing in it to expand.
        ArtifactError: the target cannot be written.
    """
    source = Path(source)
    target = Path(target)
    read_form(source)  # says what is wrong with a file of another origin
    model = load_mapped(source)
    if not expand_model(model):
        raise OnnxExportError(
            f"{source} holds no INT4 weights under INT8 activations; there is nothing to expand"
        )
    ir.external_data.load_to_model(model)  # what is kept may have to lie in the file itself
    save_model(model, target)


def expand_model(model: ir.Model) -> bool:
    """Write the INT4 chains of a model of this package as INT8 rows, in place.

    Returns:
        False where it has none, and stays as it is.
    """
    chains = list(int4_chains(model.graph))
    if not chains:
        return False
    is_unchanged = model.metadata_props.get(GRAPH_KEY) == digest_of_graph(model.graph)
    for chain in chains:
        expand_chain(model.graph, chain)
    form = FileForm.from_dict(parse_json(model.metadata_props[FORM_KEY]))
    record_form(model, dataclasses.replace(form, layout="int8"))
    if is_unchanged:
        record_graph(model)
    return True


def expand_chain(graph: ir.Graph, chain: Int4Chain) -> None:
    """Replace what makes a chain's INT8 rows by these rows."""
    rows = torch.from_numpy(_int8_rows(chain))
    path = str(chain.dequantize.name).rpartition("/")[0]
    stored = Subgraph(chain.dequantize, path).constant("int8_codes", rows.T)
    chain.dequantize.replace_input_with(0, stored)
    unused = [chain.quantize, chain.transpose, chain.codes]
    constants = [*chain.codes.inputs[:2], *chain.quantize.inputs[1:]]
    if chain.concat is not None:
        unused.insert(0, chain.concat)
        constants.append(chain.concat.inputs[1])
    graph.remove(unused, safe=True)
    for value in constants:
        assert value is not None  # a chain's constants are all there
        if not value.uses():
            graph.initializers.pop(str(value.name))


def _int8_rows(chain: Int4Chain) -> np.ndarray:
    """Return codes · multipliers, and a branch's codes after them: (N, K + rank) int8."""
    codes, multipliers = array(chain.codes.inputs[0]), array(chain.codes.inputs[1])
    assert codes is not None  # the contract holds for every file of this package
    assert multipliers is not None
    block_size = integer_attribute(chain.codes, "block_size", 0)
    products = codes.astype(np.int8) * multipliers.astype(np.int8).repeat(block_size, axis=1)
    if chain.concat is None:
        return products
    left_codes = array(chain.concat.inputs[1])
    assert left_codes is not None  # as above
    return np.concatenate([products, left_codes.T], axis=1)
