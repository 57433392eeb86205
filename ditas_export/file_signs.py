"""What a file is by its name, and what it is by its first bytes where no reader takes it."""

from __future__ import annotations

import zipfile
from pathlib import Path

ONNX_SUFFIXES = (".onnx",)
PLAN_SUFFIXES = (".plan", ".engine")

_HEAD_BYTES = 1024

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that git keeps in place of a large file; see git-lfs's docs/spec.md."""

_ZIP = b"PK\x03\x04"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}
"""First bytes of compressed files, and what made them."""

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
    if path.exists() and not path.is_file():  # reading might wait, or have no end
        return "a device, a pipe or a socket; name a plain file"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if not head:
        return "empty; copy or download it again"
    if head.startswith(_LFS_POINTER):
        return "a git-LFS pointer, not the file that it stands for; run git lfs pull"
    for sign, name in _COMPRESSED.items():
        if head.startswith(sign):
            return f"compressed by {name}; decompress it first"
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        return "a zip archive cut short; copy or download it again"
    if b"\0" in head:
        return None
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"<"):
        return "an HTML or XML page, as a login or an error page is saved; download it again"
    if text.startswith((b"{", b"[")) and not expects_json:
        return "JSON text, such as a server's answer or an index; name the file itself"
    return None


def why_unreadable(path: Path, error: Exception, *, expects_json: bool = False) -> str:
    """Return in one line why a file could not be read: what it is, or else what its reader says."""
    if sign := describe_impostor(path, expects_json=expects_json):
        return f"it is {sign}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
