"""The table that `ditas-export` prints when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ditas_export.evaluation.held_out import FinalLatents
from ditas_export.evaluation.ties import Match
from ditas_export.evaluation.verify import FAR_FROM_FLOAT_DB, Verification
from ditas_export.families.base import Conditions, plural
from ditas_export.options import ExportOptions
from ditas_export.pipeline import ExportResult
from ditas_export.runtime.openvino_runner import INSTALL as OPENVINO_INSTALL

WORST = 5


def print_summary(console: Console, result: ExportResult, options: ExportOptions) -> None:
    """Print accuracy, size, kernels and the worst linears."""
    manifest, verification = result.manifest, result.verification
    size = result.file.stat().st_size
    table = Table(title=f"{result.file}  ({size / 2**20:.2f} MiB)", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in _proof(verification):
        table.add_row(name, text)
    table.add_row("process", str(result.quantized.config.process))
    table.add_row(plural(result.conditions.what), _asked(result.conditions))
    table.add_row("noise returned at the first step", _noise(manifest["noise_check"]))
    table.add_row("bits per weight, all in", f"{manifest['bits_per_weight']:.2f}")
    parts = ", ".join(
        f"{part.replace('_', ' ')} {count / 2**10:,.0f}"
        for part, count in manifest["bytes_by_part"].items()
        if count
    )
    table.add_row("KiB by part", parts)
    if verification.file is not None:
        kernels = verification.file.kernels.items()
        listed = ", ".join(f"{count} {kernel}" for kernel, count in kernels)
        table.add_row("kernels", listed or f"not listed by {verification.file.runtime}")
    table.add_row("float linears", ", ".join(_families(manifest["float_linears"])))
    worst = sorted(result.quantized.linears.items(), key=lambda item: item[1].output_snr_db)
    table.add_row(
        "worst linears",
        ", ".join(f"{name} {linear.output_snr_db:.1f} dB" for name, linear in worst[:WORST]),
    )
    if options.vae_path is not None:
        table.add_row("VAE decoder", str(options.vae_path))
    seconds = ", ".join(f"{part} {value:.0f}" for part, value in manifest["seconds"].items())
    table.add_row("seconds", seconds)
    table.add_row("manifest", str(result.file.with_suffix(".json")))
    console.print(table)
    if verification.is_far_from_float:
        console.print(
            f"[bold red]the final latents are {verification.mean_final_db:.1f} dB from float's: "
            f"other pictures. Below {FAR_FROM_FLOAT_DB:.0f} dB a file is not for use[/]",
            highlight=False,
            soft_wrap=True,
        )
    if verification.file is None:
        console.print(_unproven(options), markup=False, highlight=False, soft_wrap=True)


def _proof(verification: Verification) -> list[tuple[str, str]]:
    """Return what was measured, and of what: the file, or the fake-quantized forward alone."""
    file = verification.file
    final = verification.final
    low, high = final.interval_db
    finals = (
        f"{low:.1f} to {high:.1f} at 95 %, {len(final.images_db)} images of "
        f"{len(final.seeds_db)} seeds"
    )
    whose = "" if file else ", fake-quantized forward"
    bare = file and file.bare_session
    rows = [] if not bare else [_bare(bare)]
    ours = file and file.runner_match
    forms = [("the same of our runners' form", _match(ours))] if ours else []
    match = _match(file.match) if file else "not measured: the file was not run"
    return [
        ("final latents against float", f"{verification.mean_final_db:.1f} dB ({finals}){whose}"),
        *rows,
        ("single step against float", f"{verification.single_step_db:.1f} dB{whose}"),
        ("file against fake-quantized forward", match),
        *forms,
    ]


def _match(match: Match) -> str:
    """Return how a file's answers match, and how much of that rounding makes."""
    return f"{match.db:.1f} dB (rounding alone: {match.ties_db:.1f})"


def _bare(final: FinalLatents) -> tuple[str, str]:
    """Return what a session that is told nothing gives, in the file's own form."""
    images = len(final.images_db)
    return "the same, a bare onnxruntime session", f"{final.mean_db:.1f} dB ({images} images)"


def _asked(conditions: Conditions) -> str:
    """Return what images can be asked for, and whether guidance has something to guide with."""
    if conditions.null is None:
        return f"{conditions.count}, no {conditions.lack}: never guided"
    return f"{conditions.count} and a null {conditions.what}"


def _noise(check: Mapping[str, Any]) -> str:
    """Return how nearly the float model returns noise, in red where it does not."""
    figures = {"with class": check["class_db"], "without": check["null_class_db"]}
    text = ", ".join(f"{name} {db:.1f} dB" for name, db in figures.items() if db is not None)
    if check["passes"]:
        return text
    return f"[bold red]{text or 'no figure'}: {check['finding']}[/]"


def _unproven(options: ExportOptions) -> str:
    """Say that the file itself was not run, and what runs it."""
    return (
        f"{options.output} was not run: no runtime installed here takes {options.float_side}; "
        f"{OPENVINO_INSTALL} and export again, or ditas-build {options.output} and ditas-compare "
        f"FP32.onnx with the engine, on its GPU"
    )


def _families(names: list[str]) -> list[str]:
    """Return names with the block number replaced by N, each once."""
    seen: dict[str, int] = {}
    for name in names:
        parts = ["N" if part.isdigit() and index == 1 and name.startswith("blocks") else part
                 for index, part in enumerate(name.split("."))]  # fmt: skip
        family = ".".join(parts)
        seen[family] = seen.get(family, 0) + 1
    return [f"{family} (x{count})" if count > 1 else family for family, count in seen.items()]
