"""Rows of a data set: from a local file by its suffix, or from the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def rows(
    key: str,
    *,
    data_files: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "test",
    columns: Sequence[str] = (),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a data set in file order, the first `limit` of them.

    key: where in the settings the data was asked for, e.g. "tasks.wikitext"; messages begin with it.
    data_files: a local file, used in preference to `dataset` (.jsonl .json .csv .parquet; .txt is one row whose
        "text" is the whole file, line ends untouched).
    dataset, dataset_config, split: arguments of `datasets.load_dataset`.
    columns: names that every row must have, with a string in each.

    Raises InputError: neither source given, file missing or unreadable, hub out of reach, column missing or not text,
    no rows, limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{key}.limit: must be at least 1 or null, not {limit}")
    if data_files is not None:
        found, source = _from_file(key, data_files), f"{key}.data_files: {data_files}"
    elif dataset is not None:
        found, source = _from_hub(key, dataset, dataset_config, split), f"{key}.dataset: {dataset}"
    else:
        raise InputError(f"{key}: set data_files to a local file ({' '.join(SUFFIXES)}) or dataset to a hub name")
    found = found[:limit]
    if not found:
        raise InputError(f"{source} holds no rows")
    _check_columns(source, found, columns)
    return found


def source_name(data_files: str | None, dataset: str | None, split: str, dataset_config: str | None = None) -> str:
    """How a protocol names its data: the file's name without its folder, or "dataset/config:split"."""
    if data_files is not None:
        return Path(data_files).name
    return f"{dataset}{'/' + dataset_config if dataset_config else ''}:{split}"


def digest(texts: Iterable[str]) -> str:
    """BLAKE2b of a sequence of strings, 16 hexadecimal digits; moves when a string or a boundary between two moves."""
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def hub_error(key: str, name: str, error: Exception) -> InputError:
    """The one message for the dozen kinds of exception that the hub's client raises."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"{key}.dataset: cannot load {name}: {reason} (offline? set {key}.data_files to a local copy)")


def _from_file(key: str, data_files: str) -> list[dict[str, Any]]:
    path = Path(data_files).expanduser()
    where = f"{key}.data_files"
    if path.is_dir():
        raise InputError(f"{where}: {data_files} is a folder; name one file ({' '.join(SUFFIXES)})")
    if not path.is_file():
        raise InputError(f"{where}: no such file {data_files}")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
    if path.suffix not in readers:
        raise InputError(f"{where}: {data_files} has none of the known suffixes {' '.join(SUFFIXES)}")
    try:
        return readers[path.suffix](where, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {data_files} is not UTF-8 (byte {error.start})") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{where}: cannot read {data_files}: {error}") from error


def _jsonl(where: str, path: Path) -> list[dict[str, Any]]:
    found = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: {path} line {number} is not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: {path} line {number} is not a JSON object")
            found.append(row)
    return found


def _json(where: str, path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: {path} is not JSON: {error.msg} in line {error.lineno}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise InputError(f"{where}: {path} must hold a list of objects (one object per line is .jsonl)")
    return found


def _csv(where: str, path: Path) -> list[dict[str, Any]]:
    # the default limit of 131072 characters is less than a book in one field
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    finally:
        csv.field_size_limit(limit)


def _parquet(where: str, path: Path) -> list[dict[str, Any]]:
    try:
        import pandas

        return pandas.read_parquet(path).to_dict("records")
    except ImportError as error:
        raise InputError(f"{where}: reading {path} needs pandas and pyarrow: {error}") from error
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{where}: cannot read {path}: {error}") from error


def _txt(where: str, path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    return [{"text": text}] if text else []


def _from_hub(key: str, dataset: str, dataset_config: str | None, split: str) -> list[dict[str, Any]]:
    try:
        import datasets

        return list(datasets.load_dataset(dataset, dataset_config, split=split))
    except Exception as error:
        raise hub_error(key, source_name(None, dataset, split, dataset_config), error) from error


def _check_columns(source: str, found: list[dict[str, Any]], columns: Sequence[str]) -> None:
    for number, row in enumerate(found):
        for column in columns:
            if column not in row:
                there = ", ".join(map(str, row))
                raise InputError(f"{source} has no column {column!r} in row {number}; its columns are {there}")
            if not isinstance(row[column], str):
                kind = type(row[column]).__name__
                raise InputError(f"{source}: column {column!r} of row {number} is not text but {kind}")
