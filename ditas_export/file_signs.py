"""What a file is by its name, and what it is by its first bytes where no reader takes it."""

from __future__ import annotations

import codecs
import json
import zipfile
from pathlib import Path
from typing import Any

ONNX_SUFFIXES = (".onnx",)
PLAN_SUFFIXES = (".plan", ".engine")

_HEAD_BYTES = 1024

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that git keeps in place of a large file; see git-lfs's docs/spec.md."""

_ANNEX_POINTER = b"/annex/objects/"
"""The same of git-annex."""

_LARGEST_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the format's own limit."""

_ZIP = b"PK\x03\x04"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
}
"""First bytes of compressed files, and what made them."""

_OTHER_KINDS = {
    _ZIP: "a zip archive, as PyTorch's checkpoints are",
    b"\x80\x02": "a pickle, as PyTorch's older checkpoints are",
    b"\x89HDF\r\n": "an HDF5 file",
    b"GGUF": "a GGUF file",
}
"""First bytes of sound files of other kinds than this package writes, and what they are."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def has_suffix(name: str | Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file's name ends in one of some lower-case suffixes, in any case."""
    return str(name).lower().endswith(suffixes)


def describe_impostor(path: Path, *, expects_json: bool = False) -> str | None:
    """Return what stands in the place of the file that was meant, and what to do about it.

    For files that their reader has refused; it says nothing about sound ones.

    Args:
        path: the file.
        expects_json: whether JSON is what was meant.

    Returns:
        A phrase for "it is ...", such as "empty; copy it again"; None if there is no such sign, or
        nothing to read.
    """
    if path.is_dir():
        return "a folder; name the file itself"
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there; fetch that file"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if not head:
        return "empty; copy or download it again"
    if not any(head):
        return "all zeros where it begins, as an unfinished download is; download it again"
    if head.startswith(_ANNEX_POINTER):
        return "a git-annex pointer, not the file that it stands for; run git annex get"
    if head.startswith(_LFS_POINTER):
        return "a git-LFS pointer, not the file that it stands for; run git lfs pull"
    for sign, name in _COMPRESSED.items():
        if head.startswith(sign):
            return f"compressed by {name}; decompress it first"
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        return "a zip archive cut short; copy or download it again"
    if lacks := _safetensors_lack(path, head):
        return f"a safetensors file cut short ({lacks}); copy or download it again"
    if b"\0" in head:
        return None
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"<"):
        return "an HTML or XML page, as a login or an error page is saved; download it again"
    if text.startswith((b"{", b"[")) and not expects_json:
        return "JSON text, such as a server's answer or an index; name the file itself"
    if not expects_json and (words := _words(head)):
        return f"a text that begins {words!r}, as a server answers; download it again"
    return None


def _words(head: bytes) -> str | None:
    """Return how a text begins, None of what is none: every model has bytes that no text has."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # may end within a character
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character in "\t\n\r" for character in text):
        return None
    words = " ".join(text.split())
    return words if len(words) <= 40 else f"{words[:40]}…"


def _is_safetensors(head: bytes) -> bool:
    """Return whether a file begins as a safetensors file does: the header's length, and JSON."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= _LARGEST_SAFETENSORS_HEADER


def _safetensors_lack(path: Path, head: bytes) -> str | None:
    """Return how many bytes a safetensors file lacks; None of a whole one and of other files."""
    if not _is_safetensors(head):
        return None
    length, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    wanted = 8 + length + (_last_byte(header) if len(header) == length else 0)
    return None if size >= wanted else f"{size:,} of {wanted:,} bytes"


def _last_byte(header: bytes) -> int:
    """Return where a safetensors file's data end by its header, 0 if the header is damaged."""
    try:
        entries: Any = json.loads(header)
        ends = (value["data_offsets"][1] for key, value in entries.items() if key[:2] != "__")
        return int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return 0


def describe_other_kind(path: Path) -> str | None:
    """Return what a file is that is sound, and of another kind than this package writes.

    Returns:
        A phrase for "it is ..."; None if there is no such sign, or nothing to read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if _is_safetensors(head):
        return "a safetensors file"
    return next((kind for sign, kind in _OTHER_KINDS.items() if head.startswith(sign)), None)


def why_unreadable(path: Path, error: Exception, *, expects_json: bool = False) -> str:
    """Return in one line why a file could not be read: what it is, or else what its reader says."""
    if sign := describe_impostor(path, expects_json=expects_json):
        return f"it is {sign}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    reason = " ".join(str(error).split()) or type(error).__name__
    kind = describe_other_kind(path)
    return f"it is {kind} ({reason})" if kind else reason
