"""`ditas-cache`: what the runtimes keep of models that were opened; listed, verified, cleared."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ditas_export.cli.console import EXIT_MISMATCH, clean_errors, print_line, printing, run, stdout
from ditas_export.cli.flags import DEBUG, version_flag
from ditas_export.errors import RunnerError

if TYPE_CHECKING:
    from ditas_export.runtime.cache import Cache, EntryFacts

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
Debug = Annotated[bool, DEBUG]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="What runtimes keep of models that were opened, in $DITAS_EXPORT_CACHE or "
    "~/.cache/ditas-export, at most $DITAS_EXPORT_CACHE_GIB (20).",
)


@app.callback()
def _options(version: Annotated[bool, version_flag("ditas-cache")] = False) -> None:
    """Take what all commands share."""


@app.command("list")
def list_entries(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the entries, used last first."""
    with clean_errors(debug=debug), printing():
        cache = _cache()
        entries = cache.entries()
        if as_json:
            _print_json(cache, entries=[_facts(entry) for entry in entries])
            return
        table = Table(box=None, pad_edge=False)
        for column in ("entry", "for", "MiB", "used", "open"):
            table.add_column(column, no_wrap=True)
        table.add_column("model", overflow="fold")
        for entry in entries:
            facts = _facts(entry)
            digits = facts["entry"].partition("-")[2][:12]
            size, used = f"{entry.size / 2**20:.1f}", (facts["used"] or "never")[:16]
            is_open = "yes" if entry.is_open else "no"
            table.add_row(digits, facts["kind"], size, used, is_open, escape(facts["source"]))
        console = stdout()
        console.print(table)
        total, limit = sum(entry.size for entry in entries) / 2**30, cache.limit / 2**30
        line = f"{len(entries)} entries, {total:.2f} of {limit:g} GiB in {cache.root}"
        print_line(console, line)


@app.command()
def verify(as_json: AsJson = False, debug: Debug = False) -> None:
    """Hash everything that is kept, and remove what is not what it was.

    A start notices what was deleted, cut or written to; this finds changes that keep size and
    times too. Exit codes: 0 all is well, 1 something was not, 2 bad input, 70 a bug of
    ditas-export.
    """
    with clean_errors(debug=debug), printing():
        cache = _cache()
        checked, faults = len(cache.entries()), cache.verify()
        if as_json:
            found = [
                {
                    "path": str(fault.path),
                    "source": fault.source,
                    "fault": fault.what,
                    "removed": fault.removed,
                }
                for fault in faults
            ]
            _print_json(cache, checked=checked, faults=found)
        else:
            console = stdout()
            for fault in faults:
                end = "removed" if fault.removed else "cannot be removed; delete it"
                line = f"{fault.path} of {fault.source}: {fault.what}; {end}"
                print_line(console, line)
            line = f"{checked} entries checked in {cache.root}, {len(faults)} faults"
            print_line(console, line)
        if faults:
            raise typer.Exit(EXIT_MISMATCH)


@app.command()
def clear(as_json: AsJson = False, debug: Debug = False) -> None:
    """Remove everything but what a process has open."""
    with clean_errors(debug=debug), printing():
        cache = _cache()
        removed = cache.clear()
        left = cache.entries()
        if as_json:
            _print_json(
                cache,
                removed=[_facts(entry) for entry in removed],
                left=[_facts(entry) for entry in left],
            )
            return
        size = sum(entry.size for entry in removed) / 2**30
        open_ones = f"; {len(left)} are open and stay" * bool(left)
        line = f"{len(removed)} entries removed from {cache.root}, {size:.2f} GiB{open_ones}"
        print_line(stdout(), line)


def _cache() -> Cache:
    """Return the user's cache.

    Raises:
        RunnerError: a user without a home, or a limit that is no size.
    """
    from ditas_export.runtime.cache import Cache
    from ditas_export.runtime.cache_settings import FOLDER_VARIABLE, user_folder

    folder = user_folder()
    if folder is None:
        raise RunnerError(f"this user has no home folder for a cache; set {FOLDER_VARIABLE}")
    return Cache.at(folder)


def _facts(entry: EntryFacts) -> dict[str, Any]:
    """Return an entry as JSON values."""
    used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.used)) if entry.used else None
    return {
        "entry": entry.path.name,
        "kind": entry.manifest.kind if entry.manifest else "damaged",
        "bytes": entry.size,
        "used": used,
        "open": entry.is_open,
        "source": entry.manifest.source if entry.manifest else "unknown",
    }


def _print_json(cache: Cache, **facts: Any) -> None:
    """Print facts with those of the cache."""
    content = {"cache": str(cache.root), "limit_bytes": cache.limit, **facts}
    typer.echo(json.dumps(content, indent=2))


def main() -> None:
    """Entry point of the `ditas-cache` script."""
    run(app)


if __name__ == "__main__":
    main()
