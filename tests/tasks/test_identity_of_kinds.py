"""The digest of a task of each kind but lm_eval: data that differ only in what is right have other digests."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import CTRLTokenizer, PreTrainedTokenizerFast

from harness.evaluation.requests import TaskContext, task_digest
from harness.models.recall import recall_config
from harness.models.settings import RecallModelSettings
from harness.tasks.registry import prepare_task
from harness.tasks.tokenization import tokenizer_digest
from tests.encoders import tiny_classifier, tokenizer
from tests.evaluation.reference import tiny, tiny_tokenizer
from tests.models.tiny import tiny_model
from tests.tasks.asking import asked
from tests.tasks.test_encoder_tasks import context, write

F1, BLEU = (str(Path(__file__).parent / "metrics" / f"{name}.py") for name in ("f1", "sacrebleu"))
MACRO = {"name": F1, "arguments": {"average": "macro"}}
Change = Callable[[dict[str, Any], list[dict[str, Any]]], Any]  # changes settings and rows in place

SENTENCES = [{"sentence": "the cat sat", "label": 0}, {"sentence": "a dog ran", "label": 1}]
NAMED = [{"sentence": "the cat sat", "label": "good"}, {"sentence": "a dog ran", "label": "bad"}]
LABELS = {"metrics": [MACRO], "label_map": {"good": 1, "bad": 0}}
CHOICES = [{"inputs": "Max is a dog. It is", "targets": ["true"], "multiple_choice_targets": ["true", "false"]}]
OPEN = [{"inputs": "Max is a ", "targets": ["dog"], "multiple_choice_targets": []}]
PAIRS = [{"sentence_good": "The dog barks.", "sentence_bad": "The dog bark.", "UID": "a"},
         {"sentence_good": "The sun was warm.", "sentence_bad": "The was sun warm.", "UID": "b"}]
NAMES = [{"prompt": "When Anna and Ben went to the park, Anna gave a ball to", "answer": "Ben"}]
FACTS = [{"prompt": "The dog of Anna is called", "ground_truth": "Max"}]
PASSAGE = [{"text": "Anna and Ben went to the park."}]
WORDS = [{"text": "the cat sat on the mat"}]
SAID = [{"source": "the cat sat", "target": "a cat"}, {"source": "a dog ran", "target": "the dog"}]
FUNCTION = [{"prompt": "def f(a):\n", "test": "def check(f):\n    assert f(1) == 1", "entry_point": "f"}]
ALLOWED = {"execute": True, "max_new_tokens": 8}
TEXTS = {"task": "niah_single", "length": 500, "n_examples": 2, "max_new_tokens": 8}
WRITTEN = {"metrics": [{"name": BLEU, "value": "score"}]}


def row(number: int, key: str, value: Any) -> Change:
    return lambda settings, rows: rows[number].update({key: value})


def setting(key: str, value: Any) -> Change:
    return lambda settings, rows: settings.update({key: value})


def metric(key: str, value: Any) -> Change:
    return lambda settings, rows: settings["metrics"][0].update({key: value})


def swapped(one: str, other: str) -> Change:
    return lambda settings, rows: rows[0].update({one: rows[0][other], other: rows[0][one]})


# (kind, settings, rows, what is changed, how)
CASES: list[tuple[str, dict[str, Any], list[dict[str, Any]], str, Change]] = [
    ("classification", {}, SENTENCES, "a label", row(0, "label", 1)),
    ("classification", {"metrics": [MACRO]}, SENTENCES, "a label beside metrics", row(0, "label", 1)),
    ("classification", LABELS, NAMED, "class of a label", setting("label_map", {"good": 0, "bad": 1})),
    ("classification", {"metrics": [MACRO]}, SENTENCES, "argument", metric("arguments", {"average": "micro"})),
    ("classification", {"metrics": [MACRO]}, SENTENCES, "higher_is_better", metric("higher_is_better", False)),
    ("classification", {"metrics": [MACRO]}, SENTENCES, "name in tables", metric("label", "other")),
    ("classification", {"metrics": [MACRO]}, SENTENCES, "number that is taken", metric("value", "f1")),
    ("classification", {"metrics": [MACRO]}, SENTENCES, "configuration", metric("config", "other")),
    ("bigbench", {}, CHOICES, "which choice is right", row(0, "targets", ["false"])),
    ("bigbench", {}, CHOICES, "order of choices", row(0, "multiple_choice_targets", ["false", "true"])),
    ("bigbench", {}, OPEN, "an answer", row(0, "targets", ["cat"])),
    ("blimp", {}, PAIRS, "which sentence is good", swapped("sentence_good", "sentence_bad")),
    ("blimp", {}, PAIRS, "paradigm of a pair", row(0, "UID", "b")),
    ("ioi", {}, NAMES, "which name is the answer", lambda settings, rows: rows[0].update(
        prompt="When Anna and Ben went to the park, Ben gave a ball to", answer="Anna")),
    ("factual", {}, FACTS, "a fact", row(0, "ground_truth", "Ben")),
    ("factual", {}, FACTS, "generic words", setting("generic_words", ["park"])),
    ("lambada", {}, PASSAGE, "last word", row(0, "text", "Anna and Ben went to the sun.")),
    ("text", {}, PASSAGE, "a word", row(0, "text", "Anna and Max went to the park.")),
    ("text", {}, PASSAGE, "column", lambda settings, rows: (rows[0].update(t=rows[0]["text"]),
                                                            settings.update(column="t"))),
    ("text", {}, PASSAGE, "window", setting("window", 4)),
    ("masked", {}, WORDS, "a word", row(0, "text", "the cat sat on the house")),
    ("masked", {}, WORDS, "window", setting("window", 5)),
    ("seq2seq", {}, SAID, "a target", row(0, "target", "a dog")),
    ("seq2seq", WRITTEN, SAID, "a target of written text", row(0, "target", "a dog")),
    ("seq2seq", WRITTEN, SAID, "a source of written text", row(0, "source", "the cat ran")),
    ("seq2seq", WRITTEN, SAID, "text before a source", setting("source_prefix", "said : ")),
    ("seq2seq", WRITTEN, SAID, "length of written text", setting("max_new_tokens", 9)),
    ("humaneval", ALLOWED, FUNCTION, "a test", row(0, "test", "def check(f):\n    assert f(1) == 2")),
    ("humaneval", ALLOWED, FUNCTION, "name of the function", row(0, "entry_point", "g")),
    ("humaneval", ALLOWED, FUNCTION, "seconds", setting("timeout", 4)),
    ("humaneval", ALLOWED, FUNCTION, "memory", setting("memory", 512)),
    ("humaneval", ALLOWED, FUNCTION, "length of the completion", setting("max_new_tokens", 9)),
    ("ruler", TEXTS, [], "question", setting("task", "niah_multikey")),
    ("ruler", TEXTS, [], "seed", setting("seed", 1)),
    ("ruler", TEXTS, [], "length of the text", setting("length", 600)),
    ("ruler", TEXTS, [], "length of the answer", setting("max_new_tokens", 9)),
    ("ruler", TEXTS, [], "what surrounds the question", setting("template", "[{prompt}]")),
    ("ruler", TEXTS, [], "number of texts", setting("n_examples", 3)),
    ("recall", {"n_sequences": 8}, [], "seed", setting("seed", 1)),
    ("recall", {"n_sequences": 8}, [], "noise", setting("noise", 0.25)),
    ("recall_probes", {"n_sequences": 8}, [], "seed", setting("seed", 1)),
    ("recall_probes", {"n_sequences": 8}, [], "noise", setting("noise", 0.25)),
]


@pytest.fixture(scope="module")
def contexts() -> dict[str, TaskContext]:
    """A context for each kind of task."""
    recall = recall_config(RecallModelSettings(dim=16, hidden_dim=16, context_length=32))
    causal = tiny(context_length=64)[1]
    return {
        "classification": context(tiny_classifier("bert"), "bert"), "masked": context(tiny_model("bert"), "bert"),
        "seq2seq": context(tiny_model("t5"), "t5"),
        **dict.fromkeys(("recall", "recall_probes"), TaskContext(None, recall, 32, "causal")),
        **dict.fromkeys(("bigbench", "blimp", "ioi", "factual", "lambada", "text", "humaneval"), causal),
        "ruler": tiny(context_length=800)[1],
    }


def digest(kind: str, settings: dict[str, Any], rows: list[dict[str, Any]], known: TaskContext, folder: Path) -> str:
    files = {"data_files": write(folder / "rows.jsonl", rows)} if rows else {}
    return task_digest(asked("t", kind=kind, **files, **settings).prepare("t", known))


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "change"), [(k, s, r, c) for k, s, r, _, c in CASES],
    ids=[f"{kind}: {name}" for kind, _, _, name, _ in CASES],
)
def test_what_makes_a_number_changes_the_digest(kind, settings, rows, change, contexts, tmp_path) -> None:
    other_settings, other_rows = copy.deepcopy(settings), copy.deepcopy(rows)
    change(other_settings, other_rows)
    (tmp_path / "moved").mkdir()
    before = digest(kind, settings, rows, contexts[kind], tmp_path)
    assert digest(kind, settings, rows, contexts[kind], tmp_path / "moved") == before
    assert digest(kind, other_settings, other_rows, contexts[kind], tmp_path) != before


def test_the_script_of_a_metric_is_in_the_digest_and_its_place_is_not(contexts, tmp_path) -> None:
    def found(script: Path) -> str:
        settings = {"metrics": [{**MACRO, "name": str(script)}]}
        return digest("classification", settings, SENTENCES, contexts["classification"], tmp_path)

    before = found(Path(F1))
    own = tmp_path / "own" / "f1.py"
    own.parent.mkdir()
    shutil.copy(F1, own)
    assert found(own) == before
    own.write_text(own.read_text().replace("value = f1", "value = 0.5 * f1"))
    assert found(own) != before


def test_what_reads_written_text_is_in_the_digest(contexts, tmp_path) -> None:
    """Another text of a token that no source holds, and the length to which the sources are cut."""
    known = contexts["seq2seq"]
    content = json.loads(known.tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"]["horse"] = content["model"]["vocab"].pop("film")
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token="<pad>", unk_token="<unk>",
        bos_token="<s>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"],
    )
    digests = {
        digest("seq2seq", WRITTEN, SAID, TaskContext(one, known.model_config, length, "seq2seq"), tmp_path)
        for one, length in ((known.tokenizer, 40), (tokenizer("t5"), 40), (other, 40), (known.tokenizer, 3))
    }
    assert len(digests) == 3


def test_a_slow_tokenizer_is_its_files_and_not_their_place(tmp_path) -> None:
    """CTRL's is one that the library tokenizers does not read."""

    def found(name: str, merges: str = "l o\n", **settings: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "l@@": 1, "lo@@": 2, "o</w>": 3}))
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        return tokenizer_digest(CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **settings))

    before = found("a")
    assert found("b") == before
    others = {found("c", merges="o l\n"), found("d", unk_token="l@@"), found("e", clean_up_tokenization_spaces=True)}
    assert len(others | {before}) == 4


