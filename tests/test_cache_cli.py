"""`ditas-cache` as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ditas_export.cli.cache import app
from ditas_export.runtime.cache import Cache, Entry, Key

SOURCE = Path("model [1].onnx")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(root: Path, digit: str = "0") -> Entry:
    key = Key(
        kind="onnxruntime",
        source=SOURCE,
        sha256=digit * 64,
        facts={},
        hash_source=lambda: digit * 64,
    )
    made = Cache.at(root).entry(key, lambda folder: (folder / "model.data").write_bytes(b"1" * 999))
    assert made is not None
    return made


def run(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_a_cache_that_is_not_there_is_empty(root: Path) -> None:
    for word, said in (("list", "0 entries"), ("verify", "0 faults"), ("clear", "0 entries")):
        result = run(word)
        assert result.exit_code == 0, result.output
        assert said in result.stdout
    assert not root.exists()


def test_entries_are_listed(root: Path) -> None:
    opened(root, "1").close()
    with opened(root) as entry:
        facts = json.loads(run("list", "--json").stdout)
        assert facts["limit_bytes"] == 20 * 2**30
        assert [each["open"] for each in facts["entries"]] == [True, False]
        assert facts["entries"][0]["entry"] == entry.path.name
        assert facts["entries"][0]["source"] == str(SOURCE.absolute())
        shown = run("list").stdout
    assert "2 entries, 0.00 of 20 GiB in" in shown
    assert shown.count("onnxruntime") == 2
    assert "[1]" in shown


def test_a_change_that_shows_nowhere_is_found(root: Path) -> None:
    """Its size and times are those that were kept."""
    with opened(root) as entry:
        pass
    path = entry.path / "model.data"
    assert run("verify").exit_code == 0
    for as_json in (True, False):
        with opened(root):
            status = path.stat()
        path.write_bytes(b"2" * 999)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        result = run("verify", *(["--json"] if as_json else []))
        assert result.exit_code == 1
        if as_json:
            (fault,) = json.loads(result.stdout)["faults"]
            assert fault["removed"]
            assert fault["path"] == str(entry.path)
        else:
            assert "files changed or missing; removed" in result.stdout
        assert not entry.path.exists()


def test_what_is_open_is_not_cleared(root: Path) -> None:
    opened(root, "1").close()
    with opened(root) as entry:
        assert "1 entries removed" in run("clear").stdout
        assert entry.path.exists()
        facts = json.loads(run("clear", "--json").stdout)
        assert (len(facts["removed"]), len(facts["left"])) == (0, 1)
    assert len(json.loads(run("clear", "--json").stdout)["removed"]) == 1


def test_refusals_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE_GIB", "much")
    for word in ("list", "verify", "clear"):
        result = run(word)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
    monkeypatch.delenv("DITAS_EXPORT_CACHE")
    monkeypatch.delenv("DITAS_EXPORT_CACHE_GIB")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    result = run("list")
    assert result.exit_code == 2
    assert "no home folder for a cache; set DITAS_EXPORT_CACHE" in result.stderr
