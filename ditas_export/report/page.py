"""The report of an export as one page of HTML, from its manifest and its statistics.

The page asks nothing of a network, and forbids itself to. Figures are SVG and follow the reader's
colours; what moves is the sorting of tables alone.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from typing import Any

from ditas_export.errors import ArtifactError
from ditas_export.evaluation.verify import FAR_FROM_FLOAT_DB
from ditas_export.report import charts
from ditas_export.report.charts import Grid, figure_of
from ditas_export.report.facts import Facts
from ditas_export.report.gather import SHOWN_LINEARS, unevenness
from ditas_export.report.markup import Html, joined, tag
from ditas_export.report.pictures import WHAT, sample_grids
from ditas_export.report.stats import BlockNames, ExportStats, LinearStats
from ditas_export.report.tables import fact_table, flat, share_table, sortable_table

_NO_ACTIVATIONS = "This export knows no activations before smoothing"


def page(manifest: Mapping[str, Any], stats: ExportStats) -> Html:
    """Return the page, but for the first lines by which its kind is known.

    Args:
        manifest: what out.json holds; format and types are checked as they are read.
        stats: of the same export.

    Raises:
        ArtifactError: the two are of different exports, or the manifest lacks something.
    """
    facts = Facts(dict(manifest), "out.json")
    export = _Export(facts=facts, stats=stats)
    export.require_one()
    sections = [section for make in _SECTIONS if (section := make(export)) is not None]
    contents = [tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections]
    title = f"{export.model}, {export.bits}"
    script = resources.files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = joined(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · ditas-export"),
        tag("style", Html(style)),
    )
    file = facts.part("file")
    header = tag(
        "header",
        tag("p", "ditas-export · report of an export", class_="eyebrow"),
        tag("h1", title),
        tag("p", "The file ", tag("code", file.text("name")), ", SHA-256 ",
            tag("code", f"{file.text('sha256')[:16]}…"), class_="lead"),
    )  # fmt: skip
    body = joined(
        tag("a", "Skip to the verdict", href="#verdict", class_="skip"),
        header,
        tag("nav", tag("ol", *contents), aria_label="Contents"),
        tag("main", *(section.html for section in sections)),
        tag("footer", tag("p", "Made from the manifest and the statistics that the export left; "
                               "nothing was computed again.")),
        tag("script", Html(script)),
    )  # fmt: skip
    return Html(tag("html", tag("head", head), tag("body", body), lang="en") + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A part of the page with a heading of its own."""

    name: str
    title: str
    html: Html


def _section(name: str, title: str, *children: str, class_: str | None = None) -> _Section:
    """Return a part of the page."""
    heading = tag("h2", title, id=f"{name}-heading")
    html = tag(
        "section", heading, *children, id=name, class_=class_, aria_labelledby=f"{name}-heading"
    )
    return _Section(name=name, title=title, html=html)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """What a page is made from."""

    facts: Facts
    stats: ExportStats

    def require_one(self) -> None:
        """Refuse a manifest and statistics that do not belong together.

        Raises:
            ArtifactError: says what differs.
        """
        recorded = self.facts.part("file").text("sha256")
        if recorded != self.stats.header.file_sha256:
            raise ArtifactError(
                f"out.json is of the file {recorded[:12]}…, its statistics are of "
                f"{self.stats.header.file_sha256[:12]}…; run the export again, or put the two that "
                f"belong together side by side"
            )
        if tuple(self.linears) != self.stats.header.linears:
            raise ArtifactError("out.json and its statistics name different linears; export again")

    @property
    def model(self) -> str:
        """Where the float model came from."""
        return self.facts.part("model").text("source")

    @property
    def bits(self) -> str:
        """Bits of weights and activations, as W4A8."""
        settings = self.facts.part("settings")
        weights, activations = (
            settings.number(f"{what}_bits") for what in ("weight", "activation")
        )
        return f"W{weights:.0f}A{activations:.0f}"

    @property
    def linears(self) -> dict[str, Facts]:
        """What the manifest says of every linear."""
        return self.facts.part("linears").parts()

    @property
    def verified(self) -> Facts:
        """What verification found."""
        return self.facts.part("verification")

    def known_ranges(self) -> dict[str, LinearStats]:
        """Return the most uneven inputs, one for each that is read; none where they are unknown."""
        maps = self.stats.maps
        chosen = {name: self.stats.linears[name] for name in maps}
        return dict(
            sorted(
                chosen.items(),
                key=lambda item: (
                    -unevenness(item[1].channel_maxima)
                    if item[1].channel_maxima is not None
                    else 0.0
                ),
            )[:SHOWN_LINEARS]
        )


