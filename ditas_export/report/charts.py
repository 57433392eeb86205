"""Figures of a report as SVG by matplotlib: colours of the page, text as text, no fixed size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from ditas_export.plain_text import visible
from ditas_export.report.markup import Html, tag
from ditas_export.report.stats import LinearStats, WeightPictures, pooled

INK, MUTED, LINE, BEFORE, AFTER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""What stands for a colour of the page until the figure is in it, where it is dark in the dark."""

_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
}

_STYLE: Any = {  # matplotlib lists its names as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "ditas-export",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "font.family": "sans-serif",
}

WIDTH = 10.0
"""Of a figure, in inches of 72 units."""

MOST_POINTS = 384
"""Channels of a curve; more are pooled by their largest."""

LONGEST_LABEL = 44
"""Characters of a name in a figure."""

_LUMINANCE = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure with the words that stand for it."""

    name: str  # unique in a page; letters and dashes
    title: str
    description: str  # what a reader sees who cannot see it
    svg: Html


def _chart(name: str, title: str, description: str, figure: Figure) -> Chart:
    """Return a figure as SVG that fits into the page."""
    text = StringIO()
    canvas: Any = FigureCanvasSVG(figure)  # it has no types
    canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    for stands_for, colour in _COLOURS.items():
        svg = svg.replace(stands_for, colour)
    svg = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None  # matplotlib writes one
    start = (
        f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-labelledby="{name}-title {name}-text">'
    )
    words = tag("title", title, id=f"{name}-title") + tag("desc", description, id=f"{name}-text")
    return Chart(
        name=name,
        title=title,
        description=description,
        svg=Html(start + words + svg[svg.index(">") + 1 :]),
    )


def _label(name: str) -> str:
    """Return a name of others as a figure takes it: visible, on one line, and short."""
    text = visible(" ".join(name.split()))
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def _pooled_curve(values: Tensor) -> np.ndarray[Any, Any]:
    """Return channel maxima, `MOST_POINTS` at most."""
    curve: np.ndarray[Any, Any] = pooled(values[None], 1, MOST_POINTS)[0].numpy()
    return curve


def in_medians(maxima: Tensor) -> Tensor:
    """Return channel maxima in units of their median, (K,); of the largest where that is 0."""
    unit = float(maxima.median()) or float(maxima.amax()) or 1.0
    return maxima / unit


def channel_ranges(linears: Mapping[str, LinearStats]) -> Chart:
    """Draw what linears read by channel, before and after smoothing: the paper's Figures 1 to 4."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 1.75 * len(linears) + 0.3), layout="constrained")
        rows = figure.subplots(len(linears), 2, squeeze=False, sharey="row")
        told = []
        for (name, linear), axes in zip(linears.items(), rows, strict=True):
            assert linear.channel_maxima is not None  # chosen for having them
            assert linear.smoothed_maxima is not None
            sides = (linear.channel_maxima, linear.smoothed_maxima)
            peaks = [float(in_medians(maxima).amax()) for maxima in sides]
            told.append(f"{name}: from {peaks[0]:.3g} to {peaks[1]:.3g} medians")
            for ax, maxima, colour, peak, when in zip(
                axes, sides, (BEFORE, AFTER), peaks, ("before", "after"), strict=True
            ):
                curve = _pooled_curve(in_medians(maxima))
                channels = np.linspace(0, len(maxima) - 1, len(curve))
                ax.fill_between(channels, curve, step="mid", color=colour, alpha=0.85, linewidth=0)
                ax.set_title(f"{_label(name)}, {when}: largest {peak:.3g} medians")
                ax.margins(x=0)
                ax.set_ylim(bottom=0)
                ax.grid(axis="y", linewidth=0.6)
                ax.set_axisbelow(True)
        for ax in rows[-1]:
            ax.set_xlabel("input channel")
        for ax in rows[:, 0]:
            ax.set_ylabel("max |x| / median")
        return _chart(
            "ranges",
            "Activation ranges by channel, before and after smoothing",
            "Two columns of bar curves, one row for each linear. " + "; ".join(told) + ".",
            figure,
        )


