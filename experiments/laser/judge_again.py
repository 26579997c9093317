"""Judge published best cells again, by more draws of their controls, without searching the grid again.

    python experiments/laser/judge_again.py VERDICT.csv FOLDER SETTING...

VERDICT.csv: the verdict of a search, as figures.py writes it, with the rows of the named tasks only; it is written
anew. FOLDER: where these cells are measured, which resumes. SETTING: those of the search that chose the cells. With a
smaller search.report_limit only the comparison with the controls is on fewer examples, and the column control_n says
on how many; otherwise the p-value and the interval of the cell itself are computed anew, too. Rows whose verdict is
"no" are not measured, because no control can change it; their controls keep the mean of the draws that the search had,
without a p-value.
"""

from __future__ import annotations

import sys
from typing import Any

import pandas

from harness.engine.measurement import Context
from harness.measurements import SEARCH, compose_settings
from harness.measurements.search.measure import SearchRun
from harness.measurements.search.tables import VERDICT
from harness.measurements.search.verdict import Winner, judge
from harness.spectral.regions.laser import Laser
from harness.spectral.regions.sizes import short

EARLIER_DRAWS = 3


def published_label(region: Any) -> str:
    """The name of a region in the committed tables, in which "small 0.9" is what is now called "laser 0.1"."""
    return f"small {short(1 - region.keep)}" if isinstance(region, Laser) else region.label


def winner_of(row: Any, ablations: dict[tuple[str, str], Any]) -> Winner:
    ablation = ablations[row.target, row.region]
    region = ablation.region
    share = 1 - region.keep if isinstance(region, Laser) else region.stop - region.start
    selected = {"higher_is_better": row.higher_is_better, "energy_removed": row.energy_removed, "n": row.selection_n,
                "baseline": row.selection_baseline, "value": row.selection_value, "delta": row.selection_delta,
                "p_value": row.selection_p, "n_removed": share, "n_values": 1.0}
    return Winner(row.task, row.metric, ablation, row.n_tried, row.selection_p_holm, selected)


def main(published: str, folder: str, *settings: str) -> None:
    plan = SEARCH.units.plan(compose_settings("search", [*settings, f"output={folder}"]))
    ablations = {(cell.ablation.target.label, published_label(cell.ablation.region)): cell.ablation
                 for cell in plan.report.units if not cell.is_baseline}
    table = pandas.read_csv(published)
    run = SearchRun(plan, Context())
    run.winners = [winner_of(row, ablations) for row in table.itertuples() if row.verdict != "no"]
    rows = {(row["task"], row["metric"]): row for row in run.stage("verdict")["verdict"]}
    judged = []
    for old in table.to_dict("records"):
        new = rows.get((old["task"], old["metric"]))
        if new is None:
            old |= {f"{name}_draws": old.get(f"{name}_draws", EARLIER_DRAWS) for name in ("random", "energy_matched")}
            old |= {"over_random_p": None, "over_energy_matched_p": None, "beats_controls": False}
            judged.append(old)
            continue
        of_controls = {key: value for key, value in new.items() if key.startswith(("random", "energy_matched", "over"))}
        judged.append({**old, **of_controls, "beats_controls": new["beats_controls"], "control_n": new["n"]})
        if new["n"] == old["n"]:
            judged[-1] |= {key: new[key] for key in ("p_value", "delta_low", "delta_high")}
            assert abs(new["delta"] - old["delta"]) < 1e-3 * abs(old["delta"]), (old["delta"], new["delta"])
    judge(judged)
    columns = [*(name for name in VERDICT.names() if name != "stage_id"), "control_n"]
    beside = [name for name in table.columns if name not in columns]
    pandas.DataFrame(judged).reindex(columns=[*columns, *beside]).to_csv(published, index=False, float_format="%.6g")


if __name__ == "__main__":
    main(*sys.argv[1:])
