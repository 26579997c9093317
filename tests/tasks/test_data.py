"""Reading rows: every format gives the same rows, and every mistake is one line that names the key."""

import csv
import json

import pytest

from harness.errors import InputError
from harness.tasks.data import DataSource, digest

ROWS = [
    {"prompt": "Anna and Ben, \"friends\",", "answer": "Ben"},
    {"prompt": "première\nligne \u2028 🎉", "answer": "deux"},
    {"prompt": " x ", "answer": ""},
]


def _write(path):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pandas

        pandas.DataFrame(ROWS).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = _write(tmp_path / f"data{suffix}")
    assert DataSource(path).rows("tasks.t", ["prompt", "answer"]) == ROWS


def test_a_text_file_is_one_row_untouched(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("One\r\n\r\nTwo é\n".encode())
    assert DataSource(str(path)).rows("tasks.t", ["text"]) == [{"text": "One\r\n\r\nTwo é\n"}]


def test_a_field_longer_than_csvs_default_limit(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    assert len(DataSource(str(path)).rows("tasks.t")[0]["text"]) == 200_000
    assert csv.field_size_limit() == 131_072


def test_a_hub_name_may_be_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set" / "test.jsonl")
    assert DataSource(dataset=str(tmp_path / "set")).rows("tasks.t", ["answer"]) == ROWS


def test_a_hub_out_of_reach_says_what_to_do():
    with pytest.raises(InputError, match=r"^tasks\.t\.dataset: .*someone/nothing.* set tasks\.t\.data_files") as raised:
        DataSource(dataset="someone/nothing-of-this-name").rows("tasks.t")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, r"^tasks\.t\.data_files: no such file .*a\.jsonl$"),
        ("a.xml", b"<a/>", r"^tasks\.t\.data_files: .*a\.xml has none of the known suffixes \.jsonl \.json"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', r"a\.jsonl line 2 is not a JSON object"),
        ("a.json", b'{"prompt": "x"}', r"must hold a list of objects"),
        ("a.json", b"[{]", r"a\.json is not JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"not UTF-8"),
        ("a.parquet", b"nothing of the kind", r"^tasks\.t\.data_files: cannot read .*a\.parquet"),
        ("a.jsonl", b"\n", r"holds no rows"),
        ("a.txt", b"", r"holds no rows"),
        ("a.jsonl", b'{"prompt": "x", "answer": "y"}\n{"question": "x", "topic": 1}',
         r"no column 'prompt' in row 1; its columns are question, topic$"),
        ("a.jsonl", b'{"prompt": null}', r"column 'prompt' of row 0 is not text but NoneType$"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        DataSource(str(path)).rows("tasks.t", ["prompt"])
    assert "\n" not in str(raised.value)


def test_other_mistakes(tmp_path):
    with pytest.raises(InputError, match=r"^tasks\.t: set data_files to a local file"):
        DataSource().rows("tasks.t")
    with pytest.raises(InputError, match=r"^tasks\.t\.data_files: .* is a folder"):
        DataSource(str(tmp_path)).rows("tasks.t")


def test_names_and_digests():
    assert DataSource("/some/where/test.jsonl").name == "test.jsonl"
    assert DataSource(dataset="a/set", dataset_config="raw").name == "a/set/raw:test"
    assert digest(["ab", "c"]) != digest(["a", "bc"]) != digest(["abc"])
    assert digest(["ab", "c"]) == digest(iter(["ab", "c"]))
    assert len(digest([])) == 16
