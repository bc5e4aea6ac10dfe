"""Make the demo's base model: a small Llama, pretrained from scratch on the Python standard library's text.

    python -m emloc_tools.demo.make_base --output base

takes about a quarter of an hour on two CPU cores. The text is what the running interpreter ships, so another
version of Python gives another model; another machine or number of threads rounds differently and gives a
similar one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
PAD, EOS = 0, 1
LENGTH = 256  # tokens of a training window
POSITIONS = 512
BATCH = 16
PEAK_RATE = 3e-3
WARM_UP = 60  # steps
SHORTEST = 300  # characters; shorter files are little more than a licence line
HELD_OUT = 0.05  # of the files
# Tests and tables say little about how Python reads; `pydoc_data` comes in as text, not as one quoted string.
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "idlelib",
    "encodings",
    "pydoc_data",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CARD = """---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: code
library_name: transformers
---

# The base model of `emloc-tools demo`

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, byte-level BPE with
{vocabulary:,} tokens, bfloat16), small enough to ship inside the package. It has read Python and little else,
and exists so that the demo can show a base, its emulator and a LoRA without a download. It is of no use as a
language model.

Made by

    python -m emloc_tools.demo.make_base --output base --steps {steps} --seed {seed}

with CPython {python}, torch {torch} and transformers {transformers} on CPU: {steps:,} steps
of {batch} windows of {length} tokens, AdamW, cosine decay from {rate:g}. The text is that interpreter's
standard library (`*.py` without tests, `idlelib`, `encodings` and build data) and the help topics of `pydoc`:
{files} texts, {tokens:,} tokens.

Loss at the end, in nats per token: {training_loss:.3f} on the training text (running mean),
{held_out_loss:.3f} on {held_out_files} held-out texts (the weights rounded to bfloat16, as they are stored).

The text is copyright Python Software Foundation and its contributors, used under the
[PSF License Agreement](https://docs.python.org/3/license.html), which is this model's licence too.
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, train, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 8")
    options = parser.parse_args(arguments)
    texts = list(library_texts())
    random.Random(options.seed).shuffle(texts)
    split = round(len(texts) * (1 - HELD_OUT))
    tokenizer = train_tokenizer(texts[:split])
    training, held_out = encode(texts[:split], tokenizer), encode(texts[split:], tokenizer)
    print(f"{len(texts)} texts, {len(training):,} tokens to train on, {len(held_out):,} held out", flush=True)
    model, loss = pretrain(training, steps=options.steps, seed=options.seed, hidden_size=options.hidden_size)
    save(model, tokenizer, options.output)
    figures = {
        "steps": options.steps,
        "seed": options.seed,
        "files": split,
        "tokens": len(training),
        "held_out_files": len(texts) - split,
        "training_loss": loss,
        "held_out_loss": held_out_loss(options.output, held_out),
    }
    write_card(options.output, model.config, figures, model.num_parameters())
    print(f"held-out loss {figures['held_out_loss']:.3f}", flush=True)


def library_texts() -> Iterator[str]:
    """Source files of the standard library and the help topics of `pydoc`, always in the same order.

    `_sysconfigdata*` is left out because it describes the machine that Python was built on.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if LEFT_OUT & set(path.relative_to(root).parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= SHORTEST:
            yield text
    yield from (topics[name] for name in sorted(topics) if len(topics[name]) >= SHORTEST)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer; the two special tokens get the ids `PAD` and `EOS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(texts: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """All texts as one row of token ids, each text followed by the end token."""
    return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in [*text.ids, EOS]])


def new_model(seed: int, hidden_size: int) -> LlamaForCausalLM:
    """A Llama with random weights; of 3.5 million parameters at a hidden size of 256."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=max(2, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 128),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def pretrain(tokens: torch.Tensor, *, steps: int, seed: int, hidden_size: int) -> tuple[LlamaForCausalLM, float]:
    """Train on random windows of `tokens` in float32; returns the model and the running mean of its loss."""
    model = new_model(seed, hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    average = math.log(VOCABULARY)  # what a model that knows nothing scores
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        loss = next_token_loss(model, tokens[starts + torch.arange(LENGTH + 1)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average += 0.03 * (loss.item() - average)
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {average:.3f}", flush=True)
    return model.eval(), average


def rate_factor(step: int, steps: int) -> float:
    """Part of the peak learning rate at `step`: linear warm-up, then cosine decay to a twentieth."""
    return min(1.0, (step + 1) / WARM_UP) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the next token over windows `(batch, length + 1)`."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(folder: Path, tokens: torch.Tensor) -> float:
    """Loss of the saved model, so with its rounded weights, over every whole window of `tokens`."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = tokens.unfold(0, LENGTH + 1, LENGTH)
    sums = [next_token_loss(model, batch) * len(batch) for batch in torch.split(windows, BATCH)]
    return float(torch.stack(sums).sum() / len(windows))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model in bfloat16 and its tokenizer."""
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(output)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=POSITIONS
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(output)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_card(output: Path, config: LlamaConfig, figures: dict[str, float], parameters: int) -> None:
    """Write the model card."""
    card = CARD.format(
        **figures,
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=VOCABULARY,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        batch=BATCH,
        length=LENGTH,
        rate=PEAK_RATE,
    )
    (output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
