"""A family of another package end to end: speech and action models' flow over frames.

The oracle is the example's own forward, which is plain PyTorch, and the fake-quantized one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from own_frames import (
    EXAMPLES,
    calibrated,
    calibrated_with,
    expected,
    exported,
    fed,
    found_in,
    largest_hidden,
    made,
    plant,
    pretend_installed,
)
from quantized_fixture import snr_db
from torch import Tensor
from typer.testing import CliRunner

from ditas_export.calibration.family_proof import prove_folds
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.cli.export import app as export_app
from ditas_export.cli.sample import app as sample_app
from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.diffusion.sampling import sample
from ditas_export.families.base import ModelInputs
from ditas_export.families.entry_points import family_named
from ditas_export.families.identity import identity_of
from ditas_export.families.packaged import save_checkpoint
from ditas_export.families.registry import known_names, linear_names
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.file_facts import read_config
from ditas_export.onnx_export.form import Layout
from ditas_export.options import Target
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner, matmul_kernels
from ditas_export.runtime.torch_runner import TorchRunner


@pytest.fixture(scope="module", autouse=True)
def frames(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("installed")
    pretend_installed(folder, [("frames", "own_family.family:FRAMES")])
    with found_in(EXAMPLES, folder):
        family_named("frames", known=known_names())
        yield


def real(output: Tensor, inputs: ModelInputs) -> Tensor:
    """Return the output of frames that are no padding, (frames, C)."""
    return output.transpose(1, 2)[inputs["attention_mask"] != 0]


def test_the_tables_are_proved() -> None:
    proof = prove_folds(made().FRAMES, made().random_model())
    assert max(proof.groups.values()) < 1e-13
    assert proof.output < 1e-13
    assert len(proof.groups) == 2 * 4


def test_the_family_is_small() -> None:
    lines = (EXAMPLES / "own_family" / "family.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 80


def test_a_file_computes_what_was_calibrated() -> None:
    path = exported()
    assert read_config(path) == made().CONFIG
    model = made().random_model()
    inputs = fed(model)
    wanted = expected()(**inputs)
    with OnnxRuntimeRunner(path, threads=2, as_is=True) as runner:
        found = runner(inputs)
    assert found.shape == (4, *made().CONFIG.latent_shape)
    assert snr_db(wanted, found) > 50  # rounding ties
    assert snr_db(model(**inputs), wanted) > 20
    kernels = matmul_kernels(path)
    assert {kernels[f"{name}/MatMul"] for name in linear_names(made().CONFIG)} == {
        "MatMulIntegerToFloat"
    }


def test_the_float_file_is_the_model(tmp_path: Path) -> None:
    """Turned heads and masked keys included: the exporter's translation is all there is between."""
    model, path = made().random_model(), tmp_path / "float.onnx"
    export_reference(model, path, identity=identity_of(model))
    inputs = fed(model)
    with OnnxRuntimeRunner(path, threads=2) as runner:
        found = runner(inputs)
    assert torch.allclose(found, model(**inputs), rtol=0, atol=2e-5)
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "Where" in kinds
    doubles = [
        tensor.name
        for tensor in onnx.load(str(path)).graph.initializer
        if tensor.data_type == onnx.TensorProto.DOUBLE
    ]
    assert not doubles


def test_what_stands_in_padding_changes_nothing() -> None:
    """No bit of a real frame, in the model and in the file."""
    path = exported()
    model = made().random_model()
    inputs = fed(model)
    padding = inputs["attention_mask"] == 0
    assert padding.any(dim=1).tolist() == [True, True, True, False]
    other = {
        "frames": inputs["frames"] + 50 * padding[:, None],
        "given": inputs["given"] - 70 * padding[:, None],
        "text": inputs["text"] + 90 * padding[..., None],
    }
    changed = inputs.replaced(other)
    assert torch.equal(real(model(**inputs), inputs), real(model(**changed), inputs))
    with OnnxRuntimeRunner(path, threads=1, as_is=True) as runner:
        first, second = runner(inputs), runner(changed)
    assert torch.equal(real(first, inputs), real(second, inputs))
    assert not torch.equal(first, second)
    whole = inputs.replaced({"attention_mask": torch.ones_like(inputs["attention_mask"])})
    assert not torch.allclose(real(model(**inputs), inputs), real(model(**whole), inputs))


