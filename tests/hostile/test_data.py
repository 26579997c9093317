"""Data that are none: every kind of task refuses them in one line, before weights are loaded and with exit status 2.

Each case goes through harness.cli.main. Only the composition of settings by Hydra is left out, which is the subject of
test_settings.py and would take most of the time.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harness.measurements
from harness.cli import main
from harness.measurements.ablation.settings import StudySettings
from harness.settings.validation import validated
from tests import encoders
from tests.evaluation.reference import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of each kind of model. The words of `small` have token ids that its embedding lacks."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "causal")
    tiny_tokenizer().save_pretrained(folder / "causal")
    small = tiny_model()
    small.resize_token_embeddings(300)
    small.save_pretrained(folder / "small")
    tiny_tokenizer().save_pretrained(folder / "small")
    for name, model in (("masked", None), ("classification", encoders.tiny_classifier("bert"))):
        encoders.save(folder / name, "bert", model)
    encoders.save(folder / "seq2seq", "t5")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def outcome(models, tmp_path, capsys, monkeypatch):
    """A function that plans a study of one task on a file, and returns its exit status and what it said on stderr."""
    def plan(content: Any, name: str = "rows.jsonl", model: str = "causal", **task: Any) -> tuple[int, str]:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, pandas.DataFrame):
            content.to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        files = {"data_files": {"validation": str(path)} if task["kind"] == "lm_eval" else str(path)}
        values = {"model": {"name": str(models[model]), "device": "cpu"}, "tasks": {"t": {**files, **task}}}
        monkeypatch.setattr(harness.measurements, "compose_settings", lambda *_: validated(StudySettings, values))
        monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("weights were loaded"))
        capsys.readouterr()
        status = main(["plan"])
        captured = capsys.readouterr()
        assert status == 0 or not captured.out
        return status, captured.err

    return plan


def assert_refused(outcome: tuple[int, str], *words: str) -> None:
    status, said = outcome
    assert status == 2, said
    assert said.startswith("harness: tasks.t") and said.count("\n") == 1 and said.endswith("\n"), said
    assert "Traceback" not in said and len(said) < 1000
    for word in words:
        assert word in said


IOI = {"prompt": "Anna and Ben went to the park. Anna gave a ball to", "answer": "Ben"}
FACT = {"prompt": "The dog was named", "ground_truth": "Max"}
CHOICE = {"input": "Max is a", "targets": ["dog"], "choices": ["dog", "cat"]}
PIQA = {"goal": "to run", "sol1": "jump", "sol2": "bark", "label": 0}
PAIR = {"sentence_good": "Anna gave a ball to Ben", "sentence_bad": "Anna gave to Ben a ball", "UID": "order"}
LABELLED = {"sentence": "the cat sat", "label": 1}
TRANSLATION = {"source": "the cat sat", "target": "a cat"}
REWRITE = {"prompt": "{} is", "subject": "Max", "target_true": {"str": "dog"}}
# Kind of task -> (model, a right row, the columns that must hold text, further settings).
KINDS: dict[str, tuple[str, dict[str, Any], list[str], dict[str, Any]]] = {
    "ioi": ("causal", IOI, ["prompt", "answer"], {}),
    "lambada": ("causal", {"text": "Anna gave a ball to Ben"}, ["text"], {}),
    "text": ("causal", {"text": "Anna gave a ball to Ben"}, ["text"], {}),
    "factual": ("causal", FACT, ["prompt", "ground_truth"], {}),
    "bigbench": ("causal", CHOICE, ["input"], {}),
    "blimp": ("causal", PAIR, ["sentence_good", "sentence_bad"], {}),
    "lm_eval": ("causal", PIQA, ["sol1", "sol2"], {"task": "piqa"}),
    "masked": ("masked", {"text": "the cat sat"}, ["text"], {}),
    "classification": ("classification", LABELLED, ["sentence"], {}),
    "seq2seq": ("seq2seq", TRANSLATION, ["source"], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_right_rows_are_taken(outcome, kind):
    model, row, _, more = KINDS[kind]
    assert outcome([row, row], model=model, kind=kind, **more) == (0, "")


# Values that are no text. lm-eval reads rows by datasets, for which a column of numbers is as good as one of texts.
NO_TEXT = {"empty": "", "blank": " \t ", "null": None, "true": True, "number": 5, "list": ["Ben"], "object": {"a": 1},
           "NaN": float("nan"), "surrogate": "Ben \ud800"}


@pytest.mark.parametrize(("kind", "column", "value"), [
    (kind, column, value) for kind, one in KINDS.items() for column in one[2] for value in NO_TEXT
    if kind != "lm_eval" or value in ("empty", "blank")
])
def test_what_is_no_text_is_refused(outcome, kind, column, value):
    model, row, _, more = KINDS[kind]
    assert_refused(outcome([{**row, column: NO_TEXT[value]}], model=model, kind=kind, **more))


@pytest.mark.parametrize(("kind", "column"), [
    *((kind, column) for kind, one in KINDS.items() for column in one[2]), ("classification", "label"),
    ("bigbench", "targets"), ("lm_eval", "label"), ("lm_eval", "goal"), ("seq2seq", "target"),
])
def test_a_missing_column_is_refused(outcome, kind, column):
    model, row, _, more = KINDS[kind]
    assert_refused(outcome([{k: v for k, v in row.items() if k != column}], model=model, kind=kind, **more))


# What would pass for data of one kind of task, and what the line must say.
GARBAGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "answer that is no name": ("ioi", {"answer": "."}, "is no name"),
    "answer that is a number": ("ioi", {"prompt": "Anna and 5. Anna gave a ball to", "answer": "5"}, "is no name"),
    "answer that occurs twice": ("ioi", {"answer": "Anna"}, "must occur exactly once"),
    "answer that does not occur": ("ioi", {"answer": "Zoe"}, "must occur exactly once"),
    "no other name": ("ioi", {"prompt": "Ben gave a ball to"}, "must occur twice"),
    "passage without a last word": ("lambada", {"text": "Anna gave "}, "must end with the word"),
    "line end behind the last word": ("lambada", {"text": "Anna gave a ball\n"}, "must end with the word"),
    "equal sentences": ("blimp", {"sentence_bad": "Anna gave a ball to Ben "}, "the sentences are the same"),
    "answers as one text": ("bigbench", {"targets": "dog"}, "targets must be a list of texts"),
    "answers as an object": ("bigbench", {"targets": {"dog": 1, "cat": 0}}, "targets must be a list of texts"),
    "answer that is a number of a list": ("bigbench", {"targets": [5]}, "targets must be a list of texts"),
    "answer that is null": ("bigbench", {"targets": [None]}, "targets must be a list of texts"),
    "answer that is NaN": ("bigbench", {"targets": [float("nan")]}, "targets must be a list of texts"),
    "answer that is a list": ("bigbench", {"targets": [["dog"]]}, "targets must be a list of texts"),
    "answer that is true": ("bigbench", {"targets": [True]}, "targets must be a list of texts"),
    "answer that is empty": ("bigbench", {"targets": [" "]}, "targets must be a list of texts"),
    "no answer": ("bigbench", {"targets": []}, "answers in targets"),
    "answer that is no choice": ("bigbench", {"targets": ["bird"]}, "none of the choices"),
    "several answers": ("bigbench", {"targets": ["dog", "cat"]}, "exactly one right answer"),
    "one choice": ("bigbench", {"choices": ["dog"]}, "needs two of them"),
    "one choice twice": ("bigbench", {"choices": ["dog", " dog"]}, "needs two of them"),
    "choices as one text": ("bigbench", {"choices": "dogs"}, "choices must be a list of texts"),
    "empty choice": ("bigbench", {"choices": ["dog", ""]}, "choices must be a list of texts"),
    "every choice right": ("bigbench", {"scores": [1, 1]}, "by its scores the right answers are cat, dog"),
    "no choice right": ("bigbench", {"scores": [0, 0]}, "by its scores the right answers are none"),
    "another choice right": ("bigbench", {"scores": [0, 1]}, "by its scores the right answers are cat"),
    "too few scores": ("bigbench", {"scores": [1]}, "one number for each"),
    "score that is a text": ("bigbench", {"scores": ["1", "0"]}, "one number for each"),
    "score that is NaN": ("bigbench", {"scores": [1, float("nan")]}, "one number for each"),
    "prefix that is a list": ("bigbench", {"task_prefix": ["Q"]}, "needs text in the column input"),
    "fact without an answer": ("factual", {"requested_rewrite": {**REWRITE, "target_true": {}}}, "needs text"),
    "fact whose answer is a text": ("factual", {"requested_rewrite": {**REWRITE, "target_true": "dog"}}, "needs text"),
    "fact whose subject is a number": ("factual", {"requested_rewrite": {**REWRITE, "subject": 5}}, "needs text"),
    "fact without a prompt": ("factual", {"requested_rewrite": {"subject": "Max"}}, "needs text"),
    "label that is a text": ("lm_eval", {"label": "x"}, "right answer 'x' is none of its 2 choices"),
    "label that is empty": ("lm_eval", {"label": ""}, "right answer '' is none of its 2 choices"),
    "label of the hidden test split": ("lm_eval", {"label": -1}, "right answer -1 is none of its 2 choices"),
    "label beyond the choices": ("lm_eval", {"label": 2}, "right answer 2 is none of its 2 choices"),
    "label that is null": ("lm_eval", {"label": None}, "none of its 2 choices"),
    "label between the choices": ("lm_eval", {"label": 0.5}, "none of its 2 choices"),
    "class that the model lacks": ("classification", {"label": 3}, "none of the model's 3 classes"),
    "class below zero": ("classification", {"label": -1}, "none of the model's 3 classes"),
    "class that is NaN": ("classification", {"label": float("nan")}, "none of the model's 3 classes"),
    "class that is infinite": ("classification", {"label": float("inf")}, "none of the model's 3 classes"),
    "class that is true": ("classification", {"label": True}, "none of the model's 3 classes"),
    "class that is null": ("classification", {"label": None}, "none of the model's 3 classes"),
    "class between others": ("classification", {"label": 0.5}, "none of the model's 3 classes"),
    "class that is a list": ("classification", {"label": [1]}, "none of the model's 3 classes"),
    "class that is no digit": ("classification", {"label": "²"}, "none of the model's 3 classes"),
    "class with two signs": ("classification", {"label": "--1"}, "none of the model's 3 classes"),
    "class of many digits": ("classification", {"label": "1" * 5000}, "none of the model's 3 classes"),
    "class of an empty name": ("classification", {"label": ""}, "none of the model's 3 classes"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_not_scored(outcome, name):
    kind, values, words = GARBAGE[name]
    model, row, _, more = KINDS[kind]
    found = [{**row, **values}] if kind in ("blimp", "bigbench") else [row, {**row, **values}]
    assert_refused(outcome(found, model=model, kind=kind, **more), words)


def test_metrics_need_words_to_compare_with(outcome):
    for words in ([], [""], ["the", " "]):
        assert_refused(outcome([FACT], kind="factual", generic_words=words), "generic_words")


@pytest.mark.parametrize("kind", ["ioi", "lambada", "text", "factual", "bigbench", "blimp", "lm_eval"])
def test_tokens_without_a_row_in_the_embedding(outcome, kind):
    _, row, _, more = KINDS[kind]
    words = "but the model has the tokens 0 to 299 only"
    assert_refused(outcome([row, row], model="small", kind=kind, **more), words)


def test_tokens_that_no_text_uses_may_lack_a_row(outcome):
    """Many tokenizers have more tokens than the embedding has rows. These bytes are among the first tokens."""
    assert outcome([{"text": "xyz xyz"}], model="small", kind="text") == (0, "")


# Name of the file -> what is in it, and a word of the line. "@" stands for a right row.
FILES: dict[str, tuple[str, bytes, str]] = {
    "JSON of half a surrogate pair": ("a.jsonl", b'{"prompt": "a \\ud83d b", "answer": "b"}', "\\ud83d"),
    "JSON nested without end": ("a.jsonl", b"[" * 100_000, "nested"),
    "objects nested without end": ("a.jsonl", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    "JSON file nested without end": ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested"),
    "number of 5,000 digits": ("a.jsonl", b'{"prompt": ' + b"7" * 5000 + b"}", "digits"),
    "key that occurs twice": ("a.jsonl", b'{"prompt": "x", "prompt": "y"}', "'prompt' occurs twice"),
    "bytes that are no UTF-8": ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
    "UTF-16": ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
    "NUL in JSON": ("a.jsonl", b'{"prompt": "a\0b"}', "not JSON"),
    "only NUL": ("a.jsonl", b"\0" * 100, "not JSON"),
    "JSON that is cut off": ("a.jsonl", b'@\n{"prompt": "x', "line 2 is not JSON"),
    "list of numbers": ("a.jsonl", b"[1, 2]", "not a JSON object"),
    "number": ("a.jsonl", b"5", "not a JSON object"),
    "NaN": ("a.jsonl", b"NaN", "not a JSON object"),
    "two values on one line": ("a.jsonl", b"@ @", "not JSON"),
    "nothing": ("a.jsonl", b"", "no rows"),
    "nothing but a BOM": ("a.jsonl", b"\xef\xbb\xbf", "no rows"),
    "nothing but lines": ("a.jsonl", b"\r\r\n\n", "no rows"),
    "object in place of a list": ("a.json", b"@", "a list of objects"),
    "list with a number": ("a.json", b"[@, 5]", "a list of objects"),
    "empty JSON": ("a.json", b"", "not JSON"),
    "gzip": ("a.jsonl.gz", b"\x1f\x8b\x08", "suffixes"),
    "gzip under another name": ("a.jsonl", b"\x1f\x8b\x08\x00", "not UTF-8"),
    "CSV with too many fields": ("a.csv", b"prompt,answer\nAnna, Ben and Anna to,Ben\n", "row 0 has more fields"),
    "CSV with too few fields": ("a.csv", b"prompt,answer\nAnna\n", "row 0 has fewer fields"),
    "CSV with a quote that stays open": ("a.csv", b'prompt,answer\n"Anna,Ben\n', "cannot read"),
    "CSV with text behind a quote": ("a.csv", b'prompt,answer\n"An"na,Ben\n', "cannot read"),
    "CSV with NUL": ("a.csv", b"prompt,answer\nAn\0na,Ben\n", "NUL"),
    "CSV with one name twice": ("a.csv", b"prompt,prompt\nAnna,Ben\n", "two columns called 'prompt'"),
    "CSV of one line": ("a.csv", b"prompt,answer\n", "no rows"),
    "text with NUL": ("a.txt", b"Anna\0Ben", "NUL"),
    "text that is no UTF-8": ("a.txt", b"Anna \xff", "not UTF-8"),
    "no suffix": ("rows", b"@", "suffixes"),
    "parquet of nothing": ("a.parquet", b"", "cannot read"),
    "parquet that is text": ("a.parquet", b"PAR1 PAR1", "cannot read"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(outcome, name):
    file, content, words = FILES[name]
    row = json.dumps(IOI).encode()
    assert_refused(outcome(content.replace(b"@", row), file, kind="ioi"), words)


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", b"\xef\xbb\xbf@\n"), ("a.jsonl", b"@\r@\r"), ("a.jsonl", b"@\r\n\r\n@\r\n"),
    ("a.json", b"\xef\xbb\xbf[@]"),
    ("a.csv", b'\xef\xbb\xbfprompt,answer\r\n"Anna and Ben. Anna gave a ball, to",Ben\r\n'),
])
def test_other_line_ends_and_a_bom_are_read(outcome, name, content):
    assert outcome(content.replace(b"@", json.dumps(IOI).encode()), name, kind="ioi") == (0, "")


def test_parquet_that_is_cut_off(outcome):
    buffer = io.BytesIO()
    pandas.DataFrame([IOI] * 3).to_parquet(buffer)
    whole = buffer.getvalue()
    for length in range(4, len(whole), len(whole) // 12):
        assert_refused(outcome(whole[:length], "a.parquet", kind="ioi"), "cannot read")


def test_parquet_with_values_of_other_types(outcome):
    for answer in ([float("nan")], [None], [[1, 2]], [b"Ben"], [5]):
        table = pandas.DataFrame({"prompt": [IOI["prompt"]], "answer": answer})
        assert_refused(outcome(table, "a.parquet", kind="ioi"), "'answer' of row 0 is not text")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["Ben", "dog", "\ud800", "", "Anna and Ben. Anna gave it to"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lm_eval"])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_value_in_any_column_is_one_line_or_right(outcome, kind, data):
    model, row, _, more = KINDS[kind]
    column = data.draw(st.sampled_from(sorted(row)))
    result = outcome([row, {**row, column: data.draw(VALUES)}], model=model, kind=kind, **more)
    if result[0]:
        assert_refused(result)


@pytest.mark.parametrize("kind", ["ioi", "bigbench", "text"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_bytes_in_a_file_are_one_line_or_right(outcome, kind, data):
    """A right file of each format, in which some bytes are others, are missing or are added."""
    model, row, _, more = KINDS[kind]
    name = data.draw(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt"]))
    whole = json.dumps([row] if name == "a.json" else row).encode()
    whole = b"prompt,answer,text\n%s,Ben,x\n" % IOI["prompt"].encode() if name == "a.csv" else whole
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    result = outcome(whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:], name, model=model, kind=kind)
    if result[0]:
        assert_refused(result)
