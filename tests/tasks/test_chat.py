"""Chat templates: the tokens of `apply_chat_template` and of lm-eval, what is refused, and that ids change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import harness as sh
from harness.errors import InputError
from harness.evaluation.requests import TaskContext, task_digest
from harness.tasks.registry import TASKS, prepare_task
from tests.checkpoints import WORDS, tokenizer
from tests.models.tiny import tiny_config

# ChatML without line breaks, so that words stay words.
TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant ,{% endif %}"
)
SYSTEM = "the big book"


@pytest.fixture(scope="module")
def context() -> TaskContext:
    config = tiny_config("llama")
    found = tokenizer()
    found.chat_template = TEMPLATE
    return TaskContext(found, config, 64, "causal")


@pytest.fixture
def files(tmp_path) -> dict[str, dict[str, object]]:
    """The settings of one small task of every kind that is asked in a chat."""
    rows = {
        "lambada": [{"text": "the cat sat on the mat"}, {"text": "Mary gave the book to John"}],
        "ioi": [{"prompt": "then John and Mary went to the store and Mary gave a book to", "answer": "John"}],
        "factual": [{"prompt": "the cat sat on the", "ground_truth": "mat"}],
        "bigbench": [{"inputs": "it was", "targets": ["red"], "multiple_choice_targets": ["red", "blue"]}],
        "text": [{"text": " ".join(WORDS)}],
        "label_words": [{"sentence": "the cat sat", "label": 1}],
        "blimp": [{"sentence_good": "the cat sat", "sentence_bad": "the sat cat"}],
    }
    found: dict[str, dict[str, object]] = {}
    for kind, content in rows.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        found[kind] = {"data_files": str(path)}
    found["factual"]["generic_words"] = ["the", "a"]
    found["label_words"] |= {"template": "{sentence} it was", "words": {"0": " red", "1": " blue"}}
    return found


def prepared(kind: str, context: TaskContext, settings: dict[str, object], **more: object):
    return prepare_task("t", sh.task("t", kind=kind, **{**settings, **more}).task, context)


# kind -> the user's turn and the answer of its first request
ASKED = {
    "lambada": ("the cat sat on the", "mat"),
    "ioi": ("then John and Mary went to the store and Mary gave a book to", "John"),
    "bigbench": ("it was", "red"),
    "text": ("Write a text.", " ".join(WORDS)),
    "blimp": ("Write a sentence.", "the cat sat"),
}


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("kind", ASKED)
def test_the_tokens_are_those_of_the_tokenizer(kind, system, context, files):
    task = prepared(kind, context, files[kind], chat=True, system_prompt=system)
    user, answer = ASKED[kind]
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]
    own = context.tokenizer
    expected = own.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    answered = own.encode(answer, add_special_tokens=False)
    request = task.requests[0]
    assert request.tokens.tolist() == [*expected, *answered[:-1]]
    assert request.targets.tolist() == answered
    np.testing.assert_array_equal(request.positions, len(expected) - 1 + np.arange(len(answered)))
    said = task.protocol["chat"]
    assert said["system_prompt"] == system and len(said["template"]) == 16


def test_factual_asks_for_words_at_the_beginning_of_the_turn(context, files):
    task = prepared("factual", context, files["factual"], chat=True)
    words = [context.tokenizer.convert_tokens_to_ids(word) for word in ("mat", "the", "a")]
    assert task.requests[0].targets.tolist() == words


def test_label_words_begin_the_turn(context, files):
    task = prepared("label_words", context, files["label_words"], chat=True)
    own = context.tokenizer
    expected = own.apply_chat_template([{"role": "user", "content": "the cat sat it was"}], tokenize=True,
                                       add_generation_prompt=True, return_dict=False)
    assert task.requests[0].tokens.tolist() == expected
    assert task.requests[0].targets.tolist() == own.convert_tokens_to_ids(["red", "blue"])


@pytest.mark.parametrize("kind", [*ASKED, "factual", "label_words"])
def test_off_nothing_changes_and_on_everything_is_in_the_id(kind, context, files):
    off = prepared(kind, context, files[kind])
    assert "chat" not in off.protocol
    other = tokenizer()  # without a template: the task is the same
    assert task_digest(prepared(kind, TaskContext(other, context.model_config, 64, "causal"), files[kind])) == \
        task_digest(off)
    ids = {task_digest(off), *(task_digest(prepared(kind, context, files[kind], chat=True, system_prompt=system))
                               for system in (None, "the", "a"))}
    assert len(ids) == 4


def test_a_template_that_changes_no_token_changes_the_id(context, files):
    on = prepared("lambada", context, files["lambada"], chat=True)
    own = tokenizer()
    own.chat_template = TEMPLATE + "{# a comment #}"
    changed = prepared("lambada", TaskContext(own, context.model_config, 64, "causal"), files["lambada"], chat=True)
    assert [r.tokens.tolist() for r in on.requests] == [r.tokens.tolist() for r in changed.requests]
    assert task_digest(on) != task_digest(changed)


def test_windows_leave_room_for_the_template(context, files):
    narrow = TaskContext(context.tokenizer, context.model_config, 20, "causal")
    task = prepared("text", narrow, files["text"], chat=True)
    assert max(len(request.tokens) for request in task.requests) <= 20
    assert sum(len(request.targets) for request in task.requests) == len(WORDS)


@pytest.mark.parametrize("change, more, message", [
    ({"chat_template": None}, {"chat": True}, "t.chat: true is wrong; the model's tokenizer has no chat template"),
    ({"chat_template": "{{ raise_exception('no system') }}"}, {"chat": True}, "refuses the turns user (no system)"),
    ({"chat_template": "{{ messages[0]['nothing'] * 1 }}"}, {"chat": True}, "the chat template refuses the turns"),
    ({}, {"system_prompt": "x"}, "system_prompt: 'x' is wrong; only chat=true reads it"),
    ({}, {"chat": True, "bos": False}, "bos: False is wrong; the chat template says where BOS is"),
])
def test_what_is_refused_is_one_line(change, more, message, context, files):
    own = tokenizer()
    own.chat_template = change.get("chat_template", TEMPLATE)
    with pytest.raises(InputError) as found:
        prepared("lambada", TaskContext(own, context.model_config, 64, "causal"), files["lambada"], **more)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_encoders_do_not_chat(context, files):
    with pytest.raises(InputError, match="only causal language models chat"):
        prepared("blimp", TaskContext(context.tokenizer, context.model_config, 64, "masked"), files["blimp"], chat=True)


def test_every_task_of_text_is_asked_in_a_chat():
    """But for classifiers, encoders and encoder-decoders; RULER has a template of its own, HumanEval continues code."""
    asked = {kind for kind, one in TASKS.items() if hasattr(one, "chat")}
    others = {"recall", "recall_probes", "masked", "classification", "seq2seq", "ruler", "humaneval"}
    assert asked == set(TASKS) - others


# ---------------------------------------------------------------- the tokenizer of a real aligned model, and lm-eval

@pytest.fixture(scope="module")
def smollm(assets):
    """The tokenizer of SmolLM2-135M-Instruct, with its own chat template."""
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(assets / "models", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "<|im_start|>" in found.chat_template
    return found


@pytest.mark.assets
def test_the_turns_of_a_real_aligned_model(smollm, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "The capital of France is Paris"}))
    context = TaskContext(smollm, tiny_config("llama"), 512, "causal")
    context.model_config.vocab_size = len(smollm)
    task = prepared("lambada", context, {"data_files": str(tmp_path / "rows.jsonl")}, chat=True,
                    system_prompt="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital of France is"},
                {"role": "assistant", "content": "Paris"}]
    whole = smollm.apply_chat_template(messages, tokenize=True, return_dict=False)
    request = task.requests[0]
    read = [*request.tokens.tolist(), int(request.targets[-1])]
    assert read == whole[: len(read)]  # the template closes the turn after the answer
    assert smollm.decode(request.targets) == "Paris"


@pytest.mark.assets
@pytest.mark.parametrize("name, system, shots, turns", [
    ("arc_easy", None, 0, True), ("arc_easy", "Answer the question.", 2, True), ("gsm8k", "Be brief.", 2, False),
])
def test_lm_eval_asks_the_same(name, system, shots, turns, smollm, assets):
    """The prompts and tokens of lm-eval's own task with lm-eval's own model class, by its own methods."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    rows = str(assets / "data" / name / "test.jsonl")
    data = {"train": rows, "validation": rows, "test": rows} if name == "arc_easy" else {"train": rows, "test": rows}
    context = TaskContext(smollm, tiny_config("llama"), 2048, "causal")
    context.model_config.vocab_size = len(smollm)
    settings = {"task": name, "num_fewshot": shots, "data_files": data, "limit": 3, "chat": True,
                "system_prompt": system, "fewshot_as_turns": turns}
    task = prepared("lm_eval", context, settings)

    lm = HFLM.__new__(HFLM)
    lm.tokenizer, lm.chat_template_args, lm.backend, lm.add_bos_token = smollm, {}, "causal", None
    lm.custom_prefix_token_id = None
    from harness.tasks.lm_eval import index
    from harness.tasks.lm_eval.task import _check

    asked = sh.task("t", kind="lm_eval", **settings).task
    (theirs,) = index.load("t", asked).tasks.values()
    _check("t", theirs, asked, alone=True)
    theirs.build_all_requests(limit=3, system_instruction=system, apply_chat_template=True, fewshot_as_multiturn=turns,
                              chat_template=lm.apply_chat_template, rank=0, world_size=1)
    if name == "gsm8k":
        assert [list(one) for one in task.inputs] == [lm.tok_encode(one.args[0]) for one in theirs.instances]
        return
    pairs = [lm._encode_pair(*one.args[:2]) for one in theirs.instances]
    assert len(pairs) == len(task.requests) >= 3 * 3
    for (before, answer), request in zip(pairs, task.requests):
        assert request.tokens.tolist() == [*before, *answer[:-1]] and request.targets.tolist() == answer


def test_both_doors_take_a_chat(tmp_path, monkeypatch):
    from tests.checkpoints import save_checkpoint

    folder: Path = save_checkpoint(tmp_path / "model", "llama")
    own = tokenizer()
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the cat sat on the mat"}))
    model = sh.load(str(folder), dtype="float32")
    plain = model.score(sh.task("lambada", data_files=str(tmp_path / "rows.jsonl")))
    chatted = model.score(sh.task("lambada", data_files=str(tmp_path / "rows.jsonl"), chat=True, system_prompt=SYSTEM))
    assert plain.asked != chatted.asked
    with pytest.raises(InputError, match="did not ask the same"):
        sh.paired(chatted, plain)
