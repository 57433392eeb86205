"""The tables that `ditas-compare` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditas_export.diffusion.sampling import REMEDY
from ditas_export.diffusion.schedules import time_words
from ditas_export.evaluation.compare import Comparison, Differences
from ditas_export.evaluation.metrics import Difference


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the outputs step by step and in total, the first diverging linear, the worst ones."""
    options, linears = comparison.options, comparison.linears
    for output in comparison.outputs:
        console.print(_step_table(comparison, output))
    if linears:
        console.print(_worst_table(comparison))
        console.print(_divergence(comparison, linears), highlight=False, soft_wrap=True)
    if comparison.not_finite_timestep is not None:
        console.print(
            f"[bold red]{escape(str(options.model))} puts out NaN or infinity[/], first at "
            f"{time_words(comparison.not_finite_timestep)}; {REMEDY}",
            highlight=False,
            soft_wrap=True,
        )
    if comparison.matches is not None:
        word = "reaches" if comparison.matches else "[bold red]misses[/]"
        console.print(
            f"total {comparison.total_db:.1f} dB {word} the {options.threshold_db:g} dB asked for",
            highlight=False,
        )


def _step_table(comparison: Comparison, output: str) -> Table:
    """Return the figures of one output at every time step, and in total."""
    options = comparison.options
    table = Table(title=f"{output} of {options.model} against {options.reference}")
    table.add_column("time")
    _add_figures(table)
    if comparison.linears:
        table.add_column(f"first below {options.linear_db:g} dB")
    rows = [(f"{step.timestep:.6g}", step.outputs, step.linears) for step in comparison.steps]
    for label, outputs, linears in [*rows, ("total", comparison.outputs, comparison.linears)]:
        if label == "total":
            table.add_section()
        diverging = [comparison.first_diverging(linears) or "none"] if linears else []
        table.add_row(label, *_figures(outputs[output]), *diverging)
    return table


def _worst_table(comparison: Comparison) -> Table:
    """Return the linears of lowest SNR."""
    table = Table(title="worst linears, all time steps")
    table.add_column("linear")
    _add_figures(table)
    for name, found in comparison.worst_linears():
        table.add_row(name, *_figures(found))
    return table


def _divergence(comparison: Comparison, linears: Differences) -> str:
    """Say where the linears begin to diverge, and what that means."""
    limit = f"{comparison.options.linear_db:g} dB"
    first = comparison.first_diverging(linears)
    if first is None:
        return f"no linear diverges: none of {len(linears)} is below {limit} over all time steps"
    return (
        f"first diverging linear: {first}, {linears[first].snr_db:.1f} dB; the first of "
        f"{len(linears)} in the order of the network that is below {limit} over all time steps, "
        f"what it inherits from earlier linears included"
    )


def _add_figures(table: Table) -> None:
    """Add the columns that `_figures` fills."""
    for title in ("SNR dB", "max error", "mean error", "relative"):
        table.add_column(title, justify="right")


def _figures(found: Difference) -> tuple[str, str, str, str]:
    """Return the figures of a difference."""
    return (
        f"{found.snr_db:.1f}",
        f"{found.max_abs:.3g}",
        f"{found.mean_abs:.3g}",
        f"{found.relative:.2%}",
    )
