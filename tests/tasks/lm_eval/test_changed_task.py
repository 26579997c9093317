"""A study of a task that writes texts, whose task is changed between two runs: no old number is served as a new one."""

from __future__ import annotations

import json
import shutil

import pytest

from harness.cli import main
from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import TaskContext, task_digest
from harness.evaluation.settings import RuntimeSettings
from harness.measurements.ablation.tables import read_metrics
from harness.models.description import generation_settings, generation_values
from harness.models.loading import describe_model, load
from harness.models.settings import ModelSettings
from harness.tasks import generation
from harness.tasks.generation import Decoding
from harness.tasks.lm_eval.task import LmEvalTask

PROMPTS = ["Once upon a time there", "Lily went to the", "The dog wanted to"]
WORDS, NUMBERS = "(\\w+)", "(\\d+)"


def write_task(folder, regex: str) -> None:
    settings = {
        "task": "say", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "target_delimiter": "", "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"max_gen_toks": 6, "until": ["."], "do_sample": False},
        "filter_list": [{"name": "word", "filter": [
            {"function": "regex", "regex_pattern": regex}, {"function": "take_first"},
        ]}],
    }
    folder.mkdir(exist_ok=True)
    (folder / "say.yaml").write_text(json.dumps(settings))


@pytest.fixture
def place(assets, tmp_path, monkeypatch):
    """The present folder: a copy of the model, a task, and rows of which two thirds are what the model says."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(assets / "models" / "stories260K", tmp_path / "model")
    said = generation.continuations(load(ModelSettings(name="model", device="cpu")), PROMPTS, Decoding(["."], 6))
    answers = [text.split()[0].strip(",") for text in said[:2]] + ["never"]
    rows = [{"q": q, "a": a} for q, a in zip(PROMPTS, answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(tmp_path / "tasks", NUMBERS)
    return tmp_path


RUN = [
    "run", "model=pretrained", "model.name=./model", "model.device=cpu", "task=[]", "+tasks.say.kind=lm_eval",
    "+tasks.say.task=say", "+tasks.say.include_path=tasks", "+tasks.say.data_files.test=rows.jsonl", "target=all",
    "target.layer_types=[down_proj]", "region=fraction", "region.kinds=[small]", "region.values=[0.1]",
    "region.controls=[]", "runtime.threads=1", "--quiet",
]


@pytest.mark.assets
@pytest.mark.fault("the filter of a task that generates is changed between two runs")
def test_a_changed_filter_makes_other_cells(place, capsys) -> None:
    def baseline(folder: str) -> float:
        table = read_metrics(place / folder)
        (value,) = table[(table["target"] == "baseline") & (table["metric"] == "exact_match,word")]["value"]
        return value

    assert main([*RUN, "output=first"]) == 0
    assert baseline("first") == 0.0
    write_task(place / "tasks", WORDS)
    capsys.readouterr()

    assert main(["work", "first", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "harness: tasks.say: its definition changed since " in line and "/first was frozen; restore " in line

    assert main([*RUN, "output=second"]) == 0
    assert baseline("second") == pytest.approx(2 / 3)
    first, second = (set(read_metrics(place / folder)["cell_id"]) for folder in ("first", "second"))
    assert not first & second

    write_task(place / "tasks", NUMBERS)
    assert main(["work", "first", "--quiet"]) == 0


@pytest.mark.assets
@pytest.mark.fault("generation_config.json is changed between two runs")
def test_generation_config_is_known_before_weights_and_changes_the_cells(place, capsys) -> None:
    """As transformers applies it, and a module whose settings changed after its task was prepared is refused."""
    asked = LmEvalTask(task="say", include_path="tasks", data_files={"test": "rows.jsonl"})
    settings = ModelSettings(name="./model", device="cpu")

    def known() -> dict:
        return generation_values(generation_settings(settings, describe_model(settings)))

    def loaded_values() -> dict:
        return generation_values(load(settings).model.generation_config)

    plain = known()
    assert plain == loaded_values() and "transformers_version" not in plain
    file = place / "model" / "generation_config.json"
    own = json.loads(file.read_text())
    file.write_text(json.dumps({**own, "repetition_penalty": 3.0, "suppress_tokens": [7]}))
    assert known() == loaded_values() == {**plain, "repetition_penalty": 3.0, "suppress_tokens": [7]}
    file.write_text(json.dumps({**own, "transformers_version": "4.0.0"}))
    assert known() == plain
    file.unlink()
    assert known() == loaded_values()
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps({**config, "repetition_penalty": 2.0}))
    assert known() == loaded_values() and known()["repetition_penalty"] == 2.0

    loaded = load(settings)
    context = TaskContext(loaded.tokenizer, loaded.model.config, 512, "causal", known())
    prepared = asked.prepare("say", context)
    prepared.measure(loaded, Division(), 1.0)
    loaded.model.generation_config.num_beams = 2
    with pytest.raises(InputError, match=r"^model: its generation_config has another num_beams \(2\)"):
        prepared.measure(loaded, Division(), 1.0)


@pytest.mark.assets
def test_a_wrong_generation_config_is_one_line(place, capsys) -> None:
    (place / "model" / "generation_config.json").write_text(json.dumps({"max_new_tokens": -1, "num_beams": "many"}))
    assert main(RUN) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.name: generation_config.json of './model' is not valid: " in line


@pytest.mark.assets
def test_memory_of_a_generating_batch_is_in_the_id_and_decides_the_batches(place, monkeypatch) -> None:
    """The model keeps 2 x 5 blocks x 4 heads x 8 dimensions x 4 bytes of a token, which are 1280."""
    settings = ModelSettings(name="./model", device="cpu")
    loaded = load(settings)
    sizes: list[int] = []
    real = generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *given: (sizes.append(len(given[1])), real(*given))[1])
    digests = {}
    for gib, tokens, batches in ((None, 16384, [3]), (2 * 14 * 1280 / 2**30, 28, [2, 1]), (1280 / 2**30, 1, [1, 1, 1])):
        context = TaskContext.of(loaded.description, loaded.tokenizer, RuntimeSettings(generation_gib=gib))
        asked = LmEvalTask(task="say", include_path="tasks", data_files={"test": "rows.jsonl"})
        prepared = asked.prepare("say", context)
        assert prepared.protocol["batch_tokens"] == tokens
        sizes.clear()
        assert prepared.measure(loaded, Division(), 1.0)["exact_match,word"].score.shape == (3,)
        assert sizes == batches
        digests[task_digest(prepared)] = gib
    assert len(digests) == 3
