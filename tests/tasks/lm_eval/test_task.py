"""Tasks of lm-evaluation-harness against lm-eval itself: HFLM and its evaluator on the same files."""

import itertools
import json
import os

import numpy as np
import pytest

from harness.errors import InputError
from harness.evaluation.requests import TaskContext
from harness.evaluation.scoring import Scorer
from harness.evaluation.statistics import estimate
from harness.models.loading import load
from harness.models.settings import ModelSettings
from harness.tasks.lm_eval.task import LmEvalTask
from tests.evaluation.reference import score, tiny_model, tiny_tokenizer
from tests.tasks.asking import asked

LIMIT = 100
# task: folder of its stock YAML, its files by split, few-shot examples
TASKS = {
    "arc_easy": ("arc/arc_easy", ("test", "validation"), None),
    "hellaswag": ("hellaswag/hellaswag", ("validation",), None),
    "piqa": ("piqa/piqa", ("validation",), 2),
    "winogrande": ("winogrande/default", ("validation",), None),
    "boolq": ("super_glue/boolq/default", ("train", "validation"), None),
}


def files_of(assets, task):
    return {split: str(assets / "data" / task / f"{split}.jsonl") for split in TASKS[task][1]}


def stock_yaml(name):
    import lm_eval.tasks

    return f"{lm_eval.tasks.__path__[0]}/{name}.yaml"


def local_yaml(folder, task, files, stock, **settings):
    """A task YAML as lm-eval's documentation tells people to write it for local files."""
    settings = {
        "include": stock_yaml(stock), "task": task, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}, **settings,
    }
    (folder / f"{task}.yaml").write_text(json.dumps(settings))  # JSON is YAML


