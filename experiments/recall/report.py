"""Tables and figures of experiments/recall from its studies: means and standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FULL = 64  # the rank of every matrix
KEPT = (0, 1, 2, 4, 6, 12, FULL)
SETTING = ["feed_forward", "noise", "n_triggers"]
KEY = [*SETTING, "step", "matrix", "rank"]
FEED_FORWARD = ("0.up_proj", "0.down_proj", "1.up_proj", "1.down_proj")
ATTENTION = tuple(f"{block}.{name}_proj" for block in (0, 1) for name in ("k", "v", "o"))


def load(jobs: Sequence, studies: Path):
    """One row per job, matrix and kept rank, a column per metric; rank 64 of matrix "none" is the whole model.

    Studies that are not complete are left out.
    """
    import pandas as pd

    from harness.engine.manifest import MANIFEST, read_manifest
    from harness.measurements.ablation.tables import cell_states, read_metrics

    frames = []
    for job in jobs:
        folder = studies / job.folder
        if not (folder / MANIFEST).is_file() or len(cell_states(folder)) < len(read_manifest(folder).units):
            continue
        metrics = read_metrics(folder)
        metrics = metrics[(metrics.status == "ok") & metrics.target_kind.isin(["matrix", "baseline"])].copy()
        metrics["matrix"] = metrics.target.where(metrics.target_kind == "matrix", "none")
        metrics["rank"] = (metrics.n_values - metrics.n_removed).fillna(FULL).astype(int)
        metrics.loc[metrics.matrix == "none", "rank"] = FULL
        wide = metrics.pivot(index=["matrix", "rank"], columns="metric", values="value").reset_index()
        for key in ("noise", "n_triggers", "feed_forward", "seed"):
            wide[key] = getattr(job, key)
        wide["step"] = job.checkpoint
        frames.append(wide)
    return pd.concat(frames, ignore_index=True)


def over_seeds(rows):
    """Mean, standard deviation over seeds and their number, for every metric."""
    metrics = [column for column in rows.columns if column not in (*KEY, "seed")]
    table = rows.groupby(KEY)[metrics].agg(["mean", "std"])
    table.columns = [f"{metric}_{statistic}" for metric, statistic in table.columns]
    table.insert(0, "n_seeds", rows.groupby(KEY).size())
    return table.reset_index()


def gains(rows, step: int):
    """Per setting, matrix and kept rank after `step`: truncated minus whole model, paired by seed."""
    at = rows[rows.step == step]
    whole = at[at.matrix == "none"].set_index([*SETTING, "seed"])
    truncated = at[at.matrix != "none"].set_index([*SETTING, "seed"])
    metrics = ["accuracy_clean", "accuracy_noisy", "p_target", "p_noise", "cross_entropy", "cross_entropy_noisy"]
    difference = truncated[metrics] - whole[metrics].reindex(truncated.index)
    difference[["matrix", "rank"]] = truncated[["matrix", "rank"]]
    groups = difference.reset_index().groupby([*SETTING, "matrix", "rank"])
    table = groups[metrics].agg(["mean", "std"])
    table.columns = [f"{metric}_{statistic}" for metric, statistic in table.columns]
    table["seeds_accuracy_better"] = groups["accuracy_clean"].apply(lambda d: int((d > 0).sum()))
    table["seeds_cross_entropy_better"] = groups["cross_entropy"].apply(lambda d: int((d < 0).sum()))
    table["n_seeds"] = groups.size()
    return table.reset_index()


def _cell(table, metric: str, **where) -> str:
    for key, value in where.items():
        table = table[table[key] == value]
    if table.empty:
        return ""
    mean, std = table[f"{metric}_mean"].iloc[0], table[f"{metric}_std"].iloc[0]
    return "" if mean != mean else f"{mean:.3f}" if std != std else f"{mean:.3f} ± {std:.3f}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def tables(rows, summary, last: int) -> str:
    """The tables of this experiment as Markdown."""
    default = {"feed_forward": "mlp", "noise": 0.5, "n_triggers": 1}
    parts = ["Mean ± standard deviation over seeds. Rank 64 is the whole model.\n"]
    for metric, what in (
        ("accuracy_clean", "Clean accuracy"), ("p_target", "p(target), clean"), ("p_noise", "p(noise), clean"),
        ("cross_entropy", "Cross-entropy of the target, nats, clean"), ("accuracy_noisy", "Noisy accuracy"),
    ):
        parts.append(f"## {what} after {last} steps: one matrix cut to a rank\n")
        lines = [
            [matrix, *(
                _cell(summary, metric, **default, step=last, matrix="none" if rank == FULL else matrix, rank=rank)
                for rank in KEPT
            )]
            for matrix in (*FEED_FORWARD, *ATTENTION)
        ]
        parts.append(_markdown(["matrix", *map(str, KEPT)], lines) + "\n")
    parts.append("## Over training, noise 0.5: the whole model, and without one feed-forward layer\n")
    lines = [
        [step, *(_cell(summary, metric, **default, step=step, matrix=matrix, rank=rank)
                 for metric in ("accuracy_clean", "p_target", "p_noise")
                 for matrix, rank in (("none", FULL), ("0.up_proj", 0), ("1.up_proj", 0)))]
        for step in sorted(summary.step.unique())
    ]
    header = ["step", *(f"{metric} {which}" for metric in ("accuracy", "p(target)", "p(noise)")
                        for which in ("whole", "no mlp 0", "no mlp 1"))]
    parts.append(_markdown(header, lines) + "\n")
    probes = [name.removesuffix("_mean") for name in summary.columns if name.startswith(
        ("margin", "attention", "memory", "direct")) and name.endswith("_mean")]
    parts.append("## Over training, noise 0.5: probes of the whole model\n")
    steps = sorted(summary.step.unique())
    lines = [[probe, *(_cell(summary, probe, **default, step=step, matrix="none", rank=FULL) for step in steps)]
             for probe in probes]
    parts.append(_markdown(["probe", *(f"step {step}" for step in steps)], lines) + "\n")
    parts.append(f"## Probes after {last} steps with one matrix removed\n")
    lines = [[probe, *(_cell(summary, probe, **default, step=last, matrix=matrix, rank=FULL if matrix == "none" else 0)
                       for matrix in ("none", *FEED_FORWARD, *ATTENTION))] for probe in probes]
    parts.append(_markdown(["probe", "whole", *FEED_FORWARD, *ATTENTION], lines) + "\n")
    parts.append(f"## Every setting after {last} steps: the whole model and the last feed-forward layer removed\n")
    gained = gains(rows, last)
    lines = []
    for setting in _settings(summary):
        where = dict(zip(SETTING, setting))
        at = {**where, "step": last}
        removed = gained[(gained[SETTING] == list(setting)).all(axis=1) & (gained.matrix == "1.up_proj")
                         & (gained["rank"] == 0)]
        better = [""] * 2 if removed.empty else [
            f"{int(removed[f'seeds_{name}_better'].iloc[0])} of {int(removed.n_seeds.iloc[0])}"
            for name in ("accuracy", "cross_entropy")
        ]
        lines.append([
            f"{where['feed_forward']}, noise {where['noise']:g}, {where['n_triggers']} triggers",
            *(_cell(summary, metric, **at, matrix=matrix, rank=rank)
              for metric in ("accuracy_clean", "p_target", "p_noise", "cross_entropy")
              for matrix, rank in (("none", FULL), ("1.up_proj", 0))),
            *better,
        ])
    header = ["setting", *(f"{metric} {which}" for metric in ("accuracy", "p(target)", "p(noise)", "CE")
                           for which in ("whole", "no mlp 1")), "seeds: accuracy better", "seeds: CE better"]
    parts.append(_markdown(header, lines) + "\n")
    parts.append(f"## Clean accuracy after {last} steps by kept rank of the last feed-forward layer, every setting\n")
    lines = [
        [f"{kind}, noise {noise:g}, {n} triggers", matrix,
         *(_cell(summary, "accuracy_clean", feed_forward=kind, noise=noise, n_triggers=n, step=last,
                 matrix="none" if rank == FULL else matrix, rank=rank) for rank in KEPT)]
        for kind, noise, n in _settings(summary) for matrix in ("1.up_proj", "1.down_proj")
        if kind == "mlp" or kind == "linear" and matrix == "1.up_proj"
    ]
    parts.append(_markdown(["setting", "matrix", *map(str, KEPT)], lines) + "\n")
    return "\n".join(parts)


def _settings(summary) -> list[tuple]:
    found = summary[SETTING].drop_duplicates()
    order = {"mlp": 0, "linear": 1, "none": 2}
    return sorted(found.itertuples(index=False, name=None), key=lambda s: (order[s[0]], s[2], s[1]))


def _plain(summary, **where):
    for key, value in where.items():
        summary = summary[summary[key] == value]
    return summary


def draw_ranks(summary, path: Path) -> None:
    """Clean accuracy against the kept rank of each matrix, one line per checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = _plain(summary, feed_forward="mlp", noise=0.5, n_triggers=1)
    steps = sorted(data.step.unique())
    colours = plt.get_cmap("viridis")([i / max(1, len(steps) - 1) for i in range(len(steps))])
    figure, axes = plt.subplots(2, 5, figsize=(17, 6.4), sharex=True, sharey=True, layout="constrained")
    places = range(len(KEPT))
    order = [f"{block}.{name}_proj" for block in (0, 1) for name in ("k", "v", "o", "up", "down")]
    for axis, matrix in zip(axes.flat, order):
        for step, colour in zip(steps, colours):
            at = data[(data.step == step)]
            line = at[(at.matrix == matrix) | (at.matrix == "none")].sort_values("rank")
            mean, std = line.accuracy_clean_mean.to_numpy(), line.accuracy_clean_std.fillna(0).to_numpy()
            axis.plot(places, mean, "o-", ms=3, color=colour, label=f"step {step}")
            axis.fill_between(places, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
        axis.set_title(matrix)
        axis.set_xticks(list(places), ["0", "1", "2", "4", "6\n(10 %)", "12\n(20 %)", "full"])
        axis.set_ylim(-0.03, 1.03)
    for axis in axes[:, 0]:
        axis.set_ylabel("clean accuracy")
    figure.supxlabel("rank kept of the one matrix that is cut")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_sweeps(summary, last: int, path: Path) -> None:
    """Whole model against truncations of the last feed-forward layer, over noise, triggers and kinds of layers; no
    figure where the studies vary none of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = _plain(summary, step=last)
    lines = [("none", FULL, "whole model", "k"), ("1.up_proj", 0, "last mlp removed", "tab:red"),
             ("1.down_proj", 1, "1.down_proj at rank 1", "tab:orange"),
             ("1.down_proj", 6, "1.down_proj at rank 6", "tab:olive"),
             ("0.up_proj", 0, "first mlp removed", "tab:blue")]
    metrics = [("accuracy_clean", "clean accuracy"), ("p_target", "p(target), clean"),
               ("cross_entropy", "cross-entropy of the target, nats")]
    sweeps = [("noise", {"feed_forward": "mlp", "n_triggers": 1}, "noise level"),
              ("n_triggers", {"feed_forward": "mlp", "noise": 0.5}, "triggers"),
              ("feed_forward", {"noise": 0.5, "n_triggers": 1}, "feed-forward layers")]
    sweeps = [sweep for sweep in sweeps if _plain(data, **sweep[1])[sweep[0]].nunique() > 1]
    if not sweeps:
        return
    figure, axes = plt.subplots(len(metrics), len(sweeps), figsize=(4.4 * len(sweeps), 10), layout="constrained",
                                squeeze=False)
    for column, (key, where, label) in enumerate(sweeps):
        part = _plain(data, **where)
        values = sorted(part[key].unique(), key=["mlp", "linear", "none"].index if key == "feed_forward" else None)
        for row, (metric, name) in enumerate(metrics):
            axis = axes[row, column]
            for shift, (matrix, rank, line, colour) in enumerate(lines):
                chosen = part[(part.matrix == matrix) & (part["rank"] == rank)].set_index(key)
                there = [(i, value) for i, value in enumerate(values) if value in chosen.index]
                axis.errorbar(
                    [i + 0.04 * (shift - 2) for i, _ in there],
                    [chosen.loc[value, f"{metric}_mean"] for _, value in there],
                    [chosen.loc[value, f"{metric}_std"] for _, value in there],
                    fmt="o" if key == "feed_forward" else "o-", ms=4, capsize=2, color=colour, label=line,
                )
            axis.set_xticks(range(len(values)), [str(value) for value in values])
            axis.set_xlabel(label)
            if column == 0:
                axis.set_ylabel(name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_probes(summary, path: Path) -> None:
    """Probes of the whole model over training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = _plain(summary, feed_forward="mlp", noise=0.5, n_triggers=1, matrix="none").sort_values("step")
    panels = [
        ("noise margin on the trigger alone, logits", ["margin_mlp0", "margin_mlp1", "margin_mlp01"]),
        ("logit(noise) - logit(target) added by", ["direct_attn0", "direct_mlp0", "direct_attn1", "direct_mlp1"]),
        ("attention mass", ["attention_previous", "attention_target", "attention_noise"]),
        ("memory recall", ["memory_k0", "memory_k1", "memory_o1"]),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(17, 4), layout="constrained")
    for axis, (title, metrics) in zip(axes, panels):
        for metric in metrics:
            axis.errorbar(data.step, data[f"{metric}_mean"], data[f"{metric}_std"], fmt="o-", ms=3, capsize=2,
                          label=metric)
        if "logit" in title:
            axis.axhline(0, color="k", lw=0.6)
        axis.set(title=title, xlabel="training step")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_report(jobs: Sequence, studies: Path, output: Path) -> None:
    """summary.csv, gains.csv, tables.md and the figures, into `output`."""
    rows = load(jobs, studies)
    last = max(job.checkpoint for job in jobs)
    summary = over_seeds(rows)
    summary.to_csv(output / "summary.csv", index=False, float_format="%.4g")
    gains(rows, last).to_csv(output / "gains.csv", index=False, float_format="%.4g")
    (output / "tables.md").write_text("# Recall: measured\n\n" + tables(rows, summary, last))
    draw_ranks(summary, output / "accuracy_against_rank.png")
    draw_sweeps(summary, last, output / "sweeps.png")
    draw_probes(summary, output / "probes.png")
