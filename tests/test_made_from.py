"""Whose states, artefact, file and manifest it is, and what of earlier versions is still taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from quantized_fixture import example_inputs, exported, exported_reference, fed, tiny_dit
from safetensors.torch import save_file
from test_checkpoint import diffusers_model
from typer.testing import CliRunner

from ditas_export import pipeline
from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.calibration.quantized_model import (
    ARTIFACT_FORMAT,
    EARLIER_FORMAT,
    QuantizedModel,
)
from ditas_export.calibration.states import (
    STATES_FORMAT,
    CalibrationSettings,
    CalibrationStates,
    collect_states,
)
from ditas_export.cli import build, compare, sample
from ditas_export.errors import ArtifactError, DitasExportError, OnnxExportError, OtherModelError
from ditas_export.families.identity import identity_of
from ditas_export.families.load import load_model
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.onnx_export.file_facts import CONFIG_KEY, IDENTITY_KEY
from ditas_export.onnx_export.manifest import MANIFEST_FORMAT, require_own_manifest
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export
from ditas_export.runtime.diffusers_adapter import OnnxDiTTransformer2DModel
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner

FORMER_CONFIG = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "layer_norm_eps",
    "mlp_norm_eps",
    "frequency_shift",
)
"""Fields of a configuration as earlier versions wrote it."""


def options(folder: Path, **changes: Any) -> ExportOptions:
    small = {"steps": 4, "samples": 2, "walk_tokens": 100, "method": "linear", "device": "cpu"}
    return ExportOptions(**{"output": folder / "out.onnx", **small, **changes})


def unlabelled(path: Path) -> Path:
    """The tiny model, without a word on its heads."""
    save_file({name: value.contiguous() for name, value in tiny_dit().state_dict().items()}, path)
    return path


def test_corrected_heads_take_nothing_of_the_interrupted_run(tmp_path: Path) -> None:
    """The tensors are the same, and their hash; what they compute is not."""
    model = str(unlabelled(tmp_path / "model.safetensors"))
    clean, folder = tmp_path / "clean", tmp_path / "corrected"
    clean.mkdir()
    folder.mkdir()

    def stop(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("quantize", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(options(folder, model=model, num_heads=2), on_progress=stop)
    kept = {name: folder / f"{name}.safetensors" for name in ("states", "model")}
    for where in (clean, folder):
        with mock.patch.object(pipeline, "collect_states", wraps=collect_states) as sampler:
            export(options(
                where, model=model, num_heads=4, save_artifact=where / kept["model"].name
            ))  # fmt: skip
        sampler.assert_called_once()
    assert {path.name for path in folder.iterdir()} == {path.name for path in clean.iterdir()}
    for name in ("out.onnx", "model.safetensors"):
        assert (folder / name).read_bytes() == (clean / name).read_bytes(), name


def test_an_artifact_of_a_diffusers_folder_is_not_of_the_official_file(tmp_path: Path) -> None:
    """The same weights: diffusers' model has another eps and other frequencies."""
    diffusers_model().save_pretrained(tmp_path / "folder")
    loaded = load_model(tmp_path / "folder")
    official = tmp_path / "official.safetensors"
    tensors = {name: value.contiguous() for name, value in loaded.model.state_dict().items()}
    save_file(tensors, official, metadata={"num_heads": "4"})
    assert load_model(official).identity.tensors_sha256 == loaded.identity.tensors_sha256
    kept = tmp_path / "kept"
    (tmp_path / "out").mkdir()
    with mock.patch.object(pipeline, "write_or_keep", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            export(options(tmp_path / "out", model=str(tmp_path / "folder")))
        solved = next((tmp_path / "out").glob("*/solved-*/model.safetensors"))
        shutil.copy(solved, kept)
    with pytest.raises(
        OtherModelError, match=r"frequency_shift 1, now 0; mlp_norm_eps 1e-05, now 1e-06"
    ):
        export(options(tmp_path / "out", model=str(official), artifact=kept, steps=None,
                       samples=None, walk_tokens=None, method=None))  # fmt: skip
    states = next((tmp_path / "out").glob("*/sampled-*/states.safetensors"))
    with pytest.raises(OtherModelError, match=r"frequency_shift 1, now 0"):
        CalibrationStates.load(states, identity=load_model(official).identity)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder with the exported tiny model, its artefact and its states; never write to it."""
    folder = tmp_path_factory.mktemp("kept")
    export(options(
        folder,
        model=str(checkpoint),
        save_artifact=folder / "model",
        save_calibration=folder / "states",
    ))  # fmt: skip
    return folder


def former_artifact(source: Path, target: Path) -> None:
    """Rewrite an artefact as an earlier version wrote it."""
    tensors, header = load_tensors(source, file_format=ARTIFACT_FORMAT)
    identity = header.pop("identity")
    header["config"] = {name: identity["config"][name] for name in FORMER_CONFIG}
    header["provenance"]["checkpoint_sha256"] = identity["tensors_sha256"]
    save_tensors(target, tensors, file_format=EARLIER_FORMAT, header=header)


def test_a_former_artifact_is_taken_up_and_written_anew(
    kept: Path, checkpoint: Path, tmp_path: Path
) -> None:
    former, anew = tmp_path / "former", tmp_path / "anew"
    former_artifact(kept / "model", former)
    with pytest.raises(OtherModelError, match=r"earlier format.*with --model and --save-artifact"):
        QuantizedModel.load(former)
    asked = ExportOptions(
        output=tmp_path / "out.onnx", model=str(checkpoint), artifact=former, save_artifact=anew
    )
    export(asked)
    assert asked.output.read_bytes() == (kept / "out.onnx").read_bytes()
    assert QuantizedModel.load(anew).identity == identity_of(tiny_dit())
    other = replace(tiny_dit().config, num_heads=2)
    wrong = identity_of(tiny_dit(other))
    with pytest.raises(OtherModelError, match=r"num_heads 4, now 2"):
        QuantizedModel.load(former, model=wrong)


def former_file(source: Path, target: Path) -> None:
    """Rewrite a file with the metadata of an earlier version."""
    model = onnx.load(str(source))
    entries = {entry.key: entry.value for entry in model.metadata_props}
    del entries[IDENTITY_KEY], model.metadata_props[:]
    config = json.loads(entries[CONFIG_KEY])
    entries[CONFIG_KEY] = json.dumps({name: config[name] for name in FORMER_CONFIG})
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, str(target))


def test_a_former_file_opens_samples_compares_and_builds(tmp_path: Path) -> None:
    former, reference = tmp_path / "former.onnx", tmp_path / "fp32.onnx"
    former_file(exported(), former)
    former_file(exported_reference(), reference)
    with (
        open_runner(str(former), runtime="onnxruntime").runner as old,
        open_runner(str(exported()), runtime="onnxruntime").runner as new,
    ):
        assert old.config == new.config
        assert torch.equal(old(fed(*example_inputs())), new(fed(*example_inputs())))
    quick = ["--classes", "1", "--steps", "2"]
    for app, words in (
        (sample.app, [str(former), "-o", str(tmp_path / "out"), *quick]),
        (compare.app, [str(reference), str(former), "--no-linears", *quick]),
        (build.app, [str(former), "--dry-run"]),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


Readers = dict[str, Callable[[Path], object]]


def command(app: Any, *words: object) -> str:
    """Return what a command refuses with."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def mismatched(tmp_path: Path) -> Iterator[Path]:
    """A file beside which lies the manifest of another."""
    path = tmp_path / "out.onnx"
    shutil.copy(exported(), path)
    manifest = {"format": MANIFEST_FORMAT, "file": {"sha256": "0" * 64}}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    yield path
    manifest["file"] = {"sha256": sha256_of_onnx(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    require_own_manifest(path)  # with its own it is fine


def test_every_reader_refuses_the_manifest_of_another_file(
    mismatched: Path, tmp_path: Path
) -> None:
    expected = "is the manifest of another file than"
    for read in (
        lambda: open_runner(str(mismatched), runtime="onnxruntime"),
        lambda: OnnxDiTTransformer2DModel(mismatched),
    ):
        with pytest.raises(DitasExportError, match=expected):
            read()
    folder = tmp_path / "images"
    assert expected in command(sample.app, mismatched, "-o", folder)
    assert expected in command(compare.app, exported_reference(), mismatched)
    assert expected in command(compare.app, mismatched, exported())
    assert expected in command(build.app, mismatched, "--dry-run")
    assert not folder.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"file": {"sha256": "0"}}', '{"format": "other"}'])
def test_a_stranger_of_that_name_is_no_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.onnx"
    shutil.copy(exported(), path)
    path.with_suffix(".json").write_text(text)
    require_own_manifest(path)


Tensors = dict[str, torch.Tensor]


def reshape(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:1].clone()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("latents"), "latents"),
        (lambda t: t.pop("timesteps"), "timesteps"),
        (lambda t: t.pop("maxima.blocks.1.mlp.fc2"), r"1 missing \(maxima\.blocks\.1\.mlp\.fc2\)"),
        (reshape("latents"), r"latents \(1, 2, 3, 8, 8\) instead of \(4, 2, 3, 8, 8\)"),
        (reshape("timesteps"), r"timesteps \(1,\) instead of \(4,\)"),
        (
            reshape("maxima.blocks.0.attn.qkv"),
            r"maxima\.blocks\.0\.attn\.qkv \(1, 96\) instead of \(4, 96\)",
        ),
        (lambda t: t["latents"].fill_(torch.nan), r"NaN or infinity \(latents\)"),
        (lambda t: t["maxima.blocks.0.attn.qkv"].neg_(), r"below the least \(maxima\.blocks\.0"),
        (lambda t: t["timesteps"].add_(1000), "time steps do not descend within 0 to 999"),
        (lambda t: t.update(latents=t["latents"].double()), "float64"),
    ],
)
def test_damaged_states_are_one_line(
    kept: Path, tmp_path: Path, damage: Callable[[Tensors], object], message: str
) -> None:
    tensors, header = load_tensors(kept / "states", file_format=STATES_FORMAT)
    damage(tensors)
    save_tensors(tmp_path / "states", tensors, file_format=STATES_FORMAT, header=header)
    with pytest.raises(ArtifactError, match=message) as caught:
        CalibrationStates.load(tmp_path / "states", identity=identity_of(tiny_dit()))
    assert "\n" not in str(caught.value)


