"""`--help` answers at once, every module imports, and imports point one way."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from quantized_fixture import exported

import ditas_export

PACKAGE = Path(ditas_export.__file__).parent

ORDER = (
    "telemetry",
    "errors",
    "paths",
    "figures",
    "saved_records",
    "text_files",
    "temporary_files",
    "file_signs",
    "artifact_files",
    "job_files",
    "kept_parts",
    "distributed",
    "fast_matmul",
    "timings",
    "options",
    "quantization",
    "process",
    "family_model",
    "dit",
    "conditions",
    "families",
    "diffusion",
    "calibration",
    "onnx_export",
    "engine",
    "runtime",
    "vae",
    "generation",
    "evaluation",
    "preflight",
    "export_job",
    "export_manifest",
    "export_proofs",
    "export_files",
    "pipeline",
    "cli",
)
"""Rooms, each of which may import those before it."""

EXCEPTIONS = {("calibration", "runtime.torch_runner")}

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(ditas_export.__path__, "ditas_export.")
)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "ditas_export."
        ):
            continue
        imported = str(node.module).removeprefix("ditas_export.")
        if (room, imported) not in EXCEPTIONS:
            assert ORDER.index(imported.split(".")[0]) <= ORDER.index(room), (path, imported)


def test_only_what_encodes_prompts_asks_for_transformers() -> None:
    """It has a process of its own: `ditas-embed`, which nothing else imports."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    asks = {path.name for path, text in texts.items() if 'module("transformers")' in text}
    imports = {
        path.name
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if "conditions.text_encoder" in (getattr(node, "module", "") or "")
    }
    named = [node for text in texts.values() for node in ast.walk(ast.parse(text))]
    modules = {alias.name for node in named if isinstance(node, ast.Import) for alias in node.names}
    assert asks == {"text_encoder.py"}
    assert imports == {"embed.py"}
    assert "transformers" not in modules


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_prepared_model_is_sampled_without_what_prepares_it(runtime: str, tmp_path: Path) -> None:
    """Half a second each: PyTorch's compiler, which diffusers asks for; onnx-ir; the exporter."""
    model = exported()
    code = (
        "import sys\n"
        "from ditas_export.cli.sample import main\n"
        "start = sys.argv[1]\n"
        f"sys.argv = ['ditas-sample', {str(model)!r}, '-o', {str(tmp_path)!r} + '/' + start,\n"
        f"    '--images', '1', '--steps', '2', '--runtime', {runtime!r}, '--quiet']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "slow = {'torch._dynamo', 'sympy', 'onnx_ir', 'onnxscript', 'torch.onnx._internal'}\n"
        "found = slow & set(sys.modules)\n"
        "assert start == 'first' or not found, found\n"
        "import torch._dynamo, diffusers.models\n"  # both work afterwards
    )
    environment = {**os.environ, "DITAS_EXPORT_CACHE": str(tmp_path / "cache")}
    for start in ("first", "prepared"):
        done = subprocess.run(
            [sys.executable, "-c", code, start],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        ("export", "--block-size"),
        ("sample", "--cfg-scale"),
        ("build", "--opt-level"),
        ("compare", "--linear-db"),
        ("cache", "verify"),
        ("embed", "--prompts"),
    ],
)
def test_help_imports_nothing_heavy(program: str, flag: str) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['ditas-{program}', '--help']\n"
        f"from ditas_export.cli.{program} import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "names = {'torch', 'onnx', 'onnxruntime', 'diffusers', 'numpy', 'polygraphy'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert flag in done.stdout
