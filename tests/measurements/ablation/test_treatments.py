"""Treatments in studies: what is in the id of a cell, calibration texts, resuming, rows, export, bytes afterwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import harness as sh
from harness.cli import main
from harness.evaluation import calibration
from harness.evaluation.covariance import CovarianceStream
from harness.measurements import compose_settings
from harness.measurements.ablation.cells import cell_id
from harness.measurements.ablation.region_settings import NO_REGION
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.ablation.units import plan
from harness.models.branches import owner_of, slice_of
from harness.models.editing import Ablation, ablated
from harness.models.loading import loaded_from
from harness.models.targets import BASELINE, Target
from harness.models.treatment import Treatment
from harness.spectral import regions
from tests.checkpoints import WORDS, save_checkpoint
from tests.models.tiny import tiny_model
from tests.studies import run_settings

SETTINGS = {"numbers_version": 2, "model": {"digest": "m"}, "dtype": "float32", "attn_implementation": None,
            "edit": "weight", "seed": 0}  # fmt: skip
TARGET = Target("matrix", "1.down_proj", ("1.down_proj",), 1, 1, "down_proj")
# Made before there were treatments (commit d6beabe).
IDS = {
    regions.small(0.1): "beef726663cfb4c497fdfb78",
    regions.Decile(10): "578ced9517580b03fa983391",
    regions.Energy("large", 0.0, 0.1): "82a116bd1dea16b35d333bc4",
    regions.Random(regions.small(0.1), 3): "ec69d75f121379dafc3068d2",
    NO_REGION: "c8b2aa7d090ee891a5a728dd",
    regions.MarchenkoPastur("above"): "a1386a9f8d1e6aa5479071d3",
}


def test_ids_of_removals_are_those_of_before():
    for region, expected in IDS.items():
        assert cell_id(SETTINGS, Ablation(TARGET, region), "t") == expected
    assert cell_id(SETTINGS, Ablation(BASELINE, NO_REGION), "t") == "bcd03fae58aa3a5ee775f1b0"


def words(seed: int, n: int) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(WORDS, 20)) for _ in range(n // 20)) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama and a mixture, the text of a task, and two calibration texts."""
    folder = tmp_path_factory.mktemp("treated")
    save_checkpoint(folder / "model")
    save_checkpoint(folder / "mixtral", "mixtral")
    for name, seed in (("text", 0), ("calibration", 1), ("other", 2)):
        (folder / f"{name}.txt").write_text(words(seed, 400))
    return folder


def overrides(place, *more: str) -> list[str]:
    return [
        "model=pretrained", f"model.name={place / 'model'}", "model.device=cpu", "task=text",
        f"tasks.text.data_files={place / 'text.txt'}", "tasks.text.window=16", "tasks.text.limit=6", "region=decile",
        "region.deciles=[1,10]", "region.controls=[none,random,energy_matched]", "target=type",
        "target.layer_types=[up_proj,down_proj]", "runtime.threads=1", f"runtime.cache_dir={place / 'cache'}",
        *more,
    ]  # fmt: skip


def calibrated(place, *more: str) -> list[str]:
    return overrides(place, "calibration=text", f"region.calibration.data_files={place / 'calibration.txt'}",
                     "region.calibration.window=16", "region.calibration.limit=12", *more)


def ids(words: list[str]) -> dict[str, str]:
    found = plan(compose_settings("ablation", words))
    return {f"{cell.ablation.target.label}: {cell.ablation.region.label}": cell.id for cell in found.units}


