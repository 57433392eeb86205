"""What each lever adds: every method on the bundled model and on its twin with planted outliers.

    python scripts/compare_methods.py                     # the whole table
    python scripts/compare_methods.py --quick --rows linear,ditas,ditas-plus --models plain

A figure is 10·log10(Σ ref² / Σ (out − ref)²) in dB of the final latents against the float model's
from the same noise: mean ± standard deviation over evaluation seeds and calibration seeds. The rows
of `paper` and `published` use the paper's own quantizers and exist in PyTorch only. Rows `adaln8`
and `adaln4` are row `ditas-plus` with the modulation weights rounded afterwards: the block linears,
which alone are counted in bits per weight, are the same. Prints a Markdown table on stdout,
progress on stderr.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ditas_export import __version__
from ditas_export.artifact_files import atomic_path
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.literal import literal_dit, literal_preset_named
from ditas_export.calibration.methods import METHODS, Method
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    collect_states,
    sample_batches,
)
from ditas_export.cli.console import clean_errors
from ditas_export.conditions.labels import ClassLabels
from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.sampling import sample
from ditas_export.dit.model import DiT
from ditas_export.errors import CalibrationError
from ditas_export.evaluation.metrics import snr_db
from ditas_export.families.identity import identity_of
from ditas_export.families.load import BUNDLED_MODEL, LoadedModel, load_model
from ditas_export.families.outliers import plant_outliers
from ditas_export.options import ExportOptions
from ditas_export.pipeline import quantization_settings, sampling_precision
from ditas_export.quantization.ranges import Ranges
from ditas_export.runtime.torch_runner import TorchRunner

FIRST_EVALUATION_SEED = 1000
"""Evaluation samples noise that calibration did not see."""

CALIBRATION_SAMPLES = 12
WIDE_RANK = 32
"""The paper's rank as a number, not as a share of the width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How the models are calibrated and judged."""

    calibration_steps: int = 50
    calibration_seeds: int = 2
    evaluation_steps: int = 25
    evaluation_seeds: int = 3
    images_per_seed: int = 10
    cfg_scale: float = 1.5

    def __post_init__(self) -> None:
        """Refuse an empty comparison."""
        if min(self.calibration_seeds, self.evaluation_seeds) < 1:
            raise CalibrationError("a comparison takes at least one seed of each kind")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A model to judge, and bits per weight of its block linears where they can be stored."""

    model: DiT
    bits_per_weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One line of the table."""

    key: str
    label: str
    build: Callable[[DiT, CalibrationStates], Candidate]
    calibrated: bool = True  # False: the same whatever the calibration states


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """One model that everything is compared on."""

    name: str
    model: DiT
    states: Sequence[CalibrationStates]  # one per calibration seed
    references: Sequence[Tensor]  # final float latents, one per evaluation seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one row reaches on one subject."""

    row: str
    subject: str
    snr_db: tuple[float, ...]  # evaluation seeds of the first calibration seed, then the next
    bits_per_weight: float | None

    def __str__(self) -> str:
        """Return mean ± standard deviation."""
        mean = statistics.fmean(self.snr_db)
        if len(self.snr_db) == 1:
            return f"{mean:.1f}"
        return f"{mean:.1f} ± {statistics.stdev(self.snr_db):.1f}"


