"""Figures inside a page: no style attributes, the page's colours, text as text, and ids that are theirs alone."""

from __future__ import annotations

from xml.etree import ElementTree

from emloc_tools.reporting.kinds import grids
from emloc_tools.reporting.plots import drawing, heat_map
from emloc_tools.reporting.svg import INK, VARIABLES, to_svg

HOSTILE = "m.0.<script>alert(1)</script>&\"' $x^2$"


def figure(name: str = "figure1") -> str:
    """A figure with a text, a line, a hatched area, and markers, which matplotlib defines once and refers to."""
    with drawing(200, 100) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=INK, marker="o")
        axes.axvspan(0, 1, facecolor="none", hatch="//")
        axes.set_title(HOSTILE)
    return to_svg(drawn, name, 'about "this"')


def test_styles_are_attributes() -> None:
    root = ElementTree.fromstring(figure())
    assert not [element for element in root.iter() if "style" in element.attrib or element.tag == "style"]
    assert {"fill", "stroke"} <= {key for element in root.iter() for key in element.attrib}


def test_colours_are_the_pages_own() -> None:
    text = figure()
    assert "var(--ink)" in text
    assert not [color for color in VARIABLES if color in text]


def test_text_stays_the_text_that_it_was() -> None:
    root = ElementTree.fromstring(figure())
    texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
    assert HOSTILE in texts  # neither markup nor mathematics
    assert root.find(".//script") is None
    assert root.attrib["aria-label"] == 'about "this"'


def test_references_lead_to_ids_of_the_same_figure() -> None:
    first, second = (ElementTree.fromstring(figure(name)) for name in ("figure1", "figure2"))
    for root, name in ((first, "figure1"), (second, "figure2")):
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert len(ids) == len(set(ids)) > 0
        assert all(each.startswith(f"{name}-") for each in ids)
        values = [value for element in root.iter() for value in element.attrib.values()]
        referred = {value.partition("#")[2].rstrip(")") for value in values if value.startswith(("#fig", "url(#"))}
        assert referred == set(ids)


def test_equal_figures_are_equal_bytes() -> None:
    assert figure() == figure()


def test_every_cell_of_a_heat_map_shows_its_number_and_an_empty_one_is_hatched() -> None:
    names = ["m.0.a", "m.0.b", "m.1.a"]
    (grid,) = grids(names)
    shades = {"m.0.a": 0.0, "m.0.b": 1.0, "m.1.a": 0.5}
    drawn = heat_map(grid, shades, {name: f"{value:.2f}" for name, value in shades.items()}, limits=(0, 1))
    root = ElementTree.fromstring(to_svg(drawn, "f", "d"))
    texts = [(element.text or "").strip() for element in root.iter("text")]
    assert [text for text in texts if "." in text] == ["0.00", "1.00", "0.50"]
    assert len(list(root.iter("pattern"))) == 1  # m.1.b does not exist


def test_numbers_in_cells_contrast_with_their_cell() -> None:
    """At least 4.5 to 1, as accessibility guidelines ask, by their formula."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    names = [f"m.{n}.a" for n in range(21)]
    (grid,) = grids(names)
    shades = {name: n / 20 for n, name in enumerate(names)}
    drawn = heat_map(grid, shades, dict.fromkeys(names, "x"), limits=(0, 1))
    root = ElementTree.fromstring(to_svg(drawn, "f", "d"))
    shown = [element for element in root.iter("text") if (element.text or "").strip() == "x"]
    texts = [element.attrib.get("fill", "#000000") for element in shown]  # what SVG takes where nothing is said
    cells = [element.attrib["fill"] for element in root.iter("path") if element.attrib.get("stroke") == "var(--paper)"]
    assert len(texts) == len(cells) == 21
    for text, cell in zip(texts, cells, strict=True):
        dark, light = sorted((luminance(text), luminance(cell)))
        assert (light + 0.05) / (dark + 0.05) > 4.5, (text, cell)
