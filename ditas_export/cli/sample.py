"""`ditas-sample`: a model in any backend, a folder of images out; alone or under torchrun."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditas_export.cli.console import (
    GOES_ON,
    clean_errors,
    print_line,
    printing,
    run,
    stderr,
    stdout,
)
from ditas_export.cli.flags import DEBUG, defaults_of, flags_of, version_flag
from ditas_export.cli.natural import natural_options
from ditas_export.errors import RunnerError
from ditas_export.generation.options import SampleOptions

if TYPE_CHECKING:
    from ditas_export.distributed import Ranks
    from ditas_export.generation.job import SampleReport

_DEFAULTS = defaults_of(SampleOptions)
_option = flags_of(SampleOptions)

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An exported .onnx, an engine, a quantized model, a checkpoint, or digits.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write to.")
    ],
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
        str | None, _option("3,7 or 0-9 or random.", "classes", shown="random")
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
    list: Annotated[
        Path | None,
        _option(
            "Images by label and seed, a line each: LABEL SEED; in the place of --classes, "
            "--images and --seed.",
            "list",
            metavar="FILE",
        ),
    ] = None,
    images: Annotated[
        int | None,
        _option("Images to make.", "images", shown="one per class named, 8 for random"),
    ] = None,
    num: Annotated[int | None, typer.Option("--num", hidden=True)] = None,
    steps: Annotated[int | None, _option("Denoising steps.", "steps")] = None,
    sampler: Annotated[
        str | None,
        _option(
            "ddpm, ddim or dpm++; of a flow euler, heun or euler-maruyama.",
            "sampler",
            shown="ddpm, of a flow euler",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        _option(
            "Shift of a flow's times in euler and heun: above 1 more steps where there is much "
            "noise.",
            "shift",
            shown="1, none",
        ),
    ] = None,
    cfg_scale: Annotated[
        float | None, _option("Guidance scale; 1 for none, 0 for the null class.", "cfg_scale")
    ] = None,
    cfg_channels: Annotated[
        str | None,
        _option(
            "Channels that guidance acts on: 3 or all.",
            "cfg_channels",
            shown="3, of REPA all",
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        _option(
            "Guide only the steps that start at a noise level from LO to HI: 0 data, 1 noise.",
            "guidance_interval",
            metavar="LO,HI",
            shown="0,1",
        ),
    ] = None,
    seed: Annotated[int | None, _option("Seed of all noise.", "seed", shown="0")] = None,
    batch: Annotated[int | None, _option("Images that are sampled at once.", "batch")] = None,
    runtime: Annotated[
        str | None,
        _option("auto, onnxruntime, openvino, torch, tensorrt or nv-tensorrt-rtx.", "runtime"),
    ] = None,
    device: Annotated[str | None, _option("cpu or cuda.", "device")] = None,
    threads: Annotated[
        int | None, _option("Threads of the backend.", "threads", shown="its own choice")
    ] = None,
    vae: Annotated[
        str | None,
        _option(
            "VAE of latent models: a hub id, a folder, a vae_decoder.onnx, or none.",
            "vae",
            shown="vae_decoder.onnx beside MODEL, else stabilityai/sd-vae-ft-ema",
        ),
    ] = None,
    npz: Annotated[
        Path | None,
        _option("Where to stack the images.", "npz", metavar="FILE", shown="DIR/samples.npz"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-sample")] = False,
) -> None:
    """Sample images: PNGs, a grid, and samples.npz for ADM's evaluator.

    The same command goes on where a killed run stopped. Under torchrun, ranks share the images:
    torchrun --nproc-per-node 2 -m ditas_export.cli.sample MODEL -o DIR. Exit codes: 0 done, 2 bad
    input, 70 a bug of ditas-export, 130 interrupted.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    chosen = {name: value for name, value in given.items() if value is not None}
    with clean_errors(on_interrupt=GOES_ON, debug=debug):
        if num is not None:
            chosen["images"] = _renamed_num(num, images, quiet=quiet)
        chosen = natural_options(SampleOptions, chosen)
        options = SampleOptions(model=model, output=output, **chosen)
        from ditas_export.distributed import launched_ranks

        with launched_ranks(options.device) as ranks:
            speaks = ranks.is_first and not quiet
            report = _run(options, ranks, show=speaks and not as_json)
            if speaks:
                with printing():
                    _print_report(report, as_json=as_json)


def _renamed_num(num: int, images: int | None, *, quiet: bool) -> int:
    """Return what the former name of `--images` asks for, and say that it goes.

    Under torchrun it never arrives: it is the beginning of an option of the launcher.

    Raises:
        RunnerError: both names were given.
    """
    if images is not None:
        raise RunnerError(f"--num {num} is --images, and --images {images} is given; leave out one")
    if not quiet:
        stderr().print("--num is --images now; the next release has that name alone")
    return num


def _run(options: SampleOptions, ranks: Ranks, *, show: bool) -> SampleReport:
    """Do the job, with a progress bar that tells images per second."""
    from ditas_export.cli.lean_diffusers import import_lean_diffusers

    import_lean_diffusers()
    from ditas_export.generation.job import generate

    console = stderr()
    columns = (
        TextColumn("Sampling"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]:.2f} images/s"),
    )
    with Progress(*columns, console=console, disable=not show) as progress:
        task = progress.add_task("sample", total=None, rate=0.0)

        def advance(done: int, total: int, rate: float) -> None:
            progress.update(task, completed=done, total=total, rate=rate)

        def say(text: str) -> None:
            if show:
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        return generate(options, ranks=ranks, on_progress=advance, say=say)


def _print_report(report: SampleReport, *, as_json: bool) -> None:
    """Print what was made, for a reader or for a program."""
    if as_json:
        facts = dataclasses.asdict(report) | {"images_per_second": report.images_per_second}
        typer.echo(json.dumps(facts, indent=2, default=str, allow_nan=False))
        return
    made = f"{report.sampled} images, {report.images_per_second:.2f} per second"
    found = f" ({report.images - report.sampled} were there)" * (report.sampled < report.images)
    print_line(stdout(), f"{report.folder}: {made}{found}; {report.npz}")


def main() -> None:
    """Entry point of the `ditas-sample` script."""
    run(app)


if __name__ == "__main__":
    main()
