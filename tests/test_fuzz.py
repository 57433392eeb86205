"""Every loader on mutated files: it reads them, or refuses them by an error of the package.

`scripts/fuzz_loaders.py` does the same for as long as one likes, guided by coverage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditas_export.errors import DitasExportError
from ditas_export.options import ExportOptions
from ditas_export.pipeline import quantization_settings
from ditas_export.preflight import check_files


@cache
def sound(loader: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return TARGETS[loader].sound(Path(folder))


Mutation = tuple[float, str, bytes]

MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["replace", "insert", "cut", "repeat"]),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"[[[[", b"{", b'"', b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"0", b"-"]),
        ),
    ),
    max_size=4,
)


def mutated(content: bytes, mutations: list[Mutation]) -> bytes:
    """Positions fall into the first 4 KiB half of the time: headers are there."""
    for place, what, data in mutations:
        span = min(len(content), 4096) if place < 0.5 else len(content)
        at = int((2 * place if place < 0.5 else place) * span)
        if what == "replace":
            content = content[:at] + data + content[at + len(data) :]
        elif what == "insert":
            content = content[:at] + data + content[at:]
        elif what == "cut":
            content = content[:at]
        else:
            content = content[: at + 64] + content[at:]
    return content


@pytest.mark.parametrize("loader", TARGETS)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutations=MUTATIONS)
def test_a_mutated_file_is_read_or_refused(
    loader: str, tmp_path: Path, mutations: list[Mutation]
) -> None:
    path = tmp_path / f"tried{TARGETS[loader].suffix}"
    path.write_bytes(mutated(sound(loader), mutations))
    refusal = None
    try:
        TARGETS[loader].read(path)
    except DitasExportError as error:
        refusal = str(error)
    assert refusal is None or (mutations and "\n" not in refusal)


CHOICES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "w": ((None, 4, 8), (3, "4", True, 4.5)),
    "a": ((None, 8, 16), (0, 32, "x")),
    "adaln": ((None, 16, 8, 4), (2, False)),
    "target": (("portable", "onnxruntime", "tensorrt"), ("gpu", None)),
    "precision": ((None, "fp32", "fp16"), ("int8", 16)),
    "method": ((None, "ditas", "tas", "linear"), ("gptq", "")),
    "rank": ((None, 0, 4), (-1, 2.5, 10**9)),
    "alpha_grid": ((None, (0.5,), (0.0, 1.0)), ((), (2.0,), (float("nan"),), "0.5")),
    "steps": ((None, 2, 50), (0, 1, -3, 10**9)),
    "samples": ((None, 1, 12), (0, -1, 2**41)),
    "seed": ((None, 0, 2**62), (-1, 2**64, 1.5)),
    "cfg_scale": ((None, 0.0, 1.0, 4.0), (float("inf"), "high")),
    "min_db": ((None, 30.0), (float("nan"), "loud")),
    "walk_tokens": ((None, 100), (0, -5)),
    "classes": ((None, "3,7", "0-9", "random"), (7, ["1"])),
    "fast": ((False, True), ("yes", 1)),
}
"""Values of options that are taken, and that are not."""


@st.composite
def combinations(draw: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    names = draw(st.lists(st.sampled_from(sorted(CHOICES)), unique=True, max_size=6))
    wrong = draw(st.lists(st.sampled_from(names), unique=True, max_size=2)) if names else []
    values = {
        name: draw(st.sampled_from(CHOICES[name][1 if name in wrong else 0])) for name in names
    }
    return values, wrong


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=combinations())
def test_options_are_taken_or_refused_before_any_work(
    drawn: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    values, wrong = drawn

    def prepared() -> None:
        options = ExportOptions(output=tmp_path / "out.onnx", **values)
        check_files(options)
        quantization_settings(options)

    if wrong:
        with pytest.raises(DitasExportError) as caught:
            prepared()
        assert "\n" not in str(caught.value)
    else:
        prepared()
    assert not list(tmp_path.iterdir())
