"""Bases without a head, labelled texts, and what a head reads of them: by stock transformers, a sample at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from tests import pico

LABELS = ["ham", "neither", "spam"]
WIDTH = pico.LLAMA["hidden_size"]


def save_base(folder: Path, family: str) -> None:
    """A random base of a family: those of `pico`, or one that it does not have."""
    if family in pico.CLASSES:
        pico.save_model(folder, family)
        return
    torch.manual_seed(0)
    sizes = {**pico.BERT, "vocab_size": pico.VOCABULARY, "pad_token_id": 0}
    match family:
        case "bert-pooled":
            model = transformers.BertForPreTraining(pico.config("bert"))
        case "roberta":
            # It numbers positions from the padding's id + 1, so that some of them are lost.
            config = transformers.RobertaConfig(**{**sizes, "max_position_embeddings": 140})
            model = transformers.RobertaForMaskedLM(config)
        case "distilbert":
            widths = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
            config = transformers.DistilBertConfig(vocab_size=pico.VOCABULARY, max_position_embeddings=128, **widths)
            model = transformers.DistilBertForMaskedLM(config)
        case "deberta":
            model = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**sizes))
        case "llama-body":
            model = transformers.LlamaModel(pico.config("llama"))
        case "modernbert-mean" | "modernbert-body":
            # Of a sample it takes the mean over tokens, which then goes through a layer that the second one lacks.
            special = {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
            config = transformers.ModernBertConfig(**sizes, **special, classifier_pooling="mean")
            whole = family == "modernbert-mean"
            model = (transformers.ModernBertForMaskedLM if whole else transformers.ModernBertModel)(config)
        case _:
            raise ValueError(family)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    pico.save_tokenizer(folder)


def save_labelled(path: Path, count: int = 36, *, seed: int = 0) -> Path:
    """Texts of 3 to 8 words, as many of each label; which label a text has depends on its first word's place."""
    words = Path(__file__).read_text(encoding="utf-8").split()
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number in range(count):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        first, *others = torch.randint(len(words), (length,), generator=generator).tolist()
        label = number % len(LABELS)
        pick = [first - first % len(LABELS) + label, *others]
        records.append({"text": " ".join(words[place % len(words)] for place in pick), "label": LABELS[label]})
    return pico.write_jsonl(path, records)


def labelled(data: Path, base: Path, max_length: int) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids of every sample, and the number of its label."""
    records = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(record["text"])["input_ids"][:max_length] for record in records]
    return ids, torch.tensor([LABELS.index(record["label"]) for record in records])


def logits_of(model: Any, samples: list[list[int]]) -> torch.Tensor:
    """The logits `(samples, labels)` of a classifier, a sample at a time, so that nothing is padded."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in samples])


def classifier(folder: Path) -> Any:
    """A finished folder as stock transformers loads it, in float64."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")  # fused experts have no float64 kernel
    return model


def last_rows(base: Path, samples: list[list[int]]) -> torch.Tensor:
    """The last row `(samples, width)` of what the base's body gives, float64: what the heads of decoders read."""
    body = transformers.AutoModel.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.cat([body(input_ids=torch.tensor([ids])).last_hidden_state[:, -1] for ids in samples])


def pooled_rows(base: Path, samples: list[list[int]]) -> torch.Tensor:
    """The same of an encoder's pooler."""
    body = transformers.AutoModel.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.cat([body(input_ids=torch.tensor([ids])).pooler_output for ids in samples])


def optimum(X: torch.Tensor, y: torch.Tensor, decay: float, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `W (labels, width)` and `b (labels,)` of least mean cross-entropy + decay/2 ‖W‖², by Newton's method.

    `b` is zero without `bias`; it is not penalised, and so unique up to a constant: its mean is 0 here.
    """
    classes, width = len(LABELS), X.shape[1]

    def objective(theta: torch.Tensor) -> torch.Tensor:
        W = theta[: classes * width].reshape(classes, width)
        b = theta[classes * width :] if bias else torch.zeros(classes, dtype=X.dtype)
        return F.cross_entropy(X @ W.T + b, y) + decay / 2 * W.square().sum()

    theta = torch.zeros(classes * width + (classes if bias else 0), dtype=X.dtype)
    for _ in range(40):
        gradient = torch.autograd.functional.jacobian(objective, theta)
        hessian = torch.autograd.functional.hessian(objective, theta)
        step = torch.linalg.lstsq(hessian, gradient[:, None], driver="gelsd").solution[:, 0]
        size = 1.0
        while objective(theta - size * step) > objective(theta) and size > 1e-9:
            size /= 2
        theta = theta - size * step
        if float(gradient.abs().max()) < 1e-13:
            break
    b = theta[classes * width :] if bias else torch.zeros(classes, dtype=X.dtype)
    return theta[: classes * width].reshape(classes, width), b - b.mean()
