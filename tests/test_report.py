"""The report of an export: what the page says, that it is one, and that it is safe to send."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from quantized_fixture import TINY
from report_fixture import plain_stats
from typer.testing import CliRunner

from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationStates
from ditas_export.cli import export as export_command
from ditas_export.cli.report import app
from ditas_export.dit.presets import preset_config
from ditas_export.errors import ArtifactError, DitasExportError, ReportError
from ditas_export.evaluation.metrics import snr_db
from ditas_export.families.registry import conditions_of
from ditas_export.generation.pixels import to_pixels
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export
from ditas_export.report import charts, page_file
from ditas_export.report import page as page_module
from ditas_export.report.charts import Chart
from ditas_export.report.markup import Html, escaped, joined, tag
from ditas_export.report.page import page
from ditas_export.report.page_file import PAGE_SIGN, is_report_file, report, write_page
from ditas_export.report.stats import BlockNames, ExportStats


class Parsed(HTMLParser):
    """A page as its elements: names, attributes, and the text within each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        self.texts.append([])
        if name not in {"meta", "img", "br"}:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        self.texts.append([])

    def handle_endtag(self, name: str) -> None:
        assert self.elements[self._open[-1]][0] == name, (name, self.elements[self._open[-1]])
        self._open.pop()

    def handle_data(self, text: str) -> None:
        for index in self._open:
            self.texts[index].append(text)

    def all(self, name: str) -> list[tuple[dict[str, str | None], str]]:
        """Return attributes and text of every element of a name."""
        return [
            (attributes, "".join(text))
            for (found, attributes), text in zip(self.elements, self.texts, strict=True)
            if found == name
        ]

    def text_of(self, identifier: str) -> str:
        """Return the text of the element with an id."""
        (found,) = [
            "".join(text)
            for (_, attributes), text in zip(self.elements, self.texts, strict=True)
            if attributes.get("id") == identifier
        ]
        return found


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    """Export the tiny model with its report, states and quantized model."""
    folder = tmp_path_factory.mktemp("report")
    asked = ExportOptions(
        output=folder / "out.onnx",
        model=str(checkpoint),
        steps=4,
        samples=2,
        rank=2,
        alpha_grid=(0.4, 0.5),
        walk_tokens=100,
        save_artifact=folder / "kept.model",
        save_calibration=folder / "kept.states",
        report=folder / "page.html",
    )
    export(asked)
    return asked


@pytest.fixture(scope="module")
def manifest(exported: ExportOptions) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(exported.manifest_path.read_text())
    return found


@pytest.fixture(scope="module")
def stats(exported: ExportOptions) -> ExportStats:
    return ExportStats.load(exported.stats_path)


