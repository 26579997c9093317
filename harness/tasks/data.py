"""Read the rows of a data set, from a local file or from the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputError

# What csv puts in the place of the fields that a row has too many or too few of.
_MORE, _FEWER = "\0more", "\0fewer"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class DataSource:
    """The place of a data set: a local file, or a name on the Hugging Face hub.

    data_files: a .jsonl, .json, .csv or .parquet file, or a .txt file, which is one row whose "text" is the whole file
        with its line ends unchanged. If it is given, the other three are not read.
    dataset, dataset_config, split: the arguments of `datasets.load_dataset`.
    """

    data_files: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "test"

    @property
    def name(self) -> str:
        """The name of the data in a protocol: the file without its folder, or "dataset/config:split"."""
        if self.data_files is not None:
            return Path(self.data_files).name
        return f"{self.dataset}{'/' + self.dataset_config if self.dataset_config else ''}:{self.split}"

    def rows(self, key: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the rows in file order.

        key: the place of the data in the settings, such as "tasks.wikitext"; messages begin with it.
        columns: the columns that must hold text in every row.

        Raises InputError if no source is given, a file is missing or cannot be read, the hub cannot be reached, a
        column is missing or does not hold text, or there are no rows.
        """
        if self.data_files is not None:
            found, place = _from_file(key, self.data_files), f"{key}.data_files: {self.data_files}"
        elif self.dataset is not None:
            found, place = self._from_hub(key, self.dataset), f"{key}.dataset: {self.dataset}"
        else:
            raise InputError(f"{key}: set data_files to a local file ({' '.join(SUFFIXES)}) or dataset to a hub name")
        if not found:
            raise InputError(f"{place} holds no rows")
        _check_columns(place, found, columns)
        return found

    def _from_hub(self, key: str, dataset: str) -> list[dict[str, Any]]:
        try:
            import datasets

            return list(datasets.load_dataset(dataset, self.dataset_config, split=self.split))
        except Exception as error:
            raise hub_error(key, self.name, error) from error


def refuse_empty(key: str, rows: Iterable[tuple[int, Mapping[str, Any]]], columns: Sequence[str]) -> None:
    """Raise InputError for the first row with a column that holds no text, or nothing but white space.

    A model gives such a row a score like any other. rows: pairs of a number and a row. key: begins the message.
    """
    for number, row in rows:
        for column in columns:
            if not row[column].strip():
                raise InputError(f"{key} row {number}: column {column!r} is empty; fill it in or remove the row")


def digest(texts: Iterable[str]) -> str:
    """Return 64 bits of BLAKE2b of a sequence of strings, as 16 hexadecimal digits.

    The lengths are hashed too, so that the digest changes when text moves from one string to the next.
    """
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def hub_error(key: str, name: str, error: Exception) -> InputError:
    """Return one error of one line for any of the many exceptions that the client of the hub raises."""
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
        found = readers[path.suffix](where, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {data_files} is not UTF-8 (byte {error.start})") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{where}: cannot read {data_files}: {error}") from error
    if path.suffix in (".txt", ".csv") and any("\0" in text for row in found for text in row.values()):
        raise InputError(f"{where}: {data_files} holds NUL characters, so it is not a text file")
    return found


def _jsonl(where: str, path: Path) -> list[dict[str, Any]]:
    found = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = _parsed(f"{where}: {path} line {number}", line)
            if not isinstance(row, dict):
                raise InputError(f"{where}: {path} line {number} is not a JSON object")
            found.append(row)
    return found


def _json(where: str, path: Path) -> list[dict[str, Any]]:
    found = _parsed(f"{where}: {path}", path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise InputError(f"{where}: {path} must hold a list of objects (one object per line is .jsonl)")
    return found


def _parsed(place: str, text: str) -> Any:
    """Return the value of a JSON text. Raises InputError with one line that begins with `place`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise InputError(f"{place} is not JSON: {error.msg}{line}") from error
    except RecursionError as error:
        raise InputError(f"{place}: its lists and objects are nested too deeply") from error
    except ValueError as error:  # a key that occurs twice, or more digits than Python turns into a number
        raise InputError(f"{place}: {error}") from error
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: half of a surrogate pair (\\u{ord(error.object[error.start]):x}) is not a"
                             " character; write both halves or remove it") from error
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return found


def _csv(where: str, path: Path) -> list[dict[str, Any]]:
    # One field may hold a whole book, which is longer than the default limit of 131,072 characters.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            found = csv.DictReader(lines, restkey=_MORE, restval=_FEWER, strict=True)
            rows = list(found)
    finally:
        csv.field_size_limit(limit)
    names = found.fieldnames or []
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}: {path} has two columns called {twice!r}; give each a name of its own")
    for number, row in enumerate(rows):
        if _MORE in row or _FEWER in row.values():
            than = "more" if _MORE in row else "fewer"
            raise InputError(f"{where}: {path} row {number} has {than} fields than the {len(names)} of the first line;"
                             " put texts with commas or line ends into quotes")
    return rows


def _parquet(where: str, path: Path) -> list[dict[str, Any]]:
    try:
        import pandas

        found: list[Any] = pandas.read_parquet(path).to_dict("records")
        return found
    except ImportError as error:
        raise InputError(f"{where}: reading {path} needs pandas and pyarrow: {error}") from error
    except Exception as error:  # pyarrow and pandas have many, also for a file that is cut off
        raise InputError(f"{where}: cannot read {path}: {error}") from error


def _txt(where: str, path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    return [{"text": text}] if text else []


def _check_columns(place: str, found: list[dict[str, Any]], columns: Sequence[str]) -> None:
    for number, row in enumerate(found):
        for column in columns:
            if column not in row:
                there = ", ".join(map(str, row))
                raise InputError(f"{place} has no column {column!r} in row {number}; its columns are {there}")
            if not isinstance(row[column], str):
                kind = type(row[column]).__name__
                raise InputError(f"{place}: column {column!r} of row {number} is not text but {kind}")
