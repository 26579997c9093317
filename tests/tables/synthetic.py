"""Studies made of numbers that nobody measured, for the tests of the tables."""

from __future__ import annotations

from harness.measurements.ablation.tables import TABLES
from harness.tables.store import write_unit

RUN = "study"  # the id of the run in which they are


def metric_row(cell: str, metric: str = "token_perplexity", **columns) -> dict:
    """A complete metrics row of a cell on the task `text`; `columns` overrides."""
    row = TABLES["metrics"].blank()
    row.update(
        study_id="study",
        cell_id=cell,
        task="text",
        metric=metric,
        status="ok",
        value=20.0,
        stderr=0.5,
        n=64,
        higher_is_better=False,
        model="model",
        target="0.q_proj",
        target_kind="matrix",
        block=0,
        layer_type="q_proj",
        region="small 0.1",
        protocol='{"window": 128}',
        settings="{}",
        seed=0,
    )
    row.update(columns)
    return row


def example_columns(cell: str, n: int = 5, metric: str = "token_perplexity") -> dict:
    return {
        "study_id": "study",
        "cell_id": cell,
        "task": "text",
        "metric": metric,
        "example_id": [f"e{i}" for i in range(n)],
        "score": [float(i) for i in range(n)],
        "weight": [1.0] * n,
        "cluster": None,
    }


def error_row(cell: str, **columns) -> dict:
    error = "Traceback (most recent call last):\n  ...\nRuntimeError: boom"
    return metric_row(cell, status="error", value=None, stderr=None, error=error, **columns)


def write_cell(folder, cell: str, rows: list[dict], examples: dict | None = None) -> None:
    """Write the unit of a study."""
    write_unit(folder, TABLES, cell, {"metrics": rows} | ({} if examples is None else {"examples": examples}), RUN)


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def deciles() -> list[dict]:
    return [
        {
            "region": f"decile {i + 1} ({i / 10:.1f}-{(i + 1) / 10:.1f})",
            "region_by": "decile",
            "region_kind": "decile",
            "fraction_start": i / 10,
            "fraction_stop": (i + 1) / 10,
        }
        for i in range(10)
    ]


def sized(sizes=(0.1,), controls=True) -> list[dict]:
    """large, bulk and small of each size, with the controls."""
    regions = []
    for size in sizes:
        for kind, start in (("large", 0.0), ("bulk", 0.5 - size / 2), ("small", 1 - size)):
            regions.append(
                {
                    "region": f"{kind} {size:g}",
                    "region_by": "fraction",
                    "region_kind": kind,
                    "fraction_start": start,
                    "fraction_stop": start + size,
                }
            )
        if controls:
            label = f"random (small {size:g}) seed 0"
            regions.append({"region": label, "region_by": "control", "region_kind": "random", "region_seed": 0})
    return regions + [{"region": "none", "region_by": "control", "region_kind": "none"}] * controls


def targets(kind: str, n_blocks: int, layers=LAYERS) -> list[dict]:
    if kind == "matrix":
        return [
            {"target": f"{b}.{t}", "target_kind": kind, "block": b, "layer_type": t}
            for b in range(n_blocks)
            for t in layers
        ]
    if kind == "type":
        return [{"target": t, "target_kind": kind, "block": None, "layer_type": t} for t in layers]
    if kind == "block":
        return [{"target": f"block {b}", "target_kind": kind, "block": b, "layer_type": None} for b in range(n_blocks)]
    return [{"target": "all", "target_kind": kind, "block": None, "layer_type": None}]


def study_rows(
    targets: list[dict], regions: list[dict], metrics=(("token_perplexity", False),), task="text", spread=1.0, seed=0
) -> list[dict]:
    """Rows of a baseline and of every target x region: the larger the removed values, the worse."""
    import numpy as np

    rng = np.random.default_rng(seed)
    baseline = {"target": "baseline", "target_kind": "baseline", "block": None, "layer_type": None, "region": "none"}
    rows = []
    for metric, higher in metrics:
        start = 0.6 if higher else 20.0
        shared = {"task": task, "higher_is_better": higher}
        rows.append(metric_row(f"{task}-baseline", metric, **shared, **baseline, value=start, stderr=start / 50))
        for i, target in enumerate(targets):
            for j, region in enumerate(regions):
                where = region.get("fraction_start")
                damage = 0.02 if where is None else np.exp(-4 * where) - 0.05
                damage = 0.0 if region["region"] == "none" else damage
                damage *= np.exp(spread * rng.normal()) * (0.5 if higher else 8.0)
                value = min(start - min(damage, 0.55), 1.0) if higher else max(start + damage, 15.0)
                rows.append(
                    metric_row(
                        f"{task}-{i}-{j}",
                        metric,
                        **shared,
                        **target,
                        **region,
                        value=value,
                        stderr=start / 50,
                        baseline=start,
                        delta=value - start,
                        delta_stderr=start / 200,
                        p_value=float(np.exp(-abs(value - start) * 200 / start)),
                    )  # fmt: skip
                )
    return rows


def write_rows(folder, rows: list[dict]) -> None:
    """The rows as one merged part: a study without the time that writing its cells takes."""
    import pyarrow as pa

    from harness.tables.identity import Part
    from harness.tables.parts import open_writer

    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    part = Part(folder / "metrics" / "merged-0.parquet", TABLES, "metrics", RUN)
    with open_writer(part.path, part) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=TABLES.arrow_schema("metrics")))
