"""The setting `bos` of prompts: which tokens are fed, and which cells are the same."""

import json

import numpy as np
import pytest

from harness.errors import InputError
from harness.evaluation.requests import task_digest
from tests.evaluation.reference import tiny
from tests.tasks.asking import asked

ROWS = {
    "ioi": ({"prompt": "Anna met Ben. Ben gave it to", "answer": "Anna"}, "Anna met Ben. Ben gave it to"),
    "factual": ({"prompt": "The dog of Anna is", "attribute": "Max"}, "The dog of Anna is"),
    "lambada": ({"text": "The dog of Anna is Max"}, "The dog of Anna is"),
}  # fmt: skip
BIGBENCH = {"input": "The dog of Anna is", "targets": ["Max"]}


def prepared(kind, folder, context, **values):
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}.jsonl"
    path.write_text(json.dumps(BIGBENCH if kind == "bigbench" else ROWS[kind][0]))
    return asked(kind, kind=kind, data_files=str(path), **values).prepare(kind, context)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", [*ROWS, "bigbench"])
def test_prompts_begin_with_bos_if_the_setting_says_so(kind, adds, tmp_path):
    _, context = tiny(bos=adds)
    of = {bos: prepared(kind, tmp_path, context, bos=bos) for bos in ("auto", True, False)}
    default = prepared(kind, tmp_path, context)
    tokens = {bos: task.requests[0].tokens.tolist() for bos, task in of.items()}
    first = context.tokenizer.bos_token_id
    assert first not in tokens[False] and tokens[True] == [first, *tokens[False]] and tokens["auto"] == tokens[adds]
    assert {bos: task.protocol["bos"] for bos, task in of.items()} == {"auto": adds, True: True, False: False}
    digests = {bos: task_digest(task) for bos, task in of.items()}
    assert task_digest(default) == digests["auto"] == digests[adds] != digests[not adds]
    for bos in (True, False):  # what is asked after the prompt does not depend on it
        assert np.array_equal(of[bos].requests[0].targets, of["auto"].requests[0].targets)
    if kind in ROWS:
        plain = context.tokenizer.encode(ROWS[kind][1], add_special_tokens=False)
        assert tokens[False][: len(plain)] == plain


def test_what_cannot_be(tmp_path):
    _, context = tiny()
    with pytest.raises(InputError, match=r"^tasks\.ioi\.bos: .*use auto, true or false"):
        prepared("ioi", tmp_path, context, bos="sometimes")
    context.tokenizer.bos_token = context.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"^tasks\.ioi\.bos: true needs a BOS or an EOS token"):
        prepared("ioi", tmp_path, context, bos=True)
    assert prepared("ioi", tmp_path, context).protocol["bos"] is False
