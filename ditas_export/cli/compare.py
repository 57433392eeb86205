"""`ditas-compare`: a float file and a quantized file or engine in, how far apart they are out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from ditas_export.errors import VerificationError
from ditas_export.evaluation.options import CompareOptions, LadderOptions

if TYPE_CHECKING:
    from ditas_export.evaluation.compare import Comparison
    from ditas_export.evaluation.ladder import Ladder

_DEFAULTS = defaults_of(CompareOptions)
_LADDER_DEFAULTS = defaults_of(LadderOptions)
_option = flags_of(CompareOptions)
_SEEDS = f"{_DEFAULTS['seed']}, of --ladder {_LADDER_DEFAULTS['seed']}"

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def compare(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="FP32.onnx",
            help="What ditas-export --reference wrote; with --ladder a checkpoint, or digits.",
        ),
    ],
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.onnx|ENGINE.plan",
            help="A quantized file, or an engine of one; with --ladder what --save-artifact wrote.",
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Argument(metavar="[PLAN]", help="With --ladder: an engine.", show_default=False),
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="MODEL ARTEFACT [PLAN]: where the error comes from, rung by rung from float32 to "
            "what runs the model.",
        ),
    ] = False,
    classes: Annotated[str | None, _option("3,7 or 0-9 or random.", "classes")] = None,
    embeddings: Annotated[
        Path | None,
        _option(
            "Embeddings of prompts; --classes are their numbers then.",
            "embeddings",
            metavar="FILE.safetensors",
        ),
    ] = None,
    images: Annotated[
        int | None, _option("Images of the trajectory, of --ladder of two.", "images")
    ] = None,
    steps: Annotated[int | None, _option("Time steps, all compared.", "steps")] = None,
    cfg_scale: Annotated[
        float | None, _option("Guidance scale; 1 for none, 0 for the null class.", "cfg_scale")
    ] = None,
    seed: Annotated[int | None, _option("Seed of all noise.", "seed", shown=_SEEDS)] = None,
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

    With --ladder: float32, float16, bfloat16, fake-quantized, the file in ONNX Runtime and OpenVINO
    and the engine, all from the same noise.

    Exit codes: 0 done, 1 a total SNR below --threshold-db, 2 bad input, 70 a bug of
    ditas-export, 130 interrupted.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    chosen = {name: value for name, value in given.items() if value is not None}
    with clean_errors(on_interrupt="Nothing was compared.", debug=debug):
        if ladder:
            _climb(str(reference), model, plan, chosen, json_path, show=not quiet)
            return
        if plan is not None:
            raise VerificationError(f"{plan} is one file too many; --ladder takes three")
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


def _climb(
    model: str,
    artifact: Path,
    plan: Path | None,
    chosen: dict[str, Any],
    json_path: Path | None,
    *,
    show: bool,
) -> None:
    """Find where the error comes from, with a progress bar, and print it.

    Raises:
        VerificationError: an option that a ladder does not have.
    """
    own = {name: value for name, value in chosen.items() if name in _LADDER_DEFAULTS}
    others = {name: value for name, value in chosen.items() if name not in own}
    if odd := [name for name, value in others.items() if value != _DEFAULTS[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise VerificationError(f"--ladder has no {flags}; leave it out")
    options = LadderOptions(model=model, artifact=artifact, plan=plan, **own)
    found = _run_ladder(options, json_path, show=show)
    if show:
        from ditas_export.cli.ladder_table import print_ladder

        with printing():
            print_ladder(stdout(), found)


def _run_ladder(options: LadderOptions, json_path: Path | None, *, show: bool) -> Ladder:
    """Do the job with a progress bar, and write the JSON if asked for."""
    from ditas_export.evaluation.ladder import ladder

    with stages(stderr(), quiet=not show) as advance:
        return ladder(options, report=json_path, on_progress=advance)


def main() -> None:
    """Entry point of the `ditas-compare` script."""
    run(app)


if __name__ == "__main__":
    main()
