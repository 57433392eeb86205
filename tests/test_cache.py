"""The cache of prepared models: keys, damage, races, processes, room."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ditas_export.errors import RunnerError
from ditas_export.runtime import cache as cache_module
from ditas_export.runtime import cache_hashes, cache_settings, machine
from ditas_export.runtime.cache import Cache, Key
from ditas_export.runtime.cache_manifest import MANIFEST, Manifest
from ditas_export.runtime.cache_settings import allowed_bytes, default_cache

KIB = 2**10


@pytest.fixture(autouse=True)
def _nothing_is_said_unasked() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def key(number: int = 0, **changes: Any) -> Key:
    settings: dict[str, Any] = {
        "kind": "test",
        "source": Path("model.onnx"),
        "sha256": f"{number:064}",
        "facts": {"version": "1"},
        "hash_source": lambda: f"{number:064}",
    }
    return Key(**settings | changes)


def filled(size: int = KIB, made: list[Path] | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "weights").write_bytes(os.urandom(size))
        if made is not None:
            made.append(folder)

    return make


def cache_of(root: Path, *, limit: int = 2**30) -> Cache:
    return Cache(root=root, limit=limit)


def kept(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.root.glob("entry-*"))


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache, made = cache_of(tmp_path / "new" / "cache"), []  # type: ignore[var-annotated]
    for _ in range(3):
        with cache.entry(key(), filled(made=made)) as entry:  # type: ignore[union-attr]
            assert entry.path == cache.root / key().name
            assert (entry.path / "weights").stat().st_size == KIB
    assert len(made) == 1
    with cache.entry(key(1), filled(made=made)):  # type: ignore[union-attr]
        assert len(made) == 2
    assert not list(cache.root.glob(".partial-*"))
    assert not list((cache.root / ".locks").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "another"},
        {"sha256": "b" * 64},
        {"facts": {"version": "2"}},
        {"facts": {"version": "1", "more": 0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_caller_says_is_in_the_key(change: dict[str, Any]) -> None:
    assert key(**change).name != key().name
    assert key(source=Path("elsewhere.onnx")).name == key().name


@pytest.mark.parametrize("name", ["FORMAT", "__version__"])
def test_the_format_and_the_package_are_in_the_key(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key().name
    monkeypatch.setattr(cache_module, name, "another")
    assert key().name != before


@pytest.mark.parametrize(
    ("fact", "line"),
    [
        ("model name", "model name\t: Another CPU\n"),
        ("flags", "flags\t\t: fpu sse avx512_vnni\n"),
        ("Features", "Features\t: fp asimd i8mm\n"),
        ("machine", ""),
        ("system", ""),
        ("processor", ""),
    ],
)
def test_every_fact_of_the_machine_is_in_the_key(
    fact: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels and packed weights of one processor crash or are slow on another."""
    info = tmp_path / "cpuinfo"
    common = "processor\t: 0\nbogomips\t: 1\n"
    first = {"model name": "model name\t: A CPU\n", "flags": "flags\t\t: fpu sse\n"}
    info.write_text(common + ("" if fact in ("Features", "processor") else "".join(first.values())))
    monkeypatch.setattr(machine, "_CPUINFO", info)
    before = key().name
    info.write_text(info.read_text().replace("bogomips\t: 1", "bogomips\t: 2"))
    assert key().name == before
    if line:
        first.pop(fact, None)
        info.write_text(common + ("".join(first.values()) if fact != "Features" else "") + line)
    else:
        monkeypatch.setattr(machine.platform, fact, lambda: "another")
    assert key().name != before