def test_everything_of_a_treatment_is_in_the_id_and_the_baseline_keeps_its_own(place):
    active = [*calibrated(place), "region.metric=activations"]
    variants = {
        "plain": overrides(place), "calibrated": calibrated(place), "activations": active,
        "centred": [*active, "region.centred=true"], "shorter": [*active, "region.calibration.limit=11"],
        "windows": [*active, "region.calibration.window=15"],
        "text": [*active, f"region.calibration.data_files={place / 'other.txt'}"],
        "kept": [*active, "region.keep=true"], "scaled": [*active, "region.scale=0.5"],
        "mean": [*active, "region.replace=mean"],
        "plainly kept": overrides(place, "region.keep=true"), "plainly scaled": overrides(place, "region.scale=2"),
    }  # fmt: skip
    found = {name: ids(words) for name, words in variants.items()}
    assert len({one["baseline: none"] for one in found.values()}) == 1
    cells = [one["down_proj: decile 10 (0.9-1.0)"] for one in found.values()]
    assert len(set(cells)) == len(variants)
    again = place / "copy.txt"
    again.write_text((place / "calibration.txt").read_text())
    assert ids([*active, f"region.calibration.data_files={again}"]) == found["activations"]  # by content alone


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["region.metric=activations"], "region.metric: 'activations' is wrong; it needs a text: calibration=wikitext"),
        (["region.replace=mean"], "region.replace: 'mean' is wrong; it needs a text: calibration=wikitext"),
        (["calibration=text", "region.calibration.data_files={other}", "region.replace=mean", "model.name={mixtral}"],
         "region.replace: mean cannot edit 0.up_proj.e0, which is an expert of a fused 3-D parameter; use region.repl"),
        (["region=compression", "region.ranks=[zero_sum]"],
         "region.ranks: 'zero_sum' is wrong; it needs a text for the"),
        (["region=compression", "region.ratios=[1]"], "region.ratios: 1.0 is wrong; a share of the parameters"),
        (["region.scale=1"], "region.scale: 1.0 is wrong; a scale of 1 changes nothing"),
        (["region.centred=true"], "region.centred: True is wrong; only a calibration text is centred"),
        (["region.metric=inputs"], "region.metric: 'inputs' is wrong"),
        (["region=laser", "region.keep=true"], "region.keep: True is wrong; for region=laser it lists the ranks"),
        (["region.keep=true", "region=fraction", "region.kinds=[large]", "region.values=[1.0]"],
         "region.keep: large 1 is all of matrix 0.down_proj"),
        (["calibration=text", "region.calibration.data_files={text}"], "region.calibration: it and tasks.text have"),
        (["calibration=text", "region.calibration.data_files={text}", "region.calibration.limit=1"],
         "region.calibration: it and tasks.text have"),
        (["calibration=text"], "region.calibration"),
        (["calibration=text", "region.calibration.data_files={other}", "region.calibration.window=4000"],
         "region.calibration.window: 4000 tokens are more"),
        (["+region.calibration={kind: ioi}"], "region.calibration.kind: 'ioi' is wrong; a calibration text is of kind"),
        (["calibration=text", "region.calibration.data_files={other}", "region.metric=activations", "region=mp"],
         "region.metric: 'activations' is wrong; the law of Marchenko and Pastur"),
        (["calibration=text", "region.calibration.data_files={other}", "runtime.compile=true"],
         "runtime.compile: True is wrong; the inputs of the matrices"),
    ],
)  # fmt: skip
def test_wrong_treatments_are_refused_in_one_line(place, capsys, more, said):
    files = {"text": place / "text.txt", "other": place / "other.txt"}
    files["mixtral"] = place / "mixtral"
    more = [word.format(**files) if "=" in word and "kind" not in word else word for word in more]
    rules = [word for word in more if word.startswith("region=")]
    words = [word for word in overrides(place) if not rules or not word.startswith(("region=", "region.deciles="))]
    assert main(["plan", *words, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def study(place):
    """A study in the metric of the activations, and what it is made of."""
    folder = place / "study"
    words = [*calibrated(place), "region.metric=activations", f"output={folder}"]
    run_settings(compose_settings("ablation", words))
    return folder, words


def rows_of(folder):
    rows = read_metrics(folder)
    assert set(rows.status) == {"ok"}, list(rows.error.dropna())[:1]
    return rows[rows.metric == "nll"].set_index(["target", "region"])


def test_rows_say_what_a_weight_edited_by_numpy_says(place, study):
    rows = rows_of(study[0])
    model = sh.load(str(place / "model"))
    task = sh.task("text", data_files=str(place / "text.txt"), window=16, limit=6)
    text = plan(compose_settings("ablation", study[1])).prepared.calibration
    names = [name for name in model.matrices if name.endswith("down_proj")]
    moments = {}
    stream = CovarianceStream(model.loaded, text.requests)
    for _ in range(len(model.loaded.blocks)):
        moments |= stream.next_block([m for m in model.loaded.matrices if m.block == stream.block])
    removed = whole = 0.0
    originals = {}
    for name in names:
        matrix = next(m for m in model.loaded.matrices if m.name == name)
        weight = originals[name] = matrix.read(model.module)
        c = moments[name].covariance + torch.outer(moments[name].mean, moments[name].mean)
        values, vectors = torch.linalg.eigh(c)
        in_metric = weight.double() @ (vectors * values.clamp(min=0).sqrt())
        left, sigma, _ = torch.linalg.svd(in_metric, full_matrices=False)
        picked = left[:, -2:]  # the smallest tenth of 24
        matrix.write(model.module, weight.double() - picked @ (picked.T @ weight.double()))
        removed, whole = removed + float(sigma[-2:].square().sum()), whole + float(sigma.square().sum())
    row = rows.loc["down_proj", "decile 10 (0.9-1.0), activations"]
    assert row.value == pytest.approx(float(model.score(task).metrics.set_index("metric").value["nll"]), abs=1e-6)
    assert row.n_removed == 2 * len(names) and row.output_energy_removed == pytest.approx(removed / whole, rel=1e-9)
    assert row.output_norm_removed == pytest.approx(removed**0.5, rel=1e-9)
    assert row.region_metric == "activations" and not row.region_keep and row.region_scale == 0
    assert '"centred": false' in row.calibration and '"n_tokens": 180' in row.calibration
    assert rows.loc["control", "none"].delta == 0
    random = rows.loc["down_proj", "energy_matched (decile 10 (0.9-1.0), activations) seed 0"]
    assert random.output_energy_removed == pytest.approx(row.output_energy_removed, rel=0.5)


def test_a_second_run_measures_no_input_again(place, study, monkeypatch):
    rows = rows_of(study[0])

    def refused(*arguments, **named):
        raise AssertionError("the inputs were measured again")

    monkeypatch.setattr(calibration, "CovarianceStream", refused)
    again = place / "again"
    run_settings(compose_settings("ablation", [*study[1], f"output={again}"]))
    assert (rows_of(again).value == rows.value).all()


def test_a_damaged_file_of_inputs_is_measured_anew(place, study, tmp_path, caplog):
    cache = tmp_path / "cache"
    words = [*study[1], f"runtime.cache_dir={cache}"]
    first, second = tmp_path / "first", tmp_path / "second"
    run_settings(compose_settings("ablation", [*words, f"output={first}"]))
    for path in cache.iterdir():
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    run_settings(compose_settings("ablation", [*words, f"output={second}"]))
    assert "is damaged" in caplog.text and (rows_of(first).value == rows_of(second).value).all()


def test_a_failing_pass_is_a_row_of_error_for_each_cell_that_needs_it(place, tmp_path, monkeypatch):
    def refused(*arguments, **named):
        raise RuntimeError("the pass failed")

    monkeypatch.setattr(calibration, "CovarianceStream", refused)
    words = [*calibrated(place), "region.metric=activations", f"output={tmp_path / 'study'}",
             f"runtime.cache_dir={tmp_path / 'cache'}"]
    rows = read_metrics(run_settings(compose_settings("ablation", words)))
    assert set(rows[rows.target == "baseline"].status) == {"ok"}
    failed = rows[rows.target != "baseline"]
    assert set(failed.status) == {"error"} and failed.error.str.contains("the pass failed").all()


def test_both_metrics_say_the_energies_of_outputs(place, tmp_path):
    """All tenths together have all of the outputs' energy, in the metric of the weights too (their parts overlap)."""
    words = [*calibrated(place), "region.deciles=[1,2,3,4,5,6,7,8,9,10]", "region.controls=[]",
             f"output={tmp_path / 'study'}"]
    rows = rows_of(run_settings(compose_settings("ablation", words)))
    assert set(rows.dropna(subset=["region_metric"]).region_metric) == {"weight"}
    down = rows[rows.index.get_level_values("target") == "down_proj"]
    assert down.output_energy_removed.sum() == pytest.approx(1, abs=1e-9)  # U is square: the parts are orthogonal
    assert down.energy_removed.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("edit", ["weight", "branch"])
@pytest.mark.parametrize("metric", ["weight", "activations"])
def test_kept_and_removed_parts_make_up_the_matrix_and_both_ways_agree(place, edit, metric):
    model = sh.wrap(tiny_model("llama"), None)
    model.loaded.tokenizer = sh.load(str(place / "model")).tokenizer
    text = sh.task("text", data_files=str(place / "calibration.txt"), window=16, limit=6).task
    treatment = sh.TreatmentSettings(metric=metric, calibration=text)
    tokens = torch.arange(3, 30)[None]
    before = {name: tensor.clone() for name, tensor in model.module.named_parameters()}
    module = model.module.model.layers[1].mlp
    for name, owner in (("1.up_proj", module.up_proj), ("1.down_proj", module.down_proj)):
        x = torch.randn(7, owner.in_features, generator=torch.Generator().manual_seed(0))
        whole = owner(x)
        for region in (sh.regions.large(0.2), sh.regions.small(0.7)):
            parts = []
            for keep in (False, True):
                changed = dataclasses.replace(treatment, keep=keep)
                with model.ablated(name, region, edit=edit, treatment=changed) as said:
                    parts.append(owner(x))
                assert said.realised_removal == pytest.approx(1, abs=1e-4)
            assert torch.allclose(sum(parts), whole, rtol=0, atol=1e-5)
            with model.ablated(name, region, edit=edit, treatment=dataclasses.replace(treatment, scale=-2.0)):
                assert torch.allclose(owner(x), whole - 3 * (whole - parts[0]), rtol=0, atol=2e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.named_parameters())
    assert not any(owner._forward_hooks for owner in model.module.modules())
    assert not model.module.training and torch.isfinite(model.module(tokens).logits).all()


def test_experts_and_their_bytes(place, tmp_path):
    words = [*calibrated(place), f"model.name={place / 'mixtral'}", "region.metric=activations", "region.scale=0.5",
             "target=block", "target.layer_types=[mlp]", f"output={tmp_path / 'study'}"]
    rows = rows_of(run_settings(compose_settings("ablation", words)))
    label = "decile 1 (0.0-0.1), activations, scaled by 0.5"
    assert rows.loc["block 1 mlp", label].realised_removal == pytest.approx(1, abs=1e-4)
    assert rows.loc["block 1 mlp", label].delta != 0


def test_an_expert_without_tokens_is_an_error_that_names_it():
    loaded = loaded_from(tiny_model("mixtral"))
    text = calibration.CalibrationText([], False, False, {})
    target = dataclasses.replace(TARGET, matrices=("1.q_proj",))
    with pytest.raises(ValueError, match=r"needs a calibration text"):
        ablated(loaded, Ablation(target, regions.small(0.5), Treatment("activations")), lambda m: None).__enter__()
    inputs = calibration.Calibration(loaded, text)
    with pytest.raises(ValueError, match=r"no token of the calibration text enters 0.up_proj.e0; use a longer text"):
        matrix = next(m for m in loaded.matrices if m.name == "0.up_proj.e0")
        inputs.prepare([matrix])
        inputs.inputs(matrix)


def test_export_of_a_treatment_is_the_model_that_was_measured(place, study, capsys):
    rows = rows_of(study[0])
    cell = rows.loc["down_proj", "decile 10 (0.9-1.0), activations"]
    task = sh.task("text", data_files=str(place / "text.txt"), window=16, limit=6)
    exported = place / "exported"
    assert main(["export", "--study", str(study[0]), "--cell", cell.cell_id, f"output={exported}"]) == 0
    found = sh.load(str(exported)).score(task).metrics.set_index("metric").value["nll"]
    assert float(found) == pytest.approx(cell.value, abs=1e-7)
    words = [*calibrated(place), "region.metric=activations", "region.keep=true", "region.deciles=[1]",
             "target=all", f"output={place / 'factored'}"]
    assert main(["export", "--factored", *words]) == 0
    from harness.models.factored import load_factored

    small, model = sh.wrap(load_factored(place / "factored")), sh.load(str(place / "model"))
    treatment = compose_settings("ablation", words).region.treatment
    with model.ablated(["up_proj", "down_proj"], regions.Decile(1), treatment=treatment):
        for name in ("1.down_proj", "2.up_proj"):
            assert torch.allclose(small[name].weight, model[name].weight, rtol=0, atol=1e-6)
            assert torch.linalg.matrix_rank(small[name].weight) == 2
    assert main(["export", "--factored", *words[:-1], "region.keep=false", "region.scale=0.5",
                 f"output={place / 'scaled'}"]) == 2
    assert "region.scale leaves a matrix at its full rank" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_parts_replaced_by_their_means_in_both_ways(place, model_type):
    """Over the calibration text itself the mean of every output is as before, and its part is constant."""
    model = sh.wrap(tiny_model(model_type), sh.load(str(place / "model")).tokenizer)
    text = sh.task("text", data_files=str(place / "calibration.txt"), window=16, limit=4)
    requests = model.prepare(text).requests
    treatment = sh.TreatmentSettings(replace="mean", calibration=text.task)
    names = ["0.q_proj", "0.v_proj", "0.up_proj", "0.down_proj"]
    matrices = {matrix.name: matrix for matrix in model.loaded.matrices}
    before = {name: tensor.clone() for name, tensor in model.module.named_parameters()}

    @torch.no_grad()
    def outputs(name):
        """The outputs of one matrix for the inputs that it has in the unedited model."""
        module = owner_of(model.module, matrices[name])
        x = inputs[module]
        return slice_of(matrices[name], module(x)).reshape(len(x), -1).double()

    inputs, found = {}, {}
    for name in names:
        module = owner_of(model.module, matrices[name])
        rows = []
        handle = module.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0][0]))
        with torch.no_grad():
            for request in requests:
                model.module(input_ids=torch.from_numpy(request.tokens)[None])
        handle.remove()
        inputs[module] = torch.cat(rows)
        found[name] = outputs(name)
    for edit in ("weight", "branch"):
        for name in names:
            with model.ablated(name, sh.regions.large(0.3), edit=edit, treatment=treatment) as said:
                now = outputs(name)
            change = now - found[name]
            scale = float(found[name].square().mean()) ** 0.5
            assert torch.allclose(change.mean(0), torch.zeros_like(change[0]), rtol=0, atol=2e-5 * scale), name
            assert float(change.square().sum(1).mean()) ** 0.5 == pytest.approx(said.output_norm_removed, rel=1e-4)
            assert 0 < said.output_constant_share < 1
            with model.ablated(name, sh.regions.large(1.0), edit=edit, treatment=treatment) as said:
                constant = outputs(name)
            assert torch.allclose(constant, found[name].mean(0).expand_as(constant), rtol=0, atol=2e-5 * scale)
            assert said.output_energy_removed == pytest.approx(1, abs=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.named_parameters())
    assert not any(module._forward_hooks for module in model.module.modules())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_means_are_exported_as_biases(place, tmp_path, model_type):
    save_checkpoint(tmp_path / "model", model_type)
    words = [*calibrated(place), f"model.name={tmp_path / 'model'}", "region.deciles=[1]", "region.replace=mean",
             "region.metric=activations", "target=all", "target.layer_types=[q_proj,up_proj]"]
    rows = rows_of(run_settings(compose_settings("ablation", [*words, f"output={tmp_path / 'study'}"])))
    assert main(["export", *words, f"output={tmp_path / 'exported'}"]) == 0
    task = sh.task("text", data_files=str(place / "text.txt"), window=16, limit=6)
    found = sh.load(str(tmp_path / "exported")).score(task).metrics.set_index("metric").value["nll"]
    label = "decile 1 (0.0-0.1), activations, mean"
    row = rows.xs(label, level="region").iloc[0]
    assert float(found) == pytest.approx(row.value, abs=2e-6) and abs(row.delta) > 1e-4
    assert row.region_replace == "mean"
    if model_type == "llama":
        module = sh.load(str(tmp_path / "exported")).module.model.layers[1].mlp
        assert module.up_proj.bias.abs().sum() > 0 and module.down_proj.bias.abs().sum() == 0


