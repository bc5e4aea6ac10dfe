"""The part of the gain that is closed, against the size of the stand-in: one panel per bed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "transfer"  # the same file from the same figures
# Told apart without colour: by marker and line.
STYLES = {
    "gradient, refined in 4 steps": ("D", "-", "refined gradient", "4 steps"),
    "gradient": ("o", "-", "gradient", "corrected"),
    "adaptive": ("s", "--", "adaptive", "corrected"),
    "paper": ("^", "-.", "paper", "corrected"),
    "plain SVD": ("v", ":", "plain SVD", "corrected"),
    "layers dropped": ("x", ":", "layers dropped", "uncorrected"),
    "magnitudes pruned": ("+", ":", "magnitudes pruned", "uncorrected"),
}


def draw(table: Mapping[tuple[Any, ...], Mapping[str, Any]], base: str, path: Path) -> None:
    """Write the figure of one base as SVG."""
    beds = list(dict.fromkeys(key[1] for key in table if key[0] == base))
    figure, axes = plt.subplots(1, len(beds), figsize=(3.6 * len(beds), 3.4), sharey=True, squeeze=False)
    for axis, bed in zip(axes[0], beds, strict=True):
        for number, (label, (marker, line, kind, variant)) in enumerate(STYLES.items()):
            points = sorted(
                (key[2], value["closed"], value["closed_std"])
                for key, value in table.items()
                if key[:2] == (base, bed) and key[3:] == (kind, variant) and "closed" in value
            )
            if points:
                ratios, closed, spread = zip(*points, strict=True)
                look = {"marker": marker, "linestyle": line, "color": f"C{number}", "capsize": 2, "lw": 1.2}
                axis.errorbar(ratios, closed, spread, label=label, **look)
        axis.axhline(1, color="grey", lw=0.8)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(title=bed, xlabel="ratio")
        axis.set_xticks(sorted({key[2] for key in table if key[:2] == (base, bed) and key[2] is not None}))
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("part of the gain that is closed")
    axes[0][0].set_ylim(bottom=-0.6, top=1.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
