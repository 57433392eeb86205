"""`ditas-embed`: prompts in, the embeddings that a text-conditioned model is asked by out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ditas_export.cli.console import clean_errors, print_line, printing, run, stages, stderr, stdout
from ditas_export.cli.flags import DEBUG, version_flag
from ditas_export.conditions.options import EncoderPrecision
from ditas_export.errors import RunnerError

if TYPE_CHECKING:
    from ditas_export.conditions.embeddings import PromptEmbeddings

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def embed(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            help="The folder of a PixArt pipeline, with its text encoder and tokenizer, or its "
            "hub id.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors to write.")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="A prompt on each line; lines that begin with # are none. (default: 32 prompts of "
            "ditas-export's own)",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="fp32 or bf16: what the encoder computes in. (default: fp32)",
            show_default=False,
        ),
    ] = "fp32",
    device: Annotated[
        str, typer.Option("--device", help="cpu or cuda. (default: cpu)", show_default=False)
    ] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, DEBUG] = False,
    version: Annotated[bool, version_flag("ditas-embed")] = False,
) -> None:
    """Encode prompts, and the empty one for guidance, for `ditas-export --embeddings FILE`.

    Row 0 is the first prompt: `--classes 0-9` asks for the first ten. Needs transformers, which the
    extra `text` installs. Exit codes: 0 done, 2 bad input, 70 a bug of ditas-export, 130
    interrupted.
    """
    with clean_errors(debug=debug):
        if precision not in get_args(EncoderPrecision):
            raise RunnerError(f"--precision {precision}; pick fp32 or bf16")
        if device not in ("cpu", "cuda"):
            raise RunnerError(f"--device {device}; pick cpu or cuda")
        made = _run(
            pipeline,
            prompts,
            output,
            precision=cast(EncoderPrecision, precision),
            device=device,
            quiet=quiet,
        )
        if not quiet:
            with printing():
                print_line(stdout(), _summary(output, made))


def _run(
    pipeline: str,
    prompts: Path | None,
    output: Path,
    *,
    precision: EncoderPrecision,
    device: str,
    quiet: bool,
) -> PromptEmbeddings:
    """Do the job, with a progress bar."""
    from ditas_export.conditions.embeddings import EMBEDDINGS_KIND
    from ditas_export.conditions.prompts import read_prompts, shipped_prompts
    from ditas_export.conditions.text_encoder import embed_prompts
    from ditas_export.job_files import JobFiles, Output, existing, tensors_kind

    kind = tensors_kind(EMBEDDINGS_KIND)
    written = Output(path=output, what="file of embeddings", is_ours=kind)
    inputs = {**existing(prompts=prompts), **{"PIPELINE": Path(pipeline)}}
    JobFiles(inputs=inputs, outputs=(written,)).check()
    texts = shipped_prompts() if prompts is None else read_prompts(prompts)
    with stages(stderr(), quiet=quiet) as advance:
        made = embed_prompts(
            pipeline,
            texts,
            precision=precision,
            device=device,
            on_prompt=lambda done, total: advance("Encoding prompts", done, total),
        )
    made.save(output)
    return made


def _summary(output: Path, made: PromptEmbeddings) -> str:
    """Return what was written, in one line."""
    _, tokens, channels = made.tensors["encoder_hidden_states"].shape
    return (
        f"{output}: {made.count} prompts and no prompt, {tokens} tokens of {channels} channels "
        f"(sha256 of the tensors {made.identity[:12]}…)"
    )


def main() -> None:
    """Entry point of the `ditas-embed` script."""
    run(app)


if __name__ == "__main__":
    main()
