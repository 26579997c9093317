"""What 100,000 cells cost beside their arithmetic: plan, freeze, write, status, report, compact.

    python experiments/scaling/cells.py [--blocks 48] [--folder /tmp/scaling]

The study is planned for a random 48-block model by the command line. Its rows are made up. Some are written as a run
writes them, by the store's writer, one file per cell and table (a run merges these when there are more than 1,000); the
others lie in merged parts. Every command is a process of its own, imports included.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.engine.manifest import MANIFEST, Manifest, read_manifest
from harness.measurements.ablation.cells import Cell
from harness.measurements.ablation.tables import TABLES
from harness.measurements.ablation.units import frozen_cells
from harness.spectral.regions import Decile
from harness.tables.identity import MERGED_PREFIX, Part, units_file
from harness.tables.parts import MERGED_LIST, label_units, open_writer
from harness.tables.store import write_unit

HERE = Path(__file__).parent
TASKS = {f"window_{n}": n for n in range(16, 61, 3)}  # 15 tasks
EXAMPLES = 8


def make_model(folder: Path, blocks: int) -> None:
    """A random Llama of `blocks` blocks of 7 matrices, with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(folder)


def overrides(work: Path) -> list[str]:
    """Every decile of every matrix, and a random one of the same size, on every task."""
    text = work / "text.txt"
    text.write_text(" ".join(f"w{i % 97}" for i in range(64 * EXAMPLES)))
    return [
        "model=pretrained", f"model.name={work / 'model'}", "target=matrix", "region=decile",
        "region.controls=[none,random]", "region.random_seeds=[0,1,2,3,4]", "~task", f"output={work / 'study'}",
        *(f"+tasks.{name}={{kind: text, data_files: {text}, window: {window}}}" for name, window in TASKS.items()),
    ]


def rows_of(manifest: Manifest, cell: Cell, rng: np.random.Generator) -> tuple[dict, dict]:
    """Made-up rows of one cell for both tables, as a run would write them."""
    target, region, scores = cell.ablation.target, cell.ablation.region, rng.normal(3, 1, EXAMPLES)
    start, stop = (region.start, region.stop) if isinstance(region, Decile) else (None, None)
    row = {
        **TABLES["metrics"].blank(), "study_id": manifest.id, "cell_id": cell.id, "task": cell.task,
        "metric": "perplexity", "status": "ok", "value": float(np.exp(scores.mean())), "stderr": 0.1,
        "n": EXAMPLES, "model": "random", "target": target.label, "target_kind": target.kind, "block": target.block,
        "layer_type": target.layer_type, "n_matrices": len(target.matrices), "higher_is_better": False,
        "region": region.label, "region_by": region.by, "region_kind": region.kind, "fraction_start": start,
        "fraction_stop": stop, "region_seed": getattr(region, "seed", None), "seconds": 0.1, "dtype": "float32",
        "edit": "weight",
        "settings": '{"attn_implementation": null, "dtype": "float32", "numbers_version": 1}',
    }
    if not cell.is_baseline:
        row |= {"baseline": 20.0, "delta": row["value"] - 20.0, "delta_stderr": 0.1, "p_value": 0.5}
    examples = {
        "study_id": manifest.id, "cell_id": cell.id, "task": cell.task, "metric": "perplexity",
        "example_id": [f"window-{i}" for i in range(EXAMPLES)], "score": scores, "weight": np.ones(EXAMPLES),
        "cluster": None,
    }
    return row, examples


def write_loose(folder: Path, manifest: Manifest, cells: Sequence[Cell]) -> tuple[float, float]:
    """One file per cell and table, by the store's writer; returns wall and processor seconds per cell."""
    rng = np.random.default_rng(0)
    started, before = time.perf_counter(), time.process_time()
    for cell in cells:
        row, examples = rows_of(manifest, cell, rng)
        write_unit(folder, TABLES, cell.id, {"metrics": [row], "examples": examples}, manifest.id)
    return (time.perf_counter() - started) / len(cells), (time.process_time() - before) / len(cells)


def write_merged(folder: Path, manifest: Manifest, cells: Sequence[Cell]) -> None:
    """One part per table, as `harness compact` leaves them."""
    import pyarrow as pa

    rng, columns = np.random.default_rng(1), {table: {} for table in TABLES.names()}
    for cell in sorted(cells, key=lambda cell: cell.id):
        row, examples = rows_of(manifest, cell, rng)
        for name, value in row.items():
            columns["metrics"].setdefault(name, []).append(value)
        for name, value in examples.items():
            single = value is None or isinstance(value, str)
            columns["examples"].setdefault(name, []).extend([value] * EXAMPLES if single else value)
    for table, content in columns.items():
        part = folder / table / f"{MERGED_PREFIX}0.parquet"
        with open_writer(part, Part(part, TABLES, table, manifest.id)) as writer:
            writer.write_table(pa.Table.from_pydict(content, schema=TABLES.arrow_schema(table)),
                               row_group_size=200_000)
            label_units(writer, [cell.id for cell in cells])
        units_file(part).write_text("\n".join(sorted(cell.id for cell in cells)))
        (folder / table / MERGED_LIST).write_text(part.name)


def timed(*arguments: str, code: Path | None = None) -> tuple[float, float]:
    """Wall seconds, and seconds of processor time, which say more on a machine that others use too.

    code: the folder of another version of the harness that runs the command.
    """
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "harness", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if code is None else {"PYTHONPATH": str(code)})
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--loose", type=int, default=1000, help="cells in files of their own; the others are merged")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scaling"))
    parser.add_argument("--out", type=Path, default=HERE / "cells.csv")
    arguments = parser.parse_args()
    work = arguments.folder
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_model(work / "model", arguments.blocks)
    settings, study = overrides(work), work / "study"
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cells", "step", "seconds", "processor_seconds"])

        def note(step: str, seconds: tuple[float, float]) -> None:
            row = [len(read_manifest(study).units) if (study / MANIFEST).exists() else "", step,
                   *(f"{one:.4g}" for one in seconds)]
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)

        note("plan --freeze", timed("plan", "--freeze", *settings))
        note("plan", timed("plan", *settings))
        manifest = read_manifest(study)
        cells = frozen_cells(study, manifest.content)
        loose, merged = cells[: arguments.loose], cells[arguments.loose :]
        note(f"write {len(loose)} cells, per cell", write_loose(study, manifest, loose))
        if merged:
            write_merged(study, manifest, merged)
        note(f"status, {len(loose)} cells in files of their own", timed("status", str(study)))
        note(f"report, {len(loose)} cells in files of their own", timed("report", str(study)))
        note(f"compact {len(loose)} cells", timed("compact", str(study)))
        note("status, all merged", timed("status", str(study)))
        note("report, all merged", timed("report", str(study)))
        note("run with nothing missing: every part read whole", timed("run", "--quiet", *settings))


if __name__ == "__main__":
    main()
