"""An encoder, a classifier and an encoder-decoder, trained from a seed in seconds, for the kinds of task that need one.

They have two blocks and one token for each frequent word. Their quality does not matter, because every null hypothesis
of this experiment is true by construction; that they are trained makes their scores depend on the text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
WORDS = re.compile(r"\w+|[^\w\s]+")  # what the tokenizer's Whitespace splits a text into
STEPS, BATCH, LENGTH = 250, 32, 34
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def tokenizer(texts: Iterable[str], size: int, single: str, pair: str) -> Any:
    """A tokenizer of the most frequent words of some texts, with special tokens around one text and around a pair."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in WORDS.findall(text.lower()))
    tokens = [*SPECIAL, *(word for word, _ in counts.most_common(size))]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", bos_token="<s>",
        eos_token="</s>", cls_token="<s>", sep_token="</s>", model_input_names=["input_ids", "attention_mask"],
    )


def trained(model: Any, examples: Sequence[Any], loss: Callable[[Any, list[Any]], torch.Tensor]) -> Any:
    """Train a model on random batches of examples. loss: a function from the model and a batch to its loss."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(STEPS):
        picked = torch.randint(len(examples), (BATCH,), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        loss(model, [examples[i] for i in picked]).backward()
        optimizer.step()
    return model.eval()


def saved(folder: Path, model: Any, words: Any) -> Path:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def masked_model(folder: Path, stories: Sequence[str]) -> Path:
    """A BERT that fills in masked words of stories."""
    from transformers import BertConfig, BertForMaskedLM

    words = tokenizer(stories, 1500, "<s> $A </s>", "<s> $A </s> $B </s>")
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=LENGTH, **SIZE))
    body = [token for story in stories for token in words(story, add_special_tokens=False)["input_ids"]]
    pieces = [torch.tensor([1, *body[i : i + LENGTH - 2], 2]) for i in range(0, len(body) - LENGTH, LENGTH - 2)]
    generator = torch.Generator().manual_seed(2)

    def loss(model: Any, batch: list[Any]) -> torch.Tensor:
        tokens = torch.stack(batch)
        hidden = (torch.rand(tokens.shape, generator=generator) < 0.15) & (tokens > 2)
        labels = torch.where(hidden, tokens, -100)
        return model(input_ids=torch.where(hidden, 4, tokens), labels=labels).loss

    return saved(folder, trained(model, pieces, loss), words)


def classifier(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A BERT that classifies sentences. rows: with "sentence" and "label"."""
    from transformers import BertConfig, BertForSequenceClassification

    words = tokenizer([row["sentence"] for row in rows], 4000, "<s> $A </s>", "<s> $A </s> $B </s>")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=128, num_labels=2, **SIZE)

    def loss(model: Any, batch: list[Any]) -> torch.Tensor:
        encoded = words([row["sentence"] for row in batch], padding=True, return_tensors="pt")
        return model(**encoded, labels=torch.tensor([row["label"] for row in batch])).loss

    return saved(folder, trained(BertForSequenceClassification(config), rows, loss), words)


def encoder_decoder(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A T5 that continues a sentence of a story by the next. rows: with "source" and "target"."""
    from transformers import T5Config, T5ForConditionalGeneration

    words = tokenizer([row["source"] for row in rows], 1500, "$A </s>", "$A $B </s>")
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, n_positions=128,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    ))  # fmt: skip

    def loss(model: Any, batch: list[Any]) -> torch.Tensor:
        source = words([row["source"] for row in batch], padding=True, return_tensors="pt")
        target = words([row["target"] for row in batch], padding=True, return_tensors="pt").input_ids
        return model(**source, labels=torch.where(target == 0, -100, target)).loss

    return saved(folder, trained(model, rows, loss), words)


def next_sentences(stories: Sequence[str], first: int, most: int) -> list[dict[str, Any]]:
    """Pairs of neighbouring sentences, at most `most` of each story. first: the number of the first story."""
    rows = []
    for number, story in enumerate(stories, first):
        sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", story) if len(part.split()) > 2]
        rows += [{"source": one, "target": other, "story": number}
                 for one, other in list(zip(sentences[:-1], sentences[1:]))[:most]]
    return rows


def last_words(stories: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The beginnings of stories without the last word of a sentence, which is the answer; at most `most` of a story."""
    rows = []
    for number, story in enumerate(stories):
        ends = [match for match in re.finditer(r" (\w+)[.!?]", story)][:most]
        rows += [{"question": story[: end.start()], "answer": end.group(1), "story": number} for end in ends]
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
