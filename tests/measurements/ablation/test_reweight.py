"""Factors for the singular values of a change by the derivative of a task's loss, against autograd and numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.errors import InputError
from harness.evaluation.derived import DerivedTask
from harness.evaluation.requests import TaskContext
from harness.measurements import compose_settings
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.ablation.units import plan
from harness.measurements.components.tables import read_components
from harness.models.editing import Ablation, ablated
from harness.models.loading import describe_model, load
from harness.models.reference import describe_reference
from harness.models.reference_matrices import ComparedMatrices
from harness.models.settings import ModelSettings, ReferenceSettings
from harness.models.targets import Target
from harness.models.treatment import Sources, Treatment
from harness.spectral.regions import Component, Reweight, Rotated, Shuffled
from harness.tasks.label_words import LabelWordsTask
from tests.checkpoints import WORDS, save_checkpoint

TEMPLATE, LABELS = "{sentence} it was", {"0": " red", "1": " blue"}
NAMES = ("0.up_proj", "1.down_proj", "2.q_proj")  # tall, wide, square


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a model that differs from it in a change of rank 4 and in noise, and sentences of two parts."""
    folder = tmp_path_factory.mktemp("reweight")
    base = save_checkpoint(folder / "base")
    save_checkpoint(folder / "tuned")
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(base / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and "proj" in name:
            out, width = weight.shape
            weight += torch.randn(out, 4, generator=generator) @ torch.randn(4, width, generator=generator) * 0.05
            weight += 1e-3 * torch.randn(weight.shape, generator=generator)
    save_file(tensors, folder / "tuned" / "model.safetensors", {"format": "pt"})
    for name, seed in (("choose", 0), ("judge", 1)):
        rng = np.random.default_rng(seed)
        rows = [{"sentence": " ".join(rng.choice(WORDS, 12)), "label": int(rng.integers(2))} for _ in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Opened:
    """The tuned model with the derivatives of its loss to the change, and the same by transformers and numpy."""

    def __init__(self, place):
        settings = ModelSettings(name=str(place / "tuned"), dtype="float32", device="cpu")
        self.loaded = load(settings)
        reference = describe_reference(
            ReferenceSettings(name=str(place / "base")), settings, describe_model(settings))
        base = load(reference.settings, reference.description)
        compared = ComparedMatrices(self.loaded, reference, 2**24, None)
        task = LabelWordsTask(data_files=str(place / "choose.jsonl"), template=TEMPLATE, words=LABELS)
        context = TaskContext.of(self.loaded.description, self.loaded.tokenizer)
        derived = DerivedTask(self.loaded, task.prepare("calibration", context))
        self.sources = Sources(lambda matrix: None, reference=compared, derived=derived)
        self.by_name = {matrix.name: matrix for matrix in self.loaded.matrices}
        self.changes = {}
        for name in NAMES:
            weight, other = (self.by_name[name].read(one.model).double().numpy() for one in (self.loaded, base))
            self.changes[name] = (weight, other, *np.linalg.svd(weight - other, full_matrices=False))
        self.slopes = self._slopes(place)

    def _slopes(self, place):
        """d loss / d s_i by autograd in float64, for the mean cross-entropy of the two words alone."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(place / "tuned", dtype=torch.float64)
        tokenizer = AutoTokenizer.from_pretrained(place / "tuned")
        words = [tokenizer(f"it was{word}", add_special_tokens=False)["input_ids"][-1] for word in LABELS.values()]
        rows = [json.loads(line) for line in (place / "choose.jsonl").read_text().splitlines()]
        loss = 0
        for row in rows:
            tokens = torch.tensor([tokenizer(f"{row['sentence']} it was")["input_ids"]])
            logits = model(tokens).logits[0, -1, words]
            loss = loss + torch.nn.functional.cross_entropy(logits[None], torch.tensor([row["label"]])) / len(rows)
        loss.backward()
        found = {}
        for name, (_, _, u, _, vh) in self.changes.items():
            gradient = model.get_parameter(self.by_name[name].parameter).grad.numpy()
            found[name] = np.einsum("oi,oj,ij->i", u, gradient, vh)
        return found

    def edited(self, region):
        """The matrices under an edit, and what was realised."""
        target = Target("all", "some", NAMES, 0)
        with ablated(self.loaded, Ablation(target, region, Treatment(of="change")), self.sources) as realised:
            return {name: self.by_name[name].read(self.loaded.model).double().numpy() for name in NAMES}, realised


@pytest.fixture(scope="module")
def opened(place):
    return Opened(place)


def test_derivatives_to_the_values_of_a_change_are_those_of_autograd_in_float64(opened):
    reference = opened.sources.reference
    matrices = [opened.by_name[name] for name in NAMES]
    losses = opened.sources.derived.losses(
        matrices, lambda m: reference.spectrum(m, Component(0), Treatment(of="change")), "change", reference.change)
    for name in NAMES:
        sigma = opened.changes[name][3]
        expected = -sigma * opened.slopes[name]
        np.testing.assert_allclose(losses[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def published(way, slope, share=0.2):
    """Factors before the budget, written down from the paper's description."""
    size = np.abs(slope)
    if way == "descent":
        return np.exp(-0.2 * slope / size.mean())
    if way == "smooth":
        low, centre, high = np.quantile(size, [share, 0.5, 1 - share])
        return 0.8 + 0.45 / (1 + np.exp(-(size - centre) / (0.35 * (high - low))))
    order = np.argsort(-size)
    n = round(share * len(slope))
    found = np.ones(len(slope))
    found[order[:n]], found[order[-n:]] = 1.25, 0.8
    return found


@pytest.mark.parametrize("budget", ["nuclear", "energy"])
@pytest.mark.parametrize("way", ["sensitivity", "smooth", "descent"])
@pytest.mark.parametrize("rank", [None, 4])
def test_the_edit_is_the_change_with_reweighted_values(opened, way, budget, rank):
    own = {"step": 0.2} if way == "descent" else {"share": 0.25, "amplify": 1.25, "damp": 0.8}
    found, realised = opened.edited(Reweight(way, budget, rank, **own))
    moved = 0.0
    for name in NAMES:
        weight, other, u, s, vh = opened.changes[name]
        n = len(s) if rank is None else rank
        factors = published(way, opened.slopes[name][:n], 0.25)
        power = 1 if budget == "nuclear" else 2
        factors *= ((s[:n] ** power).sum() / ((s[:n] * factors) ** power).sum()) ** (1 / power)
        new = s.copy()
        new[:n] *= factors
        assert (new**power).sum() == pytest.approx((s**power).sum(), rel=1e-12)
        expected = other + (u * new) @ vh
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5 * np.abs(weight - other).max())
        moved += ((expected - weight) ** 2).sum()
    assert realised.norm_removed == pytest.approx(np.sqrt(moved), rel=1e-3)
    assert realised.n_removed == sum(len(one[3]) if rank is None else rank for one in opened.changes.values())
    assert realised.realised_removal > 0.99


def test_the_control_has_the_same_factors_in_another_order(opened):
    rule = Reweight("descent", "nuclear", 4, step=0.2)
    found = [opened.edited(Shuffled(rule, seed))[0] for seed in (0, 1)]
    own = opened.edited(rule)[0]
    orders = set()
    for name in NAMES:
        weight, other, u, s, vh = opened.changes[name]
        raw = published("descent", opened.slopes[name][:4])
        for edited in found:
            values = np.einsum("oi,oj,ij->i", u, edited[name] - other, vh)
            assert values.sum() == pytest.approx(s.sum(), rel=1e-4)
            factors = values[:4] / s[:4]
            order = np.argsort(np.argsort(factors))
            np.testing.assert_allclose(np.sort(factors) / factors.max(), np.sort(raw) / raw.max(), rtol=1e-3)
            orders.add((name, tuple(order)))
        assert not np.allclose(found[0][name], own[name])
    assert len(orders) > len(NAMES)  # other seeds have other orders
    turned, realised = opened.edited(Rotated(rule, 0))
    kept = opened.edited(rule)[1]
    assert realised.norm_removed == pytest.approx(kept.norm_removed, rel=1e-6)
    assert not np.allclose(turned[NAMES[0]], own[NAMES[0]])


def asking(group, file):
    """The settings of a task with the words of this file, in a group of settings."""
    return [f"{group}.data_files={file}", f"{group}.template='{TEMPLATE}'",
            *(f"{group}.words.{label}='{word}'" for label, word in LABELS.items())]


def words(place, *more, file="judge.jsonl"):
    return ["model=pretrained", f"model.name={place / 'tuned'}", "model.dtype=float32", "model.device=cpu",
            "reference=pretrained", f"reference.name={place / 'base'}", "task=label_words",
            *asking("tasks.label_words", place / file), *more]


def study(place, *more):
    return words(place, "region=reweight", "target=all", "calibration=label_words",
                 *asking("region.calibration", place / "choose.jsonl"), "runtime.threads=1",
                 f"runtime.cache_dir={place / 'cache'}", *more)


def test_a_study_with_its_controls(place, tmp_path, capsys):
    more = ["region.weights=[sensitivity,descent]", "region.rank=4", f"output={tmp_path / 'out'}"]
    assert main(["plan", *study(place, *more)]) == 0
    assert "12 examples, whose loss is derived to the singular values of the change" in capsys.readouterr().out
    assert main(["run", "--quiet", *study(place, *more)]) == 0
    rows = read_metrics(tmp_path / "out")
    assert set(rows["status"]) == {"ok"}
    rows = rows[rows["metric"] == "cross_entropy"].set_index("region")
    own = rows[rows["region_by"] == "reweight"]
    assert set(own["region_kind"]) == {"sensitivity", "descent"} and own["region_scale"].isna().all()
    assert own["realised_removal"].gt(0.99).all() and json.loads(own["calibration"].iloc[0])["n_examples"] == 12
    controls = rows[rows["region_by"] == "control"]["region_kind"].value_counts()
    assert controls["shuffled"] == controls["rotated"] == 6 and controls["none"] == 1
    assert rows[rows["region_kind"] == "none"]["delta"].eq(0).all()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "reweighted by sensitivity, rank 4, of the change" in (tmp_path / "out" / "report" / "report.md").read_text()


def test_everything_is_in_the_id(place):
    def ids(*more):
        words = study(place, "region.controls=[]", "region.random_seeds=[0]", *more)
        units = plan(compose_settings("ablation", words)).units
        return {cell.id for cell in units if cell.ablation.region.by == "reweight"}

    variants = [[], ["region.weights=[smooth]"], ["region.weights=[descent]"],
                ["region.weights=[descent]", "region.step=0.1"], ["region.rank=4"], ["region.budget=energy"],
                ["region.share=0.1"], ["region.amplify=1.5"], ["region.damp=0.5"], ["region.calibration.limit=11"],
                ["region.calibration.words.1=' big'"], ["target=type", "target.layer_types=[q_proj]"]]
    found = [ids(*more) for more in variants]
    assert all(len(one) == 1 for one in found) and len(set.union(*found)) == len(variants)


@pytest.mark.parametrize("more, message", [
    (["region.calibration=null"], "region.calibration: must be set, because region=reweight derives its loss"),
    (["region.of=reference"], "region.of: 'reference' is wrong; region=reweight gives factors to the values"),
    (["region.keep=true"], "region.keep: True is wrong; region=reweight has a factor for each value"),
    (["region.scale=2"], "region.scale: 2.0 is wrong; region=reweight has a factor for each value"),
    (["region.controls=[random]"], "the controls of region=reweight are none, shuffled and rotated"),
    (["region.step=1"], "only region.weights=[descent] reads it"),
    (["region.weights=[descent]", "region.amplify=2"], "region.amplify: 2.0 is wrong; region.weights=[descent] reads"),
    (["region.rank=1"], "one value alone keeps its norm"),
    (["region.share=0.5"], "above 0 and below 0.5"),
    (["region.damp=2"], "below region.amplify, which is 1.25"),
    (["region=change"], "for a part of a change only region=reweight and region.top read it"),
    (["region=change", "region.calibration=null", "region.controls=[shuffled]"], "the control of the factors"),
])
def test_wrong_settings_are_one_line(place, more, message):
    given = [one for one in study(place) if not ("region.calibration=null" in more and "calibration" in one)]
    given = [one for one in given if not (one == "region=reweight" and "region=change" in more)]
    with pytest.raises(InputError) as caught:
        compose_settings("ablation", [*given, *(one for one in more if one != "region.calibration=null")])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_text_that_chooses_is_not_the_one_that_judges(place, capsys):
    assert main(["plan", *study(place, f"region.calibration.data_files={place / 'judge.jsonl'}")]) == 2
    assert "region.calibration: it and tasks.label_words have 100% of one of the two texts in common" in \
        capsys.readouterr().err


def test_components_of_a_change_and_those_that_its_loss_ranks_first(place, opened, tmp_path):
    folder = tmp_path / "components"
    judged = words(place, file="choose.jsonl")
    assert main(["components", "--quiet", *judged, "region.of=change", "stability=[]", "tokens=0", "threads=1",
                 f"cache_dir={place / 'cache'}", f"output={folder}"]) == 0
    found = read_components(folder, "predictions")
    assert set(found["metric"]) == {"cross_entropy"}
    for name in NAMES:
        expected = -opened.changes[name][3] * opened.slopes[name]
        mine = found[found["matrix"] == name].sort_values("index")["predicted_delta"].to_numpy()
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    sigma = read_components(folder).set_index(["matrix", "index"])["sigma"]
    np.testing.assert_allclose(sigma[NAMES[0]], opened.changes[NAMES[0]][3], rtol=1e-6)
    assert set(read_components(folder, "matrices")["of"]) == {"change"}
    assert main(["report", str(folder)]) == 0

    top = ["region=component", "region.of=change", "region.ends=0", "region.top=1", "region.controls=[]",
           f"output={tmp_path / 'top'}"]
    assert main(["run", "--quiet", *study(place, *top)]) == 0
    rows = read_metrics(tmp_path / "top")
    chosen = rows[rows["component"].notna()].drop_duplicates("region").set_index("region")["component"]
    best = found.sort_values("predicted_delta")
    for i in (0, -1):
        assert chosen[f"component {i} by loss, of the change"] == f"{best.iloc[i]['matrix']}:{best.iloc[i]['index']}"
