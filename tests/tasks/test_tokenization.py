"""Pairs as tokens, against lm-eval's own HFLM; and what HFLM gets wrong or leaves to an assertion."""

import pytest

from harness.errors import InputError
from harness.tasks import tokenization
from tests.evaluation.reference import tiny

PAIRS = [
    ("Anna gave a ball", " to Ben"),
    ("Anna gave a ball ", "to Ben"),
    ("Anna gave a ball \n ", " to Ben"),
    ("Once upon a ti", "me there was a little dog"),
    ("<s>Anna gave", " a ball"),
    ("Café “crème", ",” said Zoë 🎉"),
    ("", "The sun was warm"),
    ("", "<s>The sun was warm"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def made(request):
    return tiny(bos=request.param)


@pytest.mark.parametrize(("context", "continuation"), PAIRS)
def test_pairs_are_those_of_lm_eval(made, context, continuation):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, task = made
    lm = HFLM(pretrained=model, tokenizer=task.tokenizer, batch_size=1, max_length=task.context_length)
    seen = []
    lm._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    lm.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True)
    assert tokenization.encode_pair(task.tokenizer, context, continuation) == seen[0][1:]


def test_an_appended_eos_is_not_in_the_way():
    """lm-eval would cut the whole one token late and score the EOS."""
    from tokenizers import processors

    tokenizer = tiny()[1].tokenizer
    plain = tokenization.encode_pair(tokenizer, "Anna gave", " a ball")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer.encode("Anna")[-1] == tokenizer.eos_token_id
    assert tokenization.encode_pair(tokenizer, "Anna gave", " a ball") == plain
    assert tokenization.encode(tokenizer, "Anna</s>")[-1] == tokenizer.eos_token_id


def test_spaces_alone_are_no_context():
    tokenizer = tiny()[1].tokenizer
    context, continuation = tokenization.encode_pair(tokenizer, "  ", "Anna")
    assert context == [tokenizer.bos_token_id]
    assert tokenizer.decode(continuation) == "  Anna"


def test_id_0_is_a_prefix_and_eos_stands_in():
    tokenizer = tiny()[1].tokenizer
    assert tokenization.prefix_token(tokenizer) == tokenizer.bos_token_id == 0
    tokenizer.bos_token = None
    assert tokenization.prefix_token(tokenizer) == tokenizer.eos_token_id == 1


@pytest.mark.assets
def test_adds_bos_is_what_the_tokenizer_does_and_not_what_its_flag_says(assets):
    from transformers import AutoTokenizer

    llama, gpt2, neox = "models/stories260K", "data/tokenizers/gpt2", "data/tokenizers/gpt_neox_20b"
    for name, given, adds in ((llama, {}, True), (llama, {"add_bos_token": False}, False), (gpt2, {}, False),
                              (gpt2, {"add_bos_token": True}, True), (neox, {}, False)):
        tokenizer = AutoTokenizer.from_pretrained(assets / name, **given)
        assert tokenization.adds_bos(tokenizer) is adds, (name, given)
    assert AutoTokenizer.from_pretrained(assets / llama).add_bos_token is False  # of transformers 5


def test_long_contexts_lose_their_beginning():
    found = tokenization.request([1, 2, 3, 4], [5, 6], 3)
    assert (found.tokens.tolist(), found.positions.tolist(), found.targets.tolist()) == ([3, 4, 5], [1, 2], [5, 6])
    assert tokenization.request([1, 2, 3, 4], [5, 6], 5).tokens.tolist() == [1, 2, 3, 4, 5]
    assert tokenization.request([1, 2], [5, 6, 7], 3).tokens.tolist() == [2, 5, 6]


def test_nothing_to_score():
    task = tiny()[1]
    with pytest.raises(InputError, match=r"^tasks\.t row 7: no tokens to score for '' after 'Anna'$"):
        tokenization.pair_request("tasks.t row 7", task, "Anna", "")
    with pytest.raises(InputError, match=r"no tokens to score for 'me' after 'Once upon a ti'$"):
        tokenization.pair_request("tasks.t row 7", task, "Once upon a ti", "me")
