"""Every hostile input of `tests/hostile_table.py`, each in a process of its own under limits.

    python scripts/hostile_inputs.py [PART OF A NAME]

A process may take 1 GiB more than one that has imported everything, and 60 seconds. Prints a line
for each input that is mishandled, then a table by loader and kind; exits with 1 if there was one.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hostile_run  # noqa: E402
from hostile_table import Case, all_cases  # noqa: E402

MORE_BYTES = 2**30
SECONDS = 60


def main() -> None:
    """Try all inputs whose names hold what is asked for."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    cases = [case for case in all_cases() if asked in str(case)]
    _warm_up()
    tried, failed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for case in cases:
        key = (case.loader, case.kind)
        tried[key] += 1
        if (wrong := _in_child(case)) is not None:
            failed[key] += 1
            print(f"{case}: {wrong}", flush=True)
    print(f"\n{'loader':<24} {'kind':<16} {'tried':>6} {'mishandled':>11}")
    for (loader, kind), count in tried.items():
        print(f"{loader:<24} {kind:<16} {count:>6} {failed[loader, kind]:>11}")
    print(f"{'all':<41} {tried.total():>6} {failed.total():>11}")
    sys.exit(1 if failed else 0)


def _warm_up() -> None:
    """Import and export what every process needs, once."""
    os.environ["DITAS_EXPORT_CACHE"] = tempfile.mkdtemp(prefix="hostile-cache-")
    os.environ["COLUMNS"] = "200"
    seen: set[str] = set()
    for case in all_cases():
        if case.is_sound and case.loader not in seen and "ONNX" not in case.loader:
            seen.add(case.loader)
            with tempfile.TemporaryDirectory() as folder:
                case.make(Path(folder))
    for name in ("export", "sample", "build", "compare"):
        __import__(f"ditas_export.cli.{name}")
    for name in ("pipeline", "evaluation.compare", "generation.job", "engine.make"):
        __import__(f"ditas_export.{name}")


def _in_child(case: Case) -> str | None:
    """Return what is wrong with a case, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.write(write, (_limited(case, Path(folder)) or "").encode()[:4000])
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            wrong = answer.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return wrong or None


def _limited(case: Case, folder: Path) -> str | None:
    """Return what is wrong with a case, under limits of memory and time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_BYTES
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        return hostile_run.mishandled(case, folder)
    except BaseException as error:
        return f"the case itself failed: {error!r}"


if __name__ == "__main__":
    main()
