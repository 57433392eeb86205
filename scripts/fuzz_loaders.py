"""Coverage-guided fuzzing of every loader, by atheris (libFuzzer).

    pip install atheris
    python scripts/fuzz_loaders.py LOADER [--seconds 300] [--corpus FOLDER]

LOADER is one of checkpoint, pickle, onnx, artifact, states, plan, recipe, profile, list, judged.
Fuzzing begins with a sound file of the smallest model. A finding is whatever is neither read nor
refused by one of the package's own errors: another exception, 20 seconds, or 2.5 GiB. libFuzzer
then writes the input beside and stops; without a finding it prints how many inputs were tried.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["ditas_export"]):
    from fuzz_targets import TARGETS

    from ditas_export.errors import DitasExportError


def main() -> None:
    """Fuzz one loader for a while."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("loader", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path)
    args = parser.parse_args()
    target = TARGETS[args.loader]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        sound = target.sound(folder)
        corpus = args.corpus or folder / "corpus"
        corpus.mkdir(exist_ok=True)
        (corpus / "sound").write_bytes(sound)
        path = folder / f"tried{target.suffix}"

        def try_one(data: bytes) -> None:
            path.write_bytes(data)
            with contextlib.suppress(DitasExportError):
                target.read(path)

        atheris.Setup(
            [
                sys.argv[0],
                str(corpus),
                f"-max_total_time={args.seconds}",
                "-timeout=20",
                "-rss_limit_mb=2560",
                f"-max_len={2 * len(sound) + 4096}",
                "-print_final_stats=1",
            ],
            try_one,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
