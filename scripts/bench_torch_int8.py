"""Time a DiT-XL/2 in PyTorch alone: float against INT8 linears, as they are and compiled, in turns.

    python scripts/bench_torch_int8.py --device cuda --batch 2 8 32
    python scripts/bench_torch_int8.py --depth 2 --batch 2

Random weights, low-rank branch of rank 32: right for speed, not for quality. Every form is built
once, warmed up for each batch size (which is when compiled forms compile), then timed round by
round. Prints medians and ratios to the compiled float model as a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
from bench_block_pair import cpu_facts
from random_quantized import RANK, randomly_quantized
from torch import Tensor
from torch._dynamo import config as dynamo_config

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.runtime.torch_int8 import compile_for_gpu, int8_model
from ditas_export.runtime.torch_runner import TorchRunner

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

BASE = "float, compiled"
"""The form whose speed is 1."""


def inputs_of(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, time steps and class labels on the device: no form waits for copies."""
    latents = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    steps, labels = torch.full((batch,), 500), torch.arange(batch)
    return latents.to(device), steps.to(device), labels.to(device)


def allow_graphs(count: int) -> None:
    """Let torch compile so many graphs of one forward pass, and have it raise at the next.

    All models share the pass's code, and with it one limit, 8 by default; past it torch would run
    the pass eagerly without a word.
    """
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, count)
    dynamo_config.fail_on_recompile_limit_hit = True


def compiled(model: DiT, device: str) -> DiT:
    """Return the model, compiled as the runner does it on a GPU, or by a CPU's defaults."""
    if device == "cuda":
        compile_for_gpu(model)
    else:
        model.compile(dynamic=False)
    return model


def build_forms(depth: int, dtype: torch.dtype, ranges: str, device: str) -> dict[str, TorchRunner]:
    """Return the four forms of one random model, on the device."""
    model = DiT(DiTConfig(depth=depth))
    randomize(model, seed=0)
    folded = fold_smoothing(randomly_quantized(model), dtype=dtype)
    model = model.to(dtype)
    models = {
        "float": copy.deepcopy(model),
        BASE: compiled(model, device),
        "INT8": int8_model(folded, ranges=ranges),
        "INT8, compiled": compiled(int8_model(folded, ranges=ranges), device),
    }
    return {name: TorchRunner(form, device=device) for name, form in models.items()}


def milliseconds(run: Callable[[], object], runs: int, device: str) -> float:
    """Return the median milliseconds of a forward pass, by CUDA events on a GPU."""
    times = []
    for _ in range(runs):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def time_forms(
    forms: dict[str, TorchRunner], batch: int, rounds: int, runs: int, device: str
) -> dict[str, list[float]]:
    """Return each form's milliseconds, round by round."""
    inputs = inputs_of(batch, device)
    for name, form in forms.items():
        start = time.perf_counter()
        for _ in range(3):
            form(*inputs)
        print(f"batch {batch}: {name} warm after {time.perf_counter() - start:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            times[name].append(milliseconds(lambda form=form: form(*inputs), runs, device))
    return times


def hardware(device: str, threads: int) -> str:
    """Return what the figures were measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{cpu_facts()}, {threads} threads"


def main() -> None:
    """Build the forms, time them in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8, 32], help="rows per pass")
    parser.add_argument("--depth", type=int, default=28, help="blocks")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="float side")
    parser.add_argument("--ranges", choices=("token", "static"), default="token")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=5, help="forward passes per round")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    forms = build_forms(args.depth, DTYPES[args.dtype], args.ranges, args.device)
    allow_graphs(len(forms) * len(args.batch))  # at most, with every form compiled
    rows = []
    for batch in args.batch:
        times = time_forms(forms, batch, args.rounds, args.runs, args.device)
        for name, values in times.items():
            ratios = [base / value for base, value in zip(times[BASE], values, strict=True)]
            spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
            rows.append(f"| {batch} | {name} | {statistics.median(values):.2f} | {spread} |")
    print(f"\nDiT-XL/2 cut to {args.depth} blocks, rows of 256 tokens, {args.ranges} ranges, "
          f"rank {RANK}, {args.dtype} side")  # fmt: skip
    print(f"{hardware(args.device, args.threads)}, python {platform.python_version()}, "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"Speed in times that of `{BASE}`\n\n| rows | form | ms | speed | lowest | highest |")
    print("|---:|---|---:|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
