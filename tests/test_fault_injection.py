"""Every point at which a job changes files, once: killed there, or the disk full, and gone on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "fault_injection.py"

RUNS = {
    # The float model is left out: every fault while it is written traces it anew.
    "export": ["--ranks", "1", "--jobs", "export", "--faults", "killed before or full"],
    "the others": ["--ranks", "1,2", "--jobs", "sample,build", "--faults", "killed before or full"],
}
LEAST = {"export": 120, "the others": 60}
"""Points there are, at least."""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_nothing_is_lost_or_different_after_any_fault(tmp_path: Path) -> None:
    """Jobs of the model of two blocks; every final name is held against a clean run at each."""
    running = {}
    for name, words in RUNS.items():
        command = [sys.executable, str(SCRIPT), str(tmp_path / name), "--model", "tiny"]
        running[name] = subprocess.Popen(
            [*command, "--steps", "4", "--no-reference", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    for name, process in running.items():
        out, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{name}\n{out}"
        total = re.search(r"(\d+) faults, 0 rows", out)
        assert total is not None, out
        assert int(total[1]) >= LEAST[name], out
