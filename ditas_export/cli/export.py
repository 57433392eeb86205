"""`ditas-export`: a DiT checkpoint in, a verified W4A8 ONNX file out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditas_export.cli.console import (
    EXIT_FAR_FROM_FLOAT,
    EXIT_MISMATCH,
    GOES_ON,
    clean_errors,
    print_error,
    printing,
    run,
    stages,
    stderr,
    stdout,
)
from ditas_export.cli.flags import DEBUG, defaults_of, flags_of, version_flag
from ditas_export.cli.natural import natural_options
from ditas_export.cli.recipes import read_recipe
from ditas_export.errors import CalibrationError
from ditas_export.options import DEFAULTS, FAST_WALK_TOKENS, WALK_TOKENS, ExportOptions
from ditas_export.saved_records import from_record

if TYPE_CHECKING:
    from ditas_export.distributed import Ranks
    from ditas_export.pipeline import ExportResult

_DEFAULTS = defaults_of(ExportOptions)
_option = flags_of(ExportOptions, DEFAULTS)

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    model: Annotated[
        str | None,
        _option(
            "digits, digits-sit or digits-pixart (bundled), a checkpoint, a diffusers folder, or a "
            "hub id.",
            "model",
        ),
    ] = None,
    num_heads: Annotated[
        int | None, _option("Attention heads, where the checkpoint does not say.", "num_heads")
    ] = None,
    num_classes: Annotated[
        int | None,
        _option("Classes, where the checkpoint does not say.", "num_classes"),
    ] = None,
    no_null_class: Annotated[
        bool | None,
        typer.Option(
            "--no-null-class",
            help="The checkpoint was trained without class dropout: every row of its label table "
            "is a class.",
            show_default=False,
        ),
    ] = None,
    betas: Annotated[
        str | None,
        _option(
            "Noise schedule of training, where the checkpoint does not say: linear, scaled_linear "
            "or squaredcos_cap_v2.",
            "betas",
            metavar="NAME[,START,END[,STEPS]]",
            shown="linear,0.0001,0.02,1000",
        ),
    ] = None,
    family: Annotated[
        str | None,
        _option(
            "Whose process, where the checkpoint does not say: dit, or the flows sit or repa; or a "
            "family of another package, by name.",
            "family",
            shown="dit",
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        _option(
            "A LoRA of PEFT or diffusers, a folder or a file, merged into the checkpoint first.",
            "lora",
            metavar="PATH",
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None, _option("Alpha of the LoRA, where nothing says it.", "lora_alpha")
    ] = None,
    classes: Annotated[
        str | None, _option("Classes to calibrate with: 3,7 or 0-9 or random.", "classes")
    ] = None,
    embeddings: Annotated[
        Path | None,
        _option(
            "Embeddings of prompts, of ditas-embed, for models that are asked in words; --classes "
            "are their numbers then.",
            "embeddings",
            metavar="FILE.safetensors",
        ),
    ] = None,
    device: Annotated[
        str | None, _option("Where to calibrate: auto, cpu or cuda.", "device")
    ] = None,
    w: Annotated[int | None, _option("Bits of the weights: 4 or 8.", "w")] = None,
    a: Annotated[int | None, _option("Bits of the activations: 8, or 16 for float.", "a")] = None,
    method: Annotated[
        str | None,
        _option("linear, smoothquant, tas, tas-search, ditas or ditas-plus.", "method"),
    ] = None,
    rank: Annotated[
        str | None,
        _option(
            "Rank of the low-rank branch; 0 for none, the default with --w 8.",
            "rank",
            shown="auto, the paper's share of the width: 32 of 1152",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        _option(
            "Weights per block: 16, 24, 32, 48, 64, 96 or 128; with --a 16: 32, 64 or 128.",
            "block_size",
            shown="48, or the next smaller that divides",
        ),
    ] = None,
    alpha_grid: Annotated[
        str | None,
        _option("Smoothing exponents to try, as 0,0.25,0.5.", "alpha_grid", shown="0,0.05,…,1"),
    ] = None,
    walk_tokens: Annotated[
        int | None,
        _option(
            "Tokens that rounding is fitted to; fewer take less time.",
            "walk_tokens",
            shown=f"{WALK_TOKENS}, with --fast {FAST_WALK_TOKENS}",
        ),
    ] = None,
    fast: Annotated[
        bool | None,
        typer.Option(
            "--fast/--no-fast",
            help="Calibrate in about half the time: fewer tokens, and the float model samples "
            "in bfloat16 where the device has such products; options given win.",
            show_default=False,
        ),
    ] = None,
    ranges: Annotated[
        str | None,
        _option("Activation ranges: token or static.", "ranges", shown="token"),
    ] = None,
    layout: Annotated[
        str | None,
        _option("How weights are stored: int4 or int8.", "layout", shown="as --w and --target say"),
    ] = None,
    precision: Annotated[
        str | None,
        _option(
            "Float side: fp32 (CPUs), fp16 (GPUs) or bf16 (GPUs, where fp16 overflows).",
            "precision",
            shown="as --target says",
        ),
    ] = None,
    target: Annotated[
        str | None,
        _option(
            "The runtime to write for: portable, onnxruntime (fastest on CPUs, not for TensorRT) "
            "or tensorrt (fp16, int8, fewest kernels); options given win.",
            "target",
        ),
    ] = None,
    adaln: Annotated[
        int | None,
        _option(
            "Bits of the modulation weights: 16 (float), 8 or 4; where given, of what "
            "--save-artifact keeps too.",
            "adaln",
            shown="8, or as the --artifact has them",
        ),
    ] = None,
    steps: Annotated[int | None, _option("Sampling steps of calibration.", "steps")] = None,
    cfg_scale: Annotated[
        float | None,
        _option(
            "Guidance scale of calibration; 1 for none, 0 for the null class.",
            "cfg_scale",
        ),
    ] = None,
    samples: Annotated[int | None, _option("Images to calibrate with.", "samples")] = None,
    seed: Annotated[int | None, _option("Seed of all noise.", "seed")] = None,
    save_calibration: Annotated[
        Path | None,
        _option("Keep the calibration states.", "save_calibration", metavar="FILE"),
    ] = None,
    calibration: Annotated[
        Path | None, _option("Use states kept before.", "calibration", metavar="FILE")
    ] = None,
    save_artifact: Annotated[
        Path | None,
        _option("Keep the quantized model.", "save_artifact", metavar="FILE"),
    ] = None,
    artifact: Annotated[
        Path | None,
        _option("Export a quantized model kept before.", "artifact", metavar="FILE"),
    ] = None,
    reference: Annotated[
        Path | None,
        _option("Also write the float model.", "reference", metavar="FP32.onnx"),
    ] = None,
    vae: Annotated[
        str | None,
        _option(
            "Also write this VAE's decoder, vae_decoder.onnx beside the model: a diffusers folder "
            "or a hub id.",
            "vae",
            metavar="ID|PATH",
        ),
    ] = None,
    min_db: Annotated[
        float | None,
        _option(
            "Least SNR of the final latents against float, in dB: below it the exit code is 4.",
            "min_db",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        _option(
            "Also write a page that shows what quantization did (extra \\[report]).",
            "report",
            metavar="FILE.html",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Options from a YAML file, or a bundled recipe's name.", metavar="YAML"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-export")] = False,
) -> None:
    """Quantize a Diffusion Transformer and write it as ONNX, verified against the float model.

    Writes OUT.onnx, OUT.json and OUT.stats.safetensors. Exit codes: 0 done, 1 the file does not
    compute what was calibrated, 2 bad input, 4 it is further from float than --min-db, or is
    noise, 70 a bug of ditas-export, 130 interrupted.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    with clean_errors(on_interrupt=GOES_ON, debug=debug):
        options = _merge(output, recipe, given)
        from ditas_export.distributed import launched_ranks

        with launched_ranks(options.device) as ranks:
            result = _run(options, ranks, show=ranks.is_first and not (quiet or as_json))
        if ranks.is_first:
            _report(result, options, as_json=as_json, quiet=quiet)
        if result.verification.matches is False:
            raise typer.Exit(EXIT_MISMATCH)
        if result.verification.misses(options.min_db):
            raise typer.Exit(EXIT_FAR_FROM_FLOAT)