def all_rows() -> tuple[Row, ...]:
    """Return the table's rows, from plain rounding to the float model in BF16."""
    plus = METHODS["ditas-plus"]
    compensated = replace(plus, name="compensated", target_correction=False, low_rank="none")
    no_branch = replace(plus, name="no-low-rank", low_rank="none")
    return (
        _quantized("linear", "linear: plain rounding"),
        _quantized("smoothquant", "smoothquant: smoothing from one time step"),
        _quantized("tas", "tas: smoothing over all time steps, α = 0.5"),
        _quantized("tas-search", "tas-search: + α search"),
        _quantized("ditas", "ditas: + LoRA-AO on the weight error"),
        _quantized("ditas-rank32", "ditas, rank 32", "ditas", rank=WIDE_RANK),
        _quantized("compensated", "tas-search + compensated rounding", compensated),
        _quantized(
            "compensated-low-rank",
            "tas-search + compensated rounding + low rank on the output error",
            replace(compensated, name="compensated-low-rank", low_rank="output-error"),
        ),
        _quantized(
            "no-low-rank",
            "tas-search + compensated rounding + target correction",
            no_branch,
        ),
        _quantized("ditas-plus", "**ditas-plus**: all of these"),
        Row(key="fast", label="ditas-plus, `--fast`", build=_calibrated_fast),
        _quantized(
            "fixed-alpha",
            "ditas-plus, α = 0.5",
            replace(plus, name="fixed-alpha", alpha_search=False),
        ),
        _quantized("rank32", "ditas-plus, rank 32", "ditas-plus", rank=WIDE_RANK),
        _quantized("block16", "ditas-plus, block 16", "ditas-plus", block_size=16),
        _quantized(
            "block16-no-low-rank", "ditas-plus, block 16, no low rank", no_branch, block_size=16
        ),
        _quantized("static", "ditas-plus, static ranges", "ditas-plus", ranges="static"),
        _quantized("w8", "ditas-plus, 8-bit weights", "ditas-plus", weight_bits=8),
        _quantized(
            "w8-static",
            "ditas-plus, 8-bit weights, static ranges",
            "ditas-plus",
            weight_bits=8,
            ranges="static",
        ),
        _quantized("adaln8", "ditas-plus, `--adaln 8`", "ditas-plus", adaln_bits=8),
        _quantized("adaln4", "ditas-plus, `--adaln 4`", "ditas-plus", adaln_bits=4),
        _literal("paper-linear", "the paper's quantizers: LinearQuant"),
        _literal("paper-tas", "the paper's quantizers: + TAS"),
        _literal("paper-tas-search", "the paper's quantizers: + α search"),
        _literal("paper", "the paper's quantizers: + LoRA-AO (all of DiTAS)"),
        _literal("paper-rank32", "the paper's quantizers, rank 32", "paper", rank=WIDE_RANK),
        _literal("published-linear", "the published code's quantizers: plain"),
        _literal("published", "the published code's quantizers: all of DiTAS"),
        _literal(
            "published-rank32",
            "the published code's quantizers, rank 32",
            "published",
            rank=WIDE_RANK,
        ),
        Row(key="bf16", label="the float model in BF16", build=_in_bfloat16, calibrated=False),
    )


def _quantized(
    key: str,
    label: str,
    method: str | Method | None = None,
    *,
    weight_bits: int = 4,
    rank: int | None = None,
    block_size: int | None = None,
    ranges: Ranges = "token",
    adaln_bits: int = 16,
) -> Row:
    """Return a row of `quantize_model`, judged in the forward that every exported file matches."""
    settings = QuantizationSettings(
        method=method or key,
        weight_bits=weight_bits,
        rank=rank,
        block_size=block_size,
        ranges=ranges,
    )

    def build(model: DiT, states: CalibrationStates) -> Candidate:
        quantized = quantize_adaln(quantize_model(model, states, settings), adaln_bits)
        return Candidate(
            model=fake_quantized_model(fold_smoothing(quantized), ranges=ranges),
            bits_per_weight=bits_per_weight(quantized),
        )

    return Row(key=key, label=label, build=build)


def _calibrated_fast(model: DiT, states: CalibrationStates) -> Candidate:
    """Return the model as `--fast` makes it, from states of its own: the same noise and classes."""
    options = ExportOptions(output=Path("out.onnx"), fast=True)
    precision = sampling_precision(options, model.pos_embed.device)
    own = collect_states(
        model,
        replace(states.settings, precision=precision),
        identity=states.identity,
    )
    quantized = quantize_model(model, own, quantization_settings(options))
    return Candidate(
        model=fake_quantized_model(fold_smoothing(quantized), ranges="token"),
        bits_per_weight=bits_per_weight(quantized),
    )


def _literal(key: str, label: str, preset: str | None = None, *, rank: int | None = None) -> Row:
    """Return a row of the paper's own quantizers."""
    found = literal_preset_named(preset or key)

    def build(model: DiT, states: CalibrationStates) -> Candidate:
        return Candidate(model=literal_dit(model, states, found, rank=rank))

    return Row(key=key, label=label, build=build)


def _in_bfloat16(model: DiT, _states: CalibrationStates) -> Candidate:
    """Return the float model in BF16; the sampler stays in float32."""
    return Candidate(model=copy.deepcopy(model).bfloat16(), bits_per_weight=16.0)


