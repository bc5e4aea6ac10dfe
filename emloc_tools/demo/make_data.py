"""Make the demo's downstream data: CPython's C headers, far from the Python text that the base has read.

    python -m emloc_tools.demo.make_data --output data

The headers are those of the running interpreter.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import ceil
from pathlib import Path

from tokenizers import Tokenizer

LEAST, MOST = 185, 232  # mean tokens of a header's samples: full, and with room for one long line below 256
HELD_OUT, TRAINING = 60_000, 340_000  # characters
LARGEST = 16_000  # bytes; larger headers are mostly generated tables, and no header should dominate a split


def main() -> None:
    """Write train.jsonl and heldout.jsonl, no header in both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).with_name("base") / "tokenizer.json")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    texts = list(header_texts())
    random.Random(options.seed).shuffle(texts)
    cut = (list(samples(text, tokenizer)) for text in texts)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, characters in (("heldout", HELD_OUT), ("train", TRAINING)):
        write(options.output / f"{name}.jsonl", take(cut, characters))


def header_texts() -> Iterator[str]:
    """The headers of the running interpreter, always in the same order.

    `pyconfig.h` is left out because it describes one machine, and headers with a copyright notice of their
    own so that the PSF licence covers all of the text.
    """
    root = Path(sysconfig.get_path("include"))
    for path in sorted(root.rglob("*.h"), key=lambda path: path.relative_to(root).as_posix()):
        text = path.read_text(encoding="utf-8")
        if path.name != "pyconfig.h" and path.stat().st_size <= LARGEST and "copyright (c)" not in text.lower():
            yield text


def samples(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Cut a header at line ends into samples of about equal length in tokens; together they are the header.

    A header that can only be cut into short samples gives none.
    """
    lines = text.splitlines(keepends=True)
    lengths = [len(line.ids) for line in tokenizer.encode_batch(lines)]
    count = ceil(sum(lengths) / MOST)
    if count == 0 or sum(lengths) / count < LEAST:
        return
    middles = [sum(lengths[:i]) + length / 2 for i, length in enumerate(lengths)]
    places = [int(middle * count / sum(lengths)) for middle in middles]
    for _, group in groupby(zip(places, lines, strict=True), key=lambda pair: pair[0]):
        yield "".join(line for _, line in group)


def take(headers: Iterator[list[str]], characters: int) -> Iterator[str]:
    """The samples of whole headers until there are `characters` of them."""
    taken = 0
    while taken < characters:
        for sample in next(headers):
            taken += len(sample)
            yield sample


def write(path: Path, texts: Iterable[str]) -> None:
    """Write one JSON object with a text per line."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(lines)} samples")


if __name__ == "__main__":
    main()
