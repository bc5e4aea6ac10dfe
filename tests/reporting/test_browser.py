"""The page in a real browser: no complaints, no requests, tables sorted by mouse and keys, both colour schemes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from emloc_tools.reporting.collecting import Report
from emloc_tools.reporting.page import page
from tests.reporting.browser import Page, browser, installed

PROGRAM = installed()
REQUIRED = os.environ.get("EMLOC_BROWSER_TESTS") == "required"  # as `make test-browser` says
pytestmark = pytest.mark.skipif(
    PROGRAM is None and not REQUIRED, reason="no Chromium is installed; `make test-browser` says how to get one"
)

ORDER = """[...document.querySelectorAll("#{section} tbody tr")].map(row => row.cells[{column}].textContent)"""
SORTED = """document.querySelectorAll("#{section} th")[{column}].getAttribute("aria-sort")"""


@pytest.fixture(scope="module")
def file(collected: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the run, as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(collected, title="a run"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One browser for all tests."""
    assert PROGRAM is not None, (
        "no Chromium is installed: apt-get install chromium-headless-shell, or name one in EMLOC_BROWSER"
    )
    with browser(PROGRAM) as tab:
        yield tab


@pytest.fixture
def opened(tab: Page, file: Path) -> Page:
    """The page, newly loaded, its figures and tables unfolded."""
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(file)
    return tab


def test_the_browser_has_nothing_to_complain_of_and_asks_for_nothing(opened: Page, file: Path) -> None:
    assert opened.run("document.title") == "a run"
    assert opened.complaints == []
    assert [address for address in opened.requests if address != "about:blank"] == [file.as_uri()]


def test_what_the_policy_forbids_is_complained_of(tab: Page, file: Path, tmp_path: Path) -> None:
    """The control: with a script, a style and a picture of somebody else's, the browser runs and loads none of them."""
    evil = "<script>document.title = 'evil'</script><p id=p style='color: red'>x</p><img src='other.png'>"
    (tmp_path / "evil.html").write_text(file.read_text(encoding="utf-8").replace("<main>", f"<main>{evil}"))
    tab.complaints.clear()
    tab.open(tmp_path / "evil.html")
    assert tab.run("document.title") == "a run"
    assert tab.run("getComputedStyle(document.getElementById('p')).color") != "rgb(255, 0, 0)"
    assert sum("Content Security Policy" in complaint for complaint in tab.complaints) == 3


def test_all_parts_are_there_and_visible(opened: Page) -> None:
    # Two heat maps and the spectra of the emulator, one heat map of the corrections.
    sizes = opened.run("[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(sizes) == 4
    assert min(sizes) > 50
    assert opened.run("document.querySelectorAll('.chain article').length") == 5
    assert opened.run("document.querySelectorAll('details').length") == 4
    tables = opened.run("[...document.querySelectorAll('section > .scroll table')].map(t => t.offsetHeight)")
    assert len(tables) == 2
    assert min(tables) > 50


def test_a_heading_sorts_its_table_by_value_one_way_and_the_other(opened: Page) -> None:
    section, column = "sizes", 4  # files of KiB and MiB, of which the texts are in another order
    shown = opened.run(ORDER.format(section=section, column=column))
    values = opened.run(
        f"[...document.querySelectorAll('#{section} tbody tr')].map(r => +r.cells[{column}].dataset.value)"
    )
    expected = [text for _, text in sorted(zip(values, shown, strict=True))]
    assert sorted(shown) != expected
    for direction, order in (("ascending", expected), ("descending", expected[::-1])):
        opened.run(f"document.querySelectorAll('#{section} th button')[{column}].click()")
        assert opened.run(SORTED.format(section=section, column=column)) == direction
        assert opened.run(ORDER.format(section=section, column=column)) == order


def test_what_was_not_recorded_comes_last_in_either_direction(opened: Page) -> None:
    for _ in range(2):
        opened.run("document.querySelectorAll('#sizes th button')[3].click()")
        assert opened.run(ORDER.format(section="sizes", column=3))[-1] == "not recorded"


def test_tables_are_sorted_by_keys_alone(opened: Page) -> None:
    before = opened.run(ORDER.format(section="sizes", column=0))
    opened.run("document.querySelector('#sizes .scroll').focus()")  # what comes before its first heading
    opened.press("Tab", 9)
    assert opened.run("document.activeElement.textContent") == "folder"
    opened.press("Enter", 13, "\r")
    after = opened.run(ORDER.format(section="sizes", column=0))
    assert after == sorted(before) != before


@pytest.mark.parametrize("width", [360, 1200])
def test_no_width_makes_the_page_scroll_sideways(tab: Page, file: Path, width: int) -> None:
    tab.open(file, width=width)
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert tab.run("document.documentElement.scrollWidth") == width


def test_figures_do_not_move_what_follows_them(tab: Page, file: Path) -> None:
    """No layout shift, as the browser itself counts it."""
    tab.open(file)
    seen = "done => new PerformanceObserver(list => done(list.getEntries().map(each => each.value)))"
    begun = f"({seen}.observe({{type: 'layout-shift', buffered: true}}))"
    assert tab.run(f"new Promise(done => {{ {begun}(done); setTimeout(() => done([]), 200) }})") == []
    moving = "document.querySelector('h1').style.marginTop = '300px'"  # the control
    assert tab.run(f"new Promise(done => {{ {begun}(done); {moving}; setTimeout(() => done([]), 2000) }})") != []


def _contrast(first: list[float], second: list[float]) -> float:
    def luminance(color: list[float]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_contrasts_with_the_page_in_light_and_dark(tab: Page, file: Path, dark: bool) -> None:
    """4.5 to 1 for text, also that of figures, in both colour schemes, which differ."""
    tab.open(file, dark=dark)

    def color(selector: str, what: str) -> list[float]:
        found = tab.run(f"getComputedStyle(document.querySelector({selector!r})).{what}")
        return [int(part) / 255 for part in found.partition("(")[2].rstrip(")").split(",")[:3]]

    background = color("body", "backgroundColor")
    assert (sum(background) < 1) == dark
    for selector, what in (("h1", "color"), ("nav a", "color"), ("figcaption", "color"), ("figure svg text", "fill")):
        assert _contrast(color(selector, what), background) > 4.5, selector
    assert len(tab.screenshot(whole=False)) > 10_000  # it was painted