def _verdict(export: _Export) -> _Section:
    """Say whether the file is what was calibrated, and how far from float it is."""
    facts, verified = export.facts, export.verified
    final = verified.number_or_none("final_latents_snr_db_mean")
    tone, title, says = _judged(facts, verified, final)
    noise = facts.part("noise_check")
    warning = noise.text_or_none("finding") if not noise.flag("passes") else None
    children = [tag("p", says)]
    if warning is not None:
        children.append(tag("p", tag("strong", "Check the model: "), warning))
    box = _section("verdict", title, *children, class_=f"verdict {tone}")
    tiles = [tag("div", tag("dt", name), tag("dd", value, tag("small", note)))
             for name, value, note in _tiles(export, final)]  # fmt: skip
    return _Section(
        name="verdict", title="Verdict", html=joined(box.html, tag("dl", *tiles, class_="tiles"))
    )


def _judged(facts: Facts, verified: Facts, final: float | None) -> tuple[str, str, str]:
    """Return the tone, the headline and the words of the verdict."""
    why = facts.text_or_none("not_verified_because")
    if verified.text_or_none("not_finite") is not None:
        return "bad", "Do not use: outputs are not finite", verified.text("not_finite")
    if not facts.flag("verified"):
        if verified.text_or_none("runtime") is None:
            return "fair", "Not proved: the file was not run here", why or "no runtime takes it"
        return "bad", "Do not deploy: the file is not what was calibrated", why or ""
    if final is None:
        return (
            "good",
            "Proved: the file computes what was calibrated",
            ("Its final latents have no figure against the float model's: they are equal."),
        )
    words = (
        f"With the same noise its final latents are {final:.1f} dB from the float model's: an "
        f"error of {100 * 10 ** (-final / 20):.2g} % of their amplitude."
    )
    if facts.flag("far_from_float"):
        return (
            "bad",
            "Proved, but far from float: other pictures",
            (
                f"The file computes what was calibrated. {words} Below {FAR_FROM_FLOAT_DB:.0f} dB "
                f"a file is not for use."
            ),
        )
    return "good", "Proved: the file computes what was calibrated", words


def _tiles(export: _Export, final: float | None) -> list[tuple[str, str, str]]:
    """Return the figures of the first screen: name, value, note."""
    facts, verified = export.facts, export.verified
    low, high, *_ = [*verified.numbers("final_latents_snr_db_interval"), None, None]
    images = f"{verified.number('images'):.0f} images"
    if low is not None and high is not None:
        images = f"{low:.1f} to {high:.1f} at 95 %, {images}"
    if final is None and (fakes := verified.numbers("fake_quantized_final_latents_snr_db")):
        known = [each for each in fakes if each is not None]
        final = sum(known) / len(known) if known else None
        images = f"{images}; of the fake-quantized forward"
    single = verified.number_or_none("single_step_snr_db")
    total = sum(_numbers(facts.part("bytes_by_part")).values())
    fake = verified.number_or_none("fake_quantized_single_step_snr_db")
    return [
        ("Final latents against float", _db(final), images),
        ("One step against float", _db(fake if single is None else single), "at the same input"),
        (
            "Bits per weight",
            f"{facts.number('bits_per_weight'):.2f}",
            "of the block linears, all in",
        ),
        ("Tensors of the file", f"{total / 2**20:,.1f} MiB", facts.part("file").text("layout")),
    ]


def _db(value: float | None) -> str:
    """Return decibels in words."""
    return "no figure" if value is None else f"{value:.1f} dB"


def _numbers(facts: Facts) -> dict[str, float]:
    """Return an object of numbers."""
    return {name: facts.number(name) for name, _ in facts.items()}