def _report(result: ExportResult, options: ExportOptions, *, as_json: bool, quiet: bool) -> None:
    """Print what was measured, and an error if the file is not what was calibrated."""
    reason = _failure(result, options)
    if reason is not None:
        print_error(reason)
    if as_json:
        with printing():
            typer.echo(json.dumps(result.manifest, indent=2, allow_nan=False))
    elif not quiet:
        from ditas_export.cli.summary import print_summary

        with printing():
            print_summary(stdout(), result, options)
            if reason is None and result.verification.matches:
                asked = (
                    ""
                    if options.embeddings is None
                    else (f" --embeddings {shlex.quote(str(options.embeddings))}")
                )
                typer.echo(f"next: ditas-sample {shlex.quote(str(result.file))}{asked} -o samples")


def _failure(result: ExportResult, options: ExportOptions) -> str | None:
    """Return why the file should not be used, None if nothing is known against it."""
    verification = result.verification
    file = verification.file
    if file is None or verification.matches:
        return verification.misses(options.min_db)
    found = file.not_finite or (
        f"it agrees with the fake-quantized forward to {file.worst_match.description}"
    )
    return (
        f"{result.file} is not what was calibrated: {found}; do not deploy it. {options.output} "
        f"is as it was; the solved model is kept for another form of it"
    )


def _merge(output: Path, recipe: str | None, given: Mapping[str, Any]) -> ExportOptions:
    """Return the options: the command line over the recipe over the defaults."""
    merged = read_recipe(recipe, frozenset(_DEFAULTS)) if recipe is not None else {}
    merged |= {name: value for name, value in given.items() if value is not None}
    if merged.get("rank") == "auto":
        del merged["rank"]
    asked = natural_options(ExportOptions, merged)
    return from_record(ExportOptions, {**asked, "output": output}, error=CalibrationError)


def _run(options: ExportOptions, ranks: Ranks, *, show: bool) -> ExportResult:
    """Do the job with progress bars."""
    console = stderr()
    from ditas_export.pipeline import export as run_export

    with stages(console, quiet=not show) as advance:

        def say(text: str) -> None:
            if show:
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        return run_export(options, ranks=ranks, on_progress=advance, say=say)


def main() -> None:
    """Entry point of the `ditas-export` script."""
    run(app)


if __name__ == "__main__":
    main()
