"""inspect of a base on the command line: its layers, what stays dense and why, and the same as JSON."""

from __future__ import annotations

import json
import re

from tests.cli.conftest import Invoke
from tests.conftest import Run


def test_a_base_is_shown_with_what_stays_dense(run: Run, invoke: Invoke) -> None:
    text = invoke("inspect", run.base, "--exclude", "k_proj").stdout
    assert re.search(r"^  layers to factor +18$", text, re.MULTILINE)
    assert re.search(r"^self_attn\.q_proj  32 x 32\n +0-2 +1,024$", text, re.MULTILINE)
    dense = text.partition("Stays dense")[2]
    assert re.search(r"^model\.layers\.\*\.self_attn\.k_proj +3 +1,536  left out by --targets", dense, re.MULTILINE)
    assert re.search(r"^lm_head +1 +8,320  output head$", dense, re.MULTILINE)


def test_the_json_has_the_same_rows(run: Run, invoke: Invoke) -> None:
    found = json.loads(invoke("inspect", run.base, "--json").stdout)
    assert (found["kind"], len(found["layers"])) == ("base", 21)
    assert {"name": "lm_head", "count": 1, "parameters": 8320, "reason": "output head"} in found["dense"]
    emulator = json.loads(invoke("inspect", run.emulator, "--json").stdout)
    assert emulator["dense"] == found["dense"]
