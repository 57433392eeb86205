"""Run the main job with the lowest and the newest versions that pyproject.toml allows.

    python scripts/check_versions.py

Each set is laid over the environment that runs this (pip install --target), so torch stays the
installed one and is not checked; nor are the dependencies' own dependencies. Needs a package index.
Exit code 1 where a set does not install or the job fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
KEPT = ("torch",)
"""Stays as installed: a build for CPUs is not on every index."""

JOB = "ditas-export --steps 4 --samples 2 --target {target} {target}.onnx"
TARGETS = ("portable", "tensorrt")
"""float32 and float16: ONNX Runtime runs them by other kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What became of the job with a set of versions."""

    versions: dict[str, str]
    results: dict[str, str]  # by target: "ok", or the last line of what was said


def declared() -> dict[str, str]:
    """Return the requirements of pyproject.toml that are checked, name -> specifiers."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    parts = [re.match(r"([\w-]+)(.*)", each) for each in listed]
    return {found[1]: found[2] for found in parts if found and found[1] not in KEPT}


def lowest(specifiers: str) -> str:
    """Return the pin of the lowest version: ">=1.2,!=1.3" -> "==1.2"."""
    found = re.search(r">=([\w.]+)", specifiers)
    if found is None:
        raise ValueError(f"{specifiers!r} names no lowest version; write >=")
    return f"=={found[1]}"


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a command said."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip(" │╰─╯")]
    return lines[-1].strip(" │")[:120] if lines else f"exit code {done.returncode}"


def run(command: list[str], folder: Path, overlay: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, the overlay's packages first."""
    paths = f"{overlay}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def attempt(requirements: list[str]) -> Tried:
    """Install a set over this environment and run the job for every target."""
    with tempfile.TemporaryDirectory(prefix="check-versions-") as temporary:
        folder, overlay = Path(temporary), Path(temporary) / "overlay"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = run([*pip, "--target", str(overlay), *requirements], folder, overlay)
        if done.returncode:
            return Tried(versions={}, results={"install": last_line(done)})
        found = {
            each.metadata["Name"].lower(): each.version
            for each in metadata.distributions(path=[str(overlay)])
        }
        results = {}
        for target in TARGETS:
            words = JOB.format(target=target).split()[1:]
            done = run([sys.executable, "-m", "ditas_export.cli.export", *words], folder, overlay)
            results[target] = "ok" if done.returncode == 0 else last_line(done)
        return Tried(versions=found, results=results)


def main() -> None:
    """Try both sets and print what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", choices=("lowest", "newest"), help="try this one alone")
    asked = parser.parse_args().set
    wanted = declared()
    sets = {
        "lowest": [f"{name}{lowest(specifiers)}" for name, specifiers in wanted.items()],
        "newest": [f"{name}{specifiers}" for name, specifiers in wanted.items()],
    }
    tried = {name: attempt(sets[name]) for name in sets if asked in (None, name)}
    table = Table("package", *tried, title=f"torch {metadata.version('torch')}, as installed")
    for package in wanted:
        table.add_row(package, *(each.versions.get(package, "?") for each in tried.values()))
    table.add_section()
    for part in ("install", *TARGETS):
        if any(part in each.results for each in tried.values()):
            table.add_row(part, *(each.results.get(part, "") for each in tried.values()))
    Console().print(table)
    if any(result != "ok" for each in tried.values() for result in each.results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
