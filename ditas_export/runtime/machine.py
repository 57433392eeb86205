"""What compiled kernels and packed weights depend on in the machine."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def machine_facts() -> dict[str, str]:
    """Return the architecture, and the processor's model and instruction sets where they show."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _cpuinfo("model name") or platform.processor(),
        "instructions": _cpuinfo("flags", "Features"),
    }


def _cpuinfo(*names: str) -> str:
    """Return the first value under one of some names in Linux's list of processors, or nothing."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")
