"""A model that device_map=auto has divided over two devices is scored, resumed and edited as on one, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.evaluation.requests import Request
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.loading import LoadedModel, loaded_from
from harness.models.targets import Target
from harness.spectral.regions import small
from tests.evaluation.test_scoring import classifier, requests_for, task
from tests.models.tiny import tiny_model
from tests.simulated import FIRST, SECOND, on_two_devices, simulated, tree_requests

FAMILIES = ("llama", "gpt_neox", "gemma2", "bert", "t5")


def _eager(model_type: str) -> LoadedModel:
    """The simulation computes sdpa in another way than the CPU does."""
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    return loaded_from(model)


def _scores(loaded: LoadedModel, options: ScoringOptions, requests: list[Request], edit: str | None) -> list[list]:
    """The log-probabilities and ranks at each boundary; of a model whose last block is edited unless `edit` is None."""
    scorer, found = Scorer(loaded, {"task": task(requests)}, options), []
    last = [matrix for matrix in loaded.matrices if matrix.block == len(loaded.blocks) - 1]
    for block in (0, 1, len(loaded.blocks) - 1):
        scorer.advance(block)
        scores = scorer.score("task", block)
        found.append([scores.logprob.tolist(), scores.rank.tolist()])
    if edit:
        target = Target("block", "last", tuple(matrix.name for matrix in last), len(loaded.blocks) - 1)
        with ablated(loaded, Ablation(target, small(0.3)), DecompositionCache(loaded, 2**30), edit) as realised:
            found.append([scorer.score("task", len(loaded.blocks) - 1).logprob.tolist(), realised])
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plain_rows(model_type: str) -> None:
    """With the stream of every second family on the host."""
    on_host = FAMILIES.index(model_type) % 2 == 0
    options = ScoringOptions(60, stream_bytes=0, host_bytes=2**20) if on_host else ScoringOptions(60)
    one, two, requests = _eager(model_type), _eager(model_type), requests_for(model_type)
    expected = _scores(one, options, requests, None)
    with simulated():
        on_two_devices(two)
        assert {parameter.device for parameter in two.model.parameters()} == {FIRST, SECOND}
        assert _scores(two, options, requests, None) == expected


@pytest.mark.parametrize("edit", ["weight", "branch"])
def test_trees_and_edits(edit: str) -> None:
    one, two = _eager("llama"), _eager("llama")
    expected = _scores(one, ScoringOptions(400), tree_requests(), edit)
    with simulated():
        on_two_devices(two)
        scorer = Scorer(two, {"task": task(tree_requests())}, ScoringOptions(400))
        assert [batch.last is not None for batch in scorer.packed["task"].batches] == [True]
        assert _scores(two, ScoringOptions(400), tree_requests(), edit) == expected


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_classifiers(model_type: str) -> None:
    requests = [replace(request, positions=np.zeros(2, dtype=np.int64), targets=np.array([0, 2]))
                for request in requests_for(model_type)]
    found = []
    for divided in (False, True):
        loaded = classifier.__wrapped__(model_type)
        loaded.model.set_attn_implementation("eager")
        with simulated():
            if divided:
                on_two_devices(loaded)
            found.append(_scores(loaded, ScoringOptions(60), requests, None))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_on_two_gpus(model_type: str) -> None:
    from accelerate import dispatch_model, infer_auto_device_map

    one, two, requests = _eager(model_type), _eager(model_type), requests_for(model_type)
    one = loaded_from(one.model.to("cuda:0"))
    size = sum(parameter.nbytes for parameter in two.model.parameters())
    kinds = {type(block).__name__ for block in two.blocks}
    places = infer_auto_device_map(two.model, {0: int(0.6 * size), 1: 2 * size}, no_split_module_classes=list(kinds))
    two = loaded_from(dispatch_model(two.model, places))
    assert {parameter.device for parameter in two.model.parameters()} == {FIRST, SECOND}
    assert _scores(two, ScoringOptions(60), requests, None) == _scores(one, ScoringOptions(60), requests, None)
