"""Run the demo and record what it measured.

    python -m benchmarks.demo

takes about four minutes on two CPU cores and writes `benchmarks/results/demo.json` and `.md`.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import record
from emloc_tools.cli.demo_report import in_order, score_row, sentences
from emloc_tools.stages.demo import DemoResult, demo


def main() -> None:
    """Run, write, print."""
    with tempfile.TemporaryDirectory(prefix="emloc-demo-") as folder:
        result = demo(
            output=Path(folder) / "demo-run", progress=lambda step: print(step.title, step.detail, flush=True)
        )
    figures = {**record.circumstances("demo"), **asdict(result), "output": "demo-run"}
    record.write("demo", figures, text(figures, result))


def text(figures: dict[str, Any], result: DemoResult) -> str:
    """The demo's table and sentences in Markdown."""
    rows = [score_row(result, score) for score in in_order(result)]
    lines = ["# The demo", "", f"| {' | '.join(rows[0])} |", "|---|---|--:|--:|--:|--:|"]
    lines += [f"| {' | '.join(row.values())} |" for row in rows]
    lines += ["", "Loss in nats per token on held-out text.", *(sentence.strip() for sentence in sentences(result)), ""]
    seconds = f"The whole demo took {result.seconds:.0f} s."
    return "\n".join([*lines, f"{record.sentence(figures)} {seconds}"]) + "\n"


if __name__ == "__main__":
    main()
