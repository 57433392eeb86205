"""`ditas-report`: what an export left in, one page that can be sent to a colleague out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditas_export.cli.console import clean_errors, print_line, printing, run, stdout
from ditas_export.cli.flags import DEBUG, version_flag

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def report(
    manifest: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.json",
            help="What ditas-export wrote beside OUT.onnx.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.html", help="The page (default: OUT.html)."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-report")] = False,
) -> None:
    """Show what quantization did to a model: one page of HTML, which asks nothing of a network.

    Made of OUT.json and OUT.stats.safetensors alone; nothing is computed again. Exit codes: 0
    done, 2 bad input, 70 a bug of ditas-export, 130 interrupted.
    """
    with clean_errors(on_interrupt="No page was written.", debug=debug):
        from ditas_export.report.page_file import report as write_report

        written = write_report(manifest, output)
        if not quiet:
            with printing():
                print_line(stdout(), f"{written}  ({written.stat().st_size / 2**10:,.0f} KiB)")


def main() -> None:
    """Entry point of the `ditas-report` script."""
    run(app)


if __name__ == "__main__":
    main()