def test_padding_counts_in_no_moment() -> None:
    """Other numbers under the padding, the same integers; without the row of nothing, whose frames
    are all real."""
    model = made().random_model()
    conditions = made().random_conditions()
    mask = conditions.tensors["attention_mask"]
    loud = {
        "given": conditions.tensors["given"] + 80 * (mask == 0)[:, None],
        "text": conditions.tensors["text"] + 80 * (mask == 0)[..., None],
        "attention_mask": mask,
    }
    first, second = (
        calibrated_with(model, each, cfg_scale=1.0)
        for each in (conditions, PromptEmbeddings(tensors=loud, has_null=True))
    )
    for name in linear_names(made().CONFIG):
        one, other = first.linears[name], second.linears[name]
        assert torch.equal(one.smoothing_scale, other.smoothing_scale)
        assert torch.equal(one.weight.codes, other.weight.codes)
        assert torch.equal(one.step_ranges, other.step_ranges)


def test_openvino_gives_the_same_numbers() -> None:
    pytest.importorskip("openvino", reason="extra [openvino]")
    from ditas_export.runtime.openvino_runner import OpenVINORunner

    path = exported()
    inputs = fed(made().random_model())
    with OpenVINORunner(path, threads=2) as runner:
        assert snr_db(expected()(**inputs), runner(inputs)) > 50  # rounding ties


@pytest.mark.parametrize("form", [("portable", "int4"), ("tensorrt", "int8")], ids="-".join)
def test_nvidias_builder_keeps_every_linear_integer(form: tuple[Target, Layout]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="extra [rtx]")
    from test_rtx_builds import require_integer_products

    target, layout = form
    require_integer_products(
        exported(target, layout), list(linear_names(made().CONFIG)), layout=layout
    )


def test_an_activation_of_100000_needs_a_float32_side(tmp_path: Path) -> None:
    """Beyond float16's 65504 as it leaves an integer product; float32 and W4A8 hold it."""
    size = 1e5
    model = made().random_model()
    plant(model, size)
    assert largest_hidden(model) == pytest.approx(size, rel=1e-3)
    quantized = calibrated(planted=size)
    inputs = fed(model)
    folded, path = fold_smoothing(quantized), tmp_path / "out.onnx"
    export_onnx(folded, path)
    wanted = fake_quantized_model(folded, ranges="token")(**inputs)
    with OnnxRuntimeRunner(path, threads=2, as_is=True) as runner:
        found = runner(inputs)
    assert snr_db(wanted, found) > 50
    assert snr_db(model(**inputs), wanted) > 20
    half = fake_quantized_model(fold_smoothing(quantized, dtype=torch.float16), ranges="token")
    features = {
        name: value.half() if name in ("frames", "given", "text") else value
        for name, value in inputs.items()
    }
    assert not half(**features).isfinite().all()


def test_guidance_asks_for_two_rows() -> None:
    """All channels are guided, and a whole trajectory is what the fake-quantized model walks."""
    path = exported()
    conditions = made().random_conditions()
    asked = {"classes": [0, 5], "conditions": conditions, "steps": 3, "cfg_scale": 2.0}
    with OnnxRuntimeRunner(path, threads=2, as_is=True) as runner:
        found = sample(runner, **asked)  # type: ignore[arg-type]
    wanted = sample(TorchRunner(expected()), **asked)  # type: ignore[arg-type]
    assert found.shape == (2, *made().CONFIG.latent_shape)
    assert snr_db(wanted, found) > 40  # ties, carried on
    unguided = sample(TorchRunner(expected()), **{**asked, "cfg_scale": 1.0})  # type: ignore[arg-type]
    channels = (wanted - unguided).abs().amax(dim=(0, 2))
    assert bool((channels > 1e-3).all())


def test_the_commands_do_it_all(tmp_path: Path) -> None:
    """A checkpoint and what it can be asked, to a verified file and to frames made by it."""
    checkpoint, asked, out = (tmp_path / name for name in ("frames.st", "asked.st", "out.onnx"))
    save_checkpoint(made().FRAMES, made().random_model(), checkpoint)
    made().random_conditions().save(asked)
    exporting = [
        *(str(out), "--model", str(checkpoint), "--family", "frames", "--embeddings", str(asked)),
        *("--steps", "4", "--samples", "4", "--rank", "4", "--alpha-grid", "0.4,0.5"),
    ]
    done = CliRunner().invoke(export_app, exporting)
    assert done.exit_code == 0, done.output
    assert json.loads(out.with_suffix(".json").read_text())["verified"] is True
    sampling = [str(out), "--embeddings", str(asked), "--images", "2", "--steps", "3"]
    done = CliRunner().invoke(sample_app, [*sampling, "-o", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    latents = [np.load(path) for path in sorted((tmp_path / "made").glob("*.npy"))]
    assert [each.shape for each in latents] == [made().CONFIG.latent_shape] * 2
    without = CliRunner().invoke(
        sample_app, [*sampling[:1], *sampling[3:], "-o", str(tmp_path / "n")]
    )
    assert "frames are asked for by --embeddings" in without.output
