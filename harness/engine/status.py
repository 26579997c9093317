"""The status of a run: which of its units are done, running, pending, failed or missing.

This is known from its manifest, the names of the files in its tables, the records of its shards, and squeue if there is
one.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.engine.manifest import Manifest, reading
from harness.engine.measurement import Measurement
from harness.engine.slurm import LiveShard, live_shards
from harness.engine.submission import Record, read_record, submission_folder, submission_names, submissions
from harness.errors import InputError, printable
from harness.tables.failures import last_line
from harness.tables.labels import region_words
from harness.tables.store import CorruptPart, read_table, states_and_damage

WORDS = ("done", "running", "pending", "failed", "missing")
SHOWN_SHARDS = 40
SHOWN_FAILURES = 10


@dataclass(frozen=True)
class ShardStatus:
    """One shard of a submission.

    state: done, running, pending, stopped (it ended and left units undone) or lost (its job is gone, and its record
    does not say that it ended).
    """

    submission: str
    index: int
    state: str
    units: list[str]
    record: Record | None
    live: LiveShard | None


Live = dict[tuple[str, int], LiveShard]


def live_by_shard(folder: Path) -> Live | None:
    """Return the shards of the folder that are in Slurm's queue, or None if squeue does not answer."""
    if shutil.which("squeue") is None:
        return None
    try:
        return {(one.submission, one.index): one for one in live_shards(folder)}
    except InputError:
        return None


def shard_statuses(
    folder: Path, manifest: Manifest, states: Mapping[str, str], live: Live | None
) -> list[ShardStatus]:
    """Return every shard of every submission, the oldest first.

    If `live` is None, the records of the shards tell their states.
    """
    statuses = []
    for submission in submissions(folder):
        for index, positions in enumerate(submission.shards):
            with reading(submission_folder(folder, submission.name) / "plan.json", "the list of shards"):
                units = [manifest.units[position][0] for position in positions]
            record = read_record(folder, submission.name, index)
            one = None if live is None else live.get((submission.name, index))
            if one is not None:
                state = "pending" if one.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD") else "running"
            elif all(unit in states for unit in units):
                state = "done"
            else:
                state = _state_of_undone(record, slurm_answers=live is not None)
            statuses.append(ShardStatus(submission.name, index, state, units, record, one))
    return statuses


def _state_of_undone(record: Record | None, slurm_answers: bool) -> str:
    """Return the state of a shard that left units undone and is not known to be in Slurm's queue."""
    if slurm_answers:
        return "lost" if record is None or record.ended in (None, "preempted", "time limit") else "stopped"
    if record is None:
        return "pending"
    return "running" if record.ended is None else "stopped"


def describe_status(
    measurement: Measurement, folder: str | os.PathLike, manifest: Manifest, failed: bool = False
) -> str:
    """Return the text for the terminal. failed: whether it has the traceback of every failed unit.

    Raises SchemaVersionError.
    """
    folder = Path(folder)
    states, bad = states_and_damage(folder, measurement.tables)
    submitted = bool(submission_names(folder))
    live = live_by_shard(folder) if submitted else None
    shards = shard_statuses(folder, manifest, states, live)
    words = _words(manifest, states, shards)
    count = Counter(words.values())
    lines = [f"{manifest.kind} {manifest.id}  {manifest.title}", f"units {len(words)}  {_counts(count, bool(shards))}"]
    of_part: dict[str, Counter[str]] = {}
    for unit, part in manifest.units:
        of_part.setdefault(part, Counter())[words[unit]] += 1
    lines += [f"  {part}: {_counts(of_this, bool(shards))}" for part, of_this in of_part.items()]
    if submitted and live is None:
        lines.append("squeue does not answer: what runs and what is pending is what the shards wrote of themselves")
    lines += _shard_lines(shards, states)
    if count["failed"]:
        broken = [unit for unit, word in words.items() if word == "failed"]
        lines += _errors(measurement, folder, broken, failed)
    lines += _bad_lines(bad)
    if count["missing"] or count["failed"]:
        hint = " (cluster.retry_failed=true: failed units too)" if shards else ""
        command = "harness submit command" if shards else "command"
        lines.append(f"give the same {command} again{hint}: it does only what is not done")
    return "\n".join(map(printable, lines))


def _words(manifest: Manifest, states: Mapping[str, str], shards: list[ShardStatus]) -> dict[str, str]:
    word = {"ok": "done", "error": "failed"}
    words = {unit: word.get(states.get(unit, ""), "missing") for unit, _ in manifest.units}
    for shard in shards:
        if shard.state in ("running", "pending"):
            words.update((unit, shard.state) for unit in shard.units if words[unit] == "missing")
    return words


def _counts(count: Counter[str], submitted: bool) -> str:
    words = WORDS if submitted else [word for word in WORDS if word not in ("running", "pending")]
    return "  ".join(f"{word} {count[word]}" for word in words)


def _shard_lines(shards: list[ShardStatus], states: Mapping[str, str]) -> list[str]:
    if not shards:
        return []
    count = Counter(shard.state for shard in shards)
    lines = [f"shards {len(shards)}  " + "  ".join(f"{word} {n}" for word, n in count.items())]
    # of a shard that a later submission made up for, nothing is left to say
    open_shards = [shard for shard in shards if shard.state in ("running", "pending")
                   or any(states.get(unit) != "ok" for unit in shard.units)]
    for shard in open_shards[:SHOWN_SHARDS]:
        done = sum(states.get(unit) == "ok" for unit in shard.units)
        broken = sum(states.get(unit) == "error" for unit in shard.units)
        parts = [f"  {shard.submission} shard {shard.index}: {shard.state}, {done} of {len(shard.units)} units done"]
        if broken:
            parts.append(f"{broken} failed")
        if shard.live is not None:
            parts.append(f"job {shard.live.job}" + (f" ({shard.live.reason})" if shard.state == "pending" else ""))
        if shard.record is not None:
            parts.append(f"on {shard.record.host}, started {shard.record.starts} times" if shard.record.starts > 1
                         else f"on {shard.record.host}")
            if shard.record.ended not in (None, "done") and shard.live is None:
                parts.append(str(shard.record.ended))
            parts.append(f"log {shard.record.log}")
        lines.append(", ".join(parts))
    if len(open_shards) > SHOWN_SHARDS:
        lines.append(f"  and {len(open_shards) - SHOWN_SHARDS} more")
    return lines


def _bad_lines(bad: list[CorruptPart]) -> list[str]:
    if not bad:
        return []
    what = f"{bad[0].path} is not used: {bad[0].reason}"
    return [what if len(bad) == 1 else f"{what}; nor are {len(bad) - 1} other files"]


def _errors(measurement: Measurement, folder: Path, broken: list[str], whole: bool) -> list[str]:
    shown, tables = broken if whole else broken[:SHOWN_FAILURES], measurement.tables
    rows = read_table(folder, tables, tables.primary.name, units=shown)
    lines = ["failed units:"]
    for row in rows.drop_duplicates(tables.key).to_dict("records"):
        label = " | ".join(region_words(row[column]) if column == "region" else row[column] for column in tables.label
                           if isinstance(row[column], str))
        lines.append(f"  {row[tables.key]}  {label}: {last_line(row['error'])}")
        if whole:
            lines += [f"    {line}" for line in (row["error"] or "").rstrip().splitlines()]
    if len(shown) < len(broken):
        more = len(broken) - len(shown)
        lines.append(f"  and {more} more; harness status {folder} --failed shows all, with tracebacks")
    return lines
