"""harness components on a tiny model: its tables, its ids, and its report beside the exact cells of a study."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness.cli import main
from harness.measurements import compose_settings
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.components.tables import read_components
from harness.measurements.components.units import plan
from tests.browser import browser, chromium
from tests.checkpoints import WORDS, ioi_file, save_checkpoint
from tests.pages import page_data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two tiny models, texts, the exact cells of a study of one matrix, and its components with that study."""
    folder = tmp_path_factory.mktemp("components")
    save_checkpoint(folder / "model")
    save_checkpoint(folder / "other", seed=1)
    for name, seed in (("text", 0), ("calibration", 1)):
        rng = np.random.default_rng(seed)
        (folder / f"{name}.txt").write_text("\n".join(" ".join(rng.choice(WORDS, 20)) for _ in range(20)) + "\n")
    ioi_file(folder / "ioi.jsonl")
    assert main(["run", "--quiet", *study(folder)]) == 0
    assert main(["components", "--quiet", *words(folder), f"exact={folder / 'exact'}"]) == 0
    return folder


def study(place, *more):
    return [*common(place), "region=component", "region.all=true", "region.controls=[]", "target.blocks=[1]",
            "target.layer_types=[up_proj]", "runtime.threads=1", f"runtime.cache_dir={place / 'cache'}",
            "+tasks.text={kind: text, data_files: " + str(place / "text.txt") + ", window: 16, limit: 6}",
            f"output={place / 'exact'}", *more]


def common(place):
    return ["model=pretrained", f"model.name={place / 'model'}", "model.device=cpu", "task=ioi",
            f"tasks.ioi.data_files={place / 'ioi.jsonl'}", "calibration=text",
            f"region.calibration.data_files={place / 'calibration.txt'}", "region.calibration.window=16",
            "region.calibration.limit=12"]


def words(place, *more):
    return [*common(place), "blocks=[1]", "threads=1", f"cache_dir={place / 'cache'}", "tokens=3",
            f"output={place / 'out'}", *more]


def test_every_component_of_every_matrix_has_a_row(place):
    matrices, components = (read_components(place / "out", name) for name in ("matrices", "components"))
    assert set(matrices["status"]) == {"ok"} and len(matrices) == 7
    assert len(components) == matrices["n_components"].sum()
    assert components["energy"].sum() == pytest.approx(7)
    assert components[["output_rms", "predicted_loss", "stability_random", "stability_rounded"]].notna().all().all()
    assert components["stability_reference"].isna().all()
    written = components["layer_type"].isin(["o_proj", "down_proj", "up_proj", "gate_proj"])
    assert components["promoted"].notna().eq(written).all()
    tokens = json.loads(components.loc[written, "promoted"].iloc[0])
    assert len(tokens) == 3 and all(isinstance(one, str) for one in tokens)
    predictions = read_components(place / "out", "predictions")
    assert len(predictions) == len(components) and set(predictions["task"]) == {"ioi"}


def test_the_prediction_of_the_loss_is_what_region_top_chooses_by(place, tmp_path):
    more = ["region.all=false", "region.ends=0", "region.top=1", "target.kind=all", f"output={tmp_path / 'out'}"]
    assert main(["run", "--quiet", *study(place, *more)]) == 0
    rows = read_metrics(tmp_path / "out")
    chosen = rows[rows["component"].notna()].drop_duplicates("region").set_index("region")["component"]
    components = read_components(place / "out")
    components = components[components["layer_type"] == "up_proj"]
    for label, place_of in (("component 0 by loss", "idxmin"), ("component -1 by loss", "idxmax")):
        one = components.loc[getattr(components["predicted_loss"], place_of)()]
        assert chosen[label] == f"{one['matrix']}:{one['index']}"