def test_a_change_that_keeps_size_and_times_is_found_by_verify_alone(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    with cache.entry(key(), filled()) as entry:  # type: ignore[union-attr]
        weights = entry.path / "weights"
    status = weights.stat()
    changed = bytearray(weights.read_bytes())
    changed[KIB // 2] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with cache.entry(key(), filled()) as entry:  # type: ignore[union-attr]
        assert (entry.path / "weights").read_bytes() == changed
    (fault,) = cache.verify()
    assert (fault.path, fault.what, fault.removed) == (
        cache.root / key().name,
        "files changed or missing",
        True,
    )
    assert fault.source == str(Path("model.onnx").absolute())
    assert kept(cache) == []
    with cache.entry(key(), filled()) as entry:  # type: ignore[union-attr]
        assert (entry.path / "weights").read_bytes() != changed
    assert cache.verify() == []


@pytest.mark.parametrize("fact", ["size", "mtime_ns", "inode"])
def test_a_file_is_hashed_where_any_fact_differs(
    tmp_path: Path, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes then decide; what is found whole is not hashed at the next start."""
    cache = cache_of(tmp_path)
    with cache.entry(key(), filled()) as entry:  # type: ignore[union-attr]
        weights, manifest = entry.path / "weights", entry.path / MANIFEST
    hashed: list[Path] = []
    hash_of = cache_module.Manifest.of.__globals__["hash_of_file"]
    monkeypatch.setattr(
        "ditas_export.runtime.cache_manifest.hash_of_file",
        lambda path: hashed.append(path) or hash_of(path),
    )
    found = Manifest.load(entry.path)
    assert found is not None
    value = getattr(found.files["weights"], fact)
    manifest.write_text(manifest.read_text().replace(str(value), str(value + 1)))
    made: list[Path] = []
    for _ in range(2):
        with cache.entry(key(), filled(made=made)):  # type: ignore[union-attr]
            pass
    # A file of another size is not worth a hash; what is made anew is hashed when it is kept.
    assert len(made) == (fact == "size")
    assert len(hashed) == 1
    assert hashed[0].name == weights.name


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise RunnerError("refused")

    with pytest.raises(RunnerError, match="refused"):
        cache.entry(key(), fail)
    assert not [path for path in tmp_path.iterdir() if path.name != ".locks"]
    assert not list((tmp_path / ".locks").iterdir())


def test_what_changed_meanwhile_is_not_kept(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    with pytest.raises(RunnerError, match=r"^model\.onnx was replaced .* run again$"):
        cache.entry(key(hash_source=lambda: "c" * 64), filled())
    assert kept(cache) == []
    with pytest.warns(RuntimeWarning, match="was replaced"):
        cache.renew(key(hash_source=lambda: "c" * 64), filled())
    assert kept(cache) == []


def unwritable(case: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a cache that takes nothing; the tests may run as root, whom no mode stops."""
    if case == "a file":
        root.write_text("")
    elif case == "a file above":
        root.parent.write_text("")
    elif case == "read-only":
        root.mkdir()
        root.chmod(0o500)
        if os.access(root, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        root.mkdir()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(cache_module.Manifest, "of", full)


@pytest.mark.parametrize("case", ["a file", "a file above", "read-only", "full"])
def test_a_cache_that_takes_nothing_is_done_without_and_said(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "above" / "cache"
    if case != "a file above":
        root.parent.mkdir()
    unwritable(case, root, monkeypatch)
    cache = cache_of(root)
    said = rf"the cache {re.escape(str(root))} cannot be written \(.*\), so .*DITAS_EXPORT_CACHE to"
    with pytest.warns(RuntimeWarning, match=said):
        assert cache.entry(key(), filled()) is None
    with pytest.warns(RuntimeWarning, match=said):
        cache.renew(key(), filled())
    assert cache.find(key()) is None
    assert cache.entries() == cache.verify() == cache.clear() == []


def test_an_entry_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was copied there, which has other inodes."""
    with cache_of(tmp_path / "made").entry(key(), filled()):  # type: ignore[union-attr]
        pass
    shutil.copytree(tmp_path / "made", tmp_path / "copy")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("utime", "rename", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    for root in ("made", "copy"):
        with cache_of(tmp_path / root).entry(key(), filled()) as entry:  # type: ignore[union-attr]
            assert entry.kept


def test_room_is_made_by_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, limit=4 * KIB)
    for number in range(3):
        with cache.entry(key(number), filled()) as entry:  # type: ignore[union-attr]
            os.utime(entry.path / MANIFEST, (1000 + number, 1000 + number))
    with cache.entry(key(0), filled()):  # type: ignore[union-attr]
        pass  # used now
    with cache.entry(key(3), filled()):  # type: ignore[union-attr]
        assert kept(cache) == sorted(key(number).name for number in (0, 2, 3))
    assert sum(facts.size for facts in cache.entries()) <= cache.limit


def test_a_damaged_entry_goes_first(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, limit=3 * KIB)
    for number in range(2):
        with cache.entry(key(number), filled()) as entry:  # type: ignore[union-attr]
            pass
    (entry.path / MANIFEST).unlink()
    with cache.entry(key(2), filled()):  # type: ignore[union-attr]
        assert kept(cache) == sorted(key(number).name for number in (0, 2))


def test_what_is_open_stays(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, limit=3 * KIB)
    with cache.entry(key(0), filled()) as first:  # type: ignore[union-attr]
        os.utime(first.path / MANIFEST, (1000, 1000))
        with cache.entry(key(1), filled()):  # type: ignore[union-attr]
            pass
        with cache.entry(key(2), filled()):  # type: ignore[union-attr]
            assert kept(cache) == sorted(key(number).name for number in (0, 2))
        assert [facts.is_open for facts in cache.entries()].count(True) == 1
        assert [facts.path.name for facts in cache.clear()] == [key(2).name]
        assert kept(cache) == [first.path.name]
    assert len(cache.clear()) == 1


def test_nothing_leaves_for_what_cannot_be_kept(tmp_path: Path) -> None:
    """An entry larger than the cache, or than what those that are open leave: used, not kept."""
    cache = cache_of(tmp_path, limit=4 * KIB)
    unkept = r"is used and not kept: .* DITAS_EXPORT_CACHE_GIB"
    first = cache.entry(key(0), filled(2 * KIB))
    assert first is not None
    with cache.entry(key(1), filled()):  # type: ignore[union-attr]
        pass
    for size in (5 * KIB, 3 * KIB):
        with pytest.warns(RuntimeWarning, match=unkept):
            large = cache.entry(key(2), filled(size))
        assert large is not None
        assert not large.kept
        assert (large.path / "weights").stat().st_size == size
        cache_of(tmp_path)._reclaim()  # as another process does: it is in use
        assert large.path.exists()
        large.close()
        assert not large.path.exists()
    assert kept(cache) == sorted(key(number).name for number in (0, 1))
    with pytest.warns(RuntimeWarning, match=unkept):
        nothing = cache_of(tmp_path, limit=0).entry(key(3), filled())
    assert nothing is not None
    left = nothing.path
    del nothing  # nobody closed it
    assert not left.exists()


def test_a_lower_limit_counts_at_the_next_start(tmp_path: Path) -> None:
    for number in range(3):
        with cache_of(tmp_path).entry(key(number), filled()):  # type: ignore[union-attr]
            pass
    smaller = cache_of(tmp_path, limit=2 * KIB)
    with smaller.entry(key(0), filled()):  # type: ignore[union-attr]
        assert kept(smaller) == [key(0).name]


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "20 GiB", "1e400"])
def test_a_limit_that_is_no_size_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE_GIB", text)
    expected = f"^DITAS_EXPORT_CACHE_GIB='{text}'; give the cache's size in GiB, such as 20$"
    with pytest.raises(RunnerError, match=expected):
        Cache.at(Path("anywhere"))


def test_the_user_chooses_folder_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITAS_EXPORT_CACHE", raising=False)
    monkeypatch.delenv("DITAS_EXPORT_CACHE_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/ditas-export")
    assert allowed_bytes() == 20 * 2**30
    monkeypatch.setenv("DITAS_EXPORT_CACHE", "/elsewhere")
    monkeypatch.setenv("DITAS_EXPORT_CACHE_GIB", "0.5")
    assert default_cache() == Path("/elsewhere")
    assert allowed_bytes() == 2**29


@pytest.mark.parametrize("home", ["", None])
def test_a_user_without_a_home_has_no_cache(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DITAS_EXPORT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(cache_settings.Path, "home", nowhere)
    with pytest.warns(RuntimeWarning, match="no home folder .* set DITAS_EXPORT_CACHE to a folder"):
        assert default_cache() is None


PROCESS = """
import sys, time
from pathlib import Path
from ditas_export.runtime.cache import Cache, Key

root, seconds, hold = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
key = Key(kind="test", source=Path("model.onnx"), sha256="0" * 64, facts={"version": "1"},
          hash_source=lambda: "0" * 64)

def make(folder):
    print("making", flush=True)
    (folder / "weights").write_bytes(b"1" * 1024)
    time.sleep(seconds)

entry = Cache(root=root, limit=2**30).entry(key, make)
print("open", (entry.path / "weights").stat().st_size, flush=True)
time.sleep(hold)
"""


def process(root: Path, *, seconds: float = 0.0, hold: float = 0.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROCESS, str(root), str(seconds), str(hold)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_prepare_an_entry_once_and_say_that_they_wait(tmp_path: Path) -> None:
    running = [process(tmp_path, seconds=2.0) for _ in range(3)]
    outputs = [each.communicate(timeout=60) for each in running]
    assert [each.returncode for each in running] == [0, 0, 0]
    assert sorted(out for out, _ in outputs) == ["making\nopen 1024\n", *["open 1024\n"] * 2]
    waiting = "another process is preparing model.onnx; waiting for it"
    assert sum(waiting in err for _, err in outputs) >= 1
    assert kept(cache_of(tmp_path)) == [key().name]
    assert not list((tmp_path / ".locks").iterdir())


def test_threads_prepare_an_entry_once(tmp_path: Path) -> None:
    cache, made = cache_of(tmp_path), []  # type: ignore[var-annotated]

    def make(folder: Path) -> None:
        time.sleep(0.2)
        filled(made=made)(folder)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = [threading.Thread(target=cache.entry, args=(key(), make)) for _ in range(4)]
        for thread in opened:
            thread.start()
        for thread in opened:
            thread.join()
    assert len(made) == 1


def test_what_a_killed_process_left_is_reclaimed(tmp_path: Path) -> None:
    """Nothing of a process that lives is touched."""
    killed = process(tmp_path, seconds=60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "making\n"
    (left,) = tmp_path.glob(".partial-*")
    cache = cache_of(tmp_path)
    with cache.entry(key(1), filled()):  # type: ignore[union-attr]
        assert left.exists()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    shutil.copytree(left, tmp_path / ".partial-00000000")
    cache.clear()
    assert not list(tmp_path.glob(".partial-*"))
    shutil.copytree(cache.root / ".locks", tmp_path / ".partial-00000000")
    with cache.entry(key(0), filled(2 * KIB)) as entry:  # type: ignore[union-attr]
        assert (entry.path / "weights").stat().st_size == 2 * KIB
    assert not list(tmp_path.glob(".partial-*"))


def test_an_entry_of_another_process_stays(tmp_path: Path) -> None:
    other = process(tmp_path, hold=60)
    try:
        assert other.stdout is not None
        assert [other.stdout.readline() for _ in range(2)] == ["making\n", "open 1024\n"]
        cache = cache_of(tmp_path, limit=3 * KIB)
        with cache.entry(key(1), filled()):  # type: ignore[union-attr]
            pass
        with cache.entry(key(2), filled()):  # type: ignore[union-attr]
            assert kept(cache) == sorted(key(number).name for number in (0, 2))
        assert [facts.path.name for facts in cache.clear()] == [key(2).name]
    finally:
        other.kill()
        other.communicate()
    assert [facts.path.name for facts in cache.clear()] == [key().name]


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    """The folder is the user's choice, and may hold anything."""
    theirs = ["entry-1", ".partial-theirs-too-long", "0" * 32, "file"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    outside = tmp_path / "file" / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tmp_path / f"entry-{'0' * 32}").symlink_to(outside)
    (tmp_path / ".partial-01234567").symlink_to(outside)
    cache = cache_of(tmp_path)
    with cache.entry(key(), filled()):  # type: ignore[union-attr]
        pass
    assert len(cache.clear()) == 1
    assert all((tmp_path / name / "kept").exists() for name in theirs)
    assert (outside / "kept").exists()


def test_hashes_are_remembered_by_the_state_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path, link = cache_of(tmp_path / "cache"), tmp_path / "model", tmp_path / "link"
    hashed: list[Path] = []
    hash_of = cache_hashes.hash_of_file
    monkeypatch.setattr(
        cache_hashes, "hash_of_file", lambda path: hashed.append(path) or hash_of(path)
    )
    path.write_bytes(b"a" * 100)
    link.symlink_to(path)
    for _ in range(2):  # it may still change within one tick of the clock
        cache.hash_of_file(path)
    assert len(hashed) == 2
    monkeypatch.setattr(cache_hashes, "SETTLED_NS", 0)
    time.sleep(0.02)
    first = [cache.hash_of_file(each) for each in (path, link, path)]
    assert len(hashed) == 3
    assert set(first) == {hash_of(path)}
    status = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # all but the time of change
    time.sleep(0.02)
    assert cache.hash_of_file(path) == hash_of(path) != first[0]
    assert cache.verify() == []
    record = next((cache.root / ".hashes").iterdir())
    whole = record.read_text()
    for damaged in (whole.replace(hash_of(path), "0" * 64), whole.replace("sha256", "sha"), "{}"):
        record.write_text(damaged)
        assert cache.hash_of_file(path) == hash_of(path)
        assert record.read_text() == whole
    record.write_text(record.read_text().replace(hash_of(path), first[0]))
    (fault,) = cache.verify()
    assert (fault.source, fault.what) == (str(path), "other bytes than its remembered hash")
    assert cache.hash_of_file(path) == hash_of(path)
    path.unlink()
    with cache.entry(key(), filled()):  # type: ignore[union-attr]
        assert not list((cache.root / ".hashes").iterdir())
