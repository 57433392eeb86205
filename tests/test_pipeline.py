"""The main job, from checkpoint to verified file, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import onnxruntime
import pytest
import torch
from quantized_fixture import TINY, example_inputs, save_checkpoint, snr_db, tiny_dit
from safetensors.torch import load_file

from ditas_export import pipeline
from ditas_export.artifact_files import sha256_of_file
from ditas_export.calibration.quantized_model import PROOF, QuantizedModel
from ditas_export.calibration.states import CalibrationStates
from ditas_export.diffusion import sampling
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import Step
from ditas_export.distributed import Ranks
from ditas_export.errors import (
    ArtifactError,
    CalibrationError,
    CheckpointError,
    OnnxExportError,
    OtherModelError,
    QuantizationError,
    RunnerError,
)
from ditas_export.evaluation import held_out
from ditas_export.families.identity import identity_of
from ditas_export.onnx_export.file_facts import read_form
from ditas_export.options import ExportOptions
from ditas_export.pipeline import (
    ExportResult,
    export,
    quantization_settings,
    sampling_precision,
)


def options(checkpoint: Path, folder: Path, **changes: object) -> ExportOptions:
    base = ExportOptions(
        output=folder / "out.onnx",
        model=str(checkpoint),
        steps=4,
        samples=2,
        rank=2,
        alpha_grid=(0.4, 0.5),
        walk_tokens=100,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportOptions, ExportResult, list[tuple[str, int, int]]]:
    folder = tmp_path_factory.mktemp("exported")
    asked = options(
        checkpoint,
        folder,
        save_calibration=folder / "states.safetensors",
        save_artifact=folder / "model.ditas.safetensors",
        reference=folder / "fp32.onnx",
    )
    seen: list[tuple[str, int, int]] = []
    generator = sampling.image_generator

    def drawn(seed: int, index: int) -> torch.Generator:
        stage, done, total = seen[-1] if seen else ("sample", 0, 1)
        is_calibration = stage == "sample" and done < total
        DRAWN.append(("calibrate" if is_calibration else "verify", seed, index))
        return generator(seed, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "image_generator", drawn)
        result = export(asked, on_progress=lambda *step: seen.append(step))
    return asked, result, seen


Exported = tuple[ExportOptions, ExportResult, list[tuple[str, int, int]]]

DRAWN: list[tuple[str, int, int]] = []
"""What for, with which seed and of which image noise was drawn for `exported`."""


def test_verification_samples_noise_that_calibration_did_not_see(exported: Exported) -> None:
    _, result, _ = exported
    noise = {
        stage: {(seed, index) for what, seed, index in DRAWN if what == stage}
        for stage in ("calibrate", "verify")
    }
    assert len(noise["calibrate"]) == 2
    verification = result.manifest["verification"]
    assert len(noise["verify"]) == verification["images"] == 4 * len(verification["seeds"]) >= 8
    assert not noise["calibrate"] & noise["verify"]
    every = set().union(*noise.values())
    streams = {sampling.image_generator(*pair).initial_seed() for pair in every}
    assert len(streams) == 2 + verification["images"]
    assert verification["seeds"] == sorted({seed for seed, _ in noise["verify"]})


def test_all_outputs_are_there_and_nothing_else(exported: Exported) -> None:
    asked, _, _ = exported
    names = {path.name for path in asked.output.parent.iterdir()}
    assert names == {
        "out.onnx",
        "out.json",
        "out.stats.safetensors",
        "fp32.onnx",
        "states.safetensors",
        "model.ditas.safetensors",
    }


def test_the_file_matches_and_the_manifest_says_so(exported: Exported) -> None:
    asked, result, _ = exported
    manifest = json.loads(asked.manifest_path.read_text())
    assert manifest == json.loads(json.dumps(result.manifest))
    assert result.verification.matches
    assert manifest["verification"]["matches_fake_quantized_forward"] is True
    proof = manifest["verification"]
    assert len(proof["final_latents_snr_db"]) == len(proof["seeds"])
    by_image = proof["final_latents_snr_db_by_image"]
    assert len(by_image) == proof["images"]
    mean = pytest.approx(sum(by_image) / len(by_image), rel=1e-5)  # of six digits
    assert proof["final_latents_snr_db_mean"] == mean
    low, high = proof["final_latents_snr_db_interval"]
    assert low < proof["final_latents_snr_db_mean"] < high
    assert high - low <= 2.0 or len(proof["seeds"]) == 4
    assert proof["kept_with_artifact"] == []
    fold = manifest["fold_proof"]
    assert 0 < fold["relative_error"] <= fold["bound"] == 1e-10
    assert manifest["file"]["sha256"] == sha256_of_file(asked.output)
    assert manifest["file"]["layout"] == "int4"
    assert set(manifest["linears"]) == set(result.quantized.linears)
    assert 4 < manifest["bits_per_weight"] < 8
    assert manifest["settings"]["walk_tokens"] == 100
    assert list(manifest["seconds"]) == [
        "sampling",
        "passing on",
        "alpha search",
        "moments",
        "rounding and low rank",
        "fold proof",
        "export",
        "verification",
    ]
    assert sum(manifest["bytes_by_part"].values()) < asked.output.stat().st_size
    assert manifest["versions"]["onnxruntime"] == onnxruntime.__version__
    assert result.verification.file is not None
    assert result.verification.file.bare_session is not None
    bare_db = result.verification.file.bare_session.seeds_db
    for found, bare in zip(result.verification.final.seeds_db[:2], bare_db, strict=True):
        # Two forms of the same integers; the branch's inner product is rounded in ours.
        assert abs(found - bare) < 2.0


def test_every_stage_reports_its_end(exported: Exported) -> None:
    _, _, seen = exported
    last = {stage: (done, total) for stage, done, total in seen}
    assert list(last) == ["sample", "held out", "quantize", "prove", "export", "verify"]
    assert all(done == total for done, total in last.values())


def test_the_reference_is_the_float_model(exported: Exported) -> None:
    asked, _, _ = exported
    assert asked.reference is not None
    session = onnxruntime.InferenceSession(str(asked.reference))
    latents, timesteps, labels = example_inputs(TINY, batch=3)
    feeds = {
        "latents": latents.numpy(),
        "timesteps": timesteps.numpy(),
        "class_labels": labels.numpy(),
    }
    expected = tiny_dit()(latents, timesteps, labels)
    got = torch.from_numpy(session.run(None, feeds)[0])
    assert snr_db(expected, got) > 110  # float32


def test_the_artifact_exports_again_in_another_form(exported: Exported, tmp_path: Path) -> None:
    asked, first, _ = exported
    again = replace(
        asked,
        output=tmp_path / "int8.onnx",
        artifact=asked.save_artifact,
        layout="int8",
        save_artifact=None,
        save_calibration=None,
        reference=None,
    )
    seen: list[str] = []
    result = export(again, on_progress=lambda stage, *_: seen.append(stage))
    assert "quantize" not in seen
    assert "sample" not in seen
    assert result.manifest["file"]["layout"] == "int8"
    # The same integers in the same kernels: not one bit differs.
    assert result.verification.final == first.verification.final
    assert result.manifest["verification"]["kept_with_artifact"] == ["float", "file"]


@pytest.mark.parametrize(
    ("asked_for", "precision", "layout"),
    [
        ({"target": "tensorrt"}, "fp16", "int8"),
        ({"target": "tensorrt", "precision": "fp32", "layout": "int4"}, "fp32", "int4"),
        ({"target": "onnxruntime"}, "fp32", "int4"),
    ],
    ids=str,
)
def test_a_target_chooses_what_is_not_asked_for(
    exported: Exported, tmp_path: Path, asked_for: dict[str, str], precision: str, layout: str
) -> None:
    asked, _, _ = exported
    settings = {"precision": None, "layout": None, "save_artifact": None}
    again = replace(
        asked,
        output=tmp_path / "out.onnx",
        artifact=asked.save_artifact,
        save_calibration=None,
        reference=None,
        **{**settings, **asked_for},
    )
    result = export(again)
    file, form = result.manifest["file"], read_form(again.output)
    assert (file["precision"], file["layout"]) == (precision, layout)
    assert (form.float_type, form.layout) == (precision, layout)
    assert file["target"] == form.target == asked_for["target"]
    assert result.verification.matches


def from_artifact(asked: ExportOptions, artifact: Path | None, **changes: Any) -> ExportOptions:
    """Return what exports a kept model again and writes no more than the file."""
    only_the_file = {"save_artifact": None, "save_calibration": None, "reference": None}
    return replace(asked, artifact=artifact, **{**only_the_file, **changes})


@pytest.fixture(scope="module")
def small(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    """Export the kept model with 4-bit modulation, and keep it so."""
    asked, _, _ = exported
    folder = tmp_path_factory.mktemp("small")
    kept = folder / "small.ditas.safetensors"
    again = from_artifact(
        asked, asked.save_artifact, output=folder / "out.onnx", adaln=4, save_artifact=kept
    )
    export(again)
    return again


def test_a_small_artifact_is_kept_where_calibration_is_asked_for_integers(
    exported: Exported, small: ExportOptions, tmp_path: Path
) -> None:
    asked, _, _ = exported
    kept = tmp_path / "kept.ditas.safetensors"
    again = from_artifact(
        asked,
        None,
        output=tmp_path / "out.onnx",
        adaln=4,
        save_artifact=kept,
        calibration=asked.save_calibration,
    )
    result = export(again)
    assert result.quantized.adaln_bits == 4
    assert small.save_artifact is not None
    found, wanted = (
        {name: tensor for name, tensor in load_file(path).items() if not name.startswith(PROOF)}
        for path in (kept, small.save_artifact)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert again.output.read_bytes() == small.output.read_bytes()


def test_an_artifact_keeps_what_was_proved_of_it(exported: Exported, tmp_path: Path) -> None:
    """The next export of the same numbers samples nothing, and another one the file alone."""
    asked, first, _ = exported
    spied: list[str] = []
    trajectory = held_out.trajectory

    def spy(runner: Runner, **settings: Any) -> Iterator[Step]:
        spied.append(type(runner).__name__)
        return trajectory(runner, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "trajectory", spy)
        same = export(from_artifact(asked, asked.save_artifact, output=tmp_path / "same.onnx"))
        assert spied == []
        assert same.verification == first.verification
        other = from_artifact(
            asked, asked.save_artifact, output=tmp_path / "static.onnx", ranges="static"
        )
        result = export(other)
    assert set(spied) == {"OnnxRuntimeRunner"}
    assert result.verification.final != first.verification.final
    assert result.manifest["verification"]["kept_with_artifact"] == ["float"]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("float-1000/final", torch.zeros(1)), ("float-probes/0", torch.zeros(2, 3))],
)
def test_a_kept_proof_that_does_not_fit_is_made_anew(
    exported: Exported, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    asked, first, _ = exported
    assert asked.save_artifact is not None
    quantized = QuantizedModel.load(asked.save_artifact)
    proofs = dict(quantized.proofs)
    part, _, key = name.partition("/")
    (path,) = [path for path in proofs if path.endswith(f"/{part}")]
    tensors = dict(proofs[path].tensors) | {key: tensor}
    proofs[path] = replace(proofs[path], tensors=tensors)
    changed = tmp_path / "changed.safetensors"
    replace(quantized, proofs=proofs).save(changed)
    result = export(from_artifact(asked, changed, output=tmp_path / "out.onnx"))
    assert result.verification.final == first.verification.final


@pytest.mark.parametrize("adaln", [None, 4])
def test_a_small_artifact_exports_to_the_same_file(
    small: ExportOptions, tmp_path: Path, adaln: int | None
) -> None:
    again = from_artifact(small, small.save_artifact, output=tmp_path / "out.onnx", adaln=adaln)
    result = export(again)
    assert again.output.read_bytes() == small.output.read_bytes()
    assert result.manifest["file"]["adaln_bits"] == 4
    floats = result.manifest["float_linears"]
    assert floats == ["t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]


@pytest.mark.parametrize(
    "form",
    [
        {"layout": "int8"},
        {"ranges": "static"},
        {"precision": "fp16"},
        {"precision": "fp16", "layout": "int8", "ranges": "static"},
        {"precision": "bf16"},
        {"target": "tensorrt"},
    ],
    ids=str,
)
def test_a_small_artifact_takes_every_form(
    small: ExportOptions, tmp_path: Path, form: dict[str, str]
) -> None:
    again = from_artifact(small, small.save_artifact, output=tmp_path / "out.onnx", **form)
    result = export(again)
    assert result.verification.matches is not False  # None: no runtime here takes bf16
    written = read_form(again.output).to_dict()
    assert written["adaln_bits"] == 4
    assert {name: written[name] for name in form if name != "precision"} == {
        name: value for name, value in form.items() if name != "precision"
    }


@pytest.mark.parametrize("adaln", [16, 8])
def test_a_small_artifact_refuses_other_bits(
    small: ExportOptions, tmp_path: Path, adaln: int
) -> None:
    again = from_artifact(small, small.save_artifact, output=tmp_path / "out.onnx", adaln=adaln)
    message = f"in 4 bits, and {adaln} were asked for; leave out --adaln, or"
    with pytest.raises(ArtifactError, match=message):
        export(again)
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_no_block_divides_is_refused_before_the_work(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.safetensors"
    save_checkpoint(narrow, tiny_dit(replace(TINY, hidden_size=48)))
    seen: list[str] = []
    with pytest.raises(QuantizationError, match="adaLN weights in 4 bits: no block size"):
        export(options(narrow, tmp_path, adaln=4), on_progress=lambda stage, *_: seen.append(stage))
    assert seen == []
    assert list(tmp_path.iterdir()) == [narrow]


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({}, 76_800),
        ({"fast": True}, 19_200),
        ({"walk_tokens": 38_400}, 38_400),
        ({"fast": True, "walk_tokens": 76_800}, 76_800),
    ],
    ids=str,
)
def test_fast_chooses_the_tokens_that_nobody_asked_for(asked: dict[str, Any], tokens: int) -> None:
    settings = quantization_settings(ExportOptions(output=Path("out.onnx"), **asked))
    assert settings.walk_tokens == tokens


@pytest.mark.parametrize(
    ("has_products", "precision", "note"),
    [
        (True, "bf16", "--fast: the float model samples in bfloat16"),
        (
            False,
            "fp32",
            "--fast: found no bfloat16 products (AVX512-BF16, or a GPU's) in every process; the "
            "float model samples in float32",
        ),
    ],
)
def test_fast_samples_in_bfloat16_where_there_are_products(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
    has_products: bool,
    precision: str,
    note: str,
) -> None:
    """What was sampled in is in the states, the artefact and the manifest."""
    monkeypatch.setattr(pipeline, "has_bfloat16_products", lambda _: has_products)
    kept = tmp_path / "states.safetensors"
    asked = options(
        checkpoint,
        tmp_path,
        method="linear",
        fast=True,
        walk_tokens=None,
        device="cpu",
        save_calibration=kept,
    )
    said: list[str] = []
    result = export(asked, say=said.append)
    assert note in said
    settings = result.manifest["settings"]
    assert (settings["walk_tokens"], settings["calibration"]["precision"]) == (19_200, precision)
    assert result.quantized.settings["calibration"]["precision"] == precision
    identity = result.quantized.identity
    assert CalibrationStates.load(kept, identity=identity).settings.precision == precision


def test_ranks_with_different_checkpoints_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name, and on the other rank's disk another file."""
    collect = Mock(side_effect=AssertionError("sampled"))
    monkeypatch.setattr(pipeline, "collect_states", collect)
    other = tiny_dit()
    other.final_layer.linear.bias.data += 1
    ranks = Mock(spec=Ranks, is_first=True)
    ranks.first.side_effect = ranks.together.side_effect = lambda function: function()
    ranks.gather.side_effect = lambda mine: [mine, identity_of(other).fingerprint]
    with pytest.raises(CheckpointError, match="is not the same checkpoint on every rank"):
        export(options(checkpoint, tmp_path), ranks=ranks)
    assert not list(tmp_path.iterdir())


