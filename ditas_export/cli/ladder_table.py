"""The tables that `ditas-compare --ladder` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditas_export.evaluation.ladder import Distance, Ladder, Rung

ROUNDING = (
    "rounding: from the fake-quantized forward of the same form, which a rung must compute; of "
    "last bits from the rung itself"
)


def print_ladder(console: Console, ladder: Ladder) -> None:
    """Print every rung, its single steps, and why rungs are missing."""
    console.print(_rungs(ladder))
    console.print(_steps(ladder))
    lines = [
        f"{rung.name} puts out NaN or infinity: {rung.not_finite}"
        for rung in ladder.rungs
        if rung.not_finite
    ]
    for line in [ROUNDING, *lines, *ladder.missing]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rungs(ladder: Ladder) -> Table:
    """Return the figures of every rung from float32, and from what it must compute."""
    title = (
        f"{ladder.source} to {ladder.options.artifact}: dB from float32, final latents of "
        f"{len(_shown(ladder.rungs[0]).final.images_db)} images"
    )
    table = Table(title=escape(title))
    table.add_column("")
    table.add_column("rung")
    for name in ("one step", "final", "95 %", "PSNR", "rounding,\none step", "rounding,\nfinal"):
        table.add_column(name, justify="right")
    for number, rung in enumerate(ladder.rungs, start=1):
        found, own = rung.from_float, rung.from_that
        figures = _figures(found) if found else ("",) * 4
        rounding = _figures(own)[:2] if own else ("",) * 2
        table.add_row(str(number), rung.name, *figures, *rounding)
    return table


def _figures(distance: Distance) -> tuple[str, ...]:
    """Return the figures of a distance."""
    low, high = distance.final.interval_db
    return (
        f"{distance.single_step_db:.1f}",
        f"{distance.final.mean_db:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{distance.final_psnr_db:.1f}",
    )


def _steps(ladder: Ladder) -> Table:
    """Return the SNR of single steps by time step, a column per rung, by its number."""
    table = Table(title="single steps by time, dB")
    table.add_column("time")
    for number in range(1, len(ladder.rungs) + 1):
        table.add_column(str(number), justify="right")
    for index, timestep in enumerate(ladder.timesteps):
        row = (f"{_shown(rung).steps[index].snr_db:.1f}" for rung in ladder.rungs)
        table.add_row(f"{timestep:.6g}", *row)
    return table


def _shown(rung: Rung) -> Distance:
    """Return how far a rung is from float32, or where that means nothing from itself."""
    found = rung.from_float or rung.from_that
    assert found is not None  # every rung has one
    return found
