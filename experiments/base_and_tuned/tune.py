"""Tune stories15M on SST-2, in full and by LoRA, and write the data and the models into a folder.

    python experiments/base_and_tuned/tune.py ASSETS OUT data|full|lora

The prompt is the sentence and "This was", and the answer is "good" or "bad". The loss is the cross-entropy over these
two words only, at the last position: over the whole vocabulary it would also teach that no other word ever follows.
All draws come from one seed, and a model that is there is not trained again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

SEED = 0
WORDS = ("bad", "good")
STEPS = {"full": 150, "lora": 120}
BATCH = {"full": 32, "lora": 16}
RATE = {"full": 3e-4, "lora": 3e-3}
RANK = 8
CHOOSE = 256  # sentences whose loss chooses the factors of the change
WARM_UP = 10  # steps in which the rate rises; then it falls linearly to 0


def main(assets: Path, out: Path, what: str) -> None:
    if what == "data":
        write_data(assets, out)
        return
    folder = out / what
    if (folder / "losses.json").exists():
        print(f"{folder} is there")
        return
    tune(assets, folder, what)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt(sentence: str) -> str:
    return f"{sentence.strip()}\nThis was"


def write_data(assets: Path, out: Path) -> None:
    """Write the validation part of SST-2 as questions with two choices, in the form of BIG-bench.

    choose.jsonl and judge.jsonl are the sentences whose loss reweights a change, and those that judge it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [{"inputs": prompt(row["sentence"]), "targets": [WORDS[row["label"]]], "multiple_choice_targets": [*WORDS],
              "multiple_choice_scores": [1 - row["label"], row["label"]]}
             for row in rows(assets / "data/sst2/validation.jsonl")]  # fmt: skip
    (out / "sst2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, chosen in (("judge", rows(assets / "data/sst2/validation.jsonl")), ("choose", unseen(assets))):
        lines = [{"sentence": row["sentence"].strip(), "label": row["label"]} for row in chosen]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def unseen(assets: Path) -> list[dict]:
    """Return CHOOSE training examples on which neither model is tuned."""
    examples = rows(assets / "data/sst2/train.jsonl")
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED))
    return [examples[i] for i in drawn[-CHOOSE:].tolist()]


def batches(asked: list, size: int, generator: torch.Generator) -> list[list]:
    """Return batches of questions of similar length, in random order, so that little of a batch is padding."""
    chunks = [sorted(asked[start : start + 10 * size], key=lambda one: len(one[0]))
              for start in range(0, len(asked), 10 * size)]
    found = [chunk[start : start + size] for chunk in chunks for start in range(0, len(chunk), size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def tune(assets: Path, folder: Path, what: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(SEED)
    base = assets / "models/stories15M"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    if what == "lora":
        import peft

        types = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=types))
    body, head = (model.base_model.model if what == "lora" else model).model, model.get_output_embeddings().weight
    examples = rows(assets / "data/sst2/train.jsonl")
    begin = tokenizer(prompt("x")).input_ids
    labels = [tokenizer(f"{prompt('x')} {word}").input_ids[len(begin):] for word in WORDS]
    assert all(len(one) == 1 for one in labels), labels
    readout = head[[one[0] for one in labels]].detach()
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randperm(len(examples), generator=generator)[: STEPS[what] * BATCH[what]].tolist()
    asked = [(tokenizer(prompt(examples[i]["sentence"])).input_ids, examples[i]["label"]) for i in drawn]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE[what], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (STEPS[what] - step) / STEPS[what])
    )
    model.train()
    losses = []
    for step, batch in enumerate(batches(asked, BATCH[what], generator)):
        ids = [one for one, _ in batch]
        length = max(map(len, ids))
        tokens = torch.zeros(len(ids), length, dtype=torch.long)
        for i, one in enumerate(ids):  # causal attention does not see the padding behind the last token
            tokens[i, : len(one)] = torch.tensor(one)
        hidden = body(input_ids=tokens).last_hidden_state[torch.arange(len(ids)), [len(one) - 1 for one in ids]]
        loss = torch.nn.functional.cross_entropy(hidden @ readout.T, torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"{what} step {step + 1} of {STEPS[what]}: loss {sum(losses[-10:]) / 10:.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if what == "lora":
        model.merge_and_unload().save_pretrained(folder.with_name("lora_merged"))
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3])
