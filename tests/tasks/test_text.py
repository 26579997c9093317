"""Perplexity against transformers' own loss on the same windows, and counts against re and len."""

import json
import math
import re
from itertools import islice

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.requests import TaskContext, task_digest
from harness.evaluation.statistics import estimate
from harness.tasks.text import TextTask, windows
from tests.evaluation.reference import TEXT, real, score, tiny, tiny_tokenizer
from tests.tasks.asking import asked


@pytest.fixture(scope="module")
def small():
    return tiny()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def _values(model, task):
    return {metric: estimate(scores).value for metric, scores in task.measure(score(model, task.requests)).items()}


@torch.no_grad()
def _naive(model, tokens, window, stride, limit=None, bos=()):
    """The loop of transformers' guide, with its masked labels; -> summed loss, tokens scored. bos: fed before each."""
    total, count, previous, done = 0.0, 0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        ids = torch.tensor([[*bos, *tokens[begin:end]]])
        labels = ids.clone()
        labels[:, : len(bos) + previous - begin] = -100
        scored = (labels[:, 1:] != -100).sum().item()
        if scored:
            total += model(input_ids=ids, labels=labels).loss.item() * scored
            count += scored
            done += 1
        previous = end
        if end == len(tokens) or done == limit:
            break
    return total, count


