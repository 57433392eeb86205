"""The files of one job: what it reads, what it may replace, and where it keeps unfinished work.

Known before any work is done, and checked then. No output is ever an input, under whatever name;
and an output may replace only a file of its own kind that this package made. What is kept for a run
that is interrupted lies in one folder beside the main output, OUT.work, and goes when the job is
done; nothing else is ever deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ditas_export.artifact_files import partial_path, require_writable, sole_process
from ditas_export.errors import ArtifactError
from ditas_export.text_files import read_json

Kind = Callable[[Path], bool]
"""Whether a file is of one kind and made by this package, by its content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A file that a job writes."""

    path: Path
    what: str  # such as "an exported model"
    is_ours: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFiles:
    """What a job reads and writes; the working folder, if it has one, is beside the main output."""

    inputs: Mapping[str, Path] = field(default_factory=dict)  # by option; those that are not there
    outputs: tuple[Output, ...]  # the main one first
    keeps_work: bool = False

    @property
    def work_path(self) -> Path:
        """Where unfinished work is kept: out.onnx.work."""
        main = self.outputs[0].path
        return main.with_name(f"{main.name}.work")

    def check(self) -> None:
        """Refuse what must not be replaced or cannot be written; nothing is touched.

        Raises:
            ArtifactError: an output that cannot be written, that is an input or another output, or
                that holds anything but an earlier file of its kind.
        """
        for number, output in enumerate(self.outputs):
            require_writable(output.path)
            for other in self.outputs[:number]:
                if same_file(output.path, other.path):
                    raise ArtifactError(
                        f"two outputs have one name: {other.path}, {output.path}; name another"
                    )
            for option, path in self.inputs.items():
                if same_file(output.path, path):
                    raise ArtifactError(
                        f"{output.path} would be replaced by {output.what}, but it is the input "
                        f"{option}; name another"
                    )
        if self.keeps_work:
            self._check_work()
        for output in self.outputs:
            if output.path.exists() and not output.is_ours(output.path):
                raise ArtifactError(
                    f"{output.path} is there already, and is no earlier {output.what} of "
                    f"ditas-export; delete it, or name another"
                )

    def _check_work(self) -> None:
        """Refuse a working folder that is not one, and files of the job inside it."""
        folder = self.work_path
        files = {**self.inputs, **{output.what: output.path for output in self.outputs}}
        reserved = {folder.resolve(), done_name(folder).resolve()}
        reserved |= {partial_path(output.path).resolve() for output in self.outputs}
        for path in files.values():
            if path.resolve() in reserved:
                raise ArtifactError(
                    f"{path} is the name of something that the job itself writes; name another"
                )
            if folder.resolve() in path.resolve().parents:
                raise ArtifactError(
                    f"{path} lies in {folder}, which is removed when the job is done; move it, or "
                    f"name another"
                )
        for each in (folder, done_name(folder)):
            if os.path.lexists(each) and not _is_work(each):
                raise ArtifactError(
                    f"{each} is there already, and is no folder of unfinished work; delete it, or "
                    f"name another output"
                )
        for suffix in ("states", "progress"):
            left = folder.with_suffix(f".{suffix}")
            if tensors_kind("ditas-export calibration")(left) or tensors_kind(
                "ditas-export sampled batches"
            )(left):
                raise ArtifactError(
                    f"{left} was left by an interrupted run of an earlier version, which this one "
                    f"cannot take up; delete it, or name another output"
                )

    @contextlib.contextmanager
    def working(self) -> Iterator[WorkFolder]:
        """Hold the working folder for this process; what is in it stays, but if it is empty.

        Raises:
            ArtifactError: another process holds it, or it cannot be written.
        """
        folder = WorkFolder(self.work_path)
        folder.make()
        try:
            with sole_process(folder.path / _LOCK, what=self.outputs[0].path):
                try:
                    yield folder
                finally:
                    folder.remove_empty_parts()
        finally:
            with contextlib.suppress(OSError):  # not empty, or gone
                folder.path.rmdir()


_LOCK = "lock"
_PARTS = re.compile(r"(lock|(sampled|heldout|solved|written)-[0-9a-f]{16})")
"""Names in a working folder."""

_OWN_SUFFIXES = (".safetensors", ".json", ".data", ".partial", ".lock")
"""Of the files in its parts, beside the exported file's own."""


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Unfinished work: a folder for each of its parts, named by all that the part depends on."""

    path: Path

    def part(self, kind: str, digest: str) -> Path:
        """Return the folder of a part, made if need be.

        Args:
            kind: sampled, heldout, solved or written.
            digest: hexadecimal, of all that the part depends on.

        Raises:
            ArtifactError: the folder cannot be made.
        """
        folder = self.path / f"{kind}-{digest[:16]}"
        self.make()
        _make_folder(folder)
        return folder

    def make(self) -> None:
        """Make the folder itself; finish the removal of one that a killed process began."""
        shutil.rmtree(self._done, ignore_errors=True)
        _make_folder(self.path)

    def remove(self, kind: str) -> None:
        """Remove the parts of one kind."""
        for part in self._parts():
            if part.name.startswith(f"{kind}-"):
                shutil.rmtree(part, ignore_errors=True)

    def finish(self) -> None:
        """Remove everything: the job is done. In one step, so that all is kept or nothing."""
        with contextlib.suppress(OSError):  # another rank was first; else the next run removes it
            self.path.rename(self._done)
        shutil.rmtree(self._done, ignore_errors=True)

    @property
    def _done(self) -> Path:
        """What the folder is called while it is being removed."""
        return done_name(self.path)

    def remove_empty_parts(self) -> None:
        """Remove the parts in which nothing is kept; of a job that holds the folder."""
        for part in self._parts():
            if part.is_dir():
                with contextlib.suppress(OSError):  # not empty
                    part.rmdir()

    def _parts(self) -> list[Path]:
        """Return what is in the folder, but for what nobody of this package put there."""
        if not self.path.is_dir():
            return []
        return [path for path in sorted(self.path.iterdir()) if _PARTS.fullmatch(path.name)]


def _make_folder(path: Path) -> None:
    """Make a folder whose own folder is there."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the folder {path}: {error.strerror}") from error


