"""`emloc-tools verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options
from emloc_tools.errors import EmlocError

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.verify import Verification

CONSUMERS = ("peft", "vllm", "sglang", "llama.cpp", "diffusers")

EXAMPLE = """Examples:

\b
  emloc-tools verify --adapter corrected --base meta-llama/Llama-3.1-8B \\
      --for vllm --for llama.cpp
  emloc-tools verify --adapter lora --base meta-llama/Llama-3.1-8B \\
      --fix --fold-scaling --output lora-fixed
"""


@help.command(epilog=EXAMPLE)
@click.option("--adapter", type=options.FOLDER, required=True, help="LoRA in the files of PEFT or diffusers.")
@options.base_options()
@click.option("--emulator", type=options.FOLDER, help="What the LoRA was trained on, or corrected with.")
@click.option(
    "--for",
    "consumers",
    multiple=True,
    type=click.Choice(CONSUMERS),
    help="Also check what this program reads and refuses; may be given several times.",
)
@click.option("--fix", is_flag=True, help="Write an adapter whose keys have the names that PEFT reads on the base.")
@click.option(
    "--fold-scaling", is_flag=True, help="Write an adapter with one lora_alpha for all pairs, for llama.cpp and SGLang."
)
@click.option("--output", type=options.FOLDER, help="Folder to write; needed with --fix and --fold-scaling.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output of emloc-tools.")
@options.report_options
def verify(
    adapter: Path,
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    emulator: Path | None,
    consumers: tuple[str, ...],
    fix: bool,
    fold_scaling: bool,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that a LoRA applies to a base.

    Key by key: every pair finds its module and has its shape, under the names that PEFT reads and by the modules that
    its configuration means. Exits with status 1 if not. Of the base nothing but the configuration is read.

    With --fix or --fold-scaling it writes an adapter that computes the same and applies. What it knows of each program,
    and from where, is in docs/serving.md.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.verify import verify as run

    result = run(
        adapter=adapter,
        base=base,
        revision=revision,
        trust_remote_code=trust_remote_code,
        emulator=emulator,
        consumers=consumers,
        fix=fix,
        fold_scaling=fold_scaling,
        output=output,
        overwrite=overwrite,
        command=options.command_line(),
    )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result))
    for warning in result.warnings:
        console.warn(warning, hidden=quiet)
    if result.refusal is not None:
        raise EmlocError(result.refusal)


def _draw(out: Console, result: Verification) -> None:
    from emloc_tools.cli import console

    rows: list[tuple[str, Any]] = [
        ("base", f"{result.base} ({result.architecture})"),
        ("corrected", "yes" if result.corrected else "no"),
        ("found by PEFT", f"{result.matching} of {result.tensors} tensors"),
    ]
    rows += [("passed on", f"{count} {kind}") for kind, count in result.passed_on.items()]
    if result.renamed:
        old, new = next(iter(result.renamed.items()))
        rows.append(("renamed", [f"{len(result.renamed)} tensors, such as", old, f"to {new}"]))
    if result.settings:
        rows.append(("set", f"{', '.join(result.settings)} in the configuration"))
    if result.folded:
        rows.append(("multiplied", f"B of {len(result.folded)} pairs, which now have one alpha"))
    console.facts(out, f"Adapter in {result.output or result.adapter}", rows)
    out.print()
    console.layer_table(out, [vars(group) for group in result.groups], to_right=["shape", "rank", "scaling"])
    for each in result.serving:
        console.heading(out, f"\n{each.consumer} ({each.release})")
        for problem in each.problems:
            console.line(out, f"  {problem}")
        for option in each.options if not each.problems else ():
            console.line(out, f"  use: {option}")
        for note in each.notes:
            console.line(out, f"  {note}")
    console.heading(out, f"\n{_verdict(result)}")


def _verdict(result: Verification) -> str:
    if result.problems:
        return "Does not apply to the base"
    if result.refusal is not None:
        return "Applies to the base, but is not served everywhere as it is"
    served = ", ".join(each.consumer for each in result.serving)
    return f"Applies to the base{f', and is served by {served}' if served else ''}"
