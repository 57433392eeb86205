"""`ditas-build`: an exported file in, a TensorRT engine with its metadata and layer report out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditas_export.cli.build_settings import SETTINGS, BuildSettings, merge_settings
from ditas_export.cli.console import (
    EXIT_NOT_INTEGER,
    clean_errors,
    print_error,
    printing,
    run,
    stages,
    stderr,
    stdout,
)
from ditas_export.cli.flags import DEBUG, version_flag
from ditas_export.engine.products import Product, candidates, choose_product
from ditas_export.errors import EngineError

if TYPE_CHECKING:
    from ditas_export.engine.make import MadeEngine

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _option(flag: str, text: str, *, metavar: str | None = None) -> Any:
    """Return a typer option whose default is in its text."""
    return typer.Option(flag, help=text, metavar=metavar, show_default=False)


@app.command()
def build(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="A file that ditas-export wrote.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="ENGINE.plan", help="The file to write (default: MODEL.plan)."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        _option("--backend", "tensorrt, rtx, or auto: the first installed (default: auto)."),
    ] = None,
    profile: Annotated[
        str | None,
        _option(
            "--profile", "Options from a YAML file, or a bundled profile's name.", metavar="YAML"
        ),
    ] = None,
    batch: Annotated[
        str | None,
        _option(
            "--batch", "Smallest, usual and largest batch (default: 1,2,8).", metavar="MIN,OPT,MAX"
        ),
    ] = None,
    layout: Annotated[
        str | None,
        _option(
            "--layout", "int4, or int8 rows (default: int8 for a portable file, else as it is)."
        ),
    ] = None,
    as_is: Annotated[
        bool | None,
        _option(
            "--as-is/--fewest-kernels",
            "Build the form that the file has (default: a portable file is written for TensorRT).",
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        _option("--workspace", "Scratch memory of a layer (default: all).", metavar="GiB"),
    ] = None,
    opt_level: Annotated[
        int | None, _option("--opt-level", "Builder optimization level, 0 to 5 (default: 3).")
    ] = None,
    compute_capability: Annotated[
        str | None,
        _option(
            "--compute-capability",
            "GPUs to build for, as 8.9,12.0; rtx only (default: 8.6 and later).",
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        _option("--timing-cache", "Timings to use and add to; tensorrt only.", metavar="FILE"),
    ] = None,
    version_compatible: Annotated[
        bool | None,
        _option(
            "--version-compatible/--no-version-compatible",
            "A plan that later versions of the same major version run; tensorrt only.",
        ),
    ] = None,
    refit: Annotated[
        bool | None, _option("--refit/--no-refit", "A plan whose weights can be replaced.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print what became of every linear and block.")
    ] = False,
    allow_float: Annotated[
        bool,
        typer.Option(
            "--allow-float", help="Accept linears that are not multiplied as the file asks."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be built; needs no TensorRT.")
    ] = False,
    trtexec: Annotated[
        bool,
        typer.Option(
            "--trtexec", help="Build with trtexec or tensorrt_rtx; print it with --dry-run."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the engine's metadata as JSON, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-build")] = False,
) -> None:
    """Build a TensorRT engine from an exported file; the file decides every precision.

    Writes ENGINE.plan and ENGINE.plan.json. Exit codes: 0 done, 2 bad input or a builder that
    refuses, 3 a linear that is not multiplied as the file asks, 70 a bug of ditas-export, 130
    interrupted.
    """
    given = {name: value for name, value in locals().items() if name in SETTINGS}
    plan = output or model.with_suffix(".plan")
    with clean_errors(on_interrupt="No engine was written.", debug=debug):
        settings = merge_settings(profile, given)
        if dry_run:
            with printing():
                _print_dry_run(model, plan, settings, trtexec=trtexec, as_json=as_json)
            return
        made = _make(model, plan, settings, trtexec=trtexec, show=not (quiet or as_json))
        if as_json:
            with printing():
                typer.echo(json.dumps(made.metadata.to_dict(), indent=2, allow_nan=False))
        elif not quiet:
            from ditas_export.cli.engine_table import print_engine

            with printing():
                print_engine(stdout(), made, plan, detailed=report)
        _check_integer(made, plan, allow_float=allow_float)


def _make(
    model: Path, plan: Path, settings: BuildSettings, *, trtexec: bool, show: bool
) -> MadeEngine:
    """Do the job with progress bars."""
    choose = _product_with_tool if trtexec else choose_product
    product, options = choose(settings.backend), settings.options
    product.require_options(options)
    from ditas_export.engine.build import BuiltEngine, build_engine
    from ditas_export.engine.make import make_engine
    from ditas_export.engine.trtexec import run_tool

    with stages(stderr(), quiet=not show) as advance:

        def build(onnx: Path, partial: Path) -> BuiltEngine:
            if trtexec:
                return run_tool(onnx, partial, product=product, options=options)
            return build_engine(
                onnx, partial, product=product, options=options, on_progress=advance
            )

        return make_engine(
            model,
            plan,
            product=product,
            options=options,
            layout=settings.layout,
            as_is=settings.as_is,
            build=build,
        )


def _product_with_tool(backend: str) -> Product:
    """Return the product whose program is on the path; EngineError if there is none."""
    products = candidates(backend)
    for product in products:
        if shutil.which(product.tool) is not None:
            return product
    names = " nor ".join(product.tool for product in products)
    raise EngineError(f"{names} is not on the PATH; install it, or build without --trtexec")


def _print_dry_run(
    model: Path, plan: Path, settings: BuildSettings, *, trtexec: bool, as_json: bool
) -> None:
    """Print what would be built, or the command lines that would build it."""
    from ditas_export.cli.engine_dry_run import print_commands, print_intent

    if trtexec:
        print_commands(model, plan, settings)
    else:
        print_intent(model, plan, settings, as_json=as_json)


def _check_integer(made: MadeEngine, plan: Path, *, allow_float: bool) -> None:
    """Say which linears the builder did not multiply as the file asks, and exit with 3."""
    if made.report is not None and made.report.lost:
        linears = made.report.linears
        names = ", ".join(f"{path} ({linears[path].kernel})" for path in made.report.lost)
        reason = f"{len(made.report.lost)} linears are not multiplied as the file asks: {names}"
    elif made.unknown is not None:
        reason = f"{made.unknown}; nothing shows that its linears are multiplied as the file asks"
    else:
        return
    word = "warning" if allow_float else "error"
    hint = "" if allow_float else "; --allow-float accepts that"
    print_error(f"{plan}: {reason}{hint}", word=word)
    if not allow_float:
        raise typer.Exit(EXIT_NOT_INTEGER)


def main() -> None:
    """Entry point of the `ditas-build` script."""
    run(app)


if __name__ == "__main__":
    main()
