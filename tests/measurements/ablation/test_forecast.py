"""What a plan promises against what torch counts when the study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.engine.measurement import Context
from harness.engine.ranks import Ranks
from harness.engine.run import measure_units
from harness.evaluation.last_block import LastBlock
from harness.evaluation.requests import scored_tasks
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings
from harness.measurements import ABLATION
from harness.measurements.ablation.costs import decomposition_flops, edit_flops
from harness.measurements.ablation.forecast import describe_study, forecast
from harness.measurements.ablation.measure import open_session
from harness.measurements.ablation.rates import Rates
from harness.measurements.ablation.region_settings import RegionSettings
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.units import plan
from harness.models.settings import ModelSettings
from harness.models.targets import TargetSettings
from harness.spectral.ablation import edit
from harness.spectral.decomposition import decompose
from harness.spectral.regions import Component, select
from harness.spectral.regions.fraction import FractionRule
from harness.tasks.text import TextTask
from tests.evaluation.test_stream import kept_bytes
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of single characters, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("planned")
    vocabulary = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="a").save_pretrained(where)
    tiny_model("llama", hidden_size=32, num_hidden_layers=4).save_pretrained(where)
    (where / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 10)
    return where


def _settings(folder, tmp_path, **runtime) -> StudySettings:
    return StudySettings(
        # eager attention multiplies masked pairs too, which a plan leaves out: few of them in windows of 4 tokens
        model=ModelSettings(name=str(folder), device="cpu", attn_implementation="eager"),
        target=TargetSettings(kind="matrix", layer_types=["up_proj", "down_proj"]),
        region=RegionSettings(rule=FractionRule(kinds=["small"], values=[0.25, 0.5]), controls=[]),
        tasks={"text": TextTask(data_files=str(folder / "text.txt"), window=5)},
        runtime=RuntimeSettings(cache_gib=0.0, examples=False, **runtime),
        output=str(tmp_path / "study"),
    )


@pytest.mark.parametrize("reuse", [True, False])
def test_scoring_costs_what_was_predicted(folder, tmp_path, reuse: bool) -> None:
    study = plan(_settings(folder, tmp_path, reuse=reuse))
    loaded = open_session(study, Ranks(), False)
    # whole, with a hook: the counter does not see products that are written into a buffer
    loaded.model.lm_head.register_forward_hook(lambda module, args, output: output)
    cost = forecast(study)
    with FlopCounterMode(display=False) as counter:
        measure_units(ABLATION, study, study.units, Context(loaded))
    counted = counter.get_total_flops() - _float64_products(study)
    assert cost.resumed == pytest.approx(counted, rel=0.03)
    full, half = cost.plain, cost.resumed
    assert half == full if not reuse else 0.5 < half / full < 0.85


def test_the_last_block_costs_what_was_predicted_where_few_positions_are_scored(folder, tmp_path) -> None:
    settings = _settings(folder, tmp_path)
    settings.tasks["text"] = TextTask(data_files=str(folder / "text.txt"), window=5, stride=1)
    study = plan(settings)
    tasks, options, counted = scored_tasks(study.tasks), study.settings.runtime.scoring(), {}
    for spares in (True, False):
        scorer = Scorer(open_session(study, Ranks(), False), tasks, options)
        scorer.loaded.model.lm_head.register_forward_hook(lambda module, args, output: output)
        if not spares:
            scorer._last_block = LastBlock(scorer.loaded, wanted=False)
        scorer.score("text")  # which compares
        for block in (0, 3):
            scorer.advance(block)
            with FlopCounterMode(display=False) as counter:
                scorer.score("text", block)
            counted[spares, block] = counter.get_total_flops()
    predicted = study.costs.passes["text"]
    assert [predicted[block] for block in (0, 3)] == pytest.approx([counted[True, block] for block in (0, 3)], rel=0.03)
    assert counted[True, 3] < 0.6 * counted[False, 3]
    parts = study.costs.parts["text"]
    assert parts["3.down_proj"] < 0.5 * parts["2.down_proj"] and parts["3.k_proj"] == parts["2.k_proj"]


def _float64_products(study: Study) -> float:
    """What decompositions and edits multiply, counted on matrices of the same shapes."""
    total = 0.0
    for ablation in {cell.ablation for cell in study.units if not cell.is_baseline}:
        (name,) = ablation.target.matrices
        shape = next(matrix.shape for matrix in study.matrices if matrix.name == name)
        weight = torch.randn(shape)
        decomposition = decompose(weight)
        indices = select(ablation.region, None, shape)
        with FlopCounterMode(display=False) as counter:
            edit(weight, decomposition, indices)
        total += counter.get_total_flops()
    for matrix in study.matrices:
        if matrix.layer_type in ("up_proj", "down_proj"):
            with FlopCounterMode(display=False) as counter:
                decompose(torch.randn(matrix.shape))
            total += counter.get_total_flops()
    return total


def test_one_component_that_a_loss_chooses_costs_the_mean_over_its_target(folder, tmp_path) -> None:
    settings = replace(_settings(folder, tmp_path), target=TargetSettings(kind="all", layer_types=["up_proj"]))
    study = plan(settings)
    cell = replace(study.units[-1], ablation=replace(study.units[-1].ablation, region=Component(0, "loss")))
    of_block = study.costs.passes["text"]
    assert study.costs.cell(cell) == pytest.approx(sum(of_block[:4]) / 4)
    edited = forecast(study, [cell])
    assert edited.edits == edit_flops(*study.matrices[-1].shape, 1) and edited.resumed == study.costs.cell(cell)
    assert study.costs.cell(study.units[-1]) == of_block[0]


@pytest.mark.parametrize("shape, n", [((32, 40), 8), ((40, 32), 30), ((32, 32), 16)])
def test_an_edit_costs_what_was_predicted(shape, n: int) -> None:
    weight = torch.randn(shape)
    decomposition = decompose(weight)
    with FlopCounterMode(display=False) as counter:
        edit(weight, decomposition, torch.arange(n))
    assert counter.get_total_flops() == edit_flops(*shape, n)


def test_the_plan_in_words(folder, tmp_path) -> None:
    text = describe_study(plan(_settings(folder, tmp_path)))
    assert "saved by resuming at the edited block" in text and "8 decompositions" in text
    assert "shards are divided as if it took 8 times as long" in text
    assert "GFLOP/s as measured now" in text and "MiB for the stream at one boundary" in text
    assert "BOS" not in text
    settings = _settings(folder, tmp_path)
    settings.tasks["text"].bos = True
    assert "task text: every window begins with BOS, token 0 (tasks.text.bos)" in describe_study(plan(settings))


def test_bytes_of_the_stream_are_those_that_the_scorer_keeps(folder, tmp_path) -> None:
    study = plan(_settings(folder, tmp_path))
    scorer = Scorer(open_session(study, Ranks(), False), scored_tasks(study.tasks), study.settings.runtime.scoring())
    scorer.advance(2)
    assert forecast(study).stream_bytes == kept_bytes(scorer._store)


def test_seconds_follow_the_rates(folder, tmp_path) -> None:
    cost = forecast(plan(_settings(folder, tmp_path)))
    rates = Rates(product=cost.resumed, decomposition=cost.decompositions / 2, edit=cost.edits / 3)
    assert cost.seconds(rates) == pytest.approx(6)
    assert decomposition_flops(40, 1024) > 4 * 40 * 40 * 1024
