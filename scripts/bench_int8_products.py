"""Time the products of a DiT-XL/2's linears alone: what a processor gives, float32 to INT8.

    python scripts/bench_int8_products.py
    python scripts/bench_int8_products.py --tokens 512 --rounds 15

Random operands, no scales, no bias: the ceiling for what a runtime makes of these linears. Float32
by MKL, which torch takes by itself on x86, and by oneDNN where that keeps float32; bfloat16; INT8
by `torch._int_mm`. A round times every kind once. Prints T operations a second by the medians of
the rounds, as a Markdown table: TFLOPS, for INT8 TOPS. A multiply-add counts as two operations.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from bench_block_pair import cpu_facts
from torch.nn import functional

from ditas_export.fast_matmul import fast_float32_matmul, onednn_keeps_float32
from ditas_export.runtime.torch_int8 import integer_product

LINEARS = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}
"""Inputs K and outputs N of a block's linears."""

ROWS = {name: (name,) for name in LINEARS} | {"all four": tuple(LINEARS)}
"""What a row of the table sums up."""

TERA = 1e12

Product = Callable[[], object]


def main() -> None:
    """Time the kinds in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=5, help="products per round")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times: dict[tuple[int, str], dict[str, list[float]]] = {}
    for _ in range(args.rounds):
        for tokens in args.tokens:
            for linear, (width, outputs) in LINEARS.items():
                of_kind = times.setdefault((tokens, linear), {})
                for kind, product in kinds(tokens, width, outputs):
                    of_kind.setdefault(kind, []).append(median_seconds(product, args.runs))
    print(f"{cpu_facts()}, {args.threads} threads, python {platform.python_version()}, "
          f"torch {torch.__version__}")  # fmt: skip
    print("T operations a second (TFLOPS, TOPS), two to a multiply-add\n")
    names = list(next(iter(times.values())))
    print(f"| linear | tokens | {' | '.join(names)} |")
    print(f"|---|{'---:|' * (1 + len(names))}")
    for tokens in args.tokens:
        for title, linears in ROWS.items():
            work = sum(2 * tokens * math.prod(LINEARS[linear]) for linear in linears)
            cells = []
            for name in names:
                seconds = sum(statistics.median(times[tokens, linear][name]) for linear in linears)
                cells.append(f"{work / seconds / TERA:.2f}")
            print(f"| {title} | {tokens} | {' | '.join(cells)} |")


def kinds(tokens: int, width: int, outputs: int) -> Iterator[tuple[str, Product]]:
    """Yield every kind of product with its name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(outputs, width, generator=generator)
    yield "float32, MKL", lambda: functional.linear(x, weight)
    if onednn_keeps_float32():
        yield "float32, oneDNN", fast_float32_matmul()(lambda: functional.linear(x, weight))
    half_x, half_weight = x.bfloat16(), weight.bfloat16()
    yield "bfloat16", lambda: functional.linear(half_x, half_weight)
    codes, rows = (
        torch.randint(-127, 128, matrix.shape, generator=generator, dtype=torch.int8)
        for matrix in (x, weight)
    )
    yield "INT8, torch._int_mm", lambda: integer_product(codes, rows)


def median_seconds(product: Product, runs: int) -> float:
    """Warm a product up and return its median seconds."""
    for _ in range(2):
        product()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
