"""What the report of 100,000 cells costs when 5,000 of them lie in files of their own, with this code and with another.

    python experiments/scaling/loose.py --other CHECKOUT [--rounds 2] [--folder /tmp/loose]

CHECKOUT is a folder with another version of the harness, for example of `git worktree add CHECKOUT ba62ed9`. The study
is that of cells.py. Its loose files are there twice: as this version writes them, with the copy of their rows
(harness/tables/row_copy.py), and without it, as versions before wrote them. The reports run one after the other in
turns, each in a process of its own, imports included: with figures to draw, and once again when these still hold.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from pathlib import Path
from unittest import mock

from cells import make_model, overrides, timed, write_loose, write_merged

from harness.engine.manifest import MANIFEST, read_manifest
from harness.measurements.ablation.tables import TABLES
from harness.measurements.ablation.units import frozen_cells
from harness.tables import parts

HERE = Path(__file__).resolve().parent


def build(work: Path, blocks: int, n_loose: int) -> dict[str, Path]:
    """Return the study with and without copies in its loose files, whose merged parts are the same files."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_model(work / "model", blocks)
    timed("plan", "--freeze", *overrides(work))
    study, without = work / "study", work / "without"
    manifest = read_manifest(study)
    cells = frozen_cells(study, manifest.content)
    without.mkdir()
    shutil.copy(study / MANIFEST, without / MANIFEST)
    write_loose(study, manifest, cells[:n_loose])
    with mock.patch.object(parts, "copied", lambda content: {}):
        write_loose(without, manifest, cells[:n_loose])
    write_merged(study, manifest, cells[n_loose:])
    for table in TABLES.names():
        for path in (study / table).glob("*merged*"):
            os.link(path, without / table / path.name)
    return {"with": study, "without": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="a folder with another version of the harness")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--loose", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loose"))
    parser.add_argument("--out", type=Path, default=HERE / "loose.csv")
    arguments = parser.parse_args()
    studies = build(arguments.folder.resolve(), arguments.blocks, arguments.loose)
    cases = [("other", arguments.other.resolve(), "without"), ("this", HERE.parents[1], "without"),
             ("this", HERE.parents[1], "with")]
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "code", "copies", "figures", "load", "seconds", "processor_seconds"])
        for turn in range(arguments.rounds):
            for name, code, copies in cases:
                shutil.rmtree(studies[copies] / "report", ignore_errors=True)
                for figures in ("drawn", "kept"):
                    load = f"{os.getloadavg()[0]:.1f}"
                    seconds = timed("report", str(studies[copies]), code=code)
                    row = [turn, name, copies, figures, load, *(f"{one:.1f}" for one in seconds)]
                    writer.writerow(row)
                    file.flush()
                    print(*row, flush=True)


if __name__ == "__main__":
    main()
