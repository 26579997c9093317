"""`harness coupling` from the command line to its tables and its report, on tiny models."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from harness.cli import main
from harness.evaluation.jacobians import whole_sequence_maps
from harness.measurements import COUPLING, compose_settings
from harness.measurements.coupling.rows import rows_of
from harness.measurements.coupling.summary import summarise, with_label
from harness.measurements.coupling.tables import TABLES, read_coupling
from harness.measurements.coupling.units import Prompt, Way, way_of
from harness.models.loading import loaded_from
from harness.spectral.ablation import ablate
from harness.spectral.decomposition import decompose
from harness.spectral.regions import small
from tests.checkpoints import save_checkpoint, text_file
from tests.models.tiny import tiny_model
from tests.pages import page_data
from tests.processes import run_ranks
from tests.studies import CIRCUMSTANCES, status_of

K = [2, 5]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Settings of a tiny Llama and three prompts of twelve tokens."""
    folder = tmp_path_factory.mktemp("model")
    text = text_file(folder / "text.txt")
    return ["model=pretrained", f"model.name={save_checkpoint(folder / 'llama')}", "model.device=cpu", "task=text",
            f"tasks.text.data_files={text}", "tasks.text.window=12", "prompts=3", "k=[2,5]", "threads=1"]


@pytest.fixture(scope="module")
def measured(words, tmp_path_factory):
    """The folder of a run with trained and random weights and two ablations, in one process."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    assert run(words, "init=both", *ABLATIONS, f"output={folder}") == 0
    return folder


ABLATIONS = ("target=type", "target.layer_types=[down_proj]", "region=fraction", "region.kinds=[large,small]",
             "region.values=[0.5]")


def run(words, *more: str) -> int:
    return main(["coupling", "--quiet", *words, *more])


def refused(capsys, *settings: str) -> str:
    """The one line that settings are refused with."""
    capsys.readouterr()
    assert main(["coupling", "--quiet", *settings]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("harness: ")
    return err[len("harness: ") :].rstrip()


def assert_same(one, other) -> None:
    for name in TABLES.names():
        tables = [read_coupling(folder, name).drop(columns=[*CIRCUMSTANCES, "seconds"], errors="ignore")
                  for folder in (one, other)]
        assert len(tables[0])
        pd.testing.assert_frame_equal(*tables, check_exact=True)


def settings_of(words, *more: str):
    return compose_settings("coupling", [*words, *more])


def first_prompt(words) -> Prompt:
    return COUPLING.units.plan(settings_of(words)).units[0].prompt


def test_the_values_are_those_of_the_whole_model_written_out(words, measured):
    """Independent of the harness's coupling: Jacobians on the whole sequence, numpy's decompositions, single pairs."""
    prompt = first_prompt(words)
    one = loaded_from(tiny_model("llama").requires_grad_(False))
    maps = whole_sequence_maps(one, torch.tensor([prompt.tokens]))
    jacobians = [row.dense().double().numpy() for row in maps]
    svd = [np.linalg.svd(matrix) for matrix in jacobians]
    rows = read_coupling(measured, "couplings")
    rows = rows[(rows["init"] == "trained") & rows["region"].isna() & (rows["prompt_id"] == prompt.name)]
    assert len(rows) == len(K) * 9 and set(rows["kind"]) == {"depth"} and set(rows["order"]) == {"ujv"}
    for _, row in rows.iterrows():
        k, i, j = row["k"], row["block_i"], row["block_j"]
        inner = svd[j][0][:, :k].T @ jacobians[i] @ svd[j][2][:k].T
        sigma = svd[i][1][:k]
        m = np.linalg.norm(inner - np.diag(sigma)) / np.linalg.norm(sigma)
        assert row["m"] == pytest.approx(m, abs=2e-5)
        null = math.sqrt(1 + k**2 * (jacobians[i] ** 2).sum() / (24**2 * (sigma**2).sum()))
        assert row["m_null"] == pytest.approx(null, rel=1e-6)
        assert row["coupling"] == pytest.approx(1 - m / null, abs=2e-5)
    found = read_coupling(measured, "jacobians")
    found = found[(found["init"] == "trained") & found["region"].isna() & (found["prompt_id"] == prompt.name)]
    assert found["block"].tolist() == [0, 1, 2] and set(found["token_in"]) == {len(prompt.tokens) - 1}
    assert found["sigma_max"].tolist() == pytest.approx([one[1][0] for one in svd], rel=1e-5)
    assert found["gap_k"].tolist() == pytest.approx([one[1][4] / one[1][5] for one in svd], rel=1e-4)
    product = np.eye(24)
    for matrix, rank in zip(jacobians, found["product_effective_rank"]):
        product = (np.eye(24) + matrix) @ product
        p = np.linalg.svd(product, compute_uv=False)
        assert rank == pytest.approx(np.exp(-(p / p.sum() * np.log(p / p.sum())).sum()), rel=1e-5)
    assert (found["path_error"] < 1e-5).all() and (found["residual_error"] < 1e-7).all()
    assert set(found["method"]) == {"dense"} and set(found["path"]) == {"one_token"}
    assert (found["n_products"] == 24).all()
    assert found[["symmetry", "departure_normality", "effective_rank"]].notna().all().all()


def test_trajectories_are_those_of_the_hidden_states(words, measured):
    prompt = first_prompt(words)
    model = tiny_model("llama")
    captured = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: captured.append((args[0][0, -1], output[0, -1])))
    with torch.no_grad():
        model(torch.tensor([prompt.tokens]))
    states = torch.stack([captured[0][0], *(after for _, after in captured)]).double().numpy()
    steps = np.diff(states, axis=0)
    lss = 3 / np.linalg.norm((steps / np.linalg.norm(steps, axis=1, keepdims=True)).sum(0))
    rows = read_coupling(measured, "trajectories")
    row = rows[(rows["init"] == "trained") & rows["region"].isna() & (rows["prompt_id"] == prompt.name)].iloc[0]
    assert row["lss"] == pytest.approx(lss, rel=1e-5) and row["lss_null"] == pytest.approx(math.sqrt(3))
    growth = np.diff(np.log(np.linalg.norm(states, axis=1)))
    assert row["growth_mean"] == pytest.approx(growth.mean(), rel=1e-4)
    assert row["expodistance"] == pytest.approx((growth.std() / growth.mean()) ** 2, rel=1e-3)
    points = read_coupling(measured, "points")
    points = points[(points["init"] == "trained") & points["region"].isna() & (points["prompt_id"] == prompt.name)]
    assert len(points) == 4 * len(prompt.tokens)
    last = points[points["token"] == len(prompt.tokens) - 1]
    assert last["norm"].tolist() == pytest.approx(np.linalg.norm(states, axis=1).tolist(), rel=1e-5)


def test_coupling_of_an_ablated_model(words, measured):
    """It is that of a model whose matrices were ablated beforehand; and the unedited weights are back afterwards."""
    model = tiny_model("llama").requires_grad_(False)
    for block in model.model.layers:
        weight = block.mlp.down_proj.weight
        decomposition = decompose(weight)
        weight.copy_(ablate(weight, decomposition, torch.arange(24)[12:]).float())
    settings, prompt = settings_of(words), first_prompt(words)
    expected = rows_of(loaded_from(model), settings, prompt, Way("dense", "one_token")).couplings
    rows = read_coupling(measured, "couplings")
    label = small(0.5).label
    found = rows[(rows["region"] == label) & (rows["prompt_id"] == prompt.name)]
    assert found["m"].tolist() == pytest.approx(expected["m"], abs=1e-4)
    labels = with_label(read_coupling(measured, "jacobians"))["weights"]
    assert list(dict.fromkeys(labels)) == ["trained", "trained, down_proj: top 50 %",
                                           "trained, down_proj: bottom 50 %", "random"]
    jacobians = read_coupling(measured, "jacobians")
    assert jacobians.loc[jacobians["region"].notna(), "energy_removed"].between(0.01, 0.99).all()
    assert jacobians.loc[jacobians["region"].isna(), "energy_removed"].isna().all()


def test_coupling_of_the_reference_beside_that_of_a_tuned_model(words, measured, tmp_path):
    tuned = save_checkpoint(tmp_path / "tuned", seed=1)
    base = words[1].partition("=")[2]
    more = [f"model.name={tuned}", "reference=pretrained", f"reference.name={base}", f"output={tmp_path / 'out'}"]
    assert run([word for word in words if word != words[1]], *more) == 0
    rows, expected = (with_label(read_coupling(folder, "couplings")) for folder in (tmp_path / "out", measured))
    assert list(dict.fromkeys(rows["weights"])) == ["trained", "reference"]
    expected = expected[expected["weights"] == "trained"]
    assert rows.loc[rows["weights"] == "reference", "m"].tolist() == expected["m"].tolist()
    assert rows.loc[rows["weights"] == "trained", "m"].tolist() != expected["m"].tolist()
    assert set(rows.loc[rows["weights"] == "reference", "model"]) == {base}


def test_products_alone_give_the_same_couplings(words, measured, tmp_path):
    assert run(words, "jacobian=krylov", "orders=[ujv,vju]", f"output={tmp_path / 'out'}") == 0
    free, dense = read_coupling(tmp_path / "out", "couplings"), read_coupling(measured, "couplings")
    dense = dense[(dense["init"] == "trained") & dense["region"].isna()]
    free = free[free["order"] == "ujv"]
    assert np.abs(free["m"].to_numpy() - dense["m"].to_numpy()).max() < 2e-3
    rows = read_coupling(tmp_path / "out", "jacobians")
    assert set(rows["method"]) == {"krylov"} and rows["symmetry"].isna().all() and (rows["residual_error"] < 1e-3).all()


def test_the_whole_sequence_gives_the_same(words, measured, tmp_path):
    assert run(words, "jacobian=whole", f"output={tmp_path / 'out'}") == 0
    whole, dense = read_coupling(tmp_path / "out", "couplings"), read_coupling(measured, "couplings")
    dense = dense[(dense["init"] == "trained") & dense["region"].isna()]
    assert np.abs(whole["m"].to_numpy() - dense["m"].to_numpy()).max() < 1e-4
    assert set(read_coupling(tmp_path / "out", "jacobians")["path"]) == {"whole"}


def test_auto_takes_what_needs_fewer_products():
    """arXiv 2407.07810 with Llama-3-8B: 420 products instead of 4096 for K = 10; SmolLM2 with K = 30 is dense."""
    settings = settings_of(["model=recall", "task=recall"], "k=[10]")
    assert way_of(settings, 32, 4096, True) == Way("krylov", "one_token")
    assert way_of(dataclasses.replace(settings, k=[30]), 30, 576, True) == Way("dense", "one_token")
    assert way_of(settings, 30, 401, True).method == "krylov" and way_of(settings, 30, 400, True).method == "dense"
    both = dataclasses.replace(settings, orders=["ujv", "vju"])
    assert way_of(both, 30, 700, False) == Way("dense", "whole")


def test_pairs_of_tokens(words, tmp_path):
    folder = tmp_path / "out"
    assert run(words, "tokens=[-1,-2,3]", "kinds=[depth,self,context_in,context_out]", "prompts=1", "k=[3]",
               f"output={folder}") == 0
    rows = read_coupling(folder, "couplings")
    assert rows.groupby("kind").size().to_dict() == {"depth": 3 * 9, "self": 27, "context_in": 27, "context_out": 27}
    jacobians = read_coupling(folder, "jacobians")
    last = jacobians["token_out"].max()
    pairs = {(3, 3), (last - 1, last - 1), (last, last), (3, last), (last - 1, last), (3, last - 1)}
    assert set(map(tuple, jacobians[["token_in", "token_out"]].drop_duplicates().values.tolist())) == pairs
    across = jacobians["token_in"] != jacobians["token_out"]
    assert set(jacobians.loc[across, "path"]) == {"whole"} and set(jacobians.loc[~across, "path"]) == {"one_token"}
    assert jacobians.loc[across, "product_effective_rank"].isna().all()
    within = rows[rows["kind"] != "depth"]
    assert (within["block_i"] == within["block_j"]).all()
    assert set(rows.loc[rows["kind"] == "context_in", "token_out_j"]) == {last}
    assert set(rows.loc[rows["kind"] == "context_out", "token_in_j"]) == {3}
    assert len(read_coupling(folder, "trajectories")) == 3
    summary = summarise(with_label(rows))
    assert summary.groupby("kind").size().to_dict() == {"depth": 4, "self": 2, "context_in": 2, "context_out": 2}


def test_what_is_missing_is_made_up_for(words, measured, tmp_path, capsys):
    """A frozen run in shards, one file lost: the same rows as one process, and only the lost prompt runs again."""
    folder = tmp_path / "out"
    assert main(["plan", "--freeze", "coupling", *words, "init=both", *ABLATIONS, f"output={folder}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("coupling ") and lines[1].startswith("weights trained: 3 prompts with ")
    assert lines[-1].startswith("jacobians dense by the one-token path: 3 blocks of 24 dimensions")
    for shard in ("0", "1"):
        assert main(["work", str(folder), "--quiet", "--shard", shard, "--of", "2"]) == 0
    assert_same(folder, measured)
    sorted((folder / "jacobians").iterdir())[4].unlink()
    assert "done 11  failed 0  missing 1" in status_of(folder)
    assert main(["work", str(folder), "--quiet"]) == 0
    assert_same(folder, measured)
    assert main(["compact", str(folder)]) == 0
    assert_same(folder, measured)


def test_two_processes_share_the_prompts(words, measured, tmp_path):
    command = ["coupling", *words, "init=both", *ABLATIONS, f"output={tmp_path / 'two'}"]
    program = f"from harness.cli import main; raise SystemExit(main({command!r}))"
    done = run_ranks(program, 2, tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f": 12 units, 0 done, in {tmp_path / 'two'} on 2 processes\n" in done.stderr
    assert done.stderr.count("line-shape score") == 1
    assert_same(tmp_path / "two", measured)


def test_the_report(measured, capsys):
    assert main(["report", str(measured)]) == 0
    out = capsys.readouterr().out
    assert "3 blocks of 24 dimensions, 3 prompts" in out and "neighbours without block 0" in out
    report = measured / "report"
    assert {path.name for path in report.iterdir()} == {
        "coupling.md", "coupling_summary.csv", "trajectories.csv", "blocks.csv", "pairs-trained.png",
        "pairs-random.png", "ablations.png", "blocks.png", "trajectories.png", "index.html",
    }
    assert len(page_data(report / "index.html")["tables"]) == 3
    assert (report / "index.html").read_text().count("data:image/png") == 5
    summary = pd.read_csv(report / "coupling_summary.csv")
    rows = with_label(read_coupling(measured, "couplings"))
    rows = rows[(rows["weights"] == "trained") & (rows["k"] == 2)]
    per_prompt = rows[rows["block_j"] == rows["block_i"] + 1].groupby("prompt_id")["m"].mean()
    one = summary[(summary["weights"] == "trained") & (summary["k"] == 2) & (summary["pairs"] == "neighbours")].iloc[0]
    assert one["m"] == pytest.approx(per_prompt.mean(), rel=1e-5) and one["n_prompts"] == 3
    assert one["m_stderr"] == pytest.approx(per_prompt.std(ddof=1) / math.sqrt(3), rel=1e-5)
    figure = COUPLING.report.figure(measured, weights="random", k=5)
    assert len(figure.axes) == 6


def test_checkpoints_of_a_training_and_a_model_without_a_cache(tmp_path, capsys):
    settings = ["model.recall.steps=4", "model.recall.dim=16", "model.recall.hidden_dim=24", "model.device=cpu",
                f"model.recall.cache_dir={tmp_path / 'cache'}", "model.recall.batch_size=4", "revisions=[0,4]",
                "init=both", f"output={tmp_path / 'out'}", "task=recall", "prompts=2", "k=[2]"]
    assert main(["coupling", *settings]) == 0
    assert "of 64 to 64 tokens" in capsys.readouterr().out
    jacobians = with_label(read_coupling(tmp_path / "out", "jacobians"))
    assert jacobians["weights"].tolist() == ["0"] * 4 + ["4"] * 4 + ["random"] * 4
    assert set(jacobians["path"]) == {"whole"} and (jacobians["n_products"] == 16).all()
    sigma = jacobians.groupby("weights")["sigma_max"].first()
    assert sigma["0"] == sigma["random"] != sigma["4"]  # step 0 is the random initialisation
    assert (tmp_path / "out" / "report" / "training.png").is_file()


def test_a_prompt_that_fails_is_a_row_and_the_others_are_done(words, tmp_path, monkeypatch, capsys):
    from harness.measurements.coupling import measure

    def fails(loaded, settings, prompt, way):
        if prompt.name != "0":
            return rows_of(loaded, settings, prompt, way)
        raise RuntimeError("no such luck")

    monkeypatch.setattr(measure, "rows_of", fails)
    assert main(["coupling", *words, f"output={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert "failed: trained prompt 0: RuntimeError: no such luck" in out and "1 of 3 units failed" in err
    rows = read_coupling(tmp_path / "out", "jacobians")
    assert (rows["status"] == "error").sum() == 1 and (rows["status"] == "ok").sum() == 6
    monkeypatch.undo()
    assert run(words, f"output={tmp_path / 'out'}") == 0
    assert set(read_coupling(tmp_path / "out", "jacobians")["status"]) == {"ok"}


def test_every_setting_changes_the_ids(words):
    def ids(*more: str) -> tuple[str, ...]:
        return tuple(unit.id for unit in COUPLING.units.plan(settings_of(words, "prompts=1", *more)).units)

    changed = [(), ("k=[2]",), ("tokens=[-2]",), ("orders=[vju]",), ("jacobian=whole",), ("jacobian=krylov",),
               ("jacobian=krylov", "seed=1"), ("normality=false",), ("tokens=[-1,-2]",), ("model.dtype=bfloat16",),
               ("tokens=[-1,-2]", "kinds=[self]"), ("init=random",), ("init=random", "seed=1"),
               ("model.attn_implementation=eager",), ("tasks.text.window=10",)]
    assert len({ids(*more) for more in changed}) == len(changed)
    assert ids() == ids("threads=2", "jacobian=dense", "seed=1", "output=elsewhere")
    ablations = [ids(*ABLATIONS)[1:], ids(*ABLATIONS[:2], "region=decile", "region.deciles=[1]")[1:], ids()]
    assert len({one for part in ablations for one in part}) == 4


def test_a_model_over_devices(words, measured, tmp_path):
    assert run(words, "model.device_map=auto", f"output={tmp_path / 'out'}") == 0
    found, plain = read_coupling(tmp_path / "out", "couplings"), read_coupling(measured, "couplings")
    plain = plain[(plain["init"] == "trained") & plain["region"].isna()]
    assert found["m"].tolist() == plain["m"].tolist()


def test_bad_settings_are_one_line(words, tmp_path, capsys):
    recall = ("model=recall", "task=recall")
    assert refused(capsys, *words[:-1], "k=[30]") == (
        "k: 30 is wrong; a Jacobian of this model has 24 singular values"
    )
    assert refused(capsys, *recall, "k=[]").startswith("k: [] is wrong; name at least one")
    assert refused(capsys, *recall, "k=[0]").startswith("k: [0] is wrong; each must be at least 1")
    assert refused(capsys, *recall, "k=[5,5]").startswith("k: [5, 5] is wrong; each may be named once")
    assert refused(capsys, *recall, "kinds=[self]").startswith("kinds: ['self'] is wrong; self compares tokens")
    assert refused(capsys, *recall, "kinds=[width]").startswith("kinds: 'width' is wrong;")
    assert refused(capsys, *recall, "orders=[uvj]").startswith("orders: 'uvj' is wrong;")
    assert refused(capsys, *recall, "tokens=first") == (
        "tokens: 'first' is wrong; use last, or positions such as [-1,-2,-9]"
    )
    assert refused(capsys, *words, "tokens=[99]").startswith("tokens: 99 is no position in prompt 0, which has 11")
    assert refused(capsys, *recall, "target=type").startswith("target: nothing is removed from it")
    assert refused(capsys, *recall, "init=random", "region=fraction").startswith("region: ablations are of trained")
    assert refused(capsys, *recall, "region=fraction", "region.metric=activations").startswith("region.metric: 'act")
    assert refused(capsys, *recall, "region=change").startswith("region.of: 'change' is wrong; harness coupling")
    assert refused(capsys, "model=recall").startswith("task: [] is wrong; choose one whose texts")
    assert refused(capsys, *words, "task=[text,ioi]").startswith("task: ['text', 'ioi'] is wrong")
    assert refused(capsys, *recall, "revisions=[0,0]").startswith("revisions: ['0', '0'] is wrong")
    assert refused(capsys, *recall, "tokens=[-1,-2]", "kinds=[context_in]", "jacobian=krylov").startswith("jacobian:")
    assert refused(capsys, *words, *ABLATIONS[:3], "region.kinds=[small]", "region.values=[0.001]").startswith(
        "region: small 0.001 is empty for matrix 0.down_proj"
    )
    folder, text = save_checkpoint(tmp_path / "bert", "bert"), text_file(tmp_path / "text.txt")
    assert refused(capsys, "model=pretrained", f"model.name={folder}", "task=text",
                   f"tasks.text.data_files={text}").startswith("model.name: ")
