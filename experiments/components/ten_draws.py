"""Compare one component with a new draw of each of its controls, from a finished study of that component.

    python experiments/components/ten_draws.py STUDY TABLE.csv

STUDY: the folder of a study with one component and several draws of each control. TABLE.csv: gets one row for each
metric and control, with the change without the component, the changes of the draws, the advantage over the mean of the
draws, and its p-value for a new draw (harness.evaluation.statistics.over_new_draw). Metrics are means over examples.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

import harness as sh
from harness.evaluation.statistics import over_new_draw
from harness.measurements.search.verdict import example_scores


def main(study: Path, table: Path) -> None:
    metrics = sh.open(study).metrics
    found = []
    for metric in ("accuracy", "logprob"):
        rows = metrics[metrics["metric"] == metric]
        own = rows[rows["region_by"] == "component"].iloc[0]
        scores = example_scores(study, own["cell_id"], metric, "identity")
        for control, draws in rows[rows["region_by"] == "control"].groupby("region_kind"):
            of_draws = [example_scores(study, one, metric, "identity") for one in draws["cell_id"]]
            if len(of_draws) > 1:
                advantage = over_new_draw(scores, of_draws)
                found.append({"metric": metric, "delta": own["delta"], "p_value": own["p_value"], "control": control,
                              "draws": " ".join(f"{delta:.3g}" for delta in draws["delta"]),
                              "advantage": advantage.delta, "advantage_p": advantage.p_value})
    pd.DataFrame(found).to_csv(table, index=False, float_format="%.4g")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
