"""From a checkpoint's record to pictures: the process and the VAE travel with the file alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from conftest import random_vae
from quantized_fixture import TINY as TWO_BLOCKS
from quantized_fixture import snr_db, tiny_dit
from reference.published_ddpm import PublishedDDPM, cosine_betas
from test_checkpoint import diffusers_model
from torch import Tensor
from typer.testing import CliRunner, Result

from ditas_export.cli.build import app as build
from ditas_export.cli.compare import app as compare
from ditas_export.cli.export import app as export
from ditas_export.cli.sample import app as sample_app
from ditas_export.diffusion.sampling import image_generator, initial_noise, sample
from ditas_export.dit.model import DiT
from ditas_export.families.load import load_model
from ditas_export.generation import job
from ditas_export.onnx_export.export import export_reference
from ditas_export.onnx_export.file_facts import IDENTITY_KEY, read_config
from ditas_export.process import Process, VaeFactors
from ditas_export.runtime.diffusers_adapter import OnnxDiTTransformer2DModel
from ditas_export.runtime.open_runner import open_runner
from ditas_export.vae.export import export_vae_decoder
from ditas_export.vae.shape import VaeShape, read_vae_shape

STEPS, CLASSES = 4, (3, 7)
QUICK = ["--steps", 2, "--samples", 1, "--method", "linear", "--rank", 0, "--walk-tokens", 64]
TINY = replace(TWO_BLOCKS, depth=1)
COSINE = replace(TINY, process=Process(beta_schedule="squaredcos_cap_v2"))


def run(app: Any, *words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def one_line(app: Any, *words: object) -> str:
    """The refusal of bad input."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    return line


def training_checkpoint(path: Path, model: DiT, **args: Any) -> Path:
    content = {"ema": model.state_dict(), "opt": {}, "args": argparse.Namespace(**args)}
    torch.save(content, path)
    return path