def by_time(
    maps: Mapping[str, Tensor], linears: Mapping[str, LinearStats], times: Sequence[float]
) -> Chart:
    """Draw what linears read by channel and time step, and their ranges by time step."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 1.9 * len(maps) + 0.3), layout="constrained")
        rows = figure.subplots(len(maps), 2, squeeze=False, width_ratios=(3, 2))
        told = []
        for (name, picture), (left, right) in zip(maps.items(), rows, strict=True):
            linear = linears[name]
            shown = np.log10(np.maximum(picture.numpy(), _least(picture)))
            drawn = left.imshow(
                shown,
                aspect="auto",
                interpolation="nearest",
                extent=(0, len(linear.smoothing_scale), len(times), 0),
            )
            left.set_title(f"{_label(name)}: log₁₀ max |x|, before smoothing")
            left.set_ylabel("step, noise first")
            bar = figure.colorbar(drawn, ax=left, pad=0.01)
            bar.outline.set_visible(False)
            steps = np.arange(len(times))
            assert linear.step_maxima is not None  # known with the times
            for values, colour, when, dash in (
                (linear.step_maxima, BEFORE, "before", "-"),
                (linear.step_ranges, AFTER, "after", "--"),
            ):
                largest = float(values.amax()) or 1.0
                right.plot(
                    steps[: len(values)],
                    (values / largest).numpy()[: len(steps)],
                    color=colour,
                    linestyle=dash,
                    label=f"{when}, of {largest:.3g}",
                )
            told.append(_told_of_times(name, linear.step_maxima, times))
            right.set_ylim(0, 1.05)
            right.set_title("range at a step, of the largest")
            right.grid(axis="y", linewidth=0.6)
            right.legend(loc="best")
        rows[-1][0].set_xlabel("input channel")
        rows[-1][1].set_xlabel("step, noise first")
        return _chart(
            "times",
            "Activations by time step",
            "One row for each linear: on the left a map of the largest input by channel and time "
            "step, on the right its range by time step before and after smoothing. "
            + "; ".join(told)
            + ".",
            figure,
        )


def _told_of_times(name: str, values: Tensor, times: Sequence[float]) -> str:
    """Return at which times ranges are largest and least, in words."""
    most, least = int(values.argmax()), int(values.argmin())
    return (
        f"{name}: largest {float(values[most]):.3g} at time {times[most]:.4g}, least "
        f"{float(values[least]):.3g} at time {times[least]:.4g}"
    )


def _least(picture: Tensor) -> float:
    """Return the least value of a picture that is shown: a thousandth of the largest."""
    return (float(picture.amax()) or 1.0) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Values by block and linear, of blocks that have the same linears."""

    blocks: tuple[str, ...]
    linears: tuple[str, ...]  # paths within a block
    values: tuple[tuple[float | None, ...], ...]  # by linear, then by block


def heat_map(
    name: str, title: str, grids: Sequence[Grid], description: str, *, digits: int, unit: str
) -> Chart:
    """Draw values block by linear, the numbers in the cells where they fit."""
    with mpl.rc_context(_STYLE):
        heights = [0.36 * len(grid.linears) + 0.75 for grid in grids]
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        rows = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
        found = [v for grid in grids for row in grid.values for v in row if v is not None]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        for ax, grid in zip(rows, grids, strict=True):
            values = np.array(
                [[math.nan if v is None else v for v in row] for row in grid.values], dtype=float
            )
            drawn = ax.pcolormesh(
                np.ma.masked_invalid(values),
                cmap="viridis",
                vmin=low,
                vmax=max(high, low + 1e-9),
                edgecolors="face",
                linewidth=0.2,
            )
            ax.invert_yaxis()
            ax.set_yticks(
                np.arange(len(grid.linears)) + 0.5, [_label(path) for path in grid.linears]
            )
            every = max(1, math.ceil(len(grid.blocks) / 32))
            shown = range(0, len(grid.blocks), every)
            prefix, labels = _common_prefix(grid.blocks)
            ax.set_xticks(np.array(shown) + 0.5, [_label(labels[index]) for index in shown])
            ax.set_xlabel(f"N of {_label(prefix)}N" if prefix else "block")
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if len(grid.blocks) <= 32:
                _write_numbers(ax, values, drawn, digits)
        bar = figure.colorbar(drawn, ax=list(rows), pad=0.01, aspect=12)
        bar.outline.set_visible(False)
        bar.set_label(unit)
        return _chart(name, title, description, figure)


def _common_prefix(blocks: Sequence[str]) -> tuple[str, list[str]]:
    """Return what all blocks' paths begin with, up to a dot, and the rest of each."""
    start = blocks[0].rpartition(".")[0]
    prefix = f"{start}." if start and all(b.startswith(f"{start}.") for b in blocks) else ""
    return prefix, [block.removeprefix(prefix) for block in blocks]


