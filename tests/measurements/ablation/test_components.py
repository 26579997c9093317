"""Single components in studies: all of a matrix, those by a text's loss, their controls in random directions, ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.cli import main
from harness.measurements import compose_settings
from harness.measurements.ablation.cells import cell_id
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.ablation.units import plan
from harness.models.editing import Ablation
from harness.spectral import regions
from tests.checkpoints import WORDS, save_checkpoint
from tests.measurements.ablation.test_treatments import SETTINGS, TARGET
from tests.studies import run_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")
    save_checkpoint(folder / "model")
    for name, seed in (("text", 0), ("calibration", 1)):
        rng = np.random.default_rng(seed)
        (folder / f"{name}.txt").write_text("\n".join(" ".join(rng.choice(WORDS, 20)) for _ in range(20)) + "\n")
    return folder


def words(place, *more: str) -> list[str]:
    return [
        "model=pretrained", f"model.name={place / 'model'}", "model.device=cpu", "task=text", "region=component",
        f"tasks.text.data_files={place / 'text.txt'}", "tasks.text.window=16", "tasks.text.limit=6",
        "calibration=text", f"region.calibration.data_files={place / 'calibration.txt'}",
        "region.calibration.window=16", "region.calibration.limit=12", "runtime.threads=1",
        f"runtime.cache_dir={place / 'cache'}", *more,
    ]  # fmt: skip


def rows_of(place, folder, *more: str):
    asked = words(place, f"output={folder}", *(word for word in more if not word.startswith("~")))
    if "~calibration" in more:
        asked = [word for word in asked if "calibration" not in word]
    rows = read_metrics(run_settings(compose_settings("ablation", asked)))
    assert set(rows.status) == {"ok"}, rows.error.dropna().iloc[0]
    return rows[(rows.metric == "nll") & (rows.target != "baseline")]


def test_the_ids_of_components_are_those_of_before():
    assert cell_id(SETTINGS, Ablation(TARGET, regions.Component(-3)), "t") == "fbaa28bba53ea26a1bf5e616"
    others = [regions.Component(-3), regions.Component(-3, "loss"), regions.Component(-2, "loss")]
    assert len({cell_id(SETTINGS, Ablation(TARGET, one), "t") for one in others}) == 3


def test_all_is_every_value_of_each_matrix(place):
    study = plan(compose_settings("ablation", words(place, "region.all=true", "target.layer_types=[k_proj,up_proj]",
                                                    "region.controls=[]")))
    ranks = {matrix.name: min(matrix.shape) for matrix in study.matrices}
    found: dict[str, list[int]] = {}
    for cell in study.units:
        if not cell.is_baseline:
            found.setdefault(cell.ablation.target.label, []).append(cell.ablation.region.position)
    assert len(set(ranks[name] for name in found)) == 2 and len(found) >= 4
    assert all(positions == list(range(ranks[name])) for name, positions in found.items())


def test_top_finds_what_a_plain_derivative_finds_in_the_whole_model(place, tmp_path):
    rows = rows_of(place, tmp_path / "out", "target=all", "region.ends=0", "region.top=2", "region.controls=[]")
    study = plan(compose_settings("ablation", words(place, "region.top=1")))
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    requests = study.prepared.calibration.requests
    total, n = torch.zeros((), dtype=torch.float64), sum(len(one.targets) for one in requests)
    for one in requests:
        logprob = model(torch.as_tensor(np.asarray(one.tokens)[None])).logits[0].log_softmax(-1)
        total = total - logprob[torch.as_tensor(one.positions), torch.as_tensor(one.targets)].sum() / n
    total.backward()
    changes = []
    for matrix in study.matrices:
        weight = model.get_parameter(matrix.parameter)
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        products = ((u.T @ weight.grad) * vh).sum(1) * s
        changes += [(-float(product), f"{matrix.name}:{i}") for i, product in enumerate(products)]
    changes.sort()
    expected = {"component 0 by loss": changes[0], "component 1 by loss": changes[1],
                "component -2 by loss": changes[-2], "component -1 by loss": changes[-1]}
    assert rows.set_index("region").component.to_dict() == {label: name for label, (_, name) in expected.items()}
    assert set(rows.n_removed) == {1}
    # what the cell of the component by name has, measured from its own block on
    names = ",".join(rows.component)
    alone = rows_of(place, tmp_path / "each", "region=named", f"region.names=[{names}]", "region.each=true",
                    "region.controls=[]", "~calibration")
    assert set(alone.target_kind) == {"matrix"}
    for column in ("value", "delta", "norm_removed", "sigma_max_removed", "realised_removal"):
        assert alone.set_index("component")[column].to_dict() == rows.set_index("component")[column].to_dict()


def test_components_by_name_one_by_one_are_the_cells_of_region_component(place):
    def cells(*more):
        study = plan(compose_settings("ablation", words(place, "region.controls=[random,rotated,none]", *more)))
        return {cell.id: cell.ablation for cell in study.units}

    names = {"0.up_proj:3", "1.down_proj:-1", "1.down_proj:3", "1.k_proj:0"}
    found = cells("region=named", f"region.names=[{','.join(names)}]", "region.each=true")
    there = cells("target=matrix", "region.ends=0", "region.components=[0,3,-1]")
    grid = {one for one, ablation in found.items() if ablation.target.kind == "matrix"}
    # equal draws of a random component of one matrix are one cell, as they are for region=component
    drawn = {one for one in grid if found[one].region.kind == "random"}
    assert len(grid - drawn) == 2 * len(names) and grid - drawn <= set(there)
    assert {found[one].target.label for one in drawn} == {name.partition(":")[0] for name in names} and len(drawn) == 3
    components = {f"{found[one].target.label}:{found[one].region.position}" for one in grid
                  if found[one].region.by == "component"}
    assert components == names
    (none,) = (ablation for ablation in found.values() if ablation.target.kind == "control")
    assert none.target.matrices == ("0.up_proj", "1.k_proj", "1.down_proj")


def test_the_calibration_text_is_part_of_the_choice(place):
    def ids(*more):
        study = plan(compose_settings("ablation", words(place, "region.ends=0", "region.top=1", *more)))
        return {cell.id for cell in study.units if cell.ablation.region.by == "component"}

    assert not ids() & ids("region.calibration.limit=11")
    assert not ids() & ids("region.metric=activations")


@pytest.mark.parametrize("more", [[], ["region.metric=activations"], ["region.replace=mean"]])
def test_controls_in_random_directions_are_as_large(place, tmp_path, more):
    controls = ["rotated_output"] if "activations" in str(more) else ["rotated", "rotated_output"]
    rows = rows_of(place, tmp_path / "out", "target.layer_types=[up_proj,down_proj,k_proj]", "region.ends=1",
                   f"region.controls=[{','.join(controls)}]", "region.random_seeds=[0,1]", *more)
    means = rows[rows.region_by == "component"].set_index(["target", "region"])
    for (target, region), own in means.iterrows():
        for control, column in (("rotated", "norm_removed"), ("rotated_output", "output_norm_removed")):
            drawn = rows[(rows.target == target) & rows.region.str.startswith(f"{control} ({region})")]
            assert len(drawn) == (2 if control in controls else 0)
            assert np.allclose(drawn[column], own[column], rtol=1e-9)
            assert drawn.value.nunique() == len(drawn) and (abs(drawn.realised_removal - 1) < 1e-4).all()


def test_named_components_are_removed_together_and_exported(place, tmp_path):
    names = ["0.up_proj:3", "1.down_proj:-1", "1.down_proj:0"]
    plain = [word for word in words(place, "region=named", f"region.names=[{','.join(names)}]")
             if "calibration" not in word and word != "region=component"]
    study = plan(compose_settings("ablation", plain))
    (cell,) = (cell for cell in study.units if cell.of_grid)
    assert cell.ablation.target.matrices == ("0.up_proj", "1.down_proj")
    assert main(["export", *plain, f"output={tmp_path / 'exported'}"]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(one) for one in (place / "model", tmp_path / "exported"))
    for matrix in study.matrices:
        weight = before.get_parameter(matrix.parameter).detach().double().numpy()
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        s[[int(name.partition(":")[2]) for name in names if name.startswith(f"{matrix.name}:")]] = 0
        assert np.allclose(after.get_parameter(matrix.parameter).detach().numpy(), (u * s) @ vt, atol=1e-6), matrix.name
    again = [word for word in plain if not word.startswith("region.names")]
    for same in (names[::-1], [*names, names[0]]):
        other = plan(compose_settings("ablation", [*again, f"region.names=[{','.join(same)}]"]))
        assert other.id == study.id


@pytest.mark.parametrize("names, message", [
    ("[]", "region.names: [] is wrong; region.by=named needs at least one"),
    ("[0.up_proj]", "region.names: '0.up_proj' is no name of a component, such as 28.up_proj:573"),
    ("[0.up_prox:1]", "region.names: '0.up_prox' is no matrix of this model; did you mean '0.up_proj'?"),
    ("[0.up_proj:99]", "region.names: '0.up_proj:99' is wrong; 0.up_proj has positions 0 to"),
])  # fmt: skip
def test_names_that_are_refused(place, names, message, capsys):
    asked = [word for word in words(place, "region=named", f"region.names={names}")
             if "calibration" not in word and word != "region=component"]
    assert main(["plan", *asked]) == 2
    assert capsys.readouterr().err.removeprefix("harness: ").startswith(message)


@pytest.mark.parametrize("more, message", [
    (["region.top=2", "~calibration"], "region.top: 2 is wrong; it needs a text for the loss"),
    (["region.controls=[rotated]", "region.metric=activations"], "region.controls: 'rotated' is wrong; in the metric"),
    (["region.controls=[rotated]", "region.keep=true"], "region.controls: 'rotated' is wrong; random directions"),
    (["region.controls=[rotated]", "runtime.edit=branch"], "runtime.edit: 'branch' is wrong; the control rotated"),
    (["region.all=true", "region.components=[3]"], "region.components: [3] is wrong; region.all=true has every"),
    (["region.ends=0"], "region.ends: 0 is wrong; region.by=component needs at least 1"),
])  # fmt: skip
def test_refusals_are_one_line(place, more, message, capsys):
    asked = words(place, *(word for word in more if word != "~calibration"))
    if "~calibration" in more:
        asked = [word for word in asked if "calibration" not in word]
    assert main(["plan", *asked]) == 2
    assert capsys.readouterr().err.removeprefix("harness: ").startswith(message)
