"""`ditas-compare`: a float file and a quantized file or engine in, how far apart they are out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditas_export.cli.console import (
    EXIT_MISMATCH,
    clean_errors,
    printing,
    run,
    stages,
    stderr,
    stdout,
)
from ditas_export.cli.flags import DEBUG, defaults_of, flags_of, version_flag
from ditas_export.evaluation.options import CompareOptions

if TYPE_CHECKING:
    from ditas_export.evaluation.compare import Comparison

_DEFAULTS = defaults_of(CompareOptions)
_option = flags_of(CompareOptions)

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def compare(
    reference: Annotated[
        Path, typer.Argument(metavar="FP32.onnx", help="What ditas-export --reference wrote.")
    ],
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.onnx|ENGINE.plan", help="A quantized file, or an engine of one."
        ),
    ],
    classes: Annotated[str | None, _option("3,7 or 0-9 or random.", "classes")] = None,
    embeddings: Annotated[
        Path | None,
        _option(
            "Embeddings of prompts; --classes are their numbers then.",
            "embeddings",
            metavar="FILE.safetensors",
        ),
    ] = None,
    images: Annotated[int | None, _option("Images of the trajectory.", "images")] = None,
    steps: Annotated[int | None, _option("Time steps, all compared.", "steps")] = None,
    cfg_scale: Annotated[
        float | None, _option("Guidance scale; 1 for none, 0 for the null class.", "cfg_scale")
    ] = None,
    seed: Annotated[int | None, _option("Seed of all noise.", "seed")] = None,
    linears: Annotated[
        bool,
        typer.Option(
            "--linears/--no-linears",
            help="Compare every block linear too; of an engine, outputs only (default: --linears).",
            show_default=False,
        ),
    ] = True,
    linear_db: Annotated[
        float | None, _option("A linear diverges where its SNR is lower.", "linear_db")
    ] = None,
    threshold_db: Annotated[
        float | None,
        _option("Least SNR of the output over all steps.", "threshold_db", shown="report only"),
    ] = None,
    gen_inputs: Annotated[
        Path | None,
        _option(
            "Write the inputs for polygraphy run --load-inputs.", "gen_inputs", metavar="FILE.json"
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT.json", help="Write all figures as JSON."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-compare")] = False,
) -> None:
    """Compare a model with the float model at every time step of a float trajectory.

    Exit codes: 0 done, 1 a total SNR below --threshold-db, 2 bad input, 70 a bug of
    ditas-export, 130 interrupted.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    chosen = {name: value for name, value in given.items() if value is not None}
    with clean_errors(on_interrupt="Nothing was compared.", debug=debug):
        options = CompareOptions(reference=reference, model=model, **chosen)
        comparison = _run(options, json_path, show=not quiet)
        if not quiet:
            from ditas_export.cli.compare_table import print_comparison

            with printing():
                print_comparison(stdout(), comparison)
        if comparison.matches is False:
            raise typer.Exit(EXIT_MISMATCH)


def _run(options: CompareOptions, json_path: Path | None, *, show: bool) -> Comparison:
    """Do the job with progress bars, and write the JSON if asked for."""
    from ditas_export.evaluation.compare import compare

    with stages(stderr(), quiet=not show) as advance:
        return compare(options, report=json_path, on_progress=advance)


def main() -> None:
    """Entry point of the `ditas-compare` script."""
    run(app)


if __name__ == "__main__":
    main()
