"""Tiny models, tokenizers and data for the tests, made from configurations: no network, fractions of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 260
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def config(family: str) -> Any:
    """The configuration of a family that the tests know."""
    sizes = {**LLAMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    match family:
        case "llama":
            return transformers.LlamaConfig(**sizes)
        case "llama-tied":
            return transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        case "qwen2":
            return transformers.Qwen2Config(**sizes)
        case "qwen3":
            return transformers.Qwen3Config(**sizes, head_dim=8)
        case "gpt2":
            return transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128)
        case "bert":
            return transformers.BertConfig(**BERT)
        case "albert":
            return transformers.AlbertConfig(**{**BERT, "num_hidden_layers": 3}, embedding_size=16)
        case "gemma3":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            return transformers.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=6, layer_types=kinds)
        case "qwen3-moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            return transformers.Qwen3MoeConfig(**sizes, head_dim=8, decoder_sparse_step=1, **experts)
    raise ValueError(family)


CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama-tied": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "albert": "AlbertForMaskedLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
}


def save_model(
    folder: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Save a random model with its tokenizer and return it in evaluation mode. Biases and norms are random too."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[family])(config(family))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name and "wte" not in name:
            parameter.data *= 4  # the default initialisation makes attention nearly uniform
    model = model.to(dtype).eval()
    model.config.dtype = dtype
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 260 tokens with a chat template."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Write records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def save_texts(path: Path, count: int = 12, *, seed: int = 0) -> Path:
    """JSONL of `count` texts of different lengths, of real words in random order."""
    words = Path(__file__).read_text(encoding="utf-8").split()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 14, (count,), generator=generator).tolist()
    picks = [torch.randint(len(words), (length,), generator=generator).tolist() for length in lengths]
    return write_jsonl(path, [{"text": " ".join(words[i] for i in pick)} for pick in picks])


def token_ids(path: Path, folder: Path, max_length: int) -> list[list[int]]:
    """The samples of a JSONL of texts, tokenised independently of the package."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [tokenizer(text)["input_ids"][:max_length] for text in texts]


def save_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def save_lora(folder: Path, emulator: Path, *, seed: int = 0, **options: Any) -> None:
    """Save a PEFT LoRA on an emulator as if it were trained: A and B are random. `options` go to `LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    from emloc_tools import load_emulator

    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    peft = get_peft_model(load_emulator(emulator), LoraConfig(**settings))
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
