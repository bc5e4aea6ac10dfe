"""What every benchmark records beside its figures: the command, the machine, the versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def circumstances(name: str) -> dict[str, Any]:
    """How the running benchmark `name` was started, where, and with which versions."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def sentence(record: Mapping[str, Any]) -> str:
    """The circumstances in one line of Markdown."""
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"`{record['command']}` on {record['machine']}; {versions}."


def write(name: str, record: Mapping[str, Any], text: str) -> None:
    """Write `results/<name>.json` and `.md`, and print the text."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def machine() -> str:
    """Processor, cores that this process may use, and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{model}, {cores} cores, {memory / 1e9:.0f} GB"