def test_all_ranks_sample_in_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processors has bfloat16 products."""
    monkeypatch.setattr(pipeline, "has_bfloat16_products", lambda _: True)
    asked = ExportOptions(output=Path("out.onnx"), fast=True)
    ranks = Mock(spec=Ranks)
    ranks.gather.side_effect = lambda mine: [mine, False]
    assert sampling_precision(asked, torch.device("cpu"), ranks) == "fp32"
    ranks.gather.side_effect = lambda mine: [mine, True]
    assert sampling_precision(asked, torch.device("cpu"), ranks) == "bf16"


def test_fast_takes_kept_states_as_they_are(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled in float32 before; the walk over them is the quick one."""
    monkeypatch.setattr(pipeline, "has_bfloat16_products", lambda _: True)
    asked, _, _ = exported
    again = from_artifact(
        asked,
        None,
        output=tmp_path / "out.onnx",
        calibration=asked.save_calibration,
        method="linear",
        fast=True,
        walk_tokens=None,
    )
    said: list[str] = []
    settings = export(again, say=said.append).manifest["settings"]
    assert (settings["walk_tokens"], settings["calibration"]["precision"]) == (19_200, "fp32")
    assert [line for line in said if "--fast" in line] == [
        f"--fast: {asked.save_calibration} was sampled in float32, and is taken as it is"
    ]