@pytest.mark.parametrize(("window", "stride", "limit"), [
    (None, None, None), (32, None, None), (32, 32, 3), (32, 8, None), (32, 31, None), (17, 1, 20), (5, 3, None),
])
def test_mean_loss_is_transformers_own(small, text_file, window, stride, limit):
    model, context = small
    task = TextTask(data_files=text_file, window=window, stride=stride, limit=limit).prepare("t", context)
    values = _values(model, task)
    tokens = context.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    total, count = _naive(model, tokens, window or 64, stride or window or 64, limit)
    assert task.protocol["n_tokens"] == count
    assert values["nll"] == pytest.approx(total / count, rel=1e-5)
    assert values["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert values["word_perplexity"] == pytest.approx(math.exp(total / task.protocol["n_words"]), rel=1e-5)
    assert values["byte_perplexity"] == pytest.approx(math.exp(total / task.protocol["n_bytes"]), rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(total / task.protocol["n_bytes"] / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("window", "stride", "limit"), [
    (63, None, None), (63, None, 3), (32, 8, None), (17, 1, 20), (5, 3, None), (2, 2, None),
])
def test_with_bos_every_window_begins_with_it_and_every_token_is_scored_once(text_file, window, stride, limit):
    model, context = tiny(bos=True)
    task = TextTask(data_files=text_file, window=window, stride=stride, limit=limit).prepare("t", context)
    tokens = context.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert context.tokenizer(TEXT)["input_ids"] == [0, *tokens]
    assert all(request.tokens[0] == 0 and len(request.tokens) <= window for request in task.requests)
    total, count = _naive(model, tokens, window, stride or window, limit, bos=[0])
    values = _values(model, task)
    assert values["nll"] == pytest.approx(total / count, rel=1e-5)
    assert (task.protocol["bos"], task.protocol["prefix_token"], task.protocol["n_tokens"]) == (True, 0, count)
    if limit is None:
        assert np.concatenate([request.targets for request in task.requests]).tolist() == tokens
        assert task.protocol["n_words"] == len(re.split(r"\s+", TEXT))
        assert task.protocol["n_bytes"] == len(TEXT.encode())
        assert values["bits_per_byte"] == pytest.approx(total / len(TEXT.encode()) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("adds", [False, True])
def test_auto_is_what_the_tokenizer_does(text_file, adds):
    """The same cells as with the setting written out, so that nothing is measured twice."""
    _, context = tiny(bos=adds)
    by_default = TextTask(data_files=text_file).prepare("t", context)
    assert max(len(request.tokens) for request in by_default.requests) == 64 - (not adds)  # the context, and no more
    digests = {bos: task_digest(asked("t", kind="text", data_files=text_file, bos=bos).prepare("t", context))
               for bos in ("auto", True, False)}
    assert digests["auto"] == digests[adds] != digests[not adds]


def test_true_is_the_prefix_token_of_lm_eval(text_file):
    """It is EOS for a tokenizer without BOS."""
    from lm_eval.models.huggingface import HFLM

    model, context = tiny()
    for bos_token in ("<s>", None):
        context.tokenizer.bos_token = bos_token
        expected = HFLM(model, tokenizer=context.tokenizer).prefix_token_id
        task = TextTask(data_files=text_file, bos=True).prepare("t", context)
        assert {int(request.tokens[0]) for request in task.requests} == {expected} == {task.protocol["prefix_token"]}
        assert TextTask(data_files=text_file).prepare("t", context).protocol["bos"] is False
    context.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"^tasks\.t\.bos: true needs a BOS or an EOS token"):
        TextTask(data_files=text_file, bos=True).prepare("t", context)


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path, text_file):
    _, context = tiny(bos=True)
    path = tmp_path / "marked.txt"
    path.write_text("<s>" + TEXT)
    marked, plain = (TextTask(data_files=file).prepare("t", context) for file in (str(path), text_file))
    assert marked.protocol == {**plain.protocol, "data": "marked.txt"}
    assert all((a.tokens == b.tokens).all() for a, b in zip(marked.requests, plain.requests, strict=True))


@pytest.mark.assets
@pytest.mark.parametrize(("window", "stride"), [(None, None), (128, 40)])
def test_a_trained_model_on_real_text(assets, tmp_path, window, stride):
    model, context = real(assets / "models/stories260K")
    path = tmp_path / "head.jsonl"
    with (assets / "data/wikitext-2-raw/test.jsonl").open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, 60)), encoding="utf-8")
    task = TextTask(data_files=str(path), window=window, stride=stride, limit=5).prepare("w", context)
    text = "\n\n".join(json.loads(line)["text"] for line in path.open(encoding="utf-8"))
    tokens = context.tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = _naive(model, tokens, window or 512, stride or window or 512, 5, bos=[1])
    assert task.protocol["window"] == (window or 512)
    assert _values(model, task)["nll"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.assets
def test_the_joined_test_set_is_the_published_one(assets):
    """287,644 GPT-2 tokens; the one that begins a window is not scored."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "data/tokenizers/gpt2")
    path = assets / "data/wikitext-2-raw/test.jsonl"
    task = TextTask(data_files=str(path)).prepare("w", TaskContext(tokenizer, None, 1024, "causal"))
    text = "\n\n".join(json.loads(line)["text"] for line in path.open(encoding="utf-8"))
    assert task.protocol["n_windows"] == math.ceil(287_644 / 1024)
    assert task.protocol["n_tokens"] == 287_644 - math.ceil(287_644 / 1024)
    # every token that begins a window is left out of the counts, too
    pieces = [tokenizer.decode([request.tokens[0]]) for request in task.requests]
    assert task.protocol["n_bytes"] == len(text.encode()) - sum(len(piece.encode()) for piece in pieces)
    assert 0 < len(re.split(r"\s+", text)) - task.protocol["n_words"] <= len(pieces)


ASCII = "".join(character for character in TEXT if character.isascii())


def words_begun(text, position):
    """By how much lm-eval's count, len(re.split(r"\\s+", text)), is larger because of this character: an empty text has
    one word, and whitespace begins another."""
    after_space = position > 0 and text[position - 1].isspace()
    return (position == 0) + (text[position].isspace() and not after_space)


@pytest.mark.parametrize("text", [ASCII, f"\n {ASCII[:300]}  \n\n"])
@pytest.mark.parametrize("trimmed", [True, False])
def test_each_token_counts_its_own_bytes_and_words(tmp_path, text, trimmed):
    """One token is scored per window. A token is a piece of the text with its spaces, also where the offsets leave
    them out."""
    tokenizer = tiny_tokenizer(bos=not trimmed)
    path = tmp_path / "text.txt"
    path.write_text(text, newline="")
    config = TextTask(data_files=str(path), window=2, stride=1, bos=False)
    task = config.prepare("t", TaskContext(tokenizer, None, 64, "causal"))
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text
    ends = np.cumsum([len(piece) for piece in pieces])
    words = [sum(words_begun(text, at) for at in range(end - len(piece), end)) for end, piece in zip(ends, pieces)]
    assert sum(words) == len(re.split(r"\s+", text))
    weights = task.measure(score_nothing(task))
    assert weights["byte_perplexity"].weight.tolist() == [len(piece) for piece in pieces[1:]]
    assert weights["word_perplexity"].weight.tolist() == words[1:]


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (32, 7), (3, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("limit", [None, 1, 4])
@pytest.mark.parametrize("bos", [False, True])
def test_words_and_bytes_are_those_of_the_scored_tokens(text_file, window, stride, limit, bos):
    """Of a text with characters of several bytes, some of which are several tokens."""
    tokenizer = tiny_tokenizer(bos)
    config = TextTask(data_files=text_file, window=window, stride=stride, limit=limit, bos=False)
    task = config.prepare("t", TaskContext(tokenizer, None, 64, "causal"))
    offsets = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # the token that has a character: the first that ends behind it
    owner = [next(i for i, (_, end) in enumerate(offsets) if end > at) for at in range(len(TEXT))]
    done, spans = 0, []
    for begin in range(0, len(offsets), stride):
        end = min(begin + window, len(offsets))
        spans += [(max(done, begin + 1), end)] if max(done, begin + 1) < end else []
        if end == len(offsets):
            break
        done = end
    weights = task.measure(score_nothing(task))
    expected = [[at for at in range(len(TEXT)) if first <= owner[at] < end] for first, end in spans[:limit]]
    n_bytes = [len("".join(TEXT[at] for at in held).encode()) for held in expected]
    assert weights["bits_per_byte"].weight.tolist() == n_bytes
    n_words = [sum(words_begun(TEXT, at) for at in held) for held in expected]
    assert weights["word_perplexity"].weight.tolist() == n_words
    assert (task.protocol["n_words"], task.protocol["n_bytes"]) == (sum(n_words), sum(n_bytes))
    assert task.protocol["text_positions"] == "offsets"


def test_bits_per_byte_do_not_depend_on_tokens_that_are_not_scored(text_file):
    """A model that needs one nat for every byte of a token has 1 / log 2 bits per byte, whatever the windows are."""
    from harness.evaluation.requests import Scores

    tokenizer = tiny_tokenizer()
    for window, stride in ((64, 64), (8, 8), (8, 7), (64, 5)):
        config = TextTask(data_files=text_file, window=window, stride=stride)
        task = config.prepare("t", TaskContext(tokenizer, None, 64, "causal"))
        targets = np.concatenate([request.targets for request in task.requests])
        # of a byte-level tokenizer: one character of the token's name is one byte
        n_bytes = np.array([len(tokenizer.convert_ids_to_tokens(int(token))) for token in targets])
        offsets = np.cumsum([0, *(len(request.targets) for request in task.requests)])
        scores = task.measure(Scores(-n_bytes.astype(np.float64), n_bytes > 0, None, offsets))
        # a character of several tokens at the edge of a window is counted whole or not at all
        few = 0.01 if window == 8 else 1e-3
        assert estimate(scores["bits_per_byte"]).value == pytest.approx(1 / math.log(2), rel=few)


def score_nothing(task):
    from harness.evaluation.requests import Scores

    offsets = np.cumsum([0, *(len(request.targets) for request in task.requests)])
    return Scores(np.zeros(offsets[-1]), np.zeros(offsets[-1], dtype=bool), None, offsets)


@pytest.mark.parametrize("n", [2, 3, 63, 64, 65, 129, 200])
@pytest.mark.parametrize(("window", "stride"), [(64, 1), (64, 63), (10, 3), (2, 1)])
def test_overlapping_windows_score_each_token_once_with_the_longest_context(n, window, stride):
    scored = np.zeros(n, dtype=int)
    for begin, first, end in windows(n, window, stride, False):
        scored[first:end] += 1
        assert begin % stride == 0 and end - begin <= window
        # a window further left that holds the same token would give more context, and there is none
        assert begin == 0 or first >= begin - stride + window
    assert scored.tolist() == [0] + [1] * (n - 1)


def test_windows_side_by_side_leave_out_the_first_token_of_each():
    assert list(windows(10, 4, 4, False)) == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]
    assert list(windows(9, 4, 4, False)) == [(0, 1, 4), (4, 5, 8)]
    assert list(windows(9, 4, 4, True)) == [(0, 0, 4), (4, 4, 8), (8, 8, 9)]


def test_a_slow_tokenizer_gives_the_same_tokens_and_totals(small, text_file):
    model, context = small

    class Slow:
        is_fast = False
        bos_token_id = None

        def __call__(self, text, add_special_tokens, return_offsets_mapping, verbose):
            assert not return_offsets_mapping
            return context.tokenizer(text, add_special_tokens=add_special_tokens)

        def decode(self, tokens):
            return context.tokenizer.decode(tokens)

    config = TextTask(data_files=text_file, window=32)
    fast = config.prepare("t", context)
    slow = config.prepare("t", TaskContext(Slow(), None, 64, "causal"))
    assert slow.protocol == {
        **fast.protocol, "text_positions": "decoded",
        "n_words": pytest.approx(fast.protocol["n_words"], abs=3),
        "n_bytes": pytest.approx(fast.protocol["n_bytes"], abs=12),
    }
    fast_bytes, slow_bytes = (task.measure(score_nothing(task))["bits_per_byte"].weight for task in (fast, slow))
    np.testing.assert_allclose(slow_bytes, fast_bytes, atol=12)


def test_the_protocol_is_json_and_follows_the_text(tmp_path, small, text_file):
    _, context = small
    protocol = TextTask(data_files=text_file).prepare("t", context).protocol
    assert json.loads(json.dumps(protocol)) == protocol
    assert (protocol["join"], protocol["bos"], protocol["data"]) == ("\n\n", False, "text.txt")
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(json.dumps({"body": part}) for part in TEXT.split("\n\n")))
    config = TextTask(data_files=str(path), column="body")
    same = config.prepare("t", context)
    assert same.protocol["digest"] == protocol["digest"]
    config.separator = "\n"
    assert config.prepare("t", context).protocol["digest"] != protocol["digest"]
    assert list(same.example_ids) == [str(i) for i in range(len(same.requests))]


@pytest.mark.parametrize(("settings", "message"), [
    ({"window": 65}, r"^tasks\.t\.window: 65 tokens are more than the model's context of 64$"),
    ({"window": 1}, r"^tasks\.t\.window: 1 is wrong; it must be at least 2$"),
    ({"window": 32, "stride": 33}, r"^tasks\.t\.stride: must be between 1 and the window of 32 tokens, not 33$"),
    ({"stride": 0}, r"^tasks\.t\.stride: 0 is wrong; it must be at least 1$"),
    ({"limit": 0}, r"^tasks\.t\.limit: 0 is wrong; it must be at least 1$"),
    ({"column": "page"}, r"no column 'page'"),
    ({"data_files": None}, r"^tasks\.t: set data_files"),
    ({"bos": "maybe"}, r"^tasks\.t\.bos: 'maybe' is wrong; use auto, true or false$"),
])
def test_bad_settings(small, text_file, settings, message):
    with pytest.raises(InputError, match=message):
        asked("t", **{"kind": "text", "data_files": text_file, **settings}).prepare("t", small[1])


def test_nothing_to_score(tmp_path, small):
    path = tmp_path / "short.txt"
    path.write_text("a")
    with pytest.raises(InputError, match="has 1 tokens; at least 2"):
        TextTask(data_files=str(path)).prepare("t", small[1])
    with pytest.raises(InputError, match=r"tasks\.t: the model has no tokenizer"):
        TextTask(data_files=str(path)).prepare("t", TaskContext(None, None, 64, "causal"))
