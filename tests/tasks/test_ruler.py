"""RULER's texts: what is hidden is there once, lengths are kept, and who reads is told from who does not."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from harness.errors import InputError, SettingError
from harness.evaluation.division import Division
from harness.tasks.ruler import RulerTask, largest, share_found
from harness.tasks.ruler_texts import ADJECTIVES, FILLER, FORMS, NOUNS
from tests.evaluation.reference import tiny
from tests.tasks.answering import Answering

LENGTHS = dict.fromkeys(FORMS, 1200) | {"cwe": 9000}


def context_of(length: int = 9000):
    return replace(tiny(context_length=64)[1], context_length=length, generation={})


def asked_numbers(prompt: str) -> str:
    asked = set(re.findall(r"\w+-\w+", prompt.rsplit("\n", 1)[1]))
    return " ".join(number for key, number in re.findall(r"for (\S+) is: (\d+)\.", prompt) if key in asked)


def tracked(prompt: str) -> str:
    known = {re.findall(r"assigned the value (\d+)", prompt)[-1]}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt):
        known |= {name} if source in known else set()
    return " ".join(known)


def common(prompt: str) -> str:
    listed = re.findall(r"\d+\. (\S+)", prompt.split("Below is")[-1])
    return " ".join(word for word, _ in Counter(listed).most_common(10))


def frequent(prompt: str) -> str:
    listed = prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    return " ".join(word for word, _ in Counter(listed).most_common(4)[1:])


READERS = {"vt": tracked, "cwe": common, "fwe": frequent}


@pytest.mark.parametrize("task", FORMS)
def test_who_reads_the_text_is_right_and_who_does_not_is_not(task) -> None:
    """The readers are regular expressions, which know nothing of the generator but its text."""
    context = context_of()
    new_tokens = 150
    prepared = RulerTask(task=task, length=LENGTHS[task], n_examples=2, max_new_tokens=new_tokens).prepare("r", context)
    assert json.loads(json.dumps(prepared.protocol)) == prepared.protocol
    # within one unit of the length: a sentence, or a word of the list three times
    assert all(LENGTHS[task] - new_tokens - 80 < len(tokens) <= LENGTHS[task] - new_tokens
               for tokens in prepared.inputs)

    def score(answer) -> dict[str, list[float]]:
        found = prepared.measure(Answering(context.tokenizer, 9000, answer), Division(), 1.0)
        return {name: one.score.tolist() for name, one in found.items()}

    assert score(READERS.get(task, asked_numbers)) == {"string_match": [1, 1], "all_found": [1, 1]}
    assert score(lambda prompt: "The grass is green.") == {"string_match": [0, 0], "all_found": [0, 0]}


@pytest.mark.parametrize("task", FORMS)
def test_texts_are_drawn_by_the_seed(task) -> None:
    form = FORMS[task]

    def made(seed: int, units: int):
        return form.make(random.Random(seed), units, FILLER)

    size = max(form.least, 80)
    assert made(0, size) == made(0, size) != made(1, size)
    assert made(0, size).answers == made(0, size + 1).answers and len(made(0, size).text) < len(made(0, size + 1).text)
    assert len(set(made(0, form.least).answers)) == {"vt": 5, "cwe": 10, "fwe": 3}.get(task, len(made(0, size).answers))


def test_every_needle_is_hidden_once() -> None:
    for seed in range(20):
        for task in ("niah_multivalue", "niah_multiquery", "niah_multikey"):
            question = FORMS[task].make(random.Random(seed), 30, FILLER)
            needles = re.findall(r"for (\S+) is: (\d+)\.", question.text)
            assert len(needles) == len({number for _, number in needles}) == 4
            assert question.text.count("The ") + question.text.count("Here we") + question.text.count("There ") == 30
            assert all(question.text.count(f"is: {answer}.") == 1 for answer in question.answers)


def test_frequencies_of_coded_words() -> None:
    text = FORMS["fwe"].make(random.Random(0), 1000, FILLER).text
    counts = Counter(text.split("coded words. ")[1].split("\nQuestion")[0].split())
    assert [count for _, count in counts.most_common(5)] == [607, 151, 67, 37, 24]
    assert counts.most_common(1)[0][0] == "....."


def test_words_are_distinct() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)
    assert len(ADJECTIVES) * len(NOUNS) > 20_000  # enough for the rare words of a list of 131,072 tokens


def test_largest() -> None:
    for limit in (3, 4, 17, 1000):
        for guess in (0, 3, 16, 5000):
            assert largest(lambda n, limit=limit: n <= limit, 3, guess) == limit
    assert largest(lambda n: False, 3, 50) is None


def test_share_found() -> None:
    assert share_found("Quiet-River and 12", ("quiet-river", "34")) == 0.5


def test_a_haystack_and_a_template_of_ones_own(tmp_path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("One went on. Was it far?\nNo!")
    context = context_of()
    task = RulerTask(task="niah_single", length=500, n_examples=1, haystack=str(path), template="[{prompt}]")
    text = context.tokenizer.decode(task.prepare("r", context).inputs[0])
    assert "One went on. Was it far? No! One" in text and "grass" not in text
    assert text.startswith("[Some special") and "text?] The special magic number for" in text
    path.write_text(" \n")
    with pytest.raises(InputError, match=r"^tasks\.r\.haystack: .* holds no text"):
        task.prepare("r", context)


def test_refusals(tmp_path) -> None:
    with pytest.raises(InputError, match=r"^tasks\.r\.length: 700 tokens are more than the model's context of 600"):
        RulerTask(task="vt", length=700).prepare("r", context_of(600))
    with pytest.raises(InputError, match=r"^tasks\.r\.length: 600 tokens are too few; the shortest text has \d{4}"):
        RulerTask(task="cwe", length=600).prepare("r", context_of())
    with pytest.raises(InputError, match=r"^tasks\.r\.max_new_tokens: 700 tokens leave no room"):
        RulerTask(task="vt", length=700, max_new_tokens=700).prepare("r", context_of())
    with pytest.raises(SettingError, match=r"template: it must hold \{prompt\} once"):
        RulerTask(task="vt", template="x")
    with pytest.raises(SettingError, match="haystack: no such file"):
        RulerTask(task="vt", haystack=str(tmp_path / "none.txt"))
