"""Time and error of one layer's emulator against the algorithm of the EMLoC paper, on the same calibration data.

    python -m benchmarks.decomposition                           # the widths of Llama-3.2-1B: six minutes
    python -m benchmarks.decomposition --shapes half-llama-1b    # half of them: one and a half
    python -m benchmarks.decomposition --shapes llama-8b         # in = 14336 takes the paper's algorithm far longer

The reference is written here from the paper (section 3.1): `eigh` of the input Gram, its root and the inverse of
that, an SVD of the whitened weight, and the way back. Both sides run on the same weight and data, alternating, each
up to `--repeats` times but not again after 20 seconds; the smallest time of each counts. Times are CPU seconds of
the process, on one thread by default, so that other load on the machine does not count. An error is
‖X Wᵀ − X W_Eᵀ‖ / ‖X Wᵀ‖ on the data, in float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import record
from emloc_tools.linalg.allocate import uniform_rank
from emloc_tools.linalg.gram import accumulate, smaller_side
from emloc_tools.linalg.lowrank import decompose
from emloc_tools.records import Gram, Layer

SHAPES = {
    "half-llama-1b": [(1024, 1024), (4096, 1024), (1024, 4096)],
    "llama-1b": [(2048, 2048), (8192, 2048), (2048, 8192)],
    "llama-8b": [(4096, 4096), (14336, 4096), (4096, 14336)],
}
DEFAULT = "llama-1b"
LONG = 20.0  # CPU seconds of a pair after which it is not repeated
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def calibration_inputs(tokens: int, features: int) -> torch.Tensor:
    """Correlated inputs (tokens, features): standard deviations i^-0.5 over features, mixed by neighbours, bfloat16."""
    deviations = torch.arange(1, features + 1).float() ** -0.5
    X = torch.randn(tokens, features) * deviations
    return (X + X.roll(1, dims=1) + X.roll(7, dims=1)).bfloat16()


def paper(W: torch.Tensor, gram: Gram, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """W_E as in the paper. Eigenvalues at the rounding level are raised to it, or the root would have no inverse."""
    W, G = W.to(dtype), gram.matrix.to(dtype)
    eigenvalues, Q = torch.linalg.eigh(G)
    root = Q * eigenvalues.clamp(min=float(eigenvalues[-1]) * torch.finfo(dtype).eps).sqrt()
    inverse = torch.linalg.inv(root)
    U, S, Vh = torch.linalg.svd(W @ root, full_matrices=False)
    W_E: torch.Tensor = (U[:, :rank] * S[:rank]) @ (Vh[:rank] @ inverse)
    return W_E


def ours(W: torch.Tensor, gram: Gram, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """W_E of the package."""
    low_rank = decompose(W, rank, gram, dtype=dtype)
    return (low_rank.U * low_rank.S) @ low_rank.Vh


def measure(shape: tuple[int, int], *, ratio: float, tokens: int, repeats: int, dtypes: list[str]) -> dict[str, Any]:
    """CPU seconds and errors of both algorithms on one layer."""
    layer = Layer(f"{shape[0]} x {shape[1]}", *shape, orientation="linear", has_bias=False)
    rank, side = uniform_rank(layer, ratio), smaller_side([layer])
    X = calibration_inputs(tokens, layer.in_features)
    W = (torch.randn(shape) / layer.in_features**0.5).bfloat16()
    Y = X.double() @ W.double().T
    grams = {"paper": _gram(X, "input"), "ours": _gram(X if side == "input" else Y.bfloat16(), side)}
    ways: dict[str, Callable[..., torch.Tensor]] = {"paper": paper, "ours": ours}
    result: dict[str, Any] = {"layer": layer.name, "rank": rank, "side": side}
    for name in dtypes:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        errors: dict[str, float] = {}
        for turn in range(repeats):
            if sum(sum(times) for times in seconds.values()) > LONG:
                break
            for way in sorted(ways, reverse=turn % 2 == 1):
                started = time.process_time()
                W_E = ways[way](W, grams[way], rank, DTYPES[name])
                seconds[way].append(time.process_time() - started)
                if turn == 0:
                    errors[way] = float((Y - X.double() @ W_E.double().T).norm() / Y.norm())
        result[name] = {
            "seconds": seconds,
            "errors": errors,
            "time_ratio": min(seconds["paper"]) / min(seconds["ours"]),
            "error_ratio": errors["ours"] / errors["paper"],
        }
        print(_line(result, name), file=sys.stderr, flush=True)
    return result


def _gram(Z: torch.Tensor, side: str) -> Gram:
    G = torch.zeros(Z.shape[1], Z.shape[1])
    accumulate(G, Z)
    return Gram(G, side, len(Z))  # type: ignore[arg-type]


def _line(result: dict[str, Any], name: str) -> str:
    """One row of the table."""
    r = result[name]
    paper_seconds, own_seconds = min(r["seconds"]["paper"]), min(r["seconds"]["ours"])
    return (
        f"| {result['layer']} | {result['rank']} | {result['side']} | {name} | {paper_seconds:.2f} | {own_seconds:.2f} "
        f"| {r['time_ratio']:.1f} | {r['errors']['paper']:.6f} | {r['errors']['ours']:.6f} | {r['error_ratio']:.7f} |"
    )


def table(about: dict[str, Any], results: list[dict[str, Any]], dtypes: list[str]) -> str:
    """The record as Markdown."""
    return "\n".join(
        [
            "# Decomposition of one layer",
            "",
            record.sentence(about),
            f"{about['tokens']} calibration tokens, ratio {about['ratio']}; CPU seconds on {about['threads']} "
            f"thread(s), best of up to {about['repeats']}.",
            "",
            "| layer (out x in) | rank | Gram | precision | paper, s | ours, s | times faster | error, paper "
            "| error, ours | ours / paper |",
            "|---|--:|---|---|--:|--:|--:|--:|--:|--:|",
            *(_line(result, name) for result in results for name in dtypes),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default=DEFAULT)
    parser.add_argument("--ratio", type=float, default=0.25, help="part of a layer's values to keep, 0 to 1")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = [
        measure(shape, ratio=options.ratio, tokens=options.tokens, repeats=options.repeats, dtypes=options.dtypes)
        for shape in SHAPES[options.shapes]
    ]
    about = record.circumstances("decomposition") | vars(options)
    name = "decomposition" if options.shapes == DEFAULT else f"decomposition-{options.shapes}"
    record.write(name, {**about, "results": results}, table(about, results, options.dtypes))


if __name__ == "__main__":
    main()
