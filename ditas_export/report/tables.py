"""Tables of a report: facts, shares and what can be sorted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ditas_export.report.markup import Html, joined, tag

LONGEST_LIST = 12
"""Values of a list that are shown."""


def fact_table(caption: str, facts: Sequence[tuple[str, str]]) -> Html:
    """Return names and what they are."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in facts]
    head = tag("thead", tag("tr", tag("th", "what", scope="col"), tag("th", "value", scope="col")))
    return tag("table", tag("caption", caption), head, tag("tbody", *rows), class_="facts")


def flat(
    values: Mapping[str, Any], before: str = "", *, nothing: str = "none"
) -> Iterator[tuple[str, str]]:
    """Yield the leaves of JSON objects within objects, names in words.

    Args:
        values: the outer object.
        before: what its names begin with.
        nothing: what null means.
    """
    for key, value in values.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}, ", nothing=nothing)
        else:
            yield name, nothing if value is None else in_words(value)


def in_words(value: object) -> str:
    """Return a JSON value as a reader wants it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        shown = ", ".join(in_words(each) for each in value[:LONGEST_LIST])
        return f"{shown} … ({len(value)})" if len(value) > LONGEST_LIST else shown or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def share_table(
    caption: str, head: tuple[str, str], values: Mapping[str, float], digits: int
) -> Html:
    """Return amounts by part, a bar for each, and their sum."""
    total, most = sum(values.values()), max(values.values(), default=0) or 1

    def row(name: str, value: float, bar: str | None) -> Html:
        share = f"{100 * value / (total or 1):.0f} %"
        return tag(
            "tr",
            tag("th", name.replace("_", " "), scope="row"),
            tag("td", f"{value:,.{digits}f}", class_="number"),
            tag("td", share, class_="bar" if bar else None, style=bar),
        )

    rows = [row(name, v, f"--share: {100 * v / most:.1f}%") for name, v in values.items()]
    columns = [
        tag("th", head[0], scope="col"),
        tag("th", head[1], scope="col", class_="number"),
        tag("th", "share", scope="col"),
    ]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *columns)),
        tag("tbody", *rows, row("together", total, None)),
    )


def sortable_table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | str | None]]],
    digits: Mapping[str, int],
) -> Html:
    """Return a table whose heads become buttons where scripts run.

    Args:
        caption: of the table.
        columns: the first names the rows.
        rows: a name, and a value for every other column; None: no figure.
        digits: after the point, by column; the columns of numbers are those that it names.
    """

    def cell(column: str, value: float | str | None) -> Html:
        if column not in digits:
            return tag("td", "–" if value is None else str(value))
        text = "–" if value is None else f"{value:.{digits[column]}f}"
        sorts_by = "" if value is None else f"{value:.9g}"
        return tag("td", text, class_="number", data_value=sorts_by)

    heads = [
        tag("th", name, scope="col", class_="number" if name in digits else None)
        for name in columns
    ]
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(cell(column, value) for column, value in zip(columns[1:], values, strict=True)),
        )
        for name, values in rows
    ]
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_="sortable",
    )
    return tag(
        "div", joined(table), class_="scroll", tabindex="0", role="group", aria_label=caption
    )