def test_the_report_shows_measured_effects_beside_the_predictions(place, capsys):
    assert main(["report", str(place / "out")]) == 0
    out = capsys.readouterr().out
    page = (place / "out" / "report" / "components.md").read_text()
    assert "rank correlation" in out and "## First order beside measurements" in page
    assert "examples that change most" in page and "promoted:" in page
    rows = read_metrics(place / "exact")
    rows = rows[rows["component"].notna() & (rows["metric"] == "logit_difference")]
    best = rows.loc[rows["delta"].idxmax()]
    card = page.partition("## ioi: logit")[2].partition("### Largest gain")[2]
    assert card.replace("\\_", "_").strip().startswith(f"**{best['component']}**, improvement {best['delta']:+.4g}")
    assert sorted(path.suffix for path in (place / "out" / "report").glob("extremes*"))


def test_the_page_has_a_card_for_each_component_that_the_atlas_shows(place):
    assert main(["report", str(place / "out")]) == 0
    page = page_data(place / "out" / "report" / "index.html")
    (table,) = page["tables"]
    column = {one["name"]: values for one, values in zip(table["columns"], table["data"])}
    rows = read_metrics(place / "exact")
    rows = rows[rows["component"].notna() & (rows["metric"] == "logit_difference")].set_index("component")
    name = "ioi: logit_difference, measured"
    measured = {one: value for one, value in zip(column["component"], column[name]) if value is not None}
    assert measured == pytest.approx(rows.loc[list(measured), "delta"].to_dict(), rel=1e-5)
    components = read_components(place / "out")
    components.index = components["matrix"] + ":" + components["index"].astype(str)
    for row, component in enumerate(column["component"]):
        assert column["sigma"][row] == pytest.approx(components.loc[component, "sigma"], rel=1e-5)
    # each field of each heat map opens the component of its matrix with that effect
    maps = [view for chart in page["charts"] for view in chart["views"] if view["traces"][0]["type"] == "heatmap"]
    assert {view["label"] for view in maps} == {
        f"largest {what}, {how}" for what in ("gain", "harm") for how in ("measured", "predicted to first order")}
    shown: dict[str, list] = {}
    for view in maps:
        fields = [one for line in view["traces"][0]["customdata"] for one in line if one is not None]
        shown.setdefault(view["label"], []).append([column["component"][row] for row in fields])
    assert [rows["delta"].idxmax()] in shown["largest gain, measured"]
    assert [rows["delta"].idxmin()] in shown["largest harm, measured"]
    for of_metric in shown["largest gain, predicted to first order"]:
        assert 1 < len(of_metric) == len({one.partition(":")[0] for one in of_metric})
    # the examples of a card are those that the study has changed most
    best = column["component"].index(rows["delta"].idxmax())
    assert table["score_names"][-1] == "change" and 0 < len(table["examples"][str(best)]) <= 8
    largest = [abs(one[-1]) for one in table["examples"][str(best)]]
    assert largest == sorted(largest, reverse=True)
    # a curve has every component of its matrix
    curves = [view for chart in page["charts"] for view in chart["views"] if view["label"] == "1.up_proj"]
    n = int((components["matrix"] == "1.up_proj").sum())
    assert 2 * n in [sum(len(trace["x"]) for trace in view["traces"]) for view in curves]  # measured and predicted


def test_the_page_opens_cards_in_a_browser(place, tmp_path):
    pytest.importorskip("websocket", reason="no websocket-client: pip install websocket-client")
    if chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    assert main(["report", str(place / "out")]) == 0
    with browser(tmp_path) as tab:
        tab.open(place / "out" / "report" / "index.html")
        tab.wait("document.getElementById('chart-0').dataset.drawn === 'true'")
        tab.run("document.getElementById('chart-1').scrollIntoView()")
        tab.wait("document.getElementById('chart-1').dataset.drawn === 'true'")
        row = tab.run("document.querySelector('#chart-0 .plot').data[0].customdata.flat().find((one) => one !== null)")
        tab.run(f"document.querySelector('#chart-0 .plot').emit('plotly_click', {{points: [{{customdata: {row}}}]}})")
        detail = tab.run("document.querySelector('#table-0 tr.detail').textContent")
        assert "promoted" in detail and "stability_rounded" in detail and "without ablation" in detail
        assert tab.problems == [] and tab.run("document.getElementById('trouble').hidden")
        tab.open(place / "out" / "report" / "index.html", width=390)
        assert tab.run("document.documentElement.scrollWidth") <= 390 and tab.problems == []


