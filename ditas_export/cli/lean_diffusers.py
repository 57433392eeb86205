"""diffusers without what samplers have no use for; in a command's own process alone."""

from __future__ import annotations

import sys


def import_lean_diffusers() -> None:
    """Import diffusers without PyTorch's compiler, which it asks for and does without.

    `diffusers.utils` takes `torch._dynamo.allow_in_graph` for models that somebody compiles, and a
    stand-in where there is no compiler. The compiler takes two thirds of the import, and a command
    that samples compiles nothing of diffusers. It can be imported afterwards all the same.
    """
    import torch  # noqa: F401 (what it imports itself is not to miss the compiler)

    if "diffusers" in sys.modules or "torch._dynamo" in sys.modules:
        return
    sys.modules["torch._dynamo"] = None  # type: ignore[assignment]
    try:
        import diffusers.utils  # noqa: F401
    finally:
        del sys.modules["torch._dynamo"]