def test_a_model_without_biases_is_not_exported_with_means(place, tmp_path, capsys):
    save_checkpoint(tmp_path / "model", "mistral")
    words = [*calibrated(place), f"model.name={tmp_path / 'model'}", "region.deciles=[1]", "region.replace=mean",
             "target=all", "target.layer_types=[o_proj]", f"output={tmp_path / 'exported'}"]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "region.replace: mean becomes a bias, and 0.o_proj of a mistral model" in error
    assert not (tmp_path / "exported").exists()


def stories(assets, place, *more: str) -> list[str]:
    data = "/data/tinystories/"
    return [
        "experiment=svd_llm", f"model.name={assets}/models/stories260K", "model.device=cpu", "runtime.threads=1",
        "task=text", f"tasks.text.data_files={assets}{data}validation_first_stories.txt", "tasks.text.limit=8",
        "tasks.text.window=128", "calibration=text",
        f"region.calibration.data_files={assets}{data}tinystories_1000_train.jsonl", "region.calibration.window=128",
        "region.calibration.limit=64", "region.ratios=[0.3]", f"runtime.cache_dir={place / 'cache'}", *more,
    ]  # fmt: skip


@pytest.mark.assets
def test_compression_in_the_metric_of_the_activations_is_better_than_plain_truncation(assets, place, tmp_path):
    """A real trained model at one budget: plain SVD, SVD-LLM, and ZS-SVD's shared budget; then the factored export."""
    values = {}
    for metric in ("weight", "activations"):
        words = stories(assets, place, f"region.metric={metric}", f"output={tmp_path / metric}")
        rows = read_metrics(run_settings(compose_settings("ablation", words)))
        assert set(rows.status) == {"ok"}
        rows = rows[(rows.metric == "token_perplexity") & (rows.target != "baseline")].set_index("region_kind").value
        values |= {(metric, ranks): rows[ranks] for ranks in ("uniform", "zero_sum")}
    assert rows["none"] < values["activations", "uniform"] < 0.8 * values["weight", "uniform"]
    assert values["activations", "zero_sum"] < 0.8 * values["weight", "zero_sum"]
    assert len(set(values.values())) == 4
    exported = tmp_path / "exported"
    assert main(["export", "--factored", *stories(assets, place, "region.ranks=[zero_sum]", f"output={exported}")]) == 0
    from harness.models.factored import load_factored

    original = sh.load(f"{assets}/models/stories260K")
    small = sh.wrap(load_factored(exported), original.tokenizer)
    task = sh.task("text", data_files=stories(assets, place)[5].partition("=")[2], limit=8, window=128)
    found = float(small.score(task).metrics.set_index("metric").value["token_perplexity"])
    assert found == pytest.approx(values["activations", "zero_sum"], rel=1e-4)
    from safetensors import safe_open

    with safe_open(exported / "factored.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    matrices = {name: original[name].shape for name in original.matrices}
    size = sum(np.prod(shapes[part]) for name in matrices for part in shapes
               if part in (f"{name}:left", f"{name}:right", name))
    whole = [name for name in matrices if f"{name}:left" not in shapes and name not in shapes]
    size += sum(np.prod(matrices[name]) for name in whole)
    assert size <= 0.7 * sum(map(np.prod, matrices.values()))
