"""The tokens of long texts are kept between processes, and never served for another text, tokenizer or question."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.tasks import text as task_text
from harness.tasks import token_cache

TEXT = "one two  three\nfour " * 1200


def tokenizer(words=("one", "two", "three", "four"), **settings):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("?", *words))}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **settings)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spectral-harness" / "tokens"


def assert_same(found, expected):
    assert all(np.array_equal(*pair) and pair[0].dtype == np.int64 for pair in zip(found[:2], expected[:2]))
    assert found[2] is expected[2] is True


def test_what_is_kept_is_what_was_made(folder, monkeypatch):
    made = task_text._tokenise(tokenizer(), TEXT)
    assert len(made[0]) == 4800 and len(list(folder.iterdir())) == 1
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *_, **__: pytest.fail("tokenised again"))
    assert_same(task_text._tokenise(tokenizer(), TEXT), made)


def test_another_text_tokenizer_or_question_is_another_file(folder, monkeypatch):
    asked = [(tokenizer(), TEXT, "a 1"), (tokenizer(), TEXT + " ", "a 1"), (tokenizer(), TEXT, "a 2"),
             (tokenizer(("two", "one", "three", "four")), TEXT, "a 1"), (tokenizer(bos_token="one"), TEXT, "a 1"),
             (tokenizer(clean_up_tokenization_spaces=True), TEXT, "a 1"),
             (tokenizer(split_special_tokens=True), TEXT, "a 1")]  # fmt: skip
    other = tokenizer()
    other.add_tokens(["one two"])
    keys = [token_cache.key_of(*one) for one in [*asked, (other, TEXT, "a 1")]]
    assert None not in keys and len(set(keys)) == len(keys)
    assert token_cache.key_of(*asked[0]) == keys[0]
    monkeypatch.setattr(token_cache, "version", lambda package: "99")
    assert token_cache.key_of(*asked[0]) != keys[0]


def test_short_texts_and_foreign_tokenizers_are_not_kept(folder):
    class Foreign(PreTrainedTokenizerFast):
        pass

    assert token_cache.key_of(tokenizer(), "one two", "a 1") is None
    foreign = Foreign(tokenizer_object=tokenizer().backend_tokenizer)
    assert token_cache.key_of(foreign, TEXT, "a 1") is None
    task_text._tokenise(foreign, TEXT)
    assert not folder.exists()


@pytest.mark.parametrize("harm", [lambda whole: whole[:-8], lambda whole: whole[:50] + b"\1" + whole[51:],
                                  lambda whole: b"", lambda whole: whole + bytes(8)],
                         ids=["cut", "flipped", "empty", "longer"])  # fmt: skip
def test_damaged_files_are_made_anew(folder, harm):
    made = task_text._tokenise(tokenizer(), TEXT)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    assert_same(task_text._tokenise(tokenizer(), TEXT), made)
    assert file.read_bytes() == whole
    other = token_cache.key_of(tokenizer(), TEXT + "x", task_text.TOKENS_AND_EDGES)
    file.rename(folder / other)  # the file of another text
    assert len(task_text._tokenise(tokenizer(), TEXT + "x")[0]) == 4801


def test_the_oldest_files_make_room(folder, monkeypatch):
    one = np.arange(10)
    token_cache.keep("a" * 64, (one, one))
    monkeypatch.setattr(token_cache, "BUDGET_BYTES", 2 * (32 + 8 + 160))
    for name in "bc":
        token_cache.keep(name * 64, (one, one))
    assert sorted(path.name[0] for path in folder.iterdir()) == ["b", "c"]


def test_spaces_are_those_of_regular_expressions():
    assert task_text._SPACES.tolist() == [code for code in range(0x110000) if re.match(r"\s", chr(code))]
