"""matplotlib's figures as SVG inside a page: in the page's own colours and font, and without style attributes.

A page that allows no inline styles, so that no name from a file can bring one, must have them as attributes of SVG.
Figures are drawn in stand-in colours, which become variables of the page's style sheet: one figure for light and dark.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from emloc_tools.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808", "#090909")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"}
VARIABLES |= {color: f"series{number}" for number, color in enumerate(SERIES, 1)}

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a layer's name is a $
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.1,  # inches; slanted labels reach further than they are taken to
    "lines.linewidth": 1.4,
}
REFERENCE = re.compile(r"#([\w.-]+)")
LONG_NUMBER = re.compile(r"(\.\d\d)\d+")  # a hundredth of a pixel is fine enough
STYLE = re.compile(r"\s*([\w-]+)\s*:\s*(.+?)\s*")
FONT = re.compile(r"([\d.]+)px")
DROPPED = ("metadata", "style")


def require_matplotlib() -> None:
    """Raise `UnsupportedError` where matplotlib, which is an extra, is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            'the plots of an HTML report need matplotlib: pip install "emloc-tools[report]", or use --format md or json'
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many pixels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        return Figure(figsize=(width / 72, height / 72), layout="constrained")


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element. `name` begins its ids, and must be another one for each figure of a page."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": name}):  # the same bytes for the same figure
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in DROPPED:
                parent.remove(child)
    for element in root.iter():
        _rewrite(element, name)
    referred = {
        match[1] for element in root.iter() for value in element.attrib.values() for match in REFERENCE.finditer(value)
    }
    for element in root.iter():
        if element.attrib.get("id") not in referred:
            element.attrib.pop("id", None)
    root.attrib = {
        "width": root.attrib["width"].removesuffix("pt"),
        "height": root.attrib["height"].removesuffix("pt"),
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _rewrite(element: ElementTree.Element, name: str) -> None:
    """Plain names, styles as attributes, the page's colours, and ids of this figure alone."""
    element.tag = _local(element.tag)
    element.tail = None if not (element.tail or "").strip() else element.tail
    if element.tag not in ("text", "tspan") and not (element.text or "").strip():
        element.text = None
    found = {_local(key): value for key, value in element.attrib.items()}
    for declaration in found.pop("style", "").split(";"):
        match = STYLE.fullmatch(declaration)
        if match is None:
            continue
        if match[1] == "font":  # family and weight are the page's
            size = FONT.search(match[2])
            found |= {"font-size": size[1]} if size else {}
        else:
            found[match[1]] = match[2]
    for key, value in found.items():
        if key == "id":
            found[key] = f"{name}-{value}"
        elif key in ("d", "x", "y", "transform"):
            found[key] = LONG_NUMBER.sub(r"\1", " ".join(value.split()))
        elif value in VARIABLES:
            found[key] = f"var(--{VARIABLES[value]})"
        elif value.startswith(("#", "url(#")) and key in ("href", "clip-path", "fill", "stroke"):
            found[key] = (
                REFERENCE.sub(lambda match: f"#{name}-{match[1]}", value) if _is_reference(key, value) else value
            )
    element.attrib = found


def _is_reference(key: str, value: str) -> bool:
    return key == "href" or value.startswith("url(")


def _local(name: str) -> str:
    return name.rpartition("}")[2]