def evaluate(folder, model, **kwargs):
    """lm-eval's own results for the tasks of a folder: (name -> samples in order, name -> aggregated metrics)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(folder))
    tasks = kwargs.pop("tasks", None) or manager.all_subtasks
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **kwargs)
    return {name: sorted(s, key=lambda one: one["doc_id"]) for name, s in found["samples"].items()}, found


@pytest.fixture(scope="module")
def loaded(assets):
    return load(ModelSettings(name=str(assets / "models" / "stories260K"), device="cpu"))


@pytest.fixture(scope="module")
def context(loaded):
    return TaskContext(loaded.tokenizer, loaded.model.config, loaded.context_length, "causal")


@pytest.fixture(scope="module")
def hflm(assets):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(assets / "models" / "stories260K"), device="cpu", dtype="float32", batch_size=16)


@pytest.fixture(scope="module")
def theirs(assets, hflm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, (stock, splits, fewshot) in TASKS.items():
        absent = {} if "train" in splits else {"training_split": None}
        files = files_of(assets, task)
        if fewshot is None:  # lm-eval processes the whole of hellaswag three times; without examples the head is enough
            for split, path in files.items():
                files[split] = str(folder / f"{task}_{split}.jsonl")
                with open(path) as whole, open(files[split], "w") as head:
                    head.writelines(itertools.islice(whole, LIMIT))
        local_yaml(folder, task, files, stock, num_fewshot=fewshot or 0, **absent)
    return evaluate(folder, hflm, limit=LIMIT)


@pytest.mark.assets
@pytest.mark.parametrize("task", TASKS)
def test_loglikelihoods_and_accuracies_are_those_of_hflm(task, assets, loaded, context, theirs):
    config = LmEvalTask(task=task, data_files=files_of(assets, task), limit=LIMIT, num_fewshot=TASKS[task][2])
    prepared = config.prepare(task, context)
    scores = Scorer(loaded, {task: prepared}).score(task)
    samples, found = theirs[0][task], theirs[1]["results"][task]

    expected = [answer[0] for sample in samples for answer in sample["resps"]]
    np.testing.assert_allclose(scores.request_logprob(), [ll for ll, _ in expected], rtol=0, atol=1e-4)
    assert scores.request_greedy().tolist() == [greedy for _, greedy in expected]

    measured = prepared.measure(scores)
    assert set(measured) == {key.split(",")[0] for key in found if key.endswith(",none") and "stderr" not in key}
    for metric, examples in measured.items():
        assert examples.score.tolist() == [sample[metric] for sample in samples]
        assert estimate(examples).value == pytest.approx(found[f"{metric},none"], rel=1e-12)
    assert len(prepared.example_ids) == len(set(prepared.example_ids)) == LIMIT
    json.dumps(dict(prepared.protocol))


def test_rolling_and_loglikelihood_tasks_have_lm_evals_perplexities(assets, context, hflm, loaded, tmp_path):
    """wikitext (rolling windows, weighted perplexities, bits per byte) and lambada (perplexity and greedy accuracy)."""
    pages, passages = tmp_path / "pages.jsonl", tmp_path / "passages.jsonl"
    lines = (assets / "data/wikitext-2-raw/document_level/test.jsonl").read_text().splitlines()[:3]
    # two documents shorter than a window, and one of three windows with a remainder
    texts = [json.loads(line)["page"][:size] for line, size in zip(lines, (300, 3000, 20))]
    pages.write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    passages.write_text("".join((assets / "data/lambada/test.jsonl").open().readlines()[:40]))
    only_test = {"training_split": None, "validation_split": None}
    local_yaml(tmp_path, "wikitext", {"test": str(pages)}, "wikitext/wikitext", **only_test)
    local_yaml(tmp_path, "lambada_openai", {"test": str(passages)}, "lambada/lambada_openai")
    samples, found = evaluate(tmp_path, hflm)

    for task, file in (("wikitext", pages), ("lambada_openai", passages)):
        prepared = LmEvalTask(task=task, data_files={"test": str(file)}).prepare(task, context)
        scores = score(loaded.model, prepared.requests)
        measured = prepared.measure(scores)
        assert measured
        for metric, examples in measured.items():
            # the exponential of a sum of float32 log-likelihoods
            assert estimate(examples).value == pytest.approx(found["results"][task][f"{metric},none"], rel=1e-5)
            assert not examples.higher_is_better or metric == "acc"
    assert set(measured) == {"perplexity", "acc"}
    assert len(prepared.requests) == 40
    assert [a for a, in (one["filtered_resps"] for one in samples["lambada_openai"])] == [
        (pytest.approx(ll, abs=1e-4), greedy) for ll, greedy in zip(scores.request_logprob(), scores.request_greedy())
    ]


CHOICE = {
    "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "answer",
    "doc_to_choice": "choices", "dataset_path": "json",
}
METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "brier_score", "f1")


def write_questions(path, first, count):
    words = "Anna Ben dog park ball sun friends mailman café Zoë".split()
    rows = [
        {"question": f"{words[i % 7]} went to the ", "choices": [words[i % 10], words[(i * 3 + 1) % 10] + " and Max"],
         "answer": i % 3 % 2}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"test": str(path)}


@pytest.fixture
def own(tmp_path):
    """A folder of task YAML files: two tasks with a tag and two groups above them, and tasks that are refused."""
    for task, first, count in (("own_short", 0, 4), ("own_long", 4, 9)):
        files = write_questions(tmp_path / f"{task}.jsonl", first, count)
        settings = {
            **CHOICE, "task": task, "tag": "own_tag", "metadata": {"version": 1.5},
            "metric_list": [{"metric": metric} for metric in METRICS],
            "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
            "num_fewshot": 0 if task == "own_short" else None,
        }
        (tmp_path / f"{task}.yaml").write_text(json.dumps(settings))
    generated = {"output_type": "generate_until", "metric_list": None}
    for task, changes in {
        "own_f1": {"metric_list": [{"metric": "f1"}]},
        "own_rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "metric_list": None},
        "own_sampled": {**generated, "generation_kwargs": {"temperature": 0.7}},
        "own_endless": {**generated, "generation_kwargs": {"max_gen_toks": 64}},
    }.items():
        (tmp_path / f"{task}.yaml").write_text(json.dumps({**settings, "tag": None, "task": task, **changes}))
    for group, by_size in (("own_pooled", True), ("own_balanced", False)):
        aggregate = [{"metric": metric, "weight_by_size": by_size} for metric in ("acc", "brier_score")]
        (tmp_path / f"{group}.yaml").write_text(json.dumps(
            {"group": group, "task": ["own_short", "own_long"], "aggregate_metric_list": aggregate}
        ))
    return tmp_path


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return model, TaskContext(tokenizer, model.config, 64, "causal")


def tiny_hflm(tiny):
    from lm_eval.models.huggingface import HFLM

    return HFLM(tiny[0], tokenizer=tiny[1].tokenizer, batch_size=4, device="cpu")


@pytest.mark.filterwarnings("ignore")  # scikit-learn's, of the F1 score in lm-eval's own run
def test_groups_and_all_metrics_of_multiple_choice_are_lm_evals(own, tiny):
    _, found = evaluate(own, tiny_hflm(tiny), tasks=["own_pooled", "own_balanced"][:1])
    _, balanced = evaluate(own, tiny_hflm(tiny), tasks=["own_balanced"])
    groups = {"own_pooled": found["groups"]["own_pooled"], "own_balanced": balanced["groups"]["own_balanced"]}
    for group, expected in groups.items():
        prepared = LmEvalTask(task=group, include_path=str(own)).prepare("g", tiny[1])
        measured = prepared.measure(score(tiny[0], prepared.requests))
        assert prepared.protocol["metrics_left_out"] == ["f1"]
        assert prepared.example_ids[3:6] == ["own_short/3", "own_long/0", "own_long/1"]
        for metric in ("acc", "brier_score"):
            assert estimate(measured[metric]).value == pytest.approx(expected[f"{metric},none"], rel=1e-5)
            assert estimate(measured[metric]).n == 13
            assert estimate(measured[metric]).n_clusters == 2  # the subtasks
        for task, n in (("own_short", 4), ("own_long", 9)):
            for metric in METRICS[:-1]:
                of_task = estimate(measured[f"{task}/{metric}"])
                assert of_task.value == pytest.approx(found["results"][task][f"{metric},none"], rel=1e-5)
                assert of_task.n == of_task.n_clusters == n
        assert not measured["brier_score"].higher_is_better and measured["acc"].higher_is_better
    assert groups["own_pooled"]["acc,none"] != groups["own_balanced"]["acc,none"]

    tagged = LmEvalTask(task="own_tag", include_path=str(own), limit=2).prepare("t", tiny[1])
    assert tagged.example_ids == ["own_long/0", "own_long/1", "own_short/0", "own_short/1"]
    assert "own_long/acc" in tagged.measure(score(tiny[0], tagged.requests))


def test_a_changed_file_is_read_again_and_changes_the_protocol(own, tiny):
    files = write_questions(own / "own_long.jsonl", 0, 5)
    config = LmEvalTask(task="own_long", include_path=str(own), data_files=files)
    first = config.prepare("x", tiny[1])
    again = config.prepare("x", tiny[1])
    assert first.protocol == again.protocol and first.protocol["task_version"] == "1.5"
    status = (own / "own_long.jsonl").stat()
    text = (own / "own_long.jsonl").read_text()
    (own / "own_long.jsonl").write_text(text.replace("Ben", "Max"))
    os.utime(own / "own_long.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = config.prepare("x", tiny[1])
    moved = {key for key in first.protocol if first.protocol[key] != changed.protocol[key]}
    assert moved == {"data_files", "documents"}
    assert any(len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any()
               for a, b in zip(first.requests, changed.requests))


def test_examples_shown_never_hold_the_question_asked(own, tiny):
    config = LmEvalTask(task="own_long", include_path=str(own), num_fewshot=8)
    config.data_files = write_questions(own / "own_long.jsonl", 0, 9)
    rows = [json.loads(line) for line in (own / "own_long.jsonl").open()]
    context = TaskContext(tiny[1].tokenizer, tiny[1].model_config, 10_000, "causal")
    prepared = config.prepare("x", context)
    for i, row in enumerate(rows):
        prompt = context.tokenizer.decode(prepared.requests[4 * i].tokens)
        shown = [question["question"] for question in rows if question is not row]
        assert prompt.count("\n\n") == 8
        assert sorted(part.rsplit("the", 1)[0] for part in prompt.split("\n\n")[:8]) == sorted(
            question.rsplit("the", 1)[0] for question in shown
        )
    config.seed = 1
    other = config.prepare("x", context)
    assert other.protocol["documents"] != prepared.protocol["documents"]


@pytest.mark.parametrize("settings, message", [
    ({"task": "arc_eazy"}, r"tasks\.x\.task: lm-eval knows no task 'arc_eazy'; did you mean .*arc_easy"),
    ({"task": "zzzz-qqqq"}, r"tasks\.x\.task: lm-eval knows no task 'zzzz-qqqq'; .*include_path"),
    ({"task": "arc_easy"}, r"cannot load 'arc_easy': .*data_files\.<split> for train, validation, test\)"),
    ({"task": "arc_easy", "data_files": {"dev": "FILE"}}, r"data_files\.dev: 'arc_easy' has no such split; it has t"),
    ({"task": "arc_easy", "data_files": {"train": "FILE"}}, r"data_files: no file for the split .*; give test or val"),
    ({"task": "arc_easy", "data_files": {"test": "nowhere.jsonl"}}, r"data_files\.test: no such file 'nowhere.jsonl'"),
    ({"task": "arc_easy", "data_files": {"test": "BROKEN"}}, r"tasks\.x\.data_files\.test: cannot read .*broken\.js"),
    ({"task": "arc_easy", "data_files": {"test": "FILE"}}, r"tasks\.x: lm-eval cannot load 'arc_easy': Undefined"),
    ({"task": "blimp", "data_files": {"train": "FILE"}}, r"data_files: 'blimp' is a group of several .* blimp_adj"),
    ({"task": "blimp"}, r"lm-eval cannot load the group 'blimp': .*data_files for each of .* and 55 more"),
    ({"task": "own_long", "include_path": "nowhere"}, r"tasks\.x\.include_path: no such folder 'nowhere'"),
    ({"task": "own_long", "include_path": "OWN", "num_fewshot": 10}, r"build the prompts of 'own_long': .*population"),
    ({"task": "own_short", "include_path": "OWN", "num_fewshot": 1}, r"num_fewshot: 'own_short' takes no examples"),
    ({"task": "own_rolling", "include_path": "OWN", "num_fewshot": 1}, r"num_fewshot: 'own_rolling' takes no examples"),
    ({"task": "own_f1", "include_path": "OWN"}, r"task: 'own_f1' has no metric that is a mean .*, only f1"),
    ({"task": "own_sampled", "include_path": "OWN"}, r"'own_sampled' samples its answers"),
    ({"task": "own_endless", "include_path": "OWN"}, r"'own_endless' generates 64 tokens, .* no room .* of 64;"),
    ({"task": "humaneval", "data_files": {"test": "FILE"}}, r"'humaneval' executes what the model writes"),
])
def test_bad_input_is_one_clear_line(settings, message, own, tiny):
    broken = own / "broken.jsonl"
    broken.write_text('{"question": "a"}\n{"question": \n')
    names = {"FILE": str(own / "own_long.jsonl"), "BROKEN": str(broken), "OWN": str(own)}
    settings = {key: names.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    if "data_files" in settings:
        settings["data_files"] = {split: names.get(path, path) for split, path in settings["data_files"].items()}
    with pytest.raises(InputError, match=message) as error:
        LmEvalTask(**settings).prepare("x", tiny[1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "message"), [
    ({"limit": 0}, "limit: 0 is wrong; it must be at least 1"),
    ({"num_fewshot": -1}, "num_fewshot: -1 is wrong; it must be at least 0"),
    ({"seed": -1}, "seed: -1 is wrong; it must be at least 0"),
    ({"num_fewshot": 1.5}, "num_fewshot: 1.5 is wrong; it must be a whole number"),
    ({"data_files": "a.jsonl"}, "data_files: 'a.jsonl' is wrong; it must be a group of keys with values"),
    ({"data_files": {"test": "none.jsonl"}}, "data_files.test: no such file 'none.jsonl'; give the path of an exist"),
    ({"split": "test"}, "split: unknown key; .*known here: limit, .*task, num_fewshot, data_files, include_path, seed"),
])
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=f"^tasks.x.{message}"):
        asked("x", kind="lm_eval", task="arc_easy", **settings)
    with pytest.raises(InputError, match="^tasks.x.task: must be set"):
        asked("x", kind="lm_eval")


def test_models_that_cannot_be_asked_are_refused(own, tiny):
    from transformers import BertConfig

    config = LmEvalTask(task="own_long", include_path=str(own))
    with pytest.raises(InputError, match="tasks.x: .*causal"):
        config.prepare("x", TaskContext(tiny[1].tokenizer, BertConfig(), 64, "masked"))
    with pytest.raises(InputError, match="tasks.x: .*no tokenizer"):
        config.prepare("x", TaskContext(None, tiny[1].model_config, 64, "causal"))


@pytest.mark.slow
def test_names_are_found_where_lm_evals_index_has_them():
    from pathlib import Path

    import lm_eval.tasks

    from harness.tasks.lm_eval import index

    root = Path(lm_eval.tasks.__file__).parent
    entries = lm_eval.tasks.TaskManager().task_index
    files = {name: entry.yaml_path for name, entry in entries.items() if entry.yaml_path is not None}
    assert set(files) <= set(index._all_names(root))
    for name in ["arc_easy", "boolq", "gsm8k", "blimp", "mmlu", *sorted(files)[::2000]]:
        assert index._find_yaml(name, root) == files[name]
