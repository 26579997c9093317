"""Perplexities of lm-eval's wikitext to the last digit that lm-eval prints, by kind lm_eval and by kind text."""

import json

import pytest
import torch

from harness.evaluation.requests import TaskContext
from harness.evaluation.scoring import Scorer
from harness.evaluation.statistics import estimate
from harness.models.loading import load, loaded_from
from harness.models.settings import ModelSettings
from harness.tasks.lm_eval.task import LmEvalTask
from harness.tasks.text import TextTask
from tests.tasks.lm_eval.test_task import evaluate, local_yaml

METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def gpt2_that_knows(tokenizer, text):
    """A small GPT-2 with GPT-2's tokenizer, which has learnt the text so that its perplexities are of the usual size.

    In float64, because HFLM adds log-probabilities up in the dtype of the model.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ))
    tokens = torch.tensor(tokenizer.encode(text))
    with torch.no_grad():  # tokens that are not in the text need not be unlearnt
        known = torch.zeros(model.config.vocab_size)
        known[tokens] = 1
        model.transformer.wte.weight[:, 0] += 5 * known
        model.transformer.ln_f.bias[0] = 3
    rows = torch.nn.functional.pad(tokens[: len(tokens) // 32 * 32].view(-1, 32), (1, 0), value=tokenizer.bos_token_id)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval().double()


@pytest.fixture(scope="module")
def stories(assets):
    return (assets / "data/tinystories/validation_first_stories.txt").read_text().split("\n\n")


def pages_of(stories, longest):
    """A page of several windows, one that fits into a window, and one that the detokenizer of wikitext changes."""
    return [" ".join(stories[:20])[:longest], stories[4][:150], f'{stories[5][:60]} , or " that \' s it " = = .']


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def asked(request, assets, stories):
    """(model, its pages, whether its tokenizer begins a text with BOS)"""
    if request.param == "llama":
        return load(ModelSettings(name=str(assets / "models/stories260K"), device="cpu")), pages_of(stories, 2500), True
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "data/tokenizers/gpt2")
    pages = pages_of(stories, 400)
    return loaded_from(gpt2_that_knows(tokenizer, " ".join(pages)), tokenizer), pages, False


def printed(found):
    """The metrics as lm-eval prints them: its table has four decimals."""
    return {metric: f"{found[metric]:.4f}" for metric in METRICS}


def theirs(folder, loaded, texts, **settings):
    """What lm-eval's evaluator finds for its wikitext with its own HFLM."""
    from lm_eval.models.huggingface import HFLM

    folder.mkdir()
    file = folder / "pages.jsonl"
    file.write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    local_yaml(folder, "wikitext", {"test": str(file)}, "wikitext/wikitext", training_split=None, validation_split=None)
    lm = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=2, device="cpu",
              max_length=loaded.context_length, **settings)
    found = evaluate(folder, lm)[1]["results"]["wikitext"]
    return printed({metric: found[f"{metric},none"] for metric in METRICS}), file


def ours(task, loaded):
    context = TaskContext(loaded.tokenizer, loaded.model.config, loaded.context_length, "causal")
    prepared = task.prepare("w", context)
    measured = prepared.measure(Scorer(loaded, {"w": prepared}).score("w"))
    return printed({metric: estimate(measured[metric]).value for metric in METRICS}), prepared


@pytest.mark.assets
def test_kind_lm_eval_prints_lm_evals_numbers(asked, tmp_path):
    """Pages of one and of many windows, counts of words and bytes before the detokenizer."""
    loaded, pages, _ = asked
    expected, file = theirs(tmp_path / "theirs", loaded, pages)
    found, prepared = ours(LmEvalTask(task="wikitext", data_files={"test": str(file)}), loaded)
    assert found == expected and len(prepared.requests) > len(pages)
    assert 1 < float(expected["word_perplexity"]) < 1000


@pytest.mark.assets
def test_kind_text_prints_lm_evals_numbers_of_a_page_that_fits_into_a_window(asked, tmp_path):
    """With bos=true, and for a tokenizer that adds BOS with HFLM's add_bos_token=False: HFLM would add it twice."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    loaded, pages, adds_bos = asked
    page = pages[1]
    assert wikitext_detokenizer({"page": page}) == page  # kind text counts what it scores, which is the page itself
    expected, _ = theirs(tmp_path / "theirs", loaded, [page], add_bos_token=False)
    (tmp_path / "page.txt").write_text(page)
    found, prepared = ours(TextTask(data_files=str(tmp_path / "page.txt"), bos=True), loaded)
    assert found == expected and len(prepared.requests) == 1
    if adds_bos:
        assert ours(TextTask(data_files=str(tmp_path / "page.txt")), loaded)[0] == expected
        twice, file = theirs(tmp_path / "twice", loaded, [page])
        assert twice != expected
        assert ours(LmEvalTask(task="wikitext", data_files={"test": str(file)}), loaded)[0] == twice
