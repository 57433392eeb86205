"""The report in headless Chromium: it shows, sorts, is readable by all, and asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, find_chromium, opened, require

from ditas_export.options import ExportOptions
from ditas_export.pipeline import export

AXE = Path(__file__).parent / "browser" / "node_modules" / "axe-core" / "axe.min.js"

HOSTILE = "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script>"

EVENTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
"""What a page says where something is wrong, a policy that was broken too."""


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the tiny model under a name that would run code if it were markup."""
    folder = tmp_path_factory.mktemp("page")
    model = folder / f"{HOSTILE.replace('/', '∕')}.safetensors"
    model.write_bytes(checkpoint.read_bytes())
    path = folder / "page.html"
    export(
        ExportOptions(
            output=folder / "out.onnx",
            model=str(model),
            steps=2,
            samples=1,
            method="tas",
            walk_tokens=100,
            report=path,
        )
    )
    return path


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


@pytest.fixture
def shown(chromium: str, written: Path) -> Iterator[Page]:
    with opened(chromium, written.as_uri()) as page:
        page.wait_for("document.readyState === 'complete'")
        yield page


def column(page: Page, index: int) -> list[str]:
    """Return a column of the table of linears as it stands."""
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('table.sortable tbody tr')].map((row) => "
        f"row.cells[{index}].textContent)"
    )
    return found


def test_nothing_is_wrong_and_nothing_is_asked_for(shown: Page, written: Path) -> None:
    assert "tas" in shown.evaluate("document.body.innerText")
    assert shown.evaluate("window.hit") is None
    assert [event for event in shown.events if event["method"] in EVENTS] == []
    asked = [
        event["params"]["request"]["url"]
        for event in shown.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked[0] == written.as_uri()
    assert all(url.startswith("data:image/") for url in asked[1:]), asked
    assert "onerror" in shown.evaluate("document.querySelector('h1').textContent")


def test_every_figure_is_there(shown: Page) -> None:
    sizes = shown.evaluate(
        "[...document.querySelectorAll('svg')].map((svg) => [svg.getBoundingClientRect().width, "
        "svg.getBBox().height, svg.querySelectorAll('text').length])"
    )
    assert len(sizes) == 6
    assert all(width > 500 and height > 50 and texts > 5 for width, height, texts in sizes)
    pictures = shown.evaluate(
        "[...document.querySelectorAll('img')].map((img) => [img.naturalWidth, img.complete])"
    )
    assert len(pictures) == 3
    assert all(width > 100 and complete for width, complete in pictures)


def test_tables_are_sorted_by_mouse_and_by_keyboard(shown: Page) -> None:
    as_written, heads = column(shown, 0), "document.querySelectorAll('table.sortable thead th')"
    shown.evaluate(f"{heads}[1].querySelector('button').click()")
    figures = [float(text) for text in column(shown, 1)]
    assert figures == sorted(figures)
    assert figures != [float(text) for text in column(shown, 1)][::-1]
    assert shown.evaluate(f"{heads}[1].getAttribute('aria-sort')") == "ascending"
    shown.evaluate(f"{heads}[1].querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        shown.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                   windowsVirtualKeyCode=13)  # fmt: skip
    assert [float(text) for text in column(shown, 1)] == sorted(figures, reverse=True)
    assert shown.evaluate(f"{heads}[1].getAttribute('aria-sort')") == "descending"
    shown.evaluate(f"{heads}[0].querySelector('button').click()")
    assert column(shown, 0) == sorted(as_written)
    assert shown.evaluate(f"{heads}[1].getAttribute('aria-sort')") is None


def test_what_has_no_figure_is_last(shown: Page) -> None:
    rows = "document.querySelectorAll('table.sortable tbody tr')"
    shown.evaluate(f"{rows}[0].cells[1].dataset.value = ''")
    first = column(shown, 0)[0]
    for _ in range(2):
        shown.evaluate("document.querySelectorAll('table.sortable thead button')[1].click()")
        assert column(shown, 0)[-1] == first


def test_it_can_be_read_without_scripts(chromium: str, written: Path) -> None:
    with opened(chromium, "about:blank") as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.call("Page.navigate", url=written.as_uri())
        page.wait_for("document.querySelectorAll('svg').length === 6")
        assert page.evaluate("document.querySelectorAll('button').length") == 0
        assert page.evaluate("document.querySelectorAll('tbody tr').length") > 40


def contrast(one: list[float], other: list[float]) -> float:
    """Return the contrast of two colours, sRGB from 0 to 255: WCAG 2.2, relative luminance."""

    def luminance(colour: list[float]) -> float:
        shares = [value / 255 for value in colour[:3]]
        red, green, blue = (
            s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


NUMBERS = "(text) => text.match(/[\\d.]+/g).map(Number)"

FIGURE_COLOURS = f"""
[...document.querySelectorAll('.chart')].flatMap((chart) => {{
  const numbers = {NUMBERS};
  const back = numbers(getComputedStyle(chart.querySelector('.scroll')).backgroundColor);
  const words = [...chart.querySelectorAll('svg text')];
  return words.map((word) => [numbers(getComputedStyle(word).fill), back, word.textContent]);
}})
"""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(shown: Page, colours: str) -> None:
    require(found=AXE.is_file(), what="axe-core")
    shown.prefer(colours)
    shown.evaluate(AXE.read_text(encoding="utf-8"))
    found = shown.evaluate(
        "axe.run().then(({violations, passes}) => ({violations, passes: passes.length}))"
    )
    serious = [
        (each["id"], [node["html"][:200] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert found["passes"] > 20


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_words_in_figures_can_be_read(shown: Page, colours: str) -> None:
    """Numbers in the cells of a heat map are black or white on the cell, whichever is clearer."""
    shown.prefer(colours)
    found = shown.evaluate(FIGURE_COLOURS)
    in_cells = ([0, 0, 0], [255, 255, 255])
    words = [each for each in found if each[0] not in in_cells]
    assert len(words) > 100
    for colour, back, word in words:
        assert contrast(colour, back) >= 4.5, (word, colour, back)
    assert {tuple(back) for _, back, _ in found} == {
        (255, 255, 255) if colours == "light" else (25, 29, 37)
    }


def test_paper_is_white_and_has_no_contents(shown: Page) -> None:
    shown.prefer("dark", media="print")
    back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(255, 255, 255)"
    assert shown.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    printed = shown.call("Page.printToPDF", printBackground=True)["data"]
    assert len(printed) > 10_000


def test_a_telephone_scrolls_down_only(shown: Page) -> None:
    shown.screenshot(360, 700)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    assert json.loads(shown.evaluate("JSON.stringify(innerWidth)")) == 360
