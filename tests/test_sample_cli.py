"""`ditas-sample` as a user runs it: files, restart, ranks, refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from quantized_fixture import exported, quantized_tiny_dit, save_checkpoint, snr_db, tiny_dit
from typer.testing import CliRunner, Result

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.cli.sample import app
from ditas_export.distributed import cores_of_rank
from ditas_export.families.load import load_model
from ditas_export.generation import job
from ditas_export.generation.job import SampleReport
from ditas_export.generation.options import SampleOptions
from ditas_export.onnx_export.export import export_onnx

SIX = ["--classes", "0-5", "--batch", "2", "--steps", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "cache"))


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of the exported file, sampled in one go."""
    folder = tmp_path_factory.mktemp("six") / "out"
    result = run(exported(), "--runtime", "onnxruntime", *SIX, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_the_folder_holds_images_grid_npz_and_facts(six: Path) -> None:
    names = [f"{index:06d}.png" for index in range(6)]
    assert list(bytes_of(six)) == [*names, "grid.png", "samples.json", "samples.npz"]
    with np.load(six / "samples.npz") as content:
        assert content["arr_0"].shape == (6, 8, 8, 3)
        assert len({image.tobytes() for image in content["arr_0"]}) == 6
    facts = json.loads((six / "samples.json").read_text())
    assert facts["settings"]["classes"] == [0, 1, 2, 3, 4, 5]
    assert "onnxruntime" in facts["runtime"]


def test_a_quantized_model_makes_the_images_of_its_exported_file(tmp_path: Path) -> None:
    quantized = quantized_tiny_dit(load_model("digits").model, weight_bits=8, rank=0)
    quantized.settings["ranges"] = "token"
    quantized.save(tmp_path / "kept.safetensors")
    export_onnx(fold_smoothing(quantized), tmp_path / "kept.onnx", layout="int8", ranges="token")
    images = []
    for name, runtime in (("kept.safetensors", "torch"), ("kept.onnx", "onnxruntime")):
        words = [*SIX, "--steps", "10", "--cfg-scale", "1.5", "--runtime", runtime]
        result = run(tmp_path / name, *words, "-o", tmp_path / runtime)
        assert result.exit_code == 0, result.output
        images.append(torch.from_numpy(np.load(tmp_path / runtime / "samples.npz")["arr_0"]))
    facts = json.loads((tmp_path / "torch" / "samples.json").read_text())
    assert facts["runtime"].endswith("linears in INT8")
    # Rounding ties alone: the fake-quantized forward and the file differ by 40 dB too.
    assert snr_db(images[1], images[0]) > 34


def test_a_killed_run_goes_on_with_what_is_missing(six: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("000000.png", "000001.png", "000004.png", "samples.json"):
        (folder / name).write_bytes((six / name).read_bytes())
    kept = [(folder / name).stat().st_mtime_ns for name in ("000000.png", "000004.png")]
    result = run(exported(), "--runtime", "onnxruntime", *SIX, "-o", folder, "--json")
    report = json.loads(result.stdout)
    assert report["sampled"] == 4  # images 2 and 3, then 4 and 5: batches are whole
    assert kept == [(folder / name).stat().st_mtime_ns for name in ("000000.png", "000004.png")]
    assert bytes_of(folder) == bytes_of(six)


def test_a_model_that_was_exported_again_is_another(six: Path, tmp_path: Path) -> None:
    """Under the same name: the images that are there are not its own."""
    path, folder = tmp_path / "out.onnx", tmp_path / "out"
    path.write_bytes(exported().read_bytes())
    assert run(path, "--runtime", "onnxruntime", *SIX, "-o", folder).exit_code == 0
    (folder / "000001.png").unlink()
    path.write_bytes(exported(rank=0).read_bytes())
    result = run(path, "--runtime", "onnxruntime", *SIX, "-o", folder)
    assert result.exit_code == 2
    assert "sha256" in result.stderr
    assert not (folder / "000001.png").exists()


def test_two_ranks_make_the_same_bytes_as_one(six: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "ditas_export.cli.sample", str(exported())]
    command += ["--runtime", "onnxruntime", *SIX, "-o", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(six)
    assert len(list((tmp_path / "cache").glob("entry-*"))) == 1


@pytest.mark.parametrize(
    ("device", "asked", "expected"), [("cpu", None, 3), ("cpu", 5, 5), ("cuda", None, None)]
)
def test_ranks_on_one_cpu_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, device: Any, asked: int | None, expected: int | None
) -> None:
    """Model and VAE alike; on GPUs, and where threads are asked for, nothing is shared out."""
    given: list[int | None] = []

    def opened(*_: Any, threads: int | None, **__: Any) -> Any:
        given.append(threads)
        return SimpleNamespace(runner=SimpleNamespace(config=None))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(job, "open_runner", opened)
    monkeypatch.setattr(job, "open_decoder", opened)
    options = SampleOptions(
        model="m.onnx", output=Path("out"), device=device, threads=asked, vae="v.onnx"
    )
    job._decoder(options, job._open(options))
    assert given == [expected] * 2


@pytest.mark.parametrize(("ranks", "expected"), [("1", None), ("2", 3), ("7", 1), ("9", 1)])
def test_a_rank_has_one_core_at_least(
    monkeypatch: pytest.MonkeyPatch, ranks: str, expected: int | None
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert cores_of_rank() == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores_of_rank() is None


def test_a_cache_that_cannot_be_written_is_one_line_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "file"))
    result = run(exported(), "--runtime", "onnxruntime", *SIX[:4], "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(said) == 1
    assert "cannot be written (Not a directory)" in said[0]


def test_a_rank_that_fails_stops_all_with_its_message(six: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "samples.json").write_bytes((six / "samples.json").read_bytes())
    (folder / "000002.png").mkdir()  # rank 1's first image cannot be written over a folder
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "ditas_export.cli.sample", str(exported())]
    command += ["--runtime", "onnxruntime", *SIX, "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert "000002.png is a folder" in done.stderr
    assert not (folder / "samples.npz").exists()


def test_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "generate", interrupted)
    result = run("digits", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "Run the same command again" in result.stderr


def test_another_place_for_the_npz(tmp_path: Path) -> None:
    npz = tmp_path / "other.npz"
    result = run(exported(), "--classes", 1, "--steps", 2, "--npz", npz, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert npz.is_file()
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_what_is_not_finite_makes_no_picture(tmp_path: Path) -> None:
    model = tiny_dit()
    with torch.no_grad():
        model.final_layer.linear.weight *= 1e38
    save_checkpoint(tmp_path / "wild.safetensors", model)
    result = run(tmp_path / "wild.safetensors", *SIX, "-o", tmp_path / "out")
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"step [12] of 3, time step \d+, image 0", error)
    assert "check the checkpoint" in error
    assert not {".png", ".npz"} & {file.suffix for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "cat"], "write 3,7 or 0-9 or random"),
        (["--classes", "10"], "names class 10; this model has 0 to 9"),
        (["--sampler", "x"], "sampler='x'; expected one of ddpm"),
        (["--sampler", "heun"], "'heun' does not follow a diffusion, which this model is; choose"),
        (["--shift", "3"], "shift=3.0, but ddpm has no shift of times"),
        (["--guidance-interval", "0.7"], "guidance_interval=0.7; expected two noise levels LO,HI"),
        (["--guidance-interval", "0,x"], "guidance_interval=[0.0, 'x']; expected a number, 0 to 1"),
        (["--steps", "1"], "takes 2 to 1000 steps"),
        (["--batch", "0"], "batch=0"),
        (["--images", "0"], "images=0; expected a whole number, 1 to"),
        (["--num", "0"], "images=0; expected a whole number, 1 to"),
        (["--num", "3", "--images", "3"], "--num 3 is --images, and --images 3 is given; leave"),
        (["--cfg-scale", "0.5"], "cfg_scale=0.5: guidance starts at 1, which means none; use 1"),
        (["--cfg-scale", "-1"], "cfg_scale=-1.0: guidance starts at 1"),
        (["--device", "cuda"], "CUDAExecutionProvider"),
        (["--vae", "no/such/folder.onnx"], "no/such/folder.onnx"),
        (["--npz", "/no/such/folder/a.npz"], "/no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path
) -> None:
    result = run(exported(), "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert sum(line.startswith("error:") for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_old_name_of_images_works_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SampleOptions] = []

    def generate(options: SampleOptions, **_: object) -> SampleReport:
        asked.append(options)
        return SampleReport(
            folder=options.output, npz=options.output, images=5, sampled=0, seconds=0, runtime=""
        )

    monkeypatch.setattr(job, "generate", generate)
    old = run("digits", "--num", 5, "-o", tmp_path)
    new = run("digits", "--images", 5, "-o", tmp_path)
    assert asked[0] == asked[1]
    assert asked[0].images == 5
    assert (old.exit_code, new.exit_code) == (0, 0)
    line = "--num is --images now; the next release has that name alone\n"
    assert (old.stderr.count(line), new.stderr.count(line)) == (1, 0)
    assert old.stdout == new.stdout
    assert "--num " not in run("--help").stdout


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run(tmp_path / "absent.onnx", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "absent.onnx" in result.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(exported(), "--classes", 1, "--steps", 2, "-o", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot make the folder" in result.stderr
