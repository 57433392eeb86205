"""What all commands share: progress bars, error lines, exit codes. Imports nothing heavy."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditas_export.errors import DitasExportError

EXIT_MISMATCH = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_INTEGER = 3
EXIT_FAR_FROM_FLOAT = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

STAGE_NAMES = {
    "sample": "Sampling calibration states",
    "held out": "Sampling what to prove by",
    "quantize": "Quantizing linears",
    "export": "Writing ONNX",
    "prove": "Proving the folds",
    "verify": "Verifying",
}


@contextmanager
def stages(console: Console, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (stage, done, total) that draws one progress bar with ETA per stage."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(STAGE_NAMES.get(stage, stage), total=total)
            progress.update(tasks[stage], completed=done)

        yield advance


class _Terminated(KeyboardInterrupt):
    """The process was asked to end, which is an interruption like Ctrl-C."""


@contextmanager
def clean_errors(*, on_interrupt: str = "") -> Iterator[None]:
    """Turn a refusal into one line on stderr and exit code 2, Ctrl-C into 130, SIGTERM into 143.

    Either signal unwinds the stack, so that what is kept for the next run is whole. Warnings are
    one line each too.
    """
    console = Console(stderr=True)
    try:
        with _warnings_as_lines(console), _termination_interrupts():
            yield
    except DitasExportError as error:
        message = f"[bold red]error:[/] {escape(str(error))}"
        console.print(message, highlight=False, soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt as error:
        console.print(f"interrupted. {on_interrupt}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_TERMINATED if isinstance(error, _Terminated) else EXIT_INTERRUPTED)


@contextmanager
def _warnings_as_lines(console: Console) -> Iterator[None]:
    """Show warnings without the place in the code that they came from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Raise `_Terminated` where SIGTERM arrives inside; signals are the main thread's alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
