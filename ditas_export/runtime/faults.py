"""Whatever a backend raises, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ditas_export.errors import DitasExportError, RunnerError


@contextmanager
def faults_as_errors(what: str) -> Iterator[None]:
    """Say in one line what a backend failed with; `what` names it.

    Raises:
        RunnerError: in the place of every exception that is not this package's own.
    """
    try:
        yield
    except DitasExportError:
        raise
    except Exception as error:  # every backend has exceptions of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunnerError(f"{what} failed: {reason}") from error