def bits_per_weight(quantized: QuantizedModel) -> float:
    """Return bits per weight of the block linears in a float32 file, scales and low rank counted.

    Multipliers are stored as halves; 8-bit weights have none.
    """
    bits = weights = 0
    for linear in quantized.linears.values():
        weight, low_rank = linear.weight, linear.low_rank
        weights += weight.codes.numel()
        bits += weight.bits * weight.codes.numel() + 32 * weight.row_scale.numel()
        if weight.bits == 4:
            bits += 16 * weight.multipliers.numel()
        if low_rank is not None:
            bits += 32 * (low_rank.left_codes.numel() + low_rank.rank)
            bits += 8 * low_rank.right_codes.numel()
    return bits / weights


def pick_rows(rows: Sequence[Row], wanted: str) -> tuple[Row, ...]:
    """Return the rows named in a comma-separated list, `all` for every one, in table order."""
    known = {row.key for row in rows}
    keys = known if wanted == "all" else set(wanted.split(","))
    if odd := sorted(keys - known):
        raise CalibrationError(
            f"no row {', '.join(odd)}; pick from {','.join(r.key for r in rows)}"
        )
    return tuple(row for row in rows if row.key in keys)


def pick_models(loaded: LoadedModel, wanted: str) -> dict[str, DiT]:
    """Return the models named in a comma-separated list of `plain` and `twin`."""
    makers: dict[str, Callable[[], DiT]] = {
        "plain": lambda: loaded.model,
        "twin": lambda: plant_outliers(loaded.model),
    }
    if odd := sorted(set(wanted.split(",")) - set(makers)):
        raise CalibrationError(f"no model {', '.join(odd)}; pick from {','.join(makers)}")
    return {name: makers[name]() for name in makers if name in wanted.split(",")}


def classes_in_turn(model: DiT, count: int) -> tuple[int, ...]:
    """Return one class per image: every class of the model in turn."""
    classes = ClassLabels(model.config)
    return parse_classes(f"0-{classes.count - 1}", conditions=classes, count=count, seed=0)


def prepare(name: str, model: DiT, protocol: Protocol, *, on_step: Callable[[], None]) -> Subject:
    """Sample a model's calibration states and its reference latents."""
    classes = classes_in_turn(model, CALIBRATION_SAMPLES)
    states = [
        collect_states(
            model,
            CalibrationSettings(
                steps=protocol.calibration_steps,
                cfg_scale=protocol.cfg_scale,
                classes=classes,
                seed=seed,
            ),
            identity=identity_of(model),
            on_step=lambda *_: on_step(),
        )
        for seed in range(protocol.calibration_seeds)
    ]
    references = list(final_latents(model, protocol, on_step=on_step))
    return Subject(name=name, model=model, states=states, references=references)


def final_latents(
    model: DiT, protocol: Protocol, *, on_step: Callable[[], None] = lambda: None
) -> Iterable[Tensor]:
    """Yield what a model samples from each evaluation seed."""
    classes = classes_in_turn(model, protocol.images_per_seed)
    for seed in range(protocol.evaluation_seeds):
        yield sample(
            TorchRunner(model),
            classes=classes,
            steps=protocol.evaluation_steps,
            cfg_scale=protocol.cfg_scale,
            seed=FIRST_EVALUATION_SEED + seed,
            on_step=lambda *_: on_step(),
        )


def score(row: Row, subject: Subject, protocol: Protocol, *, on_run: Callable[[], None]) -> Score:
    """Build a row's model from every calibration seed's states, and judge each."""
    found: list[float] = []
    for states in subject.states if row.calibrated else subject.states[:1]:
        candidate = row.build(subject.model, states)
        latents = final_latents(candidate.model, protocol)
        found += [snr_db(*pair) for pair in zip(subject.references, latents, strict=True)]
        on_run()
    return Score(
        row=row.key,
        subject=subject.name,
        snr_db=tuple(found),
        bits_per_weight=candidate.bits_per_weight,
    )


