"""Greedy generation against lm-eval's HFLM and transformers' own generate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, TaskContext
from harness.evaluation.statistics import estimate
from harness.models.description import generation_values
from harness.models.loading import loaded_from
from harness.tasks import generation
from harness.tasks.generation import Decoding
from harness.tasks.lm_eval.task import LmEvalTask
from tests.evaluation.reference import tiny_model, tiny_tokenizer
from tests.tasks.asking import asked
from tests.tasks.lm_eval.test_task import evaluate, loaded, local_yaml, stock_yaml  # noqa: F401 (a fixture)


def hflm_of(model):
    from lm_eval.models.huggingface import HFLM

    return HFLM(model.model, tokenizer=model.tokenizer, batch_size=4, device="cpu")


def context_of(model) -> TaskContext:
    generation = generation_values(model.model.generation_config)
    return TaskContext(model.tokenizer, model.model.config, model.context_length, "causal", generation)


@pytest.mark.assets
def test_gsm8k_is_lm_evals(assets, loaded, tmp_path):  # noqa: F811
    """The stock prompts and filters; the right answers are replaced by what the model says, so that some are right."""
    rows = [json.loads(line) for line in (assets / "data/gsm8k/test.jsonl").open().readlines()[:4]]
    # longer than the room of 496 tokens before 16 new ones, beside three that are padded
    rows[2]["question"] *= 4
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    said = generation.continuations(loaded, prompts, Decoding(["."], 16))
    for row, answer in list(zip(rows, said))[:3]:
        row["answer"] = answer
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    until = ["Question:", " play", "."]
    settings = {
        "num_fewshot": 0,
        "generation_kwargs": {"until": until, "max_gen_toks": 16, "do_sample": False},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]},
        ],
    }
    local_yaml(tmp_path / "theirs", "gsm8k", {"test": str(questions)}, "gsm8k/gsm8k", training_split=None,
               fewshot_split=None, **settings)
    samples, found = evaluate(tmp_path / "theirs", hflm_of(loaded))
    (tmp_path / "ours/gsm8k.yaml").write_text(
        json.dumps({"include": stock_yaml("gsm8k/gsm8k"), "task": "gsm8k", **settings})
    )

    config = LmEvalTask(task="gsm8k", include_path=str(tmp_path / "ours"), data_files={"test": str(questions)})
    prepared = config.prepare("gsm8k", context_of(loaded))
    assert isinstance(prepared, DirectTask)
    assert prepared.protocol["max_gen_toks"] == 16 and prepared.example_ids == ["0", "1", "2", "3"]
    measured = prepared.measure(loaded, Division(), 1.0)
    for name in ("whole", "word"):
        own = [one for one in samples["gsm8k"] if one["filter"] == name]
        examples = measured[f"exact_match,{name}"]
        assert examples.score.tolist() == [one["exact_match"] for one in own]
        assert examples.score.mean() == found["results"]["gsm8k"][f"exact_match,{name}"]
    assert measured["exact_match,whole"].score.sum() in (1, 2, 3)

    prompts = [one["arguments"][0][0] for one in own]
    texts = generation.continuations(loaded, prompts, Decoding(until, 16))
    assert texts == [one["resps"][0][0] for one in own]


@pytest.fixture(scope="module")
def tiny():
    return loaded_from(tiny_model(), tiny_tokenizer())


def test_metrics_of_hugging_face_evaluate_are_lm_evals_own(tiny, tmp_path):
    """BLEU of generated answers, which lm-eval aggregates over all documents: by a metric script, and by lm-eval."""
    prompts = ["Anna went", "Ben went to the", "Once upon a time there", "The ball is", "A dog named"]
    said = generation.continuations(tiny, prompts, Decoding([], 12))
    answers = [text if i % 2 else f"no {text[3:]}" for i, text in enumerate(said)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in zip(prompts, answers)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    settings = {
        "task": "say", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "target_delimiter": "", "metric_list": [bleu],
        "generation_kwargs": {"max_gen_toks": 12, "do_sample": False, "until": []}, "num_fewshot": 0,
    }
    (folder / "say.yaml").write_text(json.dumps(settings))
    _, found = evaluate(folder, hflm_of(tiny))

    script = {"name": str(Path(__file__).parents[1] / "metrics" / "sacrebleu.py"), "value": "score"}
    files = {"test": str(questions)}
    config = asked("say", kind="lm_eval", task="say", include_path=str(folder), data_files=files, metrics=[script])
    context = context_of(tiny)
    measured = config.prepare("say", context).measure(tiny, Division(), 1.0)
    assert list(measured) == ["sacrebleu"]
    assert estimate(measured["sacrebleu"]).value == pytest.approx(found["results"]["say"]["bleu,none"], abs=1e-9)
    assert 0 < found["results"]["say"]["bleu,none"] < 100

    without = asked("say", kind="lm_eval", task="say", include_path=str(folder), data_files=files)
    with pytest.raises(InputError, match=r"^tasks\.say\.task: 'say' has no metric that is a mean over its documents"):
        without.prepare("say", context)


def test_metrics_are_for_tasks_that_generate(tiny, tmp_path):
    question = {"question": "Anna went to the", "choices": {"text": ["park", "ball"], "label": ["A", "B"]}}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**question, "answerKey": "A"}) + "\n")
    task = asked("t", kind="lm_eval", task="arc_easy", num_fewshot=0, data_files={"test": str(rows)}, metrics=["f1"])
    with pytest.raises(InputError, match=r"^tasks\.t\.metrics: 'arc_easy' scores given answers"):
        task.prepare("t", TaskContext(tiny.tokenizer, tiny.model.config, 512, "causal"))


def test_padding_and_early_stops_change_no_text(tiny):
    """A batch of unequal prompts, against transformers' generate of one prompt at a time without padding."""
    prompts = ["Anna", "Ben went to the park. Anna gave", "Once upon a time there was a dog named Max", "é" * 200]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([tiny.tokenizer.encode(prompt)[-44:]])
        out = tiny.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
        expected.append(tiny.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True))
    assert generation.continuations(tiny, prompts, Decoding([], 20)) == expected

    stop = expected[1][5:7]
    cut = generation.continuations(tiny, prompts, Decoding([stop], 20))
    assert cut == [text.split(stop)[0] for text in expected]
    assert len(cut[1]) < len(expected[1])


def test_outputs_that_are_not_numbers_are_an_error():
    model = loaded_from(tiny_model().requires_grad_(False), tiny_tokenizer())
    model.model.transformer.h[1].mlp.c_proj.weight[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        generation.continuations(model, ["Anna went"], Decoding([], 4))
