"""The README's own commands and snippets, as written."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.distributed.run
import typer
import yaml
from quantized_fixture import snr_db
from typer.testing import CliRunner

from ditas_export.cli import build, compare, embed, evaluate, report, sample
from ditas_export.cli.export import app
from ditas_export.families.load import load_model
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.export import export_reference
from ditas_export.options import ExportOptions

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = DOCUMENTS["README.md"]
PROGRAMS = {
    "ditas-export": app,
    "ditas-sample": sample.app,
    "ditas-build": build.app,
    "ditas-compare": compare.app,
    "ditas-embed": embed.app,
    "ditas-eval": evaluate.app,
    "ditas-report": report.app,
}
MODULES = {
    f"ditas_export.cli.{name.removeprefix('ditas-')}": name
    for name in PROGRAMS
    if name != "ditas-eval"
} | {"ditas_export.cli.evaluate": "ditas-eval"}
USAGE_ERROR: Any = typer.BadParameter.__base__  # Click's, or that of typer's copy of it
LAUNCHER = torch.distributed.run.get_args_parser()

RUN = (
    "InferenceSession",
    "steps=50))",
    "seeds=(1, 1, 2)",
    "onnx_export.expand",
    "onnx_export.relower",
)
"""What the Python snippets that are run here have in them, one each."""

COMPILED = {
    "ExportOptions(": "a minute's work, which the first command has done",
    "from_pretrained(": "the weights of a hub",
    "providers=CUDA": "a GPU",
    "TensorRTRunner(": "a GPU",
    "prove_folds(": "a family of one's own",
}
"""What the other snippets have in them, one each, and what they need."""


def blocks(language: str = "", text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [found for name, found in fenced if name == language]


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every command in the code blocks of a document."""
    lines = []
    for block in blocks("", text):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word in ("&&", ";", "|"):
                    lines.append(words)
                    words = []
                elif words or not re.match(r"\w+=", word):  # OMP_NUM_THREADS=1 pytest
                    words.append(word)
    return [words for words in lines if words]


def commands(program: str) -> list[list[str]]:
    """Return the arguments of every call of a program in the README."""
    return [words[1:] for words in command_lines(README) if words[0] == program]


def parse(words: list[str], *, whole: bool = True) -> None:
    """Parse a command as its program does, the launcher's part too; nothing is run.

    Unless it is `whole`, a command may lack arguments.
    """
    program, arguments = words[0], words[1:]
    if program == "torchrun":
        launched = LAUNCHER.parse_args(arguments)
        assert launched.module, words
        program, arguments = launched.training_script, launched.training_script_args
    elif words[:2] == ["python", "-m"]:
        program, arguments = words[2], words[3:]
    name = MODULES.get(program, program)
    with contextlib.suppress(typer.Exit):  # --help, --version
        typer.main.get_command(PROGRAMS[name]).make_context(
            name, list(arguments), resilient_parsing=not whole
        )


def is_ours(words: list[str]) -> bool:
    """Return whether a command is one of this package's, or launches one."""
    return words[0] in PROGRAMS or any(word in MODULES for word in words)


OURS = [words for text in DOCUMENTS.values() for words in command_lines(text) if is_ours(words)]


@pytest.fixture(scope="module")
def first_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the first command of the README, defaults and all, in a folder of its own."""
    folder = tmp_path_factory.mktemp("readme")
    arguments = commands("ditas-export")[0]
    assert arguments == ["--w", "4", "--a", "8", "out.onnx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_the_first_command_gives_what_the_readme_says(first_command: Path) -> None:
    manifest = json.loads((first_command / "out.json").read_text())
    assert manifest["model"]["source"]
    # 40.9 and 40.8 dB here; another processor's sums flip codes, which moved it by half a decibel.
    proof = manifest["verification"]
    assert proof["final_latents_snr_db_mean"] > 39.5
    bare = proof["bare_session_final_latents_snr_db"]
    assert sum(bare) / len(bare) > 39.5
    assert manifest["verification"]["matches_fake_quantized_forward"] is True
    kernels = manifest["verification"]["kernels"]
    assert kernels["MatMulIntegerToFloat"] == 2 * len(manifest["linears"])  # each with its branch


def run_snippet(marker: str) -> dict[str, Any]:
    """Run the one snippet that has something in it; return its names."""
    (snippet,) = [text for text in snippets() if marker in text]
    names: dict[str, Any] = {}
    exec(snippet, names)
    return names


def snippets() -> list[str]:
    return [snippet for text in DOCUMENTS.values() for snippet in blocks("python", text)]


def test_the_snippets_run(first_command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first_command)
    plain, service, listed, expansion, _ = map(run_snippet, RUN)
    assert plain["model_output"].shape == (2, 2, 16, 16)
    assert service["batch"].pixels.shape == (2, 16, 16, 1)
    assert listed["made"].pixels.shape == (3, 16, 16, 1)
    assert expansion["expand"] is expand
    for written in ("out-int8.onnx", "out-onnxruntime.onnx"):
        session = onnxruntime.InferenceSession(written)
        found = session.run(None, plain["inputs"])[0]
        # Rounding ties, and in the second the inner product of the branch, which is rounded there.
        assert snr_db(*map(torch.from_numpy, (plain["model_output"], found))) > 40


def test_every_snippet_is_run_or_named_as_not_run() -> None:
    found = [[marker for marker in (*RUN, *COMPILED) if marker in text] for text in snippets()]
    assert sorted(found) == sorted([marker] for marker in (*RUN, *COMPILED))


@pytest.mark.parametrize("marker", COMPILED)
def test_snippets_that_are_not_run_compile_and_name_what_exists(marker: str) -> None:
    (snippet,) = [text for text in snippets() if marker in text]
    tree = ast.parse(snippet)
    compile(tree, marker, "exec")
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, type_ignores=[]), marker, "exec"), {})


def test_the_sampling_commands_make_images(
    first_command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first_command)
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(first_command / "cache"))
    of_classes = [words for words in commands("ditas-sample") if "--embeddings" not in words]
    for arguments in of_classes:  # test_digits_pixart.py samples what is asked in words
        result = CliRunner().invoke(sample.app, arguments)
        assert result.exit_code == 0, result.output
    for folder in ("samples", "float-samples"):
        assert len(list((first_command / folder).glob("0*.png"))) == 10
    judged = CliRunner().invoke(evaluate.app, commands("ditas-eval")[0])
    assert judged.exit_code == 0, judged.output
    assert "10 images against 10 images; features: the bundled digit classifier" in judged.stdout


def test_the_report_command_writes_a_page(
    first_command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first_command)
    for arguments in commands("ditas-report"):
        result = CliRunner().invoke(report.app, arguments)
        assert result.exit_code == 0, result.output
    page = (first_command / "out.html").read_text(encoding="utf-8")
    assert "Proved: the file computes what was calibrated" in page
    assert 1e5 < len(page) < 4 * 2**20
    assert (first_command / "out.stats.safetensors").stat().st_size < 2**20


def test_the_accuracy_commands_run(first_command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ONNX Runtime's side: the engine needs a GPU. The ladder's own tests climb it."""
    monkeypatch.chdir(first_command)
    export_reference(load_model("digits").model, Path("fp32.onnx"))
    left_out = {"out.plan", "--ladder"}
    of_files = [words for words in commands("ditas-compare") if not left_out & set(words)]
    for arguments in of_files:
        result = CliRunner().invoke(compare.app, arguments)
        assert result.exit_code == 0, result.output
        assert "no linear diverges" in " ".join(result.stdout.split())
    program = str(Path(sys.executable).with_name("polygraphy"))
    for arguments in commands("polygraphy"):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert "25/25 iterations" in done.stdout