def compare(
    rows: Sequence[Row],
    models: dict[str, DiT],
    protocol: Protocol,
    console: Console,
) -> list[Score]:
    """Score every row on every model; results are also printed to the console as they come."""
    scores = []
    runs = sum(protocol.calibration_seeds if row.calibrated else 1 for row in rows)
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, model in models.items():
            steps = (
                protocol.calibration_seeds
                * protocol.calibration_steps
                * len(sample_batches(CALIBRATION_SAMPLES))
                + protocol.evaluation_seeds * protocol.evaluation_steps
            )
            sampling = progress.add_task(f"{name}: sampling with the float model", total=steps)
            subject = prepare(
                name,
                model,
                protocol,
                on_step=partial(progress.advance, sampling),
            )
            building = progress.add_task(name, total=runs)
            for row in rows:
                progress.update(building, description=f"{name}: {row.key}")
                result = score(row, subject, protocol, on_run=partial(progress.advance, building))
                scores.append(result)
                console.print(f"{name:<6} {row.key:<24} {result} dB", highlight=False)
    return scores


def table(rows: Sequence[Row], subjects: Iterable[str], scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table, one column per model."""
    names = list(subjects)
    cells = {(result.row, result.subject): result for result in scores}
    lines = [
        f"| method | bits per weight | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for row in rows:
        bits = cells[row.key, names[0]].bits_per_weight
        shown = "–" if bits is None else f"{bits:.2f}"
        found = " | ".join(str(cells[row.key, name]) for name in names)
        lines.append(f"| {row.label} | {shown} | {found} |")
    return "\n".join(lines)


def facts(loaded: LoadedModel, protocol: Protocol, *packages: str) -> str:
    """Return what a reader needs to get the same figures: model, protocol, versions, machine."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", *packages)]
    return (
        f"Final-latent SNR against the float32 trajectory with the same noise, dB, mean ± standard "
        f"deviation. {loaded.source}, fingerprint {loaded.identity.fingerprint[:12]}…; DDPM, "
        f"{protocol.evaluation_steps} steps, CFG {protocol.cfg_scale}, "
        f"{protocol.images_per_seed} images per seed, {protocol.evaluation_seeds} evaluation "
        f"seeds from {FIRST_EVALUATION_SEED}; {protocol.calibration_seeds} calibration seeds of "
        f"{CALIBRATION_SAMPLES} samples × {protocol.calibration_steps} steps. ditas-export "
        f"{__version__}, {', '.join(versions)}, Python {platform.python_version()}; "
        f"{processor()}, {torch.get_num_threads()} threads."
    )


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def parse_protocol(args: argparse.Namespace) -> Protocol:
    """Return the protocol that the options ask for."""
    seeds = {
        "calibration_seeds": args.calibration_seeds,
        "evaluation_seeds": args.evaluation_seeds,
    }
    given = {name: count for name, count in seeds.items() if count is not None}
    if not args.quick:
        return Protocol(**given)
    return replace(Protocol(calibration_steps=10, calibration_seeds=1, evaluation_seeds=1), **given)


def write_json(path: Path, protocol: Protocol, scores: Sequence[Score], about: str) -> None:
    """Write every figure, not only the means; atomic."""
    content: dict[str, Any] = {
        "about": about,
        "protocol": asdict(protocol),
        "scores": [asdict(result) for result in scores],
    }
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def common_options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every comparison."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--num-heads", type=int)
    parser.add_argument("--models", default="plain,twin", help="plain, twin or both")
    parser.add_argument("--rows", default="all", help="comma-separated keys")
    parser.add_argument("--quick", action="store_true", help="10 steps and one seed of each kind")
    parser.add_argument("--calibration-seeds", type=int)
    parser.add_argument("--evaluation-seeds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser


def run(args: argparse.Namespace, rows: Sequence[Row], *packages: str) -> None:
    """Compare as the options say, and print the table."""
    torch.set_num_threads(args.threads)
    protocol = parse_protocol(args)
    chosen = pick_rows(rows, args.rows)
    loaded = load_model(args.model, num_heads=args.num_heads)
    models = pick_models(loaded, args.models)
    scores = compare(chosen, models, protocol, Console(stderr=True))
    about = facts(loaded, protocol, *packages)
    print(f"{about}\n\n{table(chosen, models, scores)}")
    if args.json is not None:
        write_json(args.json, protocol, scores, about)


def main() -> None:
    """Compare the methods."""
    parser = common_options(str(__doc__).partition("\n")[0])
    with clean_errors():
        run(parser.parse_args(), all_rows())


if __name__ == "__main__":
    main()