@pytest.fixture(scope="module")
def parsed(exported: ExportOptions) -> Parsed:
    assert exported.report is not None
    return Parsed(exported.report.read_text(encoding="utf-8"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn; each figure is its name."""
    for name in ("channel_ranges", "by_time", "heat_map", "along", "weights"):

        def draw(*given: Any, _name: str = name, **_options: Any) -> Chart:
            chart = given[0] if _name == "heat_map" else _name.replace("_", "-")
            return Chart(name=chart, title=_name, description=_name, svg=tag("svg"))

        monkeypatch.setattr(charts, name, draw)
    monkeypatch.setattr(page_module, "sample_grids", lambda *_: tag("div"))


def test_statistics_are_those_of_the_export(
    exported: ExportOptions, manifest: dict[str, Any], stats: ExportStats
) -> None:
    assert exported.save_artifact is not None
    assert exported.save_calibration is not None
    quantized = QuantizedModel.load(exported.save_artifact)
    states = CalibrationStates.load(
        exported.save_calibration, identity=quantized.identity, conditions=conditions_of(TINY)
    )
    assert stats.header.file_sha256 == manifest["file"]["sha256"]
    assert stats.header.linears == tuple(quantized.linears)
    assert stats.header.times == tuple(states.timesteps.tolist())
    assert stats.header.missing == ()
    for name, linear in stats.linears.items():
        assert linear.channel_maxima is not None
        assert torch.equal(linear.channel_maxima, states.input_maxima[name].amax(dim=0))
        assert torch.equal(linear.smoothing_scale, quantized.linears[name].smoothing_scale)
    parts = {name.partition("/")[2]: part for name, part in quantized.proofs.items()}
    assert stats.samples is not None
    assert stats.header.pictures == "pixels"
    finals = [torch.cat([parts[f"{who}-{seed}"].tensors["final"]
                         for seed in manifest["verification"]["seeds"]])
              for who in ("float", "file")]  # fmt: skip
    for found, wanted in zip(
        (stats.samples.reference, stats.samples.quantized), finals, strict=True
    ):
        assert (found.numpy() == to_pixels(wanted)[:8]).all()
    assert list(stats.header.labels) == (manifest["verification"]["classes"] * 2)[:8]


def test_the_trajectory_is_that_of_the_first_seed(
    exported: ExportOptions, manifest: dict[str, Any]
) -> None:
    assert exported.save_artifact is not None
    proofs = QuantizedModel.load(exported.save_artifact).proofs
    parts = {name.partition("/")[2]: part.tensors for name, part in proofs.items()}
    seed = manifest["verification"]["seeds"][0]
    reference, other = parts[f"float-{seed}"], parts[f"file-{seed}"]
    images = len(manifest["verification"]["classes"])
    found = manifest["verification"]["trajectory"]
    assert [point["step"] for point in found] == [0, 5, 10, 15, 20, 25]
    assert torch.equal(reference["latents"][0][:images], other["states"][0]), "the same noise"
    assert found[0]["state_snr_db"] is None
    for index, point in enumerate(found[1:-1], start=1):
        wanted = snr_db(reference["latents"][index][:images], other["states"][index])
        assert point["state_snr_db"] == pytest.approx(wanted, rel=1e-5)  # of six digits
        assert point["time"] == float(reference["timesteps"][index][0])
    assert found[-1]["time"] is None
    last = snr_db(reference["final"], other["final"])
    assert found[-1]["state_snr_db"] == pytest.approx(last, rel=1e-5)
    assert last == pytest.approx(manifest["verification"]["final_latents_snr_db"][0], rel=1e-5)
    singles = [point["single_step_snr_db"] for point in found[:-1]]
    total = manifest["verification"]["single_step_snr_db"]
    assert min(singles) <= total <= max(singles)


def test_the_page_of_an_export_is_that_of_the_command(
    exported: ExportOptions, tmp_path: Path
) -> None:
    assert exported.report is not None
    written = report(exported.manifest_path, tmp_path / "again.html")
    assert written.read_bytes() == exported.report.read_bytes()
    assert is_report_file(written)
    assert not is_report_file(exported.output)


def test_it_says_what_matters_first(parsed: Parsed, manifest: dict[str, Any]) -> None:
    headings = [
        (name, "".join(text))
        for (name, _), text in zip(parsed.elements, parsed.texts, strict=True)
        if re.fullmatch(r"h\d", name)
    ]
    assert [text for name, text in headings if name != "h3"] == [
        f"{manifest['model']['source']}, W4A8",
        parsed.text_of("verdict-heading"),
        "Model, settings and assumptions",
        "Samples: float, quantized, difference",
        "Activations, before and after smoothing",
        "Every linear",
        "Along the trajectory",
        "Weights of the linears that lose most",
        "Bytes and seconds",
        "To repeat it",
    ]
    levels = [int(name[1]) for name, _ in headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    shown = f"{manifest['verification']['final_latents_snr_db_mean']:.1f} dB"
    assert shown in parsed.text_of("verdict")


def test_every_linear_is_listed_with_its_figures(
    parsed: Parsed, manifest: dict[str, Any], stats: ExportStats
) -> None:
    text = parsed.text_of("linears")
    for name, linear in manifest["linears"].items():
        assert name in text
        assert f"{linear['output_snr_db']:.1f}" in text
    rows = [attributes for attributes, _ in parsed.all("td") if "data-value" in attributes]
    assert len(rows) == 8 * len(manifest["linears"])
    first = next(iter(stats.linears.values()))
    assert first.channel_maxima is not None
    assert rows[4]["data-value"] == f"{float(first.channel_maxima.amax()):.9g}"


def test_all_is_there_for_those_who_cannot_see(parsed: Parsed) -> None:
    identifiers = [each["id"] for _, each in parsed.elements if "id" in each]
    assert len(set(identifiers)) == len(identifiers)
    pictures = parsed.all("svg")
    assert len(pictures) == 6
    for attributes, _ in pictures:
        assert attributes["role"] == "img"
        words = [parsed.text_of(each) for each in str(attributes["aria-labelledby"]).split()]
        assert all(len(word) > 15 for word in words)
    images = parsed.all("img")
    assert len(images) == 3
    assert all("from the same noise" in str(attributes["alt"]) for attributes, _ in images)
    tables, captions = parsed.all("table"), parsed.all("caption")
    assert len(tables) == len(captions) == 7
    assert all(text for _, text in captions)
    assert {attributes.get("scope") for attributes, _ in parsed.all("th")} == {"col", "row"}
    assert dict(parsed.elements)["html"]["lang"] == "en"
    links = {str(attributes["href"]) for attributes, _ in parsed.all("a")}
    assert {link.removeprefix("#") for link in links} <= set(identifiers)


def test_the_descriptions_of_the_figures_have_the_numbers(
    parsed: Parsed, manifest: dict[str, Any]
) -> None:
    snr = {name: linear["output_snr_db"] for name, linear in manifest["linears"].items()}
    worst = min(snr, key=lambda name: snr[name])
    assert f"Least {worst}, {snr[worst]:.3g} dB" in parsed.text_of("snr-text")
    points = manifest["verification"]["trajectory"]
    for point in points[1:]:
        assert f"step {point['step']} {point['state_snr_db']:.1f}" in parsed.text_of("along-text")


def test_it_asks_nothing_of_a_network_and_forbids_it(
    parsed: Parsed, exported: ExportOptions
) -> None:
    for name, attributes in parsed.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href"):
                assert str(value).startswith(("data:image/", "#")), (name, key, value)
            assert not key.startswith("on"), (name, key)
    assert not {name for name, _ in parsed.elements} & {"link", "iframe", "object", "form"}
    (policy,) = [
        str(attributes["content"])
        for attributes, _ in parsed.all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    ((_, script),) = parsed.all("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy
    assert exported.report is not None
    raw = exported.report.read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"' )<]+", raw))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names
    assert "@import" not in raw


def test_the_commands_ask_for_the_same_again(
    exported: ExportOptions, parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, code),) = parsed.all("pre")
    words = [shlex.split(line) for line in code.splitlines()]
    assert [line[0] for line in words] == ["ditas-export", "ditas-report", "ditas-sample"]
    assert words[0] == list(exported.command)
    asked = parsed_options(words[0][1:], monkeypatch)
    assert asked == exported


def parsed_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> ExportOptions:
    """Return the options that the command makes of its words."""
    seen: list[ExportOptions] = []

    def run(options: ExportOptions, *_: Any, **__: Any) -> Any:
        seen.append(options)
        raise typer.Exit

    monkeypatch.setattr(export_command, "_run", run)
    result = CliRunner().invoke(export_command.app, words)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_option_goes_into_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(
        output=tmp_path / "a file.onnx",
        model="a model",
        no_null_class=True,
        classes="3,7",
        a=8,
        w=4,
        rank=0,
        fast=True,
        alpha_grid=(0.0, 0.25),
        cfg_scale=1.5,
        seed=0,
        target="tensorrt",
        min_db=-3.0,
    )
    assert parsed_options(list(options.command[1:]), monkeypatch) == options


HOSTILE = [
    "<script>window.hit = 1</script>",
    "\"><img src=x onerror='window.hit = 1'>",
    "</title></style></script><b>",
    "]]></svg><svg onload=window.hit=1>--><b>",
    "&lt;b&gt; &amp; <!-- ",
    "$\\frac{1}{$ \\d {{7*7}}",
    "\u202eevil\u2066 \x1b[31m \x07",
    "x" * 3000,
]


def with_strings(
    manifest: dict[str, Any], stats: ExportStats, text: str
) -> tuple[dict[str, Any], ExportStats]:
    """Return an export whose texts, and names of blocks, others have chosen."""
    changed = copy.deepcopy(manifest)
    path = f"blocks.{text}"
    blocks = [BlockNames(path=f"{path}{index}", linears=block.linears)
              for index, block in enumerate(stats.header.blocks)]  # fmt: skip
    renamed = dict(
        zip(
            stats.header.linears,
            [f"{block.path}.{linear}" for block in blocks for linear in block.linears],
            strict=True,
        )
    )
    changed["linears"] = {renamed[name]: linear for name, linear in manifest["linears"].items()}
    changed["model"]["source"] = changed["file"]["name"] = changed["file"]["layout"] = text
    changed["model"]["config"]["process"] = {text: text}
    changed["settings"]["method"] = changed["versions"]["torch"] = text
    changed["versions"][text] = "1"
    changed["verified"], changed["not_verified_because"] = False, text
    changed["noise_check"] |= {"passes": False, "finding": text}
    changed["float_linears"] = [text]
    changed["verification"]["kept_with_artifact"] = [text]
    changed["seconds"][text] = 1.0
    changed["bytes_by_part"][text] = 1
    header = replace(
        stats.header,
        blocks=tuple(blocks),
        notes=(text,),
        command=("ditas-export", text),
        missing=(text,),
    )
    return changed, replace(
        stats,
        header=header,
        linears={renamed[name]: each for name, each in stats.linears.items()},
        maps={renamed[name]: each for name, each in stats.maps.items()},
        weights={renamed[name]: each for name, each in stats.weights.items()},
    )


DRAWN = {"g", "path", "defs", "use", "clippath", "rect", "image", "text", "tspan"}
"""Elements of a figure: how many there are is a matter of its numbers' and names' lengths."""


def shape(found: Parsed) -> list[tuple[str, tuple[str, ...]]]:
    """Return the elements of a page and the names of their attributes, figures apart."""
    return [(name, tuple(attributes)) for name, attributes in found.elements if name not in DRAWN]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_others_is_text(manifest: dict[str, Any], stats: ExportStats, text: str) -> None:
    """The page has the same elements and attributes as with a harmless word."""
    harmless, found = (
        Parsed(PAGE_SIGN + page(*with_strings(manifest, stats, word))) for word in ("word", text)
    )
    assert shape(found) == shape(harmless)
    ((_, heading),) = found.all("h1")
    if text.isprintable():
        assert heading == f"{text}, W4A8"
        assert text in found.text_of("settings")
        assert text in found.text_of("linears")
    else:
        assert "\\u202e" in heading
        assert not {"\u202e", "\x1b", "\x07"} & set("".join(map("".join, found.texts)))


def test_text_of_others_is_text_in_figures(manifest: dict[str, Any], stats: ExportStats) -> None:
    text = "".join(each[:40] for each in reversed(HOSTILE[:-1]))
    found = Parsed(PAGE_SIGN + page(*with_strings(manifest, stats, text)))
    names = {name for name, _ in found.elements}
    assert not names & {"b", "object", "iframe"}
    assert len(found.all("script")) == 1
    assert len(found.all("img")) == 3
    for _, attributes in found.elements:
        assert not {key for key in attributes if key.startswith("on")}
    assert len(found.all("svg")) == 6


@pytest.mark.usefixtures("quick")
def test_half_a_character_is_written_out(manifest: dict[str, Any], stats: ExportStats) -> None:
    """JSON may hold what no UTF-8 does."""
    changed = copy.deepcopy(manifest)
    changed["model"]["source"] = "\ud800"
    assert "\\ud800, W4A8" in page(changed, stats).encode().decode()


def test_what_enters_markup_is_escaped() -> None:
    assert tag("a", "<&>", href='"<', aria_label="'") == (
        '<a href="&quot;&lt;" aria-label="&#x27;">&lt;&amp;&gt;</a>'
    )
    assert joined("<", Html("<b>"), tag("br")) == "&lt;<b><br>"
    assert escaped(Html("<i>")) == "<i>"
    assert tag("p", class_=None) == "<p></p>"


VERDICTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "good": (lambda m: m.update(verified=True, far_from_float=False), "good", "Proved: the file"),
    "far": (lambda m: m.update(verified=True, far_from_float=True), "bad", "Proved, but far from"),
    "rejected": (
        lambda m: m.update(verified=False, not_verified_because="odd"), "bad", "Do not deploy",
    ),
    "not run": (
        lambda m: (m.update(verified=False, not_verified_because="no runtime"),
                   m["verification"].update(runtime=None, final_latents_snr_db_mean=None)),
        "fair", "Not proved",
    ),
    "not finite": (
        lambda m: m["verification"].update(not_finite="step 3: NaN"), "bad", "Do not use",
    ),
    "equal": (
        lambda m: (m.update(verified=True), m["verification"].update(
            final_latents_snr_db_mean=None, final_latents_snr_db_interval=[None, None])),
        "good", "Proved: the file",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_verdict_is_that_of_the_export(
    manifest: dict[str, Any], stats: ExportStats, verdict: str
) -> None:
    change, tone, words = VERDICTS[verdict]
    changed = copy.deepcopy(manifest)
    change(changed)
    found = Parsed(page(changed, stats))
    (attributes,) = [each for each, _ in found.all("section") if each["id"] == "verdict"]
    assert attributes["class"] == f"verdict {tone}"
    assert found.text_of("verdict-heading").startswith(words)


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_not_what_it_seems_is_named(
    manifest: dict[str, Any], stats: ExportStats
) -> None:
    changed = copy.deepcopy(manifest)
    changed["noise_check"] |= {"passes": False, "finding": "it predicts nothing"}
    assert "Check the model: it predicts nothing" in Parsed(page(changed, stats)).text_of("verdict")


def leaves(value: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of everything in a manifest; of the linears and the trajectory the first."""
    if before:
        yield before
    if isinstance(value, dict):
        for key in list(value)[: 1 if before == ("linears",) else None]:
            yield from leaves(value[key], (*before, key))


@pytest.mark.usefixtures("quick")
def test_manifests_of_others_are_refused_or_shown(
    manifest: dict[str, Any], stats: ExportStats
) -> None:
    shown = tried = 0
    for path in leaves(manifest):
        for value in (None, "x", 10**400, [[]], {"a": {"b": []}}, "absent"):
            changed = copy.deepcopy(manifest)
            place = changed
            for key in path[:-1]:
                place = place[key]
            if value == "absent":
                del place[path[-1]]
            else:
                place[path[-1]] = value
            with contextlib.suppress(ArtifactError):
                page(changed, stats)
                shown += 1
            tried += 1
    assert tried / 4 < shown < tried * 3 / 4, "both happen, and nothing else"


def test_two_exports_are_not_mixed(manifest: dict[str, Any], stats: ExportStats) -> None:
    other = replace(stats, header=replace(stats.header, file_sha256="a" * 64))
    with pytest.raises(ArtifactError, match=r"its statistics are of aaaaaaaaaaaa…"):
        page(manifest, other)
    changed = copy.deepcopy(manifest)
    changed["linears"].popitem()
    with pytest.raises(ArtifactError, match="name different linears"):
        page(changed, stats)


def test_an_export_of_a_kept_model_says_what_it_lacks(
    exported: ExportOptions, tmp_path: Path
) -> None:
    again = ExportOptions(
        output=tmp_path / "out.onnx",
        model=exported.model,
        artifact=exported.save_artifact,
        layout="int8",
    )
    export(again)
    stats = ExportStats.load(again.stats_path)
    assert len(stats.header.missing) == 1
    assert stats.header.times == ()
    assert stats.maps == {}
    assert stats.samples is not None
    found = Parsed(report(again.manifest_path).read_text(encoding="utf-8"))
    assert "Not known here: activations before smoothing" in found.text_of("settings")
    assert "no activations before smoothing" in found.text_of("activations")
    assert len(found.all("svg")) == 4


def test_the_page_of_a_dit_xl_2_is_4_mib_at_most(manifest: dict[str, Any], tmp_path: Path) -> None:
    """Noise for samples, which no picture format makes small."""
    stats = plain_stats(preset_config("DiT-XL/2"), images=5)
    changed = copy.deepcopy(manifest)
    linear = next(iter(manifest["linears"].values()))
    changed["linears"] = dict.fromkeys(stats.header.linears, linear)
    changed["file"]["sha256"] = stats.header.file_sha256
    write_page(tmp_path / "page.html", changed, stats)
    assert 2**20 < (tmp_path / "page.html").stat().st_size <= 4 * 2**20


def run(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_the_command_says_what_it_wrote(exported: ExportOptions, tmp_path: Path) -> None:
    for path in (exported.manifest_path, exported.stats_path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    code, out = run(tmp_path / "out.json")
    assert code == 0, out
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/out\.html +\(\d+ KiB\)\n", out)
    assert run(tmp_path / "out.json", "--quiet") == (0, ""), "its own kind is replaced"


def refused(*words: str | Path) -> str:
    code, out = run(*words)
    assert code == 2, out
    (line,) = out.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_the_command_refuses(exported: ExportOptions, tmp_path: Path) -> None:
    copied = tmp_path / "out.json"
    assert "is no readable manifest" in refused(copied)
    copied.write_text("{}")
    assert "is no manifest; name the out.json" in refused(copied)
    copied.write_text('{"format": "ditas-export manifest 1"}')
    assert "this version of ditas-export reads ditas-export manifest 2" in refused(copied)
    copied.write_bytes(exported.manifest_path.read_bytes())
    assert "out.stats.safetensors is not there" in refused(copied)
    statistics = tmp_path / "out.stats.safetensors"
    statistics.write_bytes(exported.stats_path.read_bytes()[:-7])
    assert "cut short" in refused(copied)
    statistics.write_bytes(exported.stats_path.read_bytes())
    assert "would be replaced by report" in refused(copied, "-o", copied)
    assert "would be replaced by report" in refused(copied, "-o", statistics)
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<!doctype html><p>years of work")
    assert "is no earlier report of ditas-export" in refused(copied, "-o", thesis)
    assert "does not exist" in refused(copied, "-o", tmp_path / "no" / "page.html")
    assert thesis.read_text() == "<!doctype html><p>years of work"
    assert not (tmp_path / "out.html").exists()


def test_a_report_without_matplotlib_is_refused_before_the_work(
    exported: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else find_spec(name, *rest)

    monkeypatch.setattr(page_file.importlib.util, "find_spec", absent)
    message = r"a report needs matplotlib: pip install 'ditas-export\[report\]'"
    with pytest.raises(ReportError, match=message):
        report(exported.manifest_path, tmp_path / "page.html")
    seen: list[str] = []
    asked = replace(exported, output=tmp_path / "out.onnx", report=tmp_path / "page.html")
    with pytest.raises(DitasExportError, match=message):
        export(asked, on_progress=lambda stage, *_: seen.append(stage))
    assert seen == []
    assert list(tmp_path.iterdir()) == []
