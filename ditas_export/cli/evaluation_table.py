"""The table that `ditas-eval` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditas_export.evaluation.bootstrap import Figure
from ditas_export.evaluation.evaluate import Evaluation

_ROWS = {
    "psnr_db": ("PSNR, dB", "higher", ".2f"),
    "ssim": ("SSIM", "higher", ".4f"),
    "lpips": ("LPIPS", "lower", ".4f"),
    "fid": ("FID", "lower", ".4g"),
    "sfid": ("sFID", "lower", ".4g"),
    "kid": ("KID", "lower", ".3g"),
    "precision": ("precision", "higher", ".4f"),
    "recall": ("recall", "higher", ".4f"),
}
"""Figure -> its name, which side is better, and how it is written."""


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the figures that there are, what they are of, and why others are missing."""
    options = evaluation.options
    title = escape(f"{options.samples} against {options.reference}")
    table = Table(title=title)
    for title in ("figure", "value", "95 % interval", "better"):
        table.add_column(title, justify="left" if title in ("figure", "better") else "right")
    for name, figure in evaluation.figures.items():
        if figure is not None:
            label, better, form = _ROWS[name]
            table.add_row(label, f"{figure.value:{form}}", _interval(figure, form), better)
    console.print(table)
    counts = [
        "moments alone" if number is None else f"{number} images"
        for number in (evaluation.images, evaluation.reference_images)
    ]
    lines = [f"{counts[0]} against {counts[1]}; features: {evaluation.features}", *evaluation.notes]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _interval(figure: Figure, form: str) -> str:
    """Return an interval as it is shown."""
    if figure.interval is None:
        return ""
    low, high = figure.interval
    return f"{low:{form}} to {high:{form}}"
