"""Float32 matrix products on CPUs by oneDNN, where that keeps them float32.

torch hands float32 products to MKL, which runs at about half of oneDNN's speed on processors that
are not Intel's. It asks oneDNN instead once products may be rounded to bfloat16, a permission that
oneDNN uses only where the processor has units for it (AMX, some ARM). Whether it does is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

PROBE_SIZE = 256
"""Edge of the probe's matrices: past every library's special case for small products."""


@contextmanager
def fast_float32_matmul() -> Iterator[None]:
    """Let float32 products on the CPU be made by oneDNN; nothing changes where it would round them.

    The setting belongs to the process, not to the thread: it is put back when no thread is inside.
    Also a decorator.
    """
    if onednn_keeps_float32():
        with _rounding_allowed():
            yield
    else:
        yield


@cache
def onednn_keeps_float32() -> bool:
    """Return whether float32 products by oneDNN keep float32's digits on this processor.

    1 + 2⁻¹² takes part in a product with the identity: bfloat16 and TF32 round it to 1. False for
    a torch before 2.9, which has no such setting.
    """
    onednn = torch.backends.mkldnn
    if not onednn.is_available() or not hasattr(onednn, "matmul"):  # type: ignore[no-untyped-call]
        return False
    probe = torch.full((PROBE_SIZE, PROBE_SIZE), 1.0 + 2.0**-12)
    with _rounding_allowed():
        return torch.equal(probe @ torch.eye(PROBE_SIZE), probe)


@dataclass(slots=True)
class _Permission:
    """The process's setting, and who has asked for it: threads come and go in any order."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    before: str = ""


_PERMISSION = _Permission()


@contextmanager
def _rounding_allowed() -> Iterator[None]:
    """Give oneDNN the permission; the last to leave takes it back."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _PERMISSION.lock:
        if not _PERMISSION.users:
            _PERMISSION.before, setting.fp32_precision = setting.fp32_precision, "bf16"
        _PERMISSION.users += 1
    try:
        yield
    finally:
        with _PERMISSION.lock:
            _PERMISSION.users -= 1
            if not _PERMISSION.users:
                setting.fp32_precision = _PERMISSION.before