def pictures(model: Path, folder: Path, *words: object) -> Tensor:
    """What `ditas-sample` makes of a model, uint8."""
    run(sample_app, model, "--steps", STEPS, "--threads", 1, "-o", folder, *words)
    return torch.from_numpy(np.load(folder / "samples.npz")["arr_0"]).float()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that records the cosine schedule, and both files of it."""
    folder = tmp_path_factory.mktemp("exported")
    args = {"num_heads": 4, "num_classes": 10, "noise_schedule": "cosine"}
    model = training_checkpoint(folder / "cosine.pt", tiny_dit(COSINE), **args)
    words = ["--model", model, "--reference", folder / "fp32.onnx", "--w", 8, "--a", 16]
    result = run(export, folder / "out.onnx", *words, *QUICK)
    said = " ".join(result.stderr.split())
    assert "not used: opt" in said
    assert "warning: fed pure noise at step 999, the model returns it to" in said
    assert "squaredcos_cap_v2" in result.stdout
    assert "10 and a null class" in result.stdout
    return folder


@pytest.fixture
def moved(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Path]]:
    """Each file alone in a folder that cannot be written, seen from another one."""
    files = {}
    for name in ("out.onnx", "fp32.onnx"):
        folder = tmp_path / "elsewhere" / name.removesuffix(".onnx")
        folder.mkdir(parents=True)
        files[name] = Path(shutil.copy(exported / name, folder))
        folder.chmod(0o555)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield files
    for path in files.values():
        path.parent.chmod(0o755)


def published_latents(model: DiT) -> Tensor:
    """What the transcription of the cosine process makes of the float model, in float64."""
    generators = [image_generator(0, index) for index in range(len(CLASSES))]
    noises = [initial_noise(TINY, generators).double().numpy() for _ in range(STEPS + 1)]
    labels = torch.tensor(CLASSES)

    @torch.no_grad()
    def predict(x: np.ndarray, t: int) -> np.ndarray:
        timesteps = torch.full((len(labels),), t)
        return model(torch.from_numpy(x).float(), timesteps, labels).double().numpy()

    made = PublishedDDPM(STEPS, betas=cosine_betas(1000)).sample(predict, noises[0], noises[1:])
    return torch.from_numpy(made[-1])


def test_a_file_moved_alone_makes_the_float_model_s_pictures(
    moved: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    model = load_model(exported / "cosine.pt").model
    assert model.config == COSINE
    expected = published_latents(model)
    for name, least in (("fp32.onnx", 80), ("out.onnx", 25)):
        with open_runner(str(moved[name])).runner as runner:
            found = sample(runner, classes=CLASSES, steps=STEPS, cfg_scale=1.0)
        # float32 tables where ᾱ is 2e-9; W8A16 of a random model.
        assert snr_db(expected, found) > least, name
    in_torch = pictures(exported / "cosine.pt", tmp_path / "a", "--classes", "3,7")
    in_onnx = pictures(moved["fp32.onnx"], tmp_path / "b", "--classes", "3,7")
    assert snr_db(in_torch, in_onnx) > 50
    linear = training_checkpoint(tmp_path / "linear.pt", tiny_dit(TINY), num_heads=4)
    other = pictures(linear, tmp_path / "c", "--classes", "3,7")
    assert snr_db(in_torch, other) < 20, "the schedule shows"


def test_a_file_moved_alone_is_compared_on_its_own_trajectory(
    moved: dict[str, Path], tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    run(compare, moved["fp32.onnx"], moved["out.onnx"], "--steps", 4, "--json", found)
    figures = json.loads(found.read_text())
    assert [step["timestep"] for step in figures["steps"]] == [999, 666, 333, 0]
    assert figures["total_snr_db"] > 25


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="extra [rtx]")
def test_a_plan_carries_the_process(moved: dict[str, Path], tmp_path: Path) -> None:
    run(build, moved["out.onnx"], "--dry-run")
    run(build, moved["out.onnx"], "-o", tmp_path / "out.plan", "--allow-float")
    known = json.loads((tmp_path / "out.plan.json").read_text())
    assert known["config"]["process"]["beta_schedule"] == "squaredcos_cap_v2"


def test_the_manifest_and_the_summary_say_it(exported: Path) -> None:
    manifest = json.loads((exported / "out.json").read_text())
    process = manifest["model"]["config"]["process"]
    assert process["beta_schedule"] == "squaredcos_cap_v2"
    check = manifest["noise_check"]
    assert check["passes"] is False
    assert check["class_db"] < 0


def test_what_a_file_records_cannot_be_told_again(exported: Path, tmp_path: Path) -> None:
    for words in (["--num-heads", 4], ["--num-classes", 10], ["--no-null-class"]):
        line = one_line(sample_app, exported / "out.onnx", "-o", tmp_path / "x", *words)
        assert f"carries its own configuration; leave out {words[0]}" in line
    line = one_line(
        export, tmp_path / "o.onnx", "--model", exported / "cosine.pt", "--betas", "linear"
    )
    assert "args.noise_schedule gives beta_schedule 'squaredcos_cap_v2', --betas gives" in line
    line = one_line(sample_app, exported / "cosine.pt", "-o", tmp_path / "x", "--num-classes", 11)
    assert "args.num_classes gives num_classes 10, --num-classes gives 11" in line


# --- Models that cannot be guided ---------------------------------------------------------------

UNGUIDED: dict[str, dict[str, Any]] = {
    "no null row, no variance": {
        "config": replace(
            TINY,
            num_classes=11,
            null_row=False,
            learn_sigma=False,
            process=Process(variance="fixed_large"),
        ),
        "args": {"class_dropout_prob": 0.0, "learn_sigma": False},
    },
    "no class": {"config": replace(TINY, num_classes=0), "args": {}},
}


@pytest.mark.parametrize("state", UNGUIDED.values(), ids=UNGUIDED)
def test_models_without_guidance_go_all_the_way(state: dict[str, Any], tmp_path: Path) -> None:
    config = state["config"]
    float_model = tiny_dit(config)
    model = training_checkpoint(tmp_path / "m.pt", float_model, num_heads=4, **state["args"])
    if config.num_classes == 0:  # a model without y_embedder is one of a row of zeros
        with torch.no_grad():
            float_model.y_embedder.embedding_table.weight.zero_()
        content = torch.load(model, weights_only=False)
        del content["ema"]["y_embedder.embedding_table.weight"]
        torch.save(content, model)
    out = tmp_path / "out.onnx"
    run(export, out, "--model", model, *QUICK, "--w", 8)
    assert read_config(out) == config
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["verification"]["matches_fake_quantized_forward"] is True
    assert manifest["settings"]["calibration"]["cfg_scale"] == 1
    assert manifest["noise_check"]["null_class_db"] is None

    found = pictures(out, tmp_path / "found", "--images", 2, "--seed", 1)
    expected = pictures(model, tmp_path / "expected", "--images", 2, "--seed", 1)
    assert snr_db(expected, found) > 15  # W8A8 of a random model; other noise is at 0 dB

    lack = "no null class" if config.num_classes else "no classes"
    for scale in ("1.5", "0"):
        line = one_line(sample_app, out, "-o", tmp_path / "no", "--cfg-scale", scale)
        assert lack in line
    line = one_line(export, tmp_path / "n.onnx", "--model", model, *QUICK, "--cfg-scale", 1.5)
    assert lack in line

    adapter = OnnxDiTTransformer2DModel(out)
    assert adapter.config["out_channels"] == config.out_channels
    pipeline = diffusers.DiTPipeline(
        transformer=adapter,
        vae=random_vae(latent_channels=3),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        class_labels=[0], guidance_scale=1.0, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert made.shape == (1, 32, 32, 3)
    assert np.isfinite(made).all()


# --- The VAE ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of latents that are scaled as no other's, the exported file of it, and a VAE."""
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers_model(num_embeds_ada_norm=3, num_layers=1).save_pretrained(
        folder / "p" / "transformer"
    )
    small = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
    }
    random_vae(scaling_factor=0.5, shift_factor=0.25, **small).save_pretrained(folder / "p" / "vae")
    random_vae(**small).save_pretrained(folder / "other")
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(
        folder / "p" / "scheduler"
    )
    loaded = load_model(folder / "p")
    export_reference(loaded.model, folder / "fp32.onnx", identity=loaded.identity)
    export_vae_decoder(str(folder / "p"), folder / "p.onnx")
    rewritten(folder / "p.onnx", folder / "other.onnx", OWN, PUBLISHED)
    return folder


