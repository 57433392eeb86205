"""What Ctrl-C does in a command before its work begins and after it. Imports next to nothing.

There is nothing to keep then: the process ends at once, with a line.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130

_PROGRAM = "ditas-"
"""What the names of the commands' scripts begin with."""


def speaks() -> bool:
    """Return whether this process tells the user of an interruption: one of those of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def end_at_once_when_interrupted() -> None:
    """Let Ctrl-C end a command with one line, from now until its work begins.

    A program that imports a command for another purpose keeps its own ways.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ignore_interrupts() -> None:
    """Let a command that has done its work, or refused it, come to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_command() -> bool:
    """Return whether this process is one of the commands: its script, or `python -m`.

    While Python looks for the module of `-m`, which imports the packages around it, it says so.
    """
    program = sys.argv[0] if sys.argv else ""
    return program == "-m" or os.path.basename(program).startswith(_PROGRAM)


def _end(_number: int, _frame: FrameType | None) -> None:
    """End the process as it stands."""
    if speaks():
        os.write(2, b"interrupted.\n")
    os._exit(EXIT_INTERRUPTED)
