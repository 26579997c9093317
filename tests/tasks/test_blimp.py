"""BLiMP against lm-eval's own accuracy, and the choice of paradigms."""

import json

import numpy as np
import pytest

from harness.errors import InputError
from harness.evaluation.statistics import estimate
from harness.tasks.blimp import BlimpTask
from tests.evaluation.reference import lm_eval_run, real, score, tiny
from tests.tasks.asking import asked


@pytest.mark.assets
@pytest.mark.parametrize("paradigm", ["irregular_plural_subject_verb_agreement_1", "anaphor_gender_agreement"])
def test_scores_are_those_of_lm_eval(assets, paradigm):
    model, context = real(assets / "models/stories260K")
    folder = assets / "data/blimp"
    task = BlimpTask(data_files=str(folder), subsets=[paradigm], limit=20).prepare("blimp", context)
    scores = score(model, task.requests)
    results, samples = lm_eval_run(
        model, context.tokenizer, "blimp/_template_yaml", {"train": str(folder / f"{paradigm}.jsonl")}, 20
    )
    theirs = [[response[0][0] for response in sample["resps"]] for sample in samples]
    np.testing.assert_allclose(scores.request_logprob().reshape(-1, 2), theirs, rtol=1e-5, atol=1e-4)
    assert estimate(task.measure(scores)["accuracy"]).value == results["acc,none"]
    assert 0.5 < results["acc,none"] < 1


PAIRS = {
    "agreement": [("The dog barks.", "The dog bark."), ("The friends play.", "The friends plays.")],
    "order": [("Anna gave a ball to Ben.", "Anna a gave ball to Ben."), ("The sun was warm.", "The was sun warm."),
              ("Max liked to run.", "Max to liked run.")],
}


def _row(paradigm, pair, uid):
    return {"sentence_good": pair[0], "sentence_bad": pair[1]} | ({"UID": paradigm} if uid else {})


@pytest.fixture
def folder(tmp_path):
    for paradigm, pairs in PAIRS.items():
        (tmp_path / f"{paradigm}.jsonl").write_text("\n".join(json.dumps(_row(paradigm, p, False)) for p in pairs))
    return str(tmp_path)


def test_a_paradigm_counts_its_own_pairs_only(folder):
    model, context = tiny()
    scores = {}
    for subsets in ([], ["agreement"], ["order"]):
        task = BlimpTask(data_files=folder, subsets=subsets).prepare("b", context)
        scores[tuple(subsets)] = task.measure(score(model, task.requests))
    whole = scores[()]
    assert list(whole) == ["accuracy", "accuracy_agreement", "accuracy_order"]
    for paradigm in PAIRS:
        alone = scores[(paradigm,)]
        assert estimate(whole[f"accuracy_{paradigm}"]) == estimate(alone["accuracy"])
        assert estimate(alone[f"accuracy_{paradigm}"]) == estimate(alone["accuracy"])
    assert estimate(whole["accuracy"]).n == 5


def test_folder_file_and_uid_give_the_same_pairs(folder, tmp_path):
    _, context = tiny()
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([_row(name, pair, True) for name in ("order", "agreement") for pair in PAIRS[name]]))
    whole = BlimpTask(data_files=folder, limit=2).prepare("b", context)
    mixed = BlimpTask(data_files=str(path), limit=2).prepare("b", context)
    assert mixed.example_ids == whole.example_ids == ["agreement/0", "agreement/1", "order/0", "order/1"]
    assert mixed.protocol["digest"] == whole.protocol["digest"]
    assert mixed.protocol["paradigms"] == {"agreement": 2, "order": 2}
    assert json.loads(json.dumps(mixed.protocol)) == mixed.protocol
    one = BlimpTask(data_files=f"{folder}/order.jsonl").prepare("b", context)
    assert one.protocol["paradigms"] == {"order": 3}


def test_ties_are_chance_and_broken_models_are_broken(folder):
    from harness.evaluation.requests import Scores

    _, context = tiny()
    task = BlimpTask(data_files=folder, subsets=["agreement"]).prepare("b", context)
    offsets = np.cumsum([0, *(len(request.targets) for request in task.requests)])
    logprob = np.zeros(offsets[-1])
    logprob[offsets[2]] = np.nan
    metrics = task.measure(Scores(logprob, np.zeros(len(logprob), dtype=bool), None, offsets))
    np.testing.assert_array_equal(metrics["accuracy"].score, [0.5, np.nan])


def test_bad_settings(folder, tmp_path):
    _, context = tiny()

    def prepare(**settings):
        asked("b", kind="blimp", **settings).prepare("b", context)

    with pytest.raises(InputError, match=r"^tasks\.b\.subsets: no paradigm ordr; there are agreement, order$"):
        prepare(data_files=folder, subsets=["order", "ordr"])
    with pytest.raises(InputError, match=r"^tasks\.b: set data_files to a folder"):
        prepare()
    with pytest.raises(InputError, match=r"^tasks\.b\.data_files: no such file"):
        prepare(data_files=f"{folder}/none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^tasks\.b\.data_files: no \.jsonl files in"):
        prepare(data_files=str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"^tasks\.b\.limit: 0 is wrong; it must be at least 1$"):
        prepare(data_files=folder, limit=0)
    with pytest.raises(InputError, match=r"^tasks\.b\.dataset: cannot load nyu-mll/blimp.* set tasks\.b\.data_files"):
        prepare(dataset="nyu-mll/blimp")
    context.tokenizer.bos_token = context.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a BOS nor an EOS"):
        prepare(data_files=folder)
