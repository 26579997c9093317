"""Scores of generated answers that are neither 0 nor 1 against lm-eval's evaluator, unablated and ablated."""

import itertools
import json

import pytest

import harness as sh
from harness.evaluation.division import Division
from harness.evaluation.requests import TaskContext
from harness.models.description import generation_values
from harness.models.loading import load
from harness.models.settings import ModelSettings
from harness.tasks.lm_eval.task import LmEvalTask
from tests.tasks.lm_eval.test_task import evaluate

GENERATED = {
    "dataset_path": "json", "output_type": "generate_until", "training_split": "train", "fewshot_split": "train",
    "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [{"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"},
                                                {"function": "take_first"}]}],
}  # fmt: skip


def greetings():
    """A child meets a friend, who greets the child: a small model of stories knows some of the names."""
    names = "Tim Lily Tom Sue Ben Mia Max Anna Sam Lucy Bob Amy".split()
    question = 'Once upon a time, {0} met {1} in the park. {1} said, "Hello,'
    pairs = [pair for pair in itertools.permutations(names, 2)][::4]
    return [{"question": question.format(*pair), "answer": pair[0]} for pair in pairs]


def sums():
    """Sums of two numbers of one digit."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)][::5]
    return [{"question": f"Question: {a} + {b}\nAnswer:", "answer": str(a + b)} for a, b in pairs]


@pytest.mark.assets
@pytest.mark.parametrize(("rows", "model", "region", "block", "n_shots"), [
    pytest.param(greetings(), {"name": "stories260K"}, sh.regions.small(0.5), 4, 2, id="greetings"),
    pytest.param(sums(), {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}, sh.regions.small(0.1), 20, 3,
                 id="arithmetic", marks=pytest.mark.slow),
])  # fmt: skip
def test_few_shot_answers_are_lm_evals(assets, tmp_path, rows, model, region, block, n_shots):
    """The same score for every document, with some right answers and some wrong ones, without and with an ablation."""
    from lm_eval.models.huggingface import HFLM

    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "answers.yaml").write_text(json.dumps({
        **GENERATED, "task": "answers", "num_fewshot": n_shots,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "generation_kwargs": {"until": ["\n", ".", "!"], "max_gen_toks": 6, "do_sample": False},
    }))

    name = str(assets / "models" / model.get("name", ""))
    loaded = load(ModelSettings(name=name, gguf_file=model.get("gguf_file"), device="cpu"))
    generation = generation_values(loaded.description.generation)
    context = TaskContext(loaded.tokenizer, loaded.model.config, loaded.context_length, "causal", generation)
    prepared = LmEvalTask(task="answers", include_path=str(tmp_path / "tasks")).prepare("answers", context)
    assert prepared.protocol["num_fewshot"] == n_shots

    def both():
        lm = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=8, device="cpu")
        samples, found = evaluate(tmp_path / "tasks", lm)
        ours = prepared.measure(loaded, Division(), 1.0)["exact_match,word"].score.tolist()
        assert ours == [sample["exact_match"] for sample in samples["answers"]]
        mean = sum(ours) / len(ours)
        assert mean == pytest.approx(found["results"]["answers"]["exact_match,word"], rel=1e-12)
        assert 0 < mean < 1
        return ours

    unablated = both()
    wrapped = sh.wrap(loaded.model, loaded.tokenizer)
    with wrapped.ablated("mlp", region, blocks=[block]):
        ablated = both()
    assert ablated != unablated
