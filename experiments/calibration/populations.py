"""The studies whose measured scores are the populations of this experiment: every kind of task, and 60 draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import small_models

from harness.engine.run import RunOptions, run
from harness.evaluation.requests import ExampleScores
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation.tables import read_examples, read_metrics

SEEDS = 60  # draws of the control
STORIES, STORY_WINDOW = "stories", 256  # a text of short documents, and the tokens of the windows that measure it
# Study -> (task, metric) of which p-values are tested.
METRICS = {
    "causal": (
        ("wikitext", "token_perplexity"), ("blimp", "accuracy"), ("boolq", "acc"), ("arc_easy", "acc"),
        ("ioi", "logprob"), ("factual", "logprob"), ("lambada", "perplexity"), ("qa_wikidata", "logprob"),
        ("lm_eval", "exact_match,word"),
    ),
    "masked": (("masked", "pseudo_perplexity"), ("masked", "accuracy")),
    "classification": (("classification", "cross_entropy"), ("classification", "accuracy")),
    "seq2seq": (("seq2seq", "token_perplexity"), ("seq2seq", "token_accuracy")),
    "recall": (
        ("recall", "cross_entropy"), ("recall", "accuracy_noisy"), ("recall_probes", "attention_target"),
        ("recall_probes", "direct_mlp1"),
    ),
    "draws": (("ioi", "logprob"), ("factual", "logprob"), ("lambada", "perplexity")),
}  # fmt: skip
# A metric whose name begins so is a count of right answers. Its p-values are discrete.
COUNTS = ("acc", "exact_match", "token_accuracy")
GENERATED = {
    "task": "last_words", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
    "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 6, "do_sample": False},
    "filter_list": [{"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"},
                                                {"function": "take_first"}]}],
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def common(*ablations: str) -> list[str]:
    return ["model.device=cpu", "runtime.threads=1", "region=fraction", "target.layer_types=[down_proj]", *ablations]


def of_stories260K(assets: Path) -> list[str]:
    data = assets / "data"
    return [
        "model=pretrained", f"model.name={assets / 'models/stories260K'}",
        f"tasks.ioi.data_files={data / 'ioi/ioi.jsonl'}",
        f"tasks.factual.data_files={data / 'counterfact/known_1000.jsonl'}",
        f"tasks.lambada.data_files={data / 'lambada/test.jsonl'}",
    ]


def causal(assets: Path, folder: Path) -> list[str]:
    data, written = assets / "data", folder / "last_words"
    stories = [row["text"] for row in lines(data / "tinystories/tinystories_1000_train.jsonl")][-100:]
    questions = small_models.write_rows(written / "test.jsonl", small_models.last_words(stories, 4))
    (written / "task.yaml").write_text(json.dumps(
        {**GENERATED, "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(written / "cache")}}
    ))
    tasks = ",".join(task for task, _ in METRICS["causal"])
    return [
        *of_stories260K(assets), f"task=[{tasks}]",
        *common("region.kinds=[large,small]", "region.values=[0.1,0.3]", "region.controls=[]", "target.blocks=[3]"),
        f"tasks.wikitext.data_files={data / 'wikitext-2-raw/test.jsonl'}", "tasks.wikitext.window=128",
        f"tasks.blimp.data_files={data / 'blimp'}", "tasks.blimp.limit=200",
        f"+tasks.boolq.data_files.train={data / 'boolq/train.jsonl'}",
        f"+tasks.boolq.data_files.validation={data / 'boolq/validation.jsonl'}", "tasks.boolq.limit=300",
        f"+tasks.arc_easy.data_files.test={data / 'arc_easy/test.jsonl'}",
        f"+tasks.arc_easy.data_files.validation={data / 'arc_easy/validation.jsonl'}", "tasks.arc_easy.limit=400",
        "tasks.lambada.limit=400", f"tasks.qa_wikidata.data_files={data / 'bigbench/qa_wikidata.jsonl'}",
        "tasks.qa_wikidata.limit=600", "tasks.lm_eval.task=last_words", f"tasks.lm_eval.include_path={written}",
        "tasks.lm_eval.cluster_column=story",
    ]


def draws(assets: Path, folder: Path) -> list[str]:
    return [
        *of_stories260K(assets), "task=[ioi,factual,lambada]", "tasks.ioi.limit=300", "tasks.factual.limit=300",
        "tasks.lambada.limit=150",
        *common("region.kinds=[small]", "region.values=[0.5]", "region.controls=[random]", "target.blocks=[3]"),
        f"region.random_seeds=[{','.join(map(str, range(SEEDS)))}]",
    ]


def of_small_model(model: Path, task: str, *words: str) -> list[str]:
    return ["model=pretrained", f"model.name={model}", f"task={task}", *words,
            *common("region.kinds=[large,small]", "region.values=[0.3]", "region.controls=[]")]


def masked(assets: Path, folder: Path) -> list[str]:
    stories = lines(assets / "data/tinystories/tinystories_1000_train.jsonl")
    model = small_models.masked_model(folder / "masked_model", [row["text"] for row in stories[:600]])
    rows = small_models.write_rows(folder / "masked.jsonl", ({"text": row["text"]} for row in stories[-100:]))
    return of_small_model(model, "masked", f"tasks.masked.data_files={rows}")


def classification(assets: Path, folder: Path) -> list[str]:
    model = small_models.classifier(folder / "classifier", lines(assets / "data/sst2/train.jsonl"))
    return of_small_model(
        model, "classification", f"tasks.classification.data_files={assets / 'data/sst2/validation.jsonl'}"
    )


def seq2seq(assets: Path, folder: Path) -> list[str]:
    stories = [row["text"] for row in lines(assets / "data/tinystories/tinystories_1000_train.jsonl")]
    model = small_models.encoder_decoder(folder / "t5", small_models.next_sentences(stories[:600], 0, 20))
    rows = small_models.write_rows(folder / "seq2seq.jsonl", small_models.next_sentences(stories[-120:], 880, 5))
    return of_small_model(model, "seq2seq", f"tasks.seq2seq.data_files={rows}", "tasks.seq2seq.cluster_column=story")


def recall(assets: Path, folder: Path) -> list[str]:
    return [
        "model=recall", "task=[recall,recall_probes]", "model.recall.dim=64", "model.recall.hidden_dim=128",
        "model.recall.context_length=64", "model.recall.steps=300", f"model.recall.cache_dir={folder / 'recall'}",
        "tasks.recall.n_sequences=600", "tasks.recall_probes.n_sequences=600",
        *common("region.kinds=[large,small]", "region.values=[0.3]", "region.controls=[]"),
    ]


def measured(study: str, assets: Path, folder: Path) -> Path:
    """Measure a study, which resumes, and return its folder."""
    make = {"causal": causal, "draws": draws, "masked": masked, "classification": classification,
            "seq2seq": seq2seq, "recall": recall}[study]
    words = [*make(assets, folder), f"output={folder / study}"]
    done = run(ABLATION, compose_settings(ABLATION, words), RunOptions(False, lambda line: None))
    assert done.failed == 0, f"harness status {folder / study} --failed"
    return folder / study


def measured_stories(assets: Path, folder: Path) -> None:
    """Measure the log-loss of every token of a text of stories, with and without ablations, and keep it."""
    import harness
    from harness.evaluation.requests import ScoredTask, continuation_request
    from harness.evaluation.scoring import Scorer, ScoringOptions

    if (folder / f"{STORIES}.npz").exists():
        return
    model = harness.load(str(assets / "models/stories260K"))
    rows = lines(assets / "data/tinystories/tinystories_1000_train.jsonl")
    tokens = [model.tokenizer(row["text"] + "\n\n", add_special_tokens=False)["input_ids"] for row in rows]
    text = [token for story in tokens for token in story]
    requests = [continuation_request([model.tokenizer.bos_token_id], text[i : i + STORY_WINDOW])
                for i in range(0, len(text), STORY_WINDOW)]
    task = ScoredTask(STORIES, {}, requests, [str(i) for i in range(len(requests))], lambda scores: {})

    def nll() -> np.ndarray:
        options = ScoringOptions(8192, reuse=False)
        return -Scorer(model.loaded, {STORIES: task}, options).score(STORIES).logprob

    found = [nll()]
    for rule in (harness.regions.large, harness.regions.small):
        for share in (0.1, 0.3):
            with model.ablated("down_proj", rule(share), blocks=[3]):
                found.append(nll())
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{STORIES}.npz", lengths=[len(story) for story in tokens], nll=np.stack(found))


def stories(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each story, and the log-loss of every token: of the model itself, then of each ablation."""
    with np.load(folder / f"{STORIES}.npz") as found:
        return found["lengths"], found["nll"]


def scores_of(folder: Path, task: str, metric: str) -> tuple[ExampleScores, list[ExampleScores]]:
    """The scores of the baseline, and those of every ablation, of the examples that belong to the metric."""
    rows = read_metrics(folder)
    rows = rows[(rows.task == task) & (rows.metric == metric)]
    examples = read_examples(folder, task=task)
    of_cell = dict(list(examples[(examples.metric == metric) & (examples.weight > 0)].groupby("cell_id")))
    transform = "exp" if metric.endswith("perplexity") else "identity"
    bounds = (0.0, 1.0) if metric.startswith(COUNTS) else None
    found: dict[bool, list[ExampleScores]] = {True: [], False: []}
    for row in rows.itertuples():
        table = of_cell[row.cell_id]
        clusters = None if table.cluster.isna().any() else table.cluster.to_numpy(np.int64)
        score, weight = table.score.to_numpy(float), table.weight.to_numpy(float)
        scores = ExampleScores(score, weight, transform, bounds=bounds, clusters=clusters)
        found[row.target_kind == "baseline"].append(scores)
    return found[True][0], found[False]
