"""Push a run as a data set: its tables, its manifest and its report, with a card that says how to read them."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from harness import __version__
from harness.engine.hub import Repository, push, write_card
from harness.engine.manifest import MANIFEST, Manifest, read_in_order, read_manifest
from harness.errors import InputError
from harness.files import told_in_one_line
from harness.tables.store import unit_states
from harness.tables.text import count, markdown_text

if TYPE_CHECKING:
    from harness.engine.measurement import Measurement

REPORT = "report"


def push_run(measurement: Measurement, folder: Path, repository: Repository) -> str:
    """Upload the rows of the units of a run that are done, and return the address of the data set.

    Each table becomes one parquet file in the order of the run. The run may go on meanwhile. Raises InputError if no
    unit is done, or if the hub refuses.
    """
    manifest = read_manifest(folder)
    with told_in_one_line(folder), tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        states = list(unit_states(folder, measurement.tables).values())
        if not states:
            raise InputError(f"{folder}: nothing has been measured yet, so there is nothing to push")
        rows = {}
        for name in measurement.tables.names():
            table = read_in_order(folder, measurement.tables, name)
            if len(table):
                table.to_parquet(work / f"{name}.parquet", index=False)
                rows[name] = len(table)
        shutil.copyfile(folder / MANIFEST, work / MANIFEST)
        if (folder / REPORT).is_dir():
            shutil.copytree(folder / REPORT, work / REPORT)
        write_card(work, *card_of(measurement, manifest, rows, states, repository.name))
        return push(repository, work, f"{measurement.name} {manifest.id}")


def card_of(
    measurement: Measurement, manifest: Manifest, rows: dict[str, int], states: list[str], name: str
) -> tuple[str, str]:
    """Return the card of a run: YAML for the hub, and Markdown.

    rows: table -> number of rows. states: "ok" or "error", one for each unit that is done. name: that of the data set.
    """
    configs = [{"config_name": table, "data_files": f"{table}.parquet", **({"default": True} if not i else {})}
               for i, table in enumerate(rows)]
    tags = ["spectral-ablation-harness", measurement.name, "singular-value-decomposition"]
    first = next(iter(rows))
    failed, missing = states.count("error"), len(manifest.units) - len(states)
    lines = [
        f"# {markdown_text(manifest.title)}: {measurement.name} {manifest.id}", "",
        f"{count(len(manifest.units), 'unit')}: {states.count('ok')} done, {failed} failed, {missing} missing."
        f" Measured with the spectral ablation harness; pushed with its version {__version__}.", "",
        "| table | rows |", "|---|--:|", *(f"| `{table}` | {n} |" for table, n in rows.items()), "",
        "Rows are in the order of the run. A row whose `status` is `error` has no value, and its `error` says why. The"
        " columns are described in docs/tables.md of the harness.", "",
        "    from datasets import load_dataset",
        f"    {first} = load_dataset(\"{name}\", \"{first}\", split=\"train\").to_pandas()", "",
        f"`{MANIFEST}` has the settings, with the paths of the machine that measured. `{REPORT}/` has the report, if"
        " one was made; `index.html` in it is a page that opens offline.",
    ]
    return f"configs: {json.dumps(configs)}\ntags: {json.dumps(tags)}", "\n".join(lines)
