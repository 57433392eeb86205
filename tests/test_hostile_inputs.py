"""Hostile inputs of every loader: one line, code 2, nothing written; sound neighbours load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_run import mishandled
from hostile_table import Case, all_cases

CASES = all_cases()


def test_the_table_is_as_wide_as_it_says() -> None:
    hostile = [case for case in CASES if not case.is_sound]
    loaders = Counter(case.loader for case in hostile)
    assert len(hostile) >= 250
    assert len({(case.loader, case.kind) for case in hostile}) >= 25
    assert min(loaders.values()) >= 5
    assert {case.loader for case in CASES if case.is_sound} >= {
        loader for loader in loaders if not loader.startswith("options")
    }


MOST_OF_A_KIND = 8
"""Cases of a loader and kind that run here; scripts/hostile_inputs.py runs all, under limits."""


def _some() -> Iterator[Case]:
    """Yield the cases that take no memory and little time, some of every kind."""
    tried = Counter[tuple[str, str]]()
    for case in CASES:
        if not case.needs_limits:
            tried[case.loader, case.kind] += 1
            if tried[case.loader, case.kind] <= MOST_OF_A_KIND:
                yield case


@pytest.mark.parametrize("case", _some(), ids=str)
def test_every_input_is_handled(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    monkeypatch.setenv("COLUMNS", "200")
    assert mishandled(case, tmp_path) is None
