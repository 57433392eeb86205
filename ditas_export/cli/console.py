"""What all commands share: progress bars, error lines, exit codes. Imports nothing heavy."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from typer import Exit

from ditas_export.cli.first_signals import ignore_interrupts, speaks
from ditas_export.cli.interrupts import interruptible
from ditas_export.errors import DitasExportError, OutputError
from ditas_export.plain_text import one_line, visible

EXIT_MISMATCH = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_INTEGER = 3
EXIT_FAR_FROM_FLOAT = 4
EXIT_BUG = 70
"""Of sysexits.h: an error within the software."""

_LOST = "what was to be printed is lost, files that were written are whole"

_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
"""Names of Python's error and of PyTorch's, which is not imported for it."""

GOES_ON = "Run the same command again to go on where it stopped."
"""What users of an interrupted job should know, where it keeps unfinished work."""

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
            progress.update(tasks[stage], completed=done, total=total)

        yield advance


@contextmanager
def clean_errors(*, on_interrupt: str = "", debug: bool = False) -> Iterator[None]:
    """Turn whatever stops a job into one line on stderr, and an exit code.

    A refusal is 2, Ctrl-C 130, SIGTERM 143, and what should not happen 70. Either signal unwinds
    the stack, so that what is kept for the next run is whole. Warnings are one line each too.

    Args:
        on_interrupt: what an interrupted user should know.
        debug: show the trace too.
    """
    console = stderr()
    with _refusals(debug=debug), _warnings_as_lines(console), interruptible() as interruption:
        try:
            yield
        except Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            # Once a signal came, other errors are what became of it: in an import, or on a rank.
            if interruption.number is None and not isinstance(error, KeyboardInterrupt):
                raise
            if debug:
                _print_trace(error)
            if speaks():
                print_line(console, f"interrupted. {on_interrupt}")
            exec("")  # makes CPython forget that an `exec` was interrupted, or it ends by SIGINT
            sys.exit(interruption.exit_code)


def run(app: Callable[[], object]) -> None:
    """Run a command as a process: whatever its arguments, its output and its user do."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a terminal that is no UTF-8
    try:
        with _refusals(debug=False), _written():  # of what comes before the job, such as --help
            app()
    finally:
        ignore_interrupts()


@contextmanager
def _refusals(*, debug: bool) -> Iterator[None]:
    """Turn errors into one line and an exit code."""
    try:
        yield
    except Exit:
        raise
    except Exception as error:
        if debug:
            _print_trace(error)
        reason, code = _reason(error)
        print_error(reason)
        sys.exit(code)


def _reason(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    if isinstance(error, DitasExportError):
        return str(error), EXIT_BAD_INPUT
    name = type(error).__name__
    if name in _OUT_OF_MEMORY:
        what = f"out of memory ({one_line(str(error)) or name})"
        return f"{what}; take fewer images or tokens at once, or a larger machine", EXIT_BAD_INPUT
    if isinstance(error, OSError):
        return f"the system refuses: {error}; --debug shows what was asked of it", EXIT_BAD_INPUT
    found = f"{name}: {one_line(str(error))}".rstrip(": ")
    return f"{found}; this is a bug of ditas-export, report it with what --debug shows", EXIT_BUG


@contextmanager
def printing() -> Iterator[None]:
    """Write what is printed inside to the standard output at once.

    Raises:
        OutputError: the standard output is closed, or takes no more.
    """
    if sys.stdout is None:
        raise OutputError(f"the standard output is closed; {_LOST}")
    with _written():
        yield


@contextmanager
def _written() -> Iterator[None]:
    """Raise OutputError where the standard output takes no more."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        raise OutputError(
            f"cannot write to the standard output: {error.strerror}; {_LOST}"
        ) from error


def _print_trace(error: BaseException) -> None:
    """Print where an error comes from."""
    text = "".join(traceback.format_exception(error))
    stderr().print(text, markup=False, highlight=False, soft_wrap=True)


def print_error(text: str, *, word: str = "error") -> None:
    """Print one line on stderr, `error: …`, the word in red."""
    print_line(stderr(), text, f"[bold red]{word}:[/] ")


def print_line(console: Console, text: str, start: str = "") -> None:
    """Print text of whatever origin as one line of bounded length.

    Args:
        console: where.
        text: no markup.
        start: what stands before it, as markup.
    """
    console.print(f"{start}{escape(one_line(text))}", highlight=False, soft_wrap=True)


class VisibleConsole(Console):
    """A console on which text of others moves no cursor and sets no colour."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Return what is to be written, control characters in it as escapes."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def on_broken_pipe(self) -> None:
        """Raise it, as any other output that takes nothing."""
        raise


def stdout() -> Console:
    """Return the console for what a command was asked for."""
    return VisibleConsole()


def stderr() -> Console:
    """Return the console for all else."""
    return VisibleConsole(stderr=True)


@contextmanager
def _warnings_as_lines(console: Console) -> Iterator[None]:
    """Show warnings without the place in the code that they came from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_line(console, str(message), "[yellow]warning:[/] ")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