def done_name(folder: Path) -> Path:
    """Return what a working folder is called while it is being removed."""
    return folder.with_name(f".{folder.name}.done")


def _is_work(path: Path) -> bool:
    """Return whether a folder holds unfinished work and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(
        _PARTS.fullmatch(entry.name)
        and (not entry.is_dir() or all(_is_own(file) for file in entry.rglob("*")))
        for entry in path.iterdir()
    )


def _is_own(path: Path) -> bool:
    """Return whether a part of unfinished work has such a file, by its name."""
    return path.is_dir() or path.suffix in _OWN_SUFFIXES or ".onnx" in path.suffixes


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths are of one file, or would be: through links of both kinds."""
    if one.resolve() == other.resolve():
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def existing(**paths: str | Path | None) -> dict[str, Path]:
    """Return inputs by option, those that are files or folders here: a hub id is none."""
    found = {name: Path(path) for name, path in paths.items() if path is not None}
    return {
        f"--{name.replace('_', '-')}": path for name, path in found.items() if os.path.lexists(path)
    }


def json_kind(file_format: str) -> Kind:
    """Return what knows a JSON of a format, of whatever version: `KIND NUMBER` under `format`."""

    def is_ours(path: Path) -> bool:
        try:
            found = read_json(path)
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and str(found.get("format")).startswith(f"{file_format} ")

    return is_ours


def tensors_kind(file_format: str) -> Kind:
    """Return what knows a safetensors file of a format, of whatever version, by its header."""

    def is_ours(path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                return any(key.startswith(f"{file_format} ") for key in file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    return is_ours