def _setting(export: _Export) -> _Section:
    """Say which model this is, how it was quantized, and what was assumed."""
    facts, header = export.facts, export.stats.header
    model = facts.part("model")
    settings = dict(facts.part("settings").items())
    taken = [str(each) for each in export.verified.values("kept_with_artifact")]
    notes = [*header.notes, *(f"Not known here: {each}" for each in header.missing)]
    if taken:
        notes.append(f"Taken from the artefact, on its maker's word: samples of {', '.join(taken)}")
    notes.append(f"Linears that stay float: {', '.join(map(str, facts.values('float_linears')))}")
    file = [(name, value) for name, value in flat(dict(facts.part("file").items()))]
    tables = [
        fact_table("Model", [("source", model.text("source")),
                             ("fingerprint", f"{model.text('fingerprint')[:16]}…"),
                             *flat(dict(model.part("config").items()))]),
        fact_table("How it was quantized", list(flat(settings, nothing="by default"))),
        fact_table("File", file),
    ]  # fmt: skip
    return _section(
        "settings",
        "Model, settings and assumptions",
        tag("div", *(tag("div", table) for table in tables), class_="columns"),
        tag("h3", "Found, chosen and assumed"),
        tag("ul", *(tag("li", note) for note in notes)),
    )


def _samples(export: _Export) -> _Section | None:
    """Show samples of both from the same noise."""
    stats = export.stats
    if stats.samples is None or stats.header.pictures is None:
        return None
    labels = ", ".join(map(str, stats.header.labels))
    return _section(
        "samples",
        "Samples: float, quantized, difference",
        tag("p", f"From the same noise, labels in order: {labels}. {WHAT[stats.header.pictures]}"),
        sample_grids(stats.samples, stats.header.pictures, stats.header.labels),
    )


def _activations(export: _Export) -> _Section:
    """Show what linears read."""
    ranges = export.known_ranges()
    title = "Activations, before and after smoothing"
    if not ranges:
        return _section("activations", title, tag("p", f"{_NO_ACTIVATIONS}."))
    stats = export.stats
    return _section(
        "activations",
        title,
        tag("p", "The inputs that are most uneven: a few channels that are much larger than the "
                 "others take the range of all. Smoothing divides each channel by its scale s and "
                 "multiplies the weights by it."),
        figure_of(
            charts.channel_ranges(ranges),
            "Largest magnitude of each input channel over all time steps and samples, in units of "
            f"the median channel. More than {charts.MOST_POINTS} channels are pooled by their "
            "largest.",
        ),
        figure_of(
            charts.by_time({name: stats.maps[name] for name in ranges}, ranges, stats.header.times),
            "The same inputs by time step. Smoothing takes one scale for all steps, from the "
            "largest over them.",
        ),
    )  # fmt: skip


def _grids(blocks: Sequence[BlockNames], values: Mapping[str, float | None]) -> list[Grid]:
    """Return values by block and linear; blocks of other linears are a grid of their own."""
    found = []
    for linears, alike in groupby(blocks, key=lambda block: block.linears):
        paths = [block.path for block in alike]
        rows = tuple(tuple(values[f"{path}.{linear}"] for path in paths) for linear in linears)
        found.append(Grid(blocks=tuple(paths), linears=linears, values=rows))
    return found


def _linears(export: _Export) -> _Section:
    """Show α and SNR of every linear, and list them."""
    blocks, linears = export.stats.header.blocks, export.linears
    snr = {name: each.number_or_none("output_snr_db") for name, each in linears.items()}
    alpha = {name: each.number_or_none("alpha") for name, each in linears.items()}
    where = "Every number is in the table below."
    heat = charts.heat_map(
        "snr", "SNR of each linear's output", _grids(blocks, snr),
        f"Heat map, blocks across and linears down. {_extremes(snr, 'dB')} {where}",
        digits=1, unit="dB",
    )  # fmt: skip
    says = "SNR of the output on the calibration states, errors of all earlier linears included."
    children = [figure_of(heat, says)]
    if any(value is not None for value in alpha.values()):
        chart = charts.heat_map(
            "alpha", "Smoothing exponent α of each linear", _grids(blocks, alpha),
            f"Heat map, blocks across and linears down. {_extremes(alpha, '')} {where}",
            digits=2, unit="α",
        )  # fmt: skip
        children.append(
            figure_of(chart, "0 leaves all difficulty in the activations, 1 moves it to weights.")
        )
    return _section("linears", "Every linear", *children, _linear_table(export, snr, alpha))