def test_an_interrupted_export_samples_only_once(
    exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    asked = options(checkpoint, tmp_path)
    seen: list[tuple[str, int]] = []

    def stop_in_the_walk(stage: str, done: int, _total: int) -> None:
        seen.append((stage, done))
        if (stage, done) == ("quantize", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(asked, on_progress=stop_in_the_walk)
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx.work"}
    again: list[str] = []
    export(asked, on_progress=lambda stage, *_: again.append(stage))
    assert "sample" not in again
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out.onnx", "out.json", "out.stats.safetensors"}
    assert asked.output.read_bytes() == exported[0].output.read_bytes()


def test_saved_states_give_the_same_file(exported: Exported, tmp_path: Path) -> None:
    asked, _, _ = exported
    again = replace(
        asked,
        output=tmp_path / "out.onnx",
        calibration=asked.save_calibration,
        save_artifact=None,
        save_calibration=None,
        reference=None,
    )
    export(again)
    assert again.output.read_bytes() == asked.output.read_bytes()


@pytest.mark.parametrize(
    "form",
    [
        {"ranges": "static"},
        {"precision": "fp16"},
        {"adaln": 8},
        {"adaln": 4},
        {"a": 16, "block_size": 32},
        {"w": 8},
        {"w": 8, "a": 16},
    ],
    ids=str,
)
def test_other_forms_match_their_own_reference(
    checkpoint: Path, tmp_path: Path, form: dict[str, object]
) -> None:
    result = export(options(checkpoint, tmp_path, method="linear", **form))
    assert result.verification.matches, result.verification


def test_a_stranger_artifact_is_refused(
    exported: Exported, tmp_path: Path, checkpoint: Path
) -> None:
    asked, _, _ = exported
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, tiny_dit(seed=1))
    with pytest.raises(OtherModelError, match="made from another model: tensors_sha256"):
        export(options(other, tmp_path, artifact=asked.save_artifact))
    with pytest.raises(ArtifactError, match="made from another model"):
        export(options(other, tmp_path, calibration=asked.save_calibration))
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": Path("/")}, ArtifactError, "is a folder"),
        ({"output": Path("/no/such/out.onnx")}, ArtifactError, "does not exist"),
        ({"classes": "3,x"}, RunnerError, "write 3,7 or 0-9 or random"),
        ({"classes": "11"}, RunnerError, r"names class 11; this model has 0 to 9"),
        ({"block_size": 128}, QuantizationError, "block_size=128 does not divide 96"),
        ({"w": 8, "layout": "int4"}, OnnxExportError, "int4"),
        ({"device": "cuda"}, CalibrationError, "no CUDA GPU"),
    ],
    ids=str,
)
def test_bad_options_fail_before_the_work_and_leave_nothing(
    checkpoint: Path,
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    seen: list[str] = []
    with pytest.raises(error, match=message):
        export(
            options(checkpoint, tmp_path, **change),
            on_progress=lambda stage, *_: seen.append(stage),
        )
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_two_outputs_of_one_name_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    asked = options(checkpoint, tmp_path, reference=tmp_path / "out.onnx")
    with pytest.raises(ArtifactError, match="two outputs have one name"):
        export(asked)