def test_a_second_run_measures_nothing_and_everything_is_in_the_id(place, capsys):
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*.parquet")}
    assert main(["components", "--quiet", *words(place), f"exact={place / 'exact'}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*.parquet")} == before

    def id_of(*more):
        return plan(compose_settings("components", [*words(place, *more), f"output={place / 'new'}"])).id

    variants = [[], ["tokens=4"], ["tokens_of=2"], ["stability=[random]"], ["seed=1"], ["region.metric=activations"],
                ["region.centred=true"], ["region.calibration.limit=11"], ["tasks.ioi.limit=3"], ["metrics=[p_target]"],
                [f"model.name={place / 'other'}"], ["reference=pretrained", f"reference.name={place / 'other'}"]]
    assert len({id_of(*more) for more in variants}) == len(variants)
    assert id_of(f"exact={place / 'exact'}") == id_of()  # it is read by the report alone
    assert main(["components", "--quiet", *words(place)]) == 2
    assert "is not the study of" in capsys.readouterr().err


def test_tokens_are_named_for_the_components_that_matter_most(place, tmp_path, capsys):
    more = ["tokens_of=2", "stability=[]", "layer_types=[down_proj]", f"output={tmp_path / 'out'}"]
    assert main(["plan", "components", *words(place, *more)]) == 0
    price = capsys.readouterr().out
    assert "floating-point operations of passes" in price and "for 1 decompositions" in price and "time " in price
    assert main(["components", "--quiet", *words(place, *more)]) == 0
    found, whole = (read_components(folder) for folder in (tmp_path / "out", place / "out"))
    whole = whole[whole["layer_type"] == "down_proj"].set_index("index")
    predictions = read_components(tmp_path / "out", "predictions")
    of_either = [found.set_index("index")["predicted_loss"], predictions.set_index("index")["predicted_delta"]]
    most = {index for one in of_either for index in one.abs().nlargest(2).index}
    named = found[found["promoted"].notna()].set_index("index")
    assert set(named.index) == most and named["promoted"].to_dict() == whole.loc[list(most), "promoted"].to_dict()


def test_a_base_is_compared_and_foreign_studies_are_refused(place, tmp_path, capsys):
    more = ["reference=pretrained", f"reference.name={place / 'other'}", "layer_types=[v_proj]", "stability=[]"]
    assert main(["components", "--quiet", *words(place, *more, f"output={tmp_path / 'pair'}")]) == 0
    components = read_components(tmp_path / "pair")
    assert components["stability_reference"].between(0, 1).all() and components["stability_random"].isna().all()
    capsys.readouterr()
    foreign = words(place, f"model.name={place / 'other'}", "layer_types=[v_proj]", "stability=[]",
                    f"exact={place / 'exact'}", f"output={tmp_path / 'foreign'}")
    assert main(["components", "--quiet", *foreign]) == 0
    assert main(["report", str(tmp_path / "foreign")]) == 2
    assert "measured other weights than" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (["region.metric=activations"], "region.metric: 'activations' is wrong; it needs a text"),
    (["region.centred=true"], "region.centred: True is wrong; only a calibration text is centred"),
    (["exact=nowhere"], "exact: 'nowhere' is wrong; there is no such folder"),
    (["metrics=[accuracy]"], "tasks.ioi: 'accuracy' of task ioi has no derivative"),
    (["stability=[random,random]"], "stability: ['random', 'random'] is wrong; each may be named once"),
])  # fmt: skip
def test_refusals_are_one_line(place, more, message, tmp_path, capsys):
    asked = [word for word in words(place, f"output={tmp_path / 'out'}") if "calibration" not in word]
    assert main(["components", "--quiet", *asked, *more]) == 2
    err = capsys.readouterr().err
    assert err.removeprefix("harness: ").startswith(message) and err.count("\n") == 1