def rewritten(source: Path, path: Path, old: str, new: str) -> Path:
    """Copy a file, a piece of its metadata replaced wherever it stands; without its identity."""
    model = onnx.load(source)
    kept = [entry for entry in model.metadata_props if entry.key != IDENTITY_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for entry in model.metadata_props:
        entry.value = entry.value.replace(old, new)
    onnx.save(model, path)
    return path


OWN = '"scaling_factor": 0.5, "shift_factor": 0.25'
PUBLISHED = '"scaling_factor": 0.18215, "shift_factor": 0.0'


def sampled(model: Path, folder: Path, *words: object) -> tuple[Tensor, str]:
    made = pictures(model, folder, "--classes", "0", "--runtime", "auto", *words)
    return made, json.loads((folder / "samples.json").read_text())["vae"]


def test_a_pipeline_brings_its_own_vae(pipeline: Path, tmp_path: Path) -> None:
    expected, described = sampled(pipeline / "p", tmp_path / "a")
    assert described.startswith(f"{pipeline / 'p'} (AutoencoderKL")
    named, _ = sampled(pipeline / "p", tmp_path / "b", "--vae", pipeline / "p" / "vae")
    assert torch.equal(named, expected)
    (tmp_path / "c").mkdir()
    shutil.copy(pipeline / "fp32.onnx", tmp_path / "c")
    shutil.copy(pipeline / "p.onnx", tmp_path / "c" / "vae_decoder.onnx")
    beside, described = sampled(tmp_path / "c" / "fp32.onnx", tmp_path / "d")
    assert "vae_decoder.onnx (onnxruntime" in described
    assert snr_db(expected, beside) > 50


def test_a_vae_of_other_factors_is_refused_naming_both(pipeline: Path, tmp_path: Path) -> None:
    both = (
        "was trained on latents of scaling factor 0.5 and shift 0.25",
        "has scaling factor 0.18215 and shift 0",
    )
    shutil.copy(pipeline / "other.onnx", tmp_path / "vae_decoder.onnx")
    shutil.copy(pipeline / "fp32.onnx", tmp_path)
    out = ["-o", tmp_path / "out", "--classes", "0"]
    for words in (
        [pipeline / "p", *out, "--vae", pipeline / "other"],
        [pipeline / "fp32.onnx", *out, "--vae", tmp_path / "vae_decoder.onnx"],
        [tmp_path / "fp32.onnx", *out],
    ):
        line = one_line(sample_app, *words)
        assert all(part in line for part in both), line
    line = one_line(
        export, tmp_path / "o.onnx", "--model", pipeline / "p", "--vae", pipeline / "other", *QUICK
    )
    assert all(part in line for part in both), line


def test_the_published_vae_is_taken_where_it_fits_only(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = one_line(sample_app, pipeline / "fp32.onnx", "-o", tmp_path / "x", "--classes", "0")
    assert "which the default VAE stabilityai/sd-vae-ft-ema (scaling factor 0.18215" in line
    monkeypatch.setattr(job, "DEFAULT_VAE", str(pipeline / "other"))
    for index, (old, new) in enumerate([(OWN, PUBLISHED), (f"{{{OWN}}}", "null")]):
        file = rewritten(pipeline / "fp32.onnx", tmp_path / f"{index}.onnx", old, new)
        recorded = read_config(file).process.vae
        assert recorded == (None if index else VaeFactors(scaling_factor=0.18215))
        _, described = sampled(file, tmp_path / str(index))
        assert described.startswith(str(pipeline / "other"))


def test_a_decoder_of_an_earlier_version_says_no_factors(pipeline: Path, tmp_path: Path) -> None:
    old = f'"factors": {{{PUBLISHED}}}, '
    rewritten(pipeline / "other.onnx", tmp_path / "vae_decoder.onnx", old, "")
    assert read_vae_shape(tmp_path / "vae_decoder.onnx") == VaeShape(in_channels=4, scale=2)
    shutil.copy(pipeline / "fp32.onnx", tmp_path)
    _, described = sampled(tmp_path / "fp32.onnx", tmp_path / "out")
    assert "vae_decoder.onnx" in described
