"""`ditas-eval`: images and a reference in, how far apart they are out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditas_export.cli.console import clean_errors, printing, run, stages, stderr, stdout
from ditas_export.cli.flags import DEBUG, defaults_of, flags_of, version_flag
from ditas_export.evaluation.options import EvaluateOptions

if TYPE_CHECKING:
    from ditas_export.evaluation.evaluate import Evaluation

_DEFAULTS = defaults_of(EvaluateOptions)
_option = flags_of(EvaluateOptions)

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def evaluate(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES.npz", help="Images as ditas-sample writes them.")
    ],
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE.npz",
            help="What they are judged by: images, features, or ADM's reference file.",
        ),
    ],
    features: Annotated[
        str | None,
        _option(
            "given (in the files), digits (of the bundled classifier) or inception (of "
            "torch-fidelity).",
            "features",
            shown="given where both have them, digits for 16×16 grey images, else inception",
        ),
    ] = None,
    paired: Annotated[
        bool | None,
        typer.Option(
            "--paired/--no-paired",
            help="Images of one place are of the same noise: PSNR, SSIM and LPIPS (default: where "
            "ditas-sample wrote both files, of one shape).",
            show_default=False,
        ),
    ] = None,
    resamples: Annotated[
        int | None, _option("Sets drawn anew, for intervals; 0 for none.", "resamples")
    ] = None,
    seed: Annotated[int | None, _option("Seed of what is drawn.", "seed")] = None,
    device: Annotated[str | None, _option("cpu or cuda.", "device")] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT.json", help="Write all figures as JSON."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-eval")] = False,
) -> None:
    """Judge images: PSNR and SSIM of pairs, FID, sFID, KID, precision and recall of sets.

    Exit codes: 0 done, 2 bad input, 70 a bug of ditas-export, 130 interrupted.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    chosen = {name: value for name, value in given.items() if value is not None}
    with clean_errors(on_interrupt="Nothing was judged.", debug=debug):
        options = EvaluateOptions(samples=samples, reference=reference, **chosen)
        evaluation = _run(options, json_path, show=not quiet)
        if not quiet:
            from ditas_export.cli.evaluation_table import print_evaluation

            with printing():
                print_evaluation(stdout(), evaluation)


def _run(options: EvaluateOptions, json_path: Path | None, *, show: bool) -> Evaluation:
    """Do the job with progress bars, and write the JSON if asked for."""
    from ditas_export.evaluation.evaluate import evaluate

    with stages(stderr(), quiet=not show) as advance:
        return evaluate(options, report=json_path, on_progress=advance)


def main() -> None:
    """Entry point of the `ditas-eval` script."""
    run(app)


if __name__ == "__main__":
    main()