def _extremes(values: Mapping[str, float | None], unit: str) -> str:
    """Return the least and the largest value in words."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return "No linear has a figure."
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return f"Least {low}, {known[low]:.3g} {unit}; largest {high}, {known[high]:.3g} {unit}."


def _linear_table(
    export: _Export, snr: Mapping[str, float | None], alpha: Mapping[str, float | None]
) -> Html:
    """Return the list of all linears."""
    digits = {"SNR, dB": 1, "α": 2, "rank": 0, "block": 0, "max |x|": 2, "max |x / s|": 2,
              "unevenness before": 1, "after": 1}  # fmt: skip
    rows = []
    for name, each in export.linears.items():
        linear = export.stats.linears[name]
        before, after = linear.channel_maxima, linear.smoothed_maxima
        values: list[float | str | None] = [
            snr[name],
            alpha[name],
            each.number("rank"),
            each.number("block_size"),
            None if before is None else float(before.amax()),
            float(linear.step_ranges.amax()),
            *(None if side is None else _finite(unevenness(side)) for side in (before, after)),
        ]
        rows.append((name, values))
    caption = "All linears in the order of the network; unevenness: largest over median channel"
    return sortable_table(caption, ["linear", *digits], rows, digits)


def _finite(value: float) -> float | None:
    """Return a number, None where it is infinite."""
    return value if value < float("inf") else None


def _trajectory(export: _Export) -> _Section | None:
    """Show how errors add up while a sampler runs."""
    points = [
        (
            int(point.number("step")),
            point.number_or_none("state_snr_db"),
            point.number_or_none("single_step_snr_db"),
        )
        for point in export.verified.objects("trajectory")
    ]
    if not points:
        return None
    steps = export.verified.number("steps")
    return _section(
        "trajectory",
        "Along the trajectory",
        figure_of(
            charts.along(points),
            f"Of the first seed, {steps:.0f} steps. The state of both starts as the same noise; "
            f"what each step adds stays in it.",
        ),
    )


def _weights(export: _Export) -> _Section:
    """Show the weights that lose most."""
    snr = {name: each.number_or_none("output_snr_db") for name, each in export.linears.items()}
    pictures = dict(sorted(export.stats.weights.items(), key=lambda item: snr.get(item[0]) or 0.0))
    return _section(
        "weights",
        "Weights of the linears that lose most",
        figure_of(
            charts.weights(pictures, snr),
            "Magnitudes, output channels down and input channels across, pooled by their largest. "
            "Bright columns in the second picture are what smoothing moved there.",
        ),
    )


def _parts(export: _Export) -> _Section:
    """Show where the bytes and the seconds are."""
    facts = export.facts
    tables = [
        share_table("Bytes of the file, by part", ("part", "bytes"),
                    _numbers(facts.part("bytes_by_part")), 0),
        share_table("Seconds of the export, by part", ("part", "seconds"),
                    _numbers(facts.part("seconds")), 1),
    ]  # fmt: skip
    return _section(
        "parts",
        "Bytes and seconds",
        tag("div", *(tag("div", table) for table in tables), class_="columns"),
    )


def _again(export: _Export) -> _Section:
    """Say what made this, and how to make it again."""
    facts, header = export.facts, export.stats.header
    file = facts.part("file").text("name")
    stem = file.rpartition(".")[0] or file
    commands = [
        header.command,
        ("ditas-report", f"{stem}.json", "-o", f"{stem}.html"),
        ("ditas-sample", file, "-o", "samples"),
    ]
    versions = [(name, str(value)) for name, value in facts.part("versions").items()]
    return _section(
        "again",
        "To repeat it",
        tag("p", "The export, this page, and samples. The same versions, processor and number of "
                 "threads give the same bytes."),
        tag("pre", tag("code", "\n".join(shlex.join(words) for words in commands))),
        fact_table("Versions", versions),
    )  # fmt: skip


_SECTIONS: tuple[Callable[[_Export], _Section | None], ...] = (
    _verdict,
    _setting,
    _samples,
    _activations,
    _linears,
    _trajectory,
    _weights,
    _parts,
    _again,
)