def _write_numbers(ax: Axes, values: np.ndarray[Any, Any], drawn: Any, digits: int) -> None:
    """Write every value into its cell, black or white, whichever is easier to read."""
    size = 8 if values.shape[1] <= 20 else 5.5
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            ax.text(column + 0.5, row + 0.5, "–", ha="center", va="center", fontsize=size)
            continue
        rgb = np.array(drawn.cmap(drawn.norm(value))[:3])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        is_light = float(linear @ np.array(_LUMINANCE)) > 0.179
        ax.text(
            column + 0.5,
            row + 0.5,
            f"{value:.{digits}f}",
            ha="center",
            va="center",
            fontsize=size,
            color="#000000" if is_light else "#ffffff",
        )


def along(points: Sequence[tuple[int, float | None, float | None]]) -> Chart:
    """Draw how far the file is from float along a trajectory.

    Args:
        points: step, SNR of the state and SNR of a single step, in dB; None: no figure.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        ax = figure.subplots()
        told = []
        for column, colour, dash, mark, label in (
            (1, AFTER, "-", "o", "the state x, errors so far in it"),
            (2, BEFORE, "--", "s", "one step alone, from the float model's x"),
        ):
            known = [(p[0], p[column]) for p in points if p[column] is not None]
            if not known:
                continue
            steps, values = zip(*known, strict=True)
            ax.plot(steps, values, color=colour, linestyle=dash, marker=mark, ms=4, label=label)
            listed = ", ".join(f"step {step} {value:.1f}" for step, value in known)
            told.append(f"{label}: {listed} dB")
        ax.set_xlabel("step of the sampler, noise first")
        ax.set_ylabel("SNR against float, dB")
        ax.grid(axis="y", linewidth=0.6)
        ax.legend(loc="best")
        return _chart(
            "along",
            "SNR along the trajectory",
            "Two lines. " + "; ".join(told or ["no figure was finite"]) + ".",
            figure,
        )


def weights(pictures: Mapping[str, WeightPictures], snr: Mapping[str, float | None]) -> Chart:
    """Draw the weights of linears: before, smoothed, what rounding loses, how codes are used."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 1.75 * len(pictures) + 0.4), layout="constrained")
        rows = figure.subplots(len(pictures), 4, squeeze=False, width_ratios=(3, 3, 3, 2))
        told = []
        for (name, parts), axes in zip(pictures.items(), rows, strict=True):
            largest = [float(each.amax()) for each in (parts.before, parts.smoothed, parts.error)]
            told.append(
                f"{name}: largest weight {largest[0]:.3g}, smoothed {largest[1]:.3g}, rounding "
                f"error {largest[2]:.3g}"
            )
            titles = (f"|W|, up to {largest[0]:.3g}", f"|W · s|, up to {largest[1]:.3g}",
                      f"error, up to {largest[2]:.3g}")  # fmt: skip
            shown = (parts.before, parts.smoothed, parts.error)
            for ax, picture, title in zip(axes, shown, titles, strict=False):
                ax.imshow(picture.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
                ax.set_title(title)
                ax.set_xticks([])
                ax.set_yticks([])
            db = snr.get(name)
            axes[0].set_ylabel(f"{_label(name)}\n{'no figure' if db is None else f'{db:.1f} dB'}")
            codes = parts.codes.numpy()
            most = len(codes) // 2
            axes[3].bar(range(-most, most + 1), codes / max(1, codes.sum()), width=1, color=AFTER)
            axes[3].set_title("share of each code")
            axes[3].set_yticks([])
            axes[3].set_xlim(-most - 0.6, most + 0.6)
        return _chart(
            "weights",
            "Weights of the linears that lose most",
            "One row for each linear: maps of the weight's magnitudes, output channels down and "
            "input channels across, then of the smoothed weight, then of what rounding loses, and "
            "a histogram of the integer codes. " + "; ".join(told) + ".",
            figure,
        )


def figure_of(chart: Chart, caption: str) -> Html:
    """Return a chart as a figure of the page, scrollable where the page is narrow."""
    return tag(
        "figure",
        tag("div", chart.svg, class_="scroll", tabindex="0", role="group", aria_label=chart.title),
        tag("figcaption", tag("strong", f"{chart.title}."), f" {caption}"),
        class_="chart",
        id=f"figure-{chart.name}",
    )
