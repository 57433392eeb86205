"""What the flags of all commands share. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import typer

from ditas_export import __version__


def defaults_of(options: type) -> dict[str, Any]:
    """Return the fields of an options dataclass that have a default, and that default."""
    return {
        field.name: field.default
        for field in dataclasses.fields(options)
        if field.default is not dataclasses.MISSING
    }


def flags_of(options: type, shown_defaults: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Return a function that makes the typer option of one field of an options dataclass.

    Args:
        options: the dataclass.
        shown_defaults: what stands for None in it, by field.
    """
    defaults = {**defaults_of(options), **(shown_defaults or {})}

    def option(
        text: str, name: str, *, metavar: str | None = None, shown: str | None = None
    ) -> Any:
        """Return an option that shows the default it has in the dataclass, or `shown`."""
        default = shown or defaults[name]
        suffix = f" (default: {default})" if default is not None else ""
        flag = "-" * 2 + name.replace("_", "-")
        return typer.Option(flag, help=f"{text}{suffix}", metavar=metavar, show_default=False)

    return option


DEBUG = typer.Option("--debug", help="Show where an error comes from.")
"""The `--debug` option of every command."""


def version_flag(program: str) -> Any:
    """Return the `--version` option of a command."""

    def print_version(asked: bool) -> None:
        if asked:
            typer.echo(f"{program} {__version__}")
            raise typer.Exit

    return typer.Option(
        "--version", help="Print the version.", callback=print_version, is_eager=True
    )