def test_a_tokenizer_is_the_same_from_a_file(tmp_path) -> None:
    made = tiny_tokenizer()
    made.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    read = [PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("saved", "moved")]
    assert tokenizer_digest(read[0]) == tokenizer_digest(read[1])
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(made) != tokenizer_digest(tiny_tokenizer(bos=True))


KIND = '''
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from harness.evaluation.requests import DirectTask, ExampleScores
from harness.tasks.settings import Task


@dataclass
class One(Task):
    kind: ClassVar[str] = "one"

    def prepare(self, name, context):
        return DirectTask(name, {}, ["0"], lambda *_: {"one": ExampleScores(np.array([1.0]), np.array([1.0]))})
'''


def test_the_code_of_a_kind_of_another_package_is_in_the_digest(tmp_path, monkeypatch) -> None:
    def found(folder: str, code: str) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kind_elsewhere.py").write_text(code)
        with monkeypatch.context() as context:
            context.syspath_prepend(str(tmp_path / folder))
            context.delitem(sys.modules, "kind_elsewhere", raising=False)
            return task_digest(prepare_task("t", import_module("kind_elsewhere").One(), TaskContext(None, None, 1, "")))

    before = found("a", KIND)
    assert found("b", KIND) == before
    assert found("c", KIND.replace("np.array([1.0]), np", "np.array([2.0]), np")) != before
