"""`ditas-build`: with TensorRT for RTX for real, and without any TensorRT."""

from __future__ import annotations

import importlib.util
import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from quantized_fixture import exported, exported_reference
from typer.testing import CliRunner

from ditas_export import __version__
from ditas_export.artifact_files import sha256_of_file
from ditas_export.cli.build import app
from ditas_export.engine import products
from ditas_export.engine.metadata import EngineMetadata, metadata_path
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.engine.products import TENSORRT
from ditas_export.engine.report import expected_kernels
from ditas_export.engine.trtexec import run_tool
from ditas_export.errors import EngineError
from ditas_export.onnx_export.file_facts import read_form

ROOT = Path(__file__).parent.parent

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="extra [rtx]"
)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for `trtexec` on the path; it writes a plan and says its version."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "trtexec"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "words = dict(word[2:].partition('=')[::2] for word in sys.argv[1:])\n"
        "assert pathlib.Path(words['onnx']).is_file()\n"
        "if words['maxShapes'].startswith('latents:9x'):\n"
        "    print('[11/21/2026-10:00:00] [E] Engine could not be created from network')\n"
        "    sys.exit(1)\n"
        "pathlib.Path(words['saveEngine']).write_bytes(b'a plan')\n"
        "print('[11/21/2026-10:00:00] [I] TensorRT version: 10.13.3')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def test_version_and_help() -> None:
    assert run("--version") == (0, f"ditas-build {__version__}\n", "")
    code = (
        "import sys\n"
        "sys.argv = ['ditas-build', '--help']\n"
        "from ditas_export.cli.build import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnx', 'numpy', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--timing-cache" in done.stdout


@needs_rtx
def test_a_build_leaves_plan_and_metadata(tmp_path: Path) -> None:
    model, plan = exported(dtype=torch.float16), tmp_path / "out.plan"
    code, out, err = run(
        model, "-o", plan, "--backend", "rtx", "--batch", "1,2,4", "--report",
        "--compute-capability", "8.9,12.0", "--opt-level", "4",
    )  # fmt: skip
    assert code == 0, err
    flat = " ".join(out.split())
    for wanted in ("TensorRT for RTX 1.", "8 INT8×INT8 GEMM", "0 of 8", "attn.qkv", "0-1"):
        assert wanted in flat
    known = EngineMetadata.load(metadata_path(plan))
    assert (known.product, known.plan_bytes) == ("rtx", plan.stat().st_size)
    assert known.plan_sha256 == sha256_of_file(plan)
    assert (known.onnx_name, known.onnx_sha256) == (model.name, sha256_of_file(model))
    assert (known.form.layout, known.form.target) == ("int8", "tensorrt")  # the fewest kernels
    assert known.options.batch == BatchRange(smallest=1, usual=2, largest=4)
    assert known.options.compute_capabilities == ("8.9", "12.0")
    assert known.layers is not None
    assert known.layers["lost"] == []
    assert set(known.layers["linears"]) == set(expected_kernels_of(known))
    assert {path.name for path in tmp_path.iterdir()} == {"out.plan", "out.plan.json"}


def expected_kernels_of(known: EngineMetadata) -> dict[str, Any]:
    return dict(expected_kernels(known.model, known.form))


@needs_rtx
def test_a_portable_file_takes_the_fewest_kernels_at_its_own_precision(tmp_path: Path) -> None:
    kernels = {}
    for name, more in {"own": ["--as-is"], "fewest": [], "int4": ["--layout", "int4"]}.items():
        plan = tmp_path / f"{name}.plan"
        model = exported(dtype=torch.float16)
        code, out, err = run(model, "-o", plan, "--backend", "rtx", "--json", *more)
        assert code == 0, err
        built = json.loads(out)
        assert built["form"]["float_type"] == "fp16"
        assert built["layers"]["lost"] == []
        kernels[name] = built["layers"]["kernels"]
    assert kernels["fewest"] <= min(kernels.values())  # of the bundled model 16, 20 and 28 a block


@needs_rtx
def test_layout_int8_expands_and_json_prints_the_metadata(tmp_path: Path) -> None:
    plan = tmp_path / "out.plan"
    code, out, err = run(exported(), "-o", plan, "--layout", "int8", "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["form"]["layout"] == "int8"
    assert printed["onnx_sha256"] == sha256_of_file(exported())
    assert not any(built["keeps_int4"] for built in printed["layers"]["linears"].values())
    saved = json.loads(metadata_path(plan).read_text())
    assert saved.pop("format")
    assert saved == printed


@needs_rtx
def test_a_lost_linear_is_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The float model under the name of a quantized one: the builder multiplies all in float.
    asked = read_form(exported(layout="int8"))
    monkeypatch.setattr("ditas_export.engine.make.read_form", lambda path: asked)
    arguments = (exported_reference(), "-o", tmp_path / "out.plan", "--quiet")
    code, out, err = run(*arguments)
    assert (code, out) == (3, "")
    assert "8 linears are not multiplied as the file asks: blocks.0.attn.qkv (float GEMM)" in err
    assert EngineMetadata.load(tmp_path / "out.plan.json").layers is not None
    code, _, err = run(*arguments, "--allow-float")
    assert code == 0
    assert "warning" in err


@needs_rtx
def test_a_broken_file_is_exit_code_2(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(exported().read_bytes()[:1000])
    for model in (broken, tmp_path / "nowhere.onnx"):
        code, _, err = run(model, "-o", tmp_path / "out.plan")
        assert code == 2
        assert "no readable ONNX file" in err
    assert not (tmp_path / "out.plan").exists()


@pytest.mark.usefixtures("no_tensorrt")
def test_without_any_tensorrt(tmp_path: Path) -> None:
    code, _, err = run(exported(), "-o", tmp_path / "out.plan")
    assert code == 2
    assert "neither TensorRT nor TensorRT for RTX is installed; run: pip install" in err
    code, _, err = run(exported(), "-o", tmp_path / "out.plan", "--backend", "tensorrt")
    assert 'TensorRT is not installed; run: pip install "ditas-export[tensorrt]"' in err
    code, out, _ = run(exported(), "-o", tmp_path / "out.plan", "--dry-run", "--refit")
    assert code == 0
    for wanted in ("TensorRT for RTX: not installed", "1x3x8x8 | 2x3x8x8 | 8x3x8x8", "refit: True"):
        assert wanted in out
    code, out, _ = run(exported(), "--dry-run", "--compute-capability", "8.9")  # one of two can
    assert code == 0
    both = ("--compute-capability", "8.9", "--timing-cache", "t")
    code, _, err = run(exported(), "--dry-run", *both)
    assert code == 2
    assert "TensorRT has no --compute-capability" in err
    assert "TensorRT for RTX has no --timing-cache" in err
    code, out, _ = run(exported(), "--dry-run", "--json", "--layout", "int8")
    assert json.loads(out)["expands"] is True
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_tensorrt")
def test_the_command_lines(tmp_path: Path) -> None:
    plan = tmp_path / "out.plan"
    common = [
        f"--onnx={exported()}",
        f"--saveEngine={plan}",
        "--minShapes=latents:1x3x8x8,timesteps:1,class_labels:1",
        "--optShapes=latents:2x3x8x8,timesteps:2,class_labels:2",
        "--maxShapes=latents:8x3x8x8,timesteps:8,class_labels:8",
        "--skipInference",
    ]
    code, out, err = run(exported(), "-o", plan, "--dry-run", "--trtexec")
    assert code == 0
    assert "as it is; ditas-build takes fewer kernels, by writing it for TensorRT first" in err
    assert run(exported(), "-o", plan, "--dry-run", "--trtexec", "--as-is")[1:] == (out, "")
    tensorrt, rtx = map(shlex.split, out.splitlines())
    words = ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed", "--verbose"]
    assert tensorrt == ["trtexec", *common, *words]
    assert rtx == ["tensorrt_rtx", *common]
    code, out, _ = run(
        exported(), "-o", plan, "--dry-run", "--trtexec", "--workspace", "2", "--opt-level", "5",
        "--timing-cache", "t.cache", "--version-compatible", "--refit",
    )  # fmt: skip
    line, refusal = out.splitlines()
    assert shlex.split(line)[-5:] == [
        "--memPoolSize=workspace:2048",
        "--builderOptimizationLevel=5",
        "--timingCacheFile=t.cache",
        "--versionCompatible",
        "--refit",
    ]
    assert refusal.startswith("# TensorRT for RTX has no --timing-cache")
    arguments = ("--backend", "rtx", "--dry-run", "--trtexec", "--compute-capability", "8.9,12.0")
    code, out, _ = run(exported(), *arguments)
    assert out.split()[-1] == "--computeCapabilities=89,120"
    code, _, err = run(exported(), *arguments, "--workspace", "1")
    assert code == 2
    assert "tensorrt_rtx documents no option for --workspace" in err
    code, _, err = run(exported(), "--dry-run", "--trtexec", "--layout", "int8")
    assert code == 2
    assert "has to be expanded first" in err


@pytest.mark.usefixtures("tools")
def test_trtexec_builds_too(tmp_path: Path) -> None:
    plan = tmp_path / "out.plan"
    code, _, err = run(exported(), "-o", plan, "--trtexec", "--allow-float")
    assert code == 0, err
    assert "the build log lists no layers" in err
    known = EngineMetadata.load(metadata_path(plan))
    assert (known.product, known.version, known.layers) == ("tensorrt", "10.13.3", None)
    code, _, err = run(exported(), "-o", plan, "--trtexec")
    assert code == 3  # nothing shows that the linears are INT8
    assert run(exported_reference(), "-o", plan, "--trtexec")[0] == 0  # it has none to lose
    code, _, err = run(exported(), "-o", tmp_path / "b", "--trtexec", "--batch", "1,2,9")
    assert code == 2
    assert "trtexec could not build" in err
    assert "[E] Engine could not be created" in err
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("tools")
def test_changed_external_data_are_another_file(tmp_path: Path) -> None:
    model, data, plan = tmp_path / "large.onnx", tmp_path / "large.data", tmp_path / "out.plan"
    float_model = onnx.load(str(exported_reference()))
    onnx.save(float_model, str(model), save_as_external_data=True, location=data.name)
    hashes = set()
    for change in (0, 1):
        content = data.read_bytes()
        data.write_bytes(content[:-1] + bytes([content[-1] ^ change]))
        assert run(model, "-o", plan, "--trtexec")[0] == 0
        hashes.add(EngineMetadata.load(metadata_path(plan)).onnx_sha256)
    assert len(hashes) == 2


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    code, _, err = run(exported(), "--trtexec")
    assert code == 2
    assert "trtexec nor tensorrt_rtx is not on the PATH" in err
    with pytest.raises(EngineError, match="trtexec is not on the PATH; install TensorRT"):
        run_tool(exported(), tmp_path / "a", product=TENSORRT, options=BuildOptions())


def test_a_program_without_a_version_is_refused(tmp_path: Path, tools: Path) -> None:
    script = tools / "trtexec"
    script.write_text(script.read_text().replace("TensorRT version", "version"))
    code, _, err = run(exported(), "-o", tmp_path / "out.plan", "--trtexec")
    assert code == 2
    assert "did not say its version" in err
    assert not (tmp_path / "out.plan").exists()


def test_a_timing_cache_is_told_by_name() -> None:
    arguments = ("--backend", "tensorrt", "--timing-cache", "cache/t.cache")
    code, out, _ = run(exported(), *arguments, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["options"]["timing_cache"] == "t.cache"


@pytest.mark.parametrize("name", ["rtx-ada", "hopper", "digits"])
def test_bundled_profiles(name: str) -> None:
    code, out, err = run(exported(), "--profile", name, "--dry-run", "--json")
    assert code == 0, err
    assert (ROOT / "engines" / f"{name}.yaml").is_file()
    assert f'"engines/{name}.yaml" = ' in (ROOT / "pyproject.toml").read_text()
    assert json.loads(out)["options"]["batch"]


def test_the_command_line_wins_over_the_profile(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "backend: rtx\nbatch: [1, 1, 2]\nopt-level: 4\nrefit: true\ncompute-capability: 8.9\n"
    )
    code, out, _ = run(
        exported(), "--profile", profile, "--opt-level", "2", "--no-refit", "--dry-run", "--json"
    )
    assert code == 0
    intent = json.loads(out)
    assert set(intent["backends"]) == {"rtx"}
    options = intent["options"]
    assert options["batch"] == {"smallest": 1, "usual": 1, "largest": 2}
    assert (options["opt_level"], options["refit"]) == (2, False)
    assert options["compute_capabilities"] == ["8.9"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch", "1,2"], "batch='1,2'; give smallest, usual and largest"),
        (["--batch", "2,1,8"], "batch sizes 2, 1, 8"),
        (["--opt-level", "6"], "opt_level=6; expected a whole number, 0 to 5"),
        (["--workspace", "0"], "workspace=0.0; expected a number, 0.001 to 65536"),
        (["--compute-capability", "ada"], "compute-capability='ada'; give numbers"),
        (["--backend", "onnx"], "backend='onnx'; choose one of tensorrt, rtx, auto"),
        (["--layout", "fp16"], "layout='fp16'; expected one of int4, int8"),
        (["--profile", "nowhere"], "no profile 'nowhere': give a YAML file, or one of digits"),
        (["--backend", "rtx", "--timing-cache", "t"], "TensorRT for RTX has no --timing-cache"),
        (["--backend", "tensorrt", "--compute-capability", "8.9"], "it builds for the GPU at hand"),
    ],
)
def test_refusals(arguments: list[str], reason: str) -> None:
    code, _, err = run(exported(), *arguments, "--dry-run")
    assert code == 2
    assert reason in err


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--dry-run", "--trtexec"], []], ids=str)
def test_unsigned_codes_are_refused(arguments: list[str]) -> None:
    code, _, err = run(exported(target="onnxruntime"), *arguments)
    assert code == 2
    assert "was exported for onnxruntime" in err
    assert "--target tensorrt or portable" in err


def test_int8_rows_do_not_turn_back() -> None:
    code, _, err = run(exported(layout="int8"), "--layout", "int4", "--dry-run")
    assert code == 2
    assert "INT8 rows do not turn back" in err
    code, out, _ = run(exported(layout="int8"), "--layout", "int8", "--dry-run", "--json")
    assert json.loads(out)["expands"] is False


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rtx", "expected option: value lines"),
        ("a: [", "is no YAML"),
        ("opt-level: high", "opt_level='high'; expected a whole number, 0 to 5"),
        ("refit: maybe", "refit='maybe'; expected true or false"),
        ("precision: fp16", "unknown options"),
    ],
)
def test_profiles_that_make_no_sense(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    code, _, err = run(exported(), "--profile", tmp_path / "mine.yaml", "--dry-run")
    assert code == 2
    assert reason in err


def test_the_readmes_commands_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.onnx").write_bytes(exported().read_bytes())
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line.partition("#")[0])[1:]
        for line in readme.splitlines()
        if line.startswith("ditas-build ")
    ]
    assert len(commands) >= 3
    for arguments in commands:
        code, _, err = run(*arguments, "--dry-run")
        assert code == 0, err