@pytest.mark.parametrize("words", OURS, ids=shlex.join)
def test_every_command_line_is_one_that_its_program_takes(words: list[str]) -> None:
    parse(words)


def test_the_documents_have_command_lines_of_all_kinds() -> None:
    assert {words[0] for words in OURS} == {*PROGRAMS, "torchrun"}


def test_commands_within_the_text_name_options_that_exist() -> None:
    found = 0
    for text in DOCUMENTS.values():
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            words = [word for word in code.replace("\\|", "|").split() if word != "…"]
            if words and is_ours(words):
                parse(words, whole=False)
                found += 1
    assert found > 10
    known = set().union(*map(flags, PROGRAMS))
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert option in known, option


@pytest.mark.parametrize(
    "words",
    [
        "ditas-export --no-such-option out.onnx",
        "ditas-export --steps many out.onnx",
        "ditas-export",
        "ditas-sample out.onnx",
        "ditas-build a.onnx b.onnx",
        "torchrun --nproc-per-node 8 -m ditas_export.cli.sample dit.onnx -o samples --no-such 1",
        "torchrun --no-such 8 -m ditas_export.cli.sample dit.onnx -o samples",
        "torchrun --nproc-per-node 8 -m ditas_export.cli.sample dit.onnx --num 10 -o samples",
    ],
)
def test_the_parsers_refuse_other_command_lines(words: str) -> None:
    with pytest.raises((SystemExit, USAGE_ERROR)):
        parse(words.split())


def flags(program: str) -> set[str]:
    """Return the options that a program shows."""
    parameters = typer.main.get_command(PROGRAMS[program]).params
    shown = [each for each in parameters if not getattr(each, "hidden", False)]
    return {
        flag
        for each in shown
        for flag in (*each.opts, *each.secondary_opts)
        if flag.startswith("-")
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_launcher_passes_every_option_on(program: str) -> None:
    """It refuses what begins two of its own options, wherever it stands."""
    for flag in flags(program):
        launched = LAUNCHER.parse_args(["-m", "module", "MODEL", flag, "1"])
        assert launched.training_script_args == ["MODEL", flag, "1"]


def test_files_that_the_readme_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("recipe", sorted((ROOT / "calib").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_fill_options(recipe: Path) -> None:
    options = {key.replace("-", "_"): value for key, value in yaml.safe_load(
        recipe.read_text()).items()}  # fmt: skip
    built = ExportOptions(output=Path("out.onnx"), **options)
    assert (built.w, built.a, built.steps, built.samples) == (4, 8, 50, 12)


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    """`.ci/run` on a README whose test command only leaves a trace, tools installed before it."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    command = next(block for block in blocks() if "pytest" in block)
    (tmp_path / "README.md").write_text(README.replace(command, "echo ran > trace\n"))
    tools = tmp_path / ".ci" / "browser-tools"
    tools.write_text("#!/bin/sh\necho tools > trace-of-tools\n")
    tools.chmod(0o755)
    for ci in ("", "true"):
        assert not (tmp_path / "trace-of-tools").exists()
        environment = {**os.environ, "CI": ci}
        subprocess.run(["bash", str(script)], check=True, cwd=tmp_path, env=environment)
        assert (tmp_path / "trace").read_text() == "ran\n"
    assert (tmp_path / "trace-of-tools").exists()
