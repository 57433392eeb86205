"""The tables that `ditas-build` prints when it is done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ditas_export.engine.layers import BuiltLinear
from ditas_export.engine.make import MadeEngine
from ditas_export.engine.metadata import metadata_path
from ditas_export.engine.products import PRODUCTS
from ditas_export.engine.report import LayerReport
from ditas_export.onnx_export.form import FileForm


def print_engine(console: Console, made: MadeEngine, plan: Path, *, detailed: bool) -> None:
    """Print what was built and, detailed, what became of every linear and block."""
    metadata = made.metadata
    table = Table(title=f"{plan}  ({metadata.plan_bytes / 2**20:.2f} MiB)", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("built with", f"{PRODUCTS[metadata.product].title} {metadata.version}")
    table.add_row("graph", _graph(metadata.form))
    if made.report is not None:
        _add_summary(table, made.report)
    table.add_row("metadata", str(metadata_path(plan)))
    console.print(table)
    if detailed and made.report is not None:
        console.print(_linear_table(made.report))
        console.print(_block_table(made.report))


def _graph(form: FileForm) -> str:
    """Return the form that was built, and what another float side would give."""
    if not form.is_quantized:
        return f"float, {form.float_type}"
    said = f"for {form.target}, {form.layout}, float side {form.float_type}"
    if form.float_type != "fp32":
        return said
    return f"{said} (fp16 takes fewer kernels: export with --target tensorrt)"


def _add_summary(table: Table, report: LayerReport) -> None:
    """Add the counts of a report."""
    counts: dict[str, int] = defaultdict(int)
    for built in report.linears.values():
        counts[built.kernel] += 1
    products = ", ".join(f"{count} {kernel}" for kernel, count in counts.items())
    table.add_row("quantized linears", products or "none")
    kept = sum(built.keeps_int4 for built in report.linears.values())
    table.add_row("weights kept as INT4", f"{kept} of {len(report.linears)}")
    fused = sum(block.has_fused_attention for block in report.blocks)
    table.add_row("fused attention", f"{fused} of {len(report.blocks)} blocks")
    streams = f", {report.extra_streams} extra streams" if report.extra_streams else ""
    table.add_row("kernels", f"{report.kernels}{streams}")


def _linear_table(report: LayerReport) -> Table:
    """Return one row for all linears of which the same became."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, built in report.linears.items():
        block, _, kind = path.removeprefix("blocks.").partition(".")
        rows[(kind, *_cells(built))].append(block)
    table = Table(title="quantized linears")
    for title in ("linear", "blocks", "multiplied as", "INT4", "shares a kernel with"):
        table.add_column(title)
    for (kind, kernel, int4, neighbours), blocks in rows.items():
        table.add_row(kind, _ranges(blocks), kernel, int4, neighbours)
    return table


def _cells(built: BuiltLinear) -> tuple[str, str, str]:
    """Return the cells of a linear: kernel, whether INT4 is kept, what is fused with it."""
    sides = (
        ("before", built.fused_before),
        ("inside", built.fused_inside),
        ("after", built.fused_after),
    )
    neighbours = (f"{side}: {_operators(nodes)}" for side, nodes in sides if nodes)
    return built.kernel, "yes" if built.keeps_int4 else "no", "\n".join(neighbours)


def _operators(nodes: Iterable[str]) -> str:
    """Return the operators of ONNX nodes, each once: blocks.0/Add_2 is an Add."""
    leaves = {node.rpartition("/")[2] for node in nodes}
    names = {leaf.rstrip("0123456789").removesuffix("_") for leaf in leaves}
    return " ".join(sorted(names))


def _block_table(report: LayerReport) -> Table:
    """Return one row for all blocks of which the same became."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for index, block in enumerate(report.blocks):
        fused = "yes" if block.has_fused_attention else "no"
        rows[(str(block.kernels), fused)].append(str(index))
    table = Table(title="blocks")
    for title in ("blocks", "kernels", "fused attention"):
        table.add_column(title)
    for cells, blocks in rows.items():
        table.add_row(_ranges(blocks), *cells)
    return table


def _ranges(numbers: list[str]) -> str:
    """Return ascending numbers with runs joined: 0-3, 5."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
