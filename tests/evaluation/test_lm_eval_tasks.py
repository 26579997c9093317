"""Tasks of lm-evaluation-harness against lm-eval itself: HFLM and its evaluator on the same files."""

import json
import math

import numpy as np
import pytest

from harness.config import LmEvalTask, ModelConfig
from harness.errors import InputError
from harness.evaluation import lm_eval_tasks
from harness.evaluation.requests import TaskContext
from harness.evaluation.scoring import Scorer
from harness.evaluation.statistics import estimate
from harness.models.loading import load
from tests.evaluation.reference import score, tiny_model, tiny_tokenizer

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
    return load(ModelConfig(name=str(assets / "models" / "stories260K"), device="cpu"))


@pytest.fixture(scope="module")
def context(loaded):
    return TaskContext(loaded.tokenizer, loaded.model.config, loaded.context_length)


@pytest.fixture(scope="module")
def hflm(assets):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(assets / "models" / "stories260K"), device="cpu", dtype="float32", batch_size=16)


@pytest.fixture(scope="module")
def theirs(assets, hflm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, (stock, splits, fewshot) in TASKS.items():
        absent = {} if "train" in splits else {"training_split": None}
        local_yaml(folder, task, files_of(assets, task), stock, num_fewshot=fewshot or 0, **absent)
    return evaluate(folder, hflm, limit=LIMIT)


@pytest.mark.assets
@pytest.mark.parametrize("task", TASKS)
def test_loglikelihoods_and_accuracies_are_those_of_hflm(task, assets, loaded, context, theirs):
    config = LmEvalTask(task=task, data_files=files_of(assets, task), limit=LIMIT, num_fewshot=TASKS[task][2])
    prepared = lm_eval_tasks.prepare(task, config, context)
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