QKV = "blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, _h: t.pop(f"{QKV}.bias"), "damaged"),
        (lambda t, _h: t.pop("float.pos_embed"), "pos_embed"),
        (
            lambda t, _h: t.update({f"{QKV}.smoothing_scale": torch.ones(1)}),
            r"smoothing_scale \(1,\) instead",
        ),
        (lambda t, _h: t[f"{QKV}.smoothing_scale"].zero_(), "not positive"),
        (lambda t, _h: t[f"{QKV}.bias"].fill_(torch.inf), "NaN or infinity"),
        (lambda t, _h: t[f"{QKV}.codes"].fill_(-0x78), "outside -7 … 7"),  # two codes of −8
        (lambda t, _h: t[f"{QKV}.multipliers"].zero_(), "multipliers"),
        (lambda t, _h: t.update({f"{QKV}.row_scale": torch.ones(3)}), "row"),
        (lambda _t, h: h.pop("activation_bits"), "activation_bits"),
        (lambda _t, h: h.pop("settings"), "settings"),
        (lambda _t, h: h["linears"].pop(QKV), "damaged"),
        (lambda _t, h: h["settings"].update(ranges="row"), "ranges='row'"),
        (
            lambda t, _h: t.update({f"{QKV}.codes": t[f"{QKV}.codes"][None]}),
            r"codes \(1, 13824\) instead",
        ),
        (
            lambda t, _h: t.update({f"{QKV}.codes": t[f"{QKV}.codes"].short()}),
            "int16 instead of (u)?int8",
        ),
        (lambda t, _h: t.update({f"{QKV}.row_scale": t[f"{QKV}.row_scale"].double()}), "float64"),
        (lambda t, _h: t.update(stray=torch.ones(2)), r"1 unexpected \(stray\)"),
        (lambda _t, h: h["linears"][QKV].update(rank=7), "damaged"),
        (lambda _t, h: h["linears"][QKV].update(alpha="x"), "alpha='x'; expected a number"),
        (lambda _t, h: h["settings"].update(alpha_grid=5), "alpha_grid=5"),
        (lambda _t, h: h["settings"]["calibration"].pop("classes"), "at least one sample"),
        (lambda _t, h: h["settings"]["calibration"].update(classes=[99]), "no class 99"),
        (lambda _t, h: h["settings"]["calibration"].update(cfg_scale="1.5"), "expected a number"),
        (lambda _t, h: h["settings"]["calibration"].update(cfg_scale=0.5), "guidance starts at 1"),
        (lambda _t, h: h["settings"]["calibration"].update(seed=2**70), "seed="),
        (lambda _t, h: h["settings"]["calibration"].update(steps=0), "steps=0"),
        (lambda _t, h: h["identity"]["config"].update(depth=1), "damaged|mlp"),
    ],
)
def test_damaged_artifacts_are_one_line(
    kept: Path, tmp_path: Path, damage: Callable[[Tensors, dict[str, Any]], object], message: str
) -> None:
    tensors, header = load_tensors(kept / "model", file_format=ARTIFACT_FORMAT)
    damage(tensors, header)
    save_tensors(tmp_path / "model", tensors, file_format=ARTIFACT_FORMAT, header=header)
    with pytest.raises(ArtifactError, match=message) as caught:
        QuantizedModel.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_byte_that_changed_is_noticed(kept: Path, tmp_path: Path) -> None:
    """Within the range of its codes, so that nothing but the hash tells."""
    content = bytearray((kept / "model").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged: it holds something else than was written"):
        QuantizedModel.load(tmp_path / "model")


def test_float_parameters_are_the_model_s_own(kept: Path) -> None:
    quantized = QuantizedModel.load(kept / "model")
    quantized.require_parameters_of(tiny_dit())
    parameters = dict(quantized.float_parameters)
    parameters["pos_embed"] = parameters["pos_embed"].roll(1, 1)
    with pytest.raises(ArtifactError, match="not the model's own: pos_embed; the quant"):
        replace(quantized, float_parameters=parameters).require_parameters_of(tiny_dit())


def test_settings_that_no_calibration_had_are_refused(kept: Path) -> None:
    states = CalibrationStates.load(kept / "states", identity=identity_of(tiny_dit()))
    with pytest.raises(ArtifactError, match="the model has no class 10"):
        replace(states, settings=CalibrationSettings(steps=4, classes=(1, 10)))


@pytest.mark.parametrize("change", [{"null_row": False}, {"num_classes": 9}, {"input_size": 16}])
def test_a_configuration_that_was_changed_is_no_model_s(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """Also of a file without a manifest: the fingerprint stands beside the configuration."""
    model = onnx.load(str(exported()))
    (entry,) = (entry for entry in model.metadata_props if entry.key == CONFIG_KEY)
    entry.value = json.dumps(json.loads(entry.value) | change)
    onnx.save(model, str(tmp_path / "out.onnx"))
    with pytest.raises(OnnxExportError, match=r"another model than its record says|damaged record"):
        OnnxRuntimeRunner(tmp_path / "out.onnx")
