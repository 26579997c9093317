"""Manifests that were edited by hand: every command refuses them in one line, or goes on; none calls a unit done."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.engine.manifest import MANIFEST, checksum_of
from tests.hostile.folders import UNITS, complaint, make_study, manifest_of, write_manifest

FOLDER_COMMANDS = ("status", "report", "compact", "work")
GOOD = manifest_of()
DEEP = "[" * 100_000 + "]" * 100_000


def changed(**keys) -> dict:
    return {**GOOD, **keys}


def resealed(**keys) -> dict:
    """With a checksum that fits, as if another program had written it."""
    return {**changed(**keys), "checksum": checksum_of(changed(**keys))}


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


# what the manifest is -> what the line says
CASES = {
    "empty": ("", "not readable as JSON"),
    "cut": (json.dumps(GOOD)[:-7], "not readable as JSON"),
    "a list": ([], "not a manifest, without manifest_version"),
    "a number": (3, "not a manifest, without"),
    "null": ("null", "not a manifest, without"),
    "a text": ('"manifest"', "not a manifest, without"),
    "nested too deeply": (DEEP, "nested too deeply"),
    "settings nested too deeply": (resealed(settings=json.loads("[" * 300 + "]" * 300)), "settings is not a mapping"),
    "a setting nested too deeply": (
        resealed(settings={"model": json.loads("[" * 300 + "]" * 300)}), "nested more than 50 levels"),
    "an integer of 5000 digits": (json.dumps(GOOD).replace("[0, 0, 0]", "[" + "9" * 5000 + ", 0]", 1), "not readable"),
    "bytes that are no text": (b"\xff\xfe{}", "not readable as JSON"),
    "an earlier version": (changed(manifest_version=2), "version 2, this harness reads version 3"),
    "a version of another type": (changed(manifest_version="3"), "version '3', this harness reads"),
    **{f"no {key}": (without(key), f"not a manifest, without {key}")
       for key in ("kind", "id", "working_directory", "title", "settings", "parts", "units", "checksum")},
    **{f"{key} of another type": (resealed(**{key: 7}), f"{key} is not a text")
       for key in ("kind", "id", "working_directory", "title")},
    "a NUL in the working directory": (resealed(working_directory="/\0"), "working_directory is not a text"),
    "settings that are a list": (resealed(settings=[]), "settings is not a mapping"),
    "parts that are a text": (resealed(parts="text"), "parts is not a list of texts"),
    "parts of numbers": (resealed(parts=[1]), "parts is not a list of texts"),
    "no units": (resealed(units=[]), "units is not a list of pairs"),
    "units in a mapping": (resealed(units={"aaaa": 0}), "units is not a list of pairs"),
    "units that are texts": (resealed(units=["aaaa"]), "its units are not pairs"),
    "units of three": (resealed(units=[["aaaa", 0, 0]]), "its units are not pairs"),
    "an id that is a number": (resealed(units=[[1, 0]]), "the id of unit 0 is not letters"),
    "an id that is a path": (resealed(units=[["../aaaa", 0]]), "the id of unit 0 is not letters"),
    "an empty id": (resealed(units=[["", 0]]), "the id of unit 0 is not letters"),
    "an id with a line break": (resealed(units=[["aaaa\n", 0]]), "the id of unit 0 is not letters"),
    "an id that is there twice": (resealed(units=[["aaaa", 0], ["aaaa", 0]]), "unit aaaa is there twice"),
    "a part out of range": (resealed(units=[["aaaa", 1]]), "unit aaaa is of no part in parts"),
    "a part before the first": (resealed(units=[["aaaa", -1]]), "unit aaaa is of no part in parts"),
    "a part that is a huge number": (resealed(units=[["aaaa", 10**300]]), "unit aaaa is of no part in parts"),
    "a part that is true": (resealed(parts=["a", "b"], units=[["aaaa", True]]), "unit aaaa is of no part in parts"),
    "a unit less": (changed(units=GOOD["units"][1:]), "changed since it was frozen"),
    "a unit more": (changed(units=[*GOOD["units"], ["eeee", 0]]), "changed since it was frozen"),
    "another id": (changed(id="0123456789ab"), "changed since it was frozen"),
    "another target": (changed(targets=[{**GOOD["targets"][0], "first_block": 1}]), "changed since it was frozen"),
    "another region": (changed(regions=[{**GOOD["regions"][0], "start": 0.5}]), "changed since it was frozen"),
    "a key more": (changed(more=1), "changed since it was frozen"),
    "an unknown kind": (changed(kind="spectre"), "'spectre' is no measurement that is installed here"),
    "a kind with control characters": (changed(kind="\x1b[2J\n\ud800"), "is no measurement that is installed here"),
}
# Only what restores the cells reads these.
OF_WORK = {
    "a setting that is unknown": (resealed(settings={"warp": 9}), "settings.warp: unknown key"),
    "no cells": ({**without("cells"), "checksum": checksum_of(without("cells"))}, "the list of its cells"),
    "cells of two": (resealed(cells=[[0, 0]] * 4), "the list of its cells"),
    "fewer cells than units": (resealed(cells=[[0, 0, 0]]), "the list of its cells"),
    "a cell of no target": (resealed(cells=[[9, 0, 0]] * 4), "the list of its cells"),
    "a target without matrices": (resealed(targets=[{"kind": "all"}]), "the list of its cells"),
    "a target that is a list": (resealed(targets=[[]]), "the list of its cells"),
    "a region without a rule": (resealed(regions=[{}]), "the list of its cells"),
    "a region of an unknown rule": (resealed(regions=[{"by": "magic", "kind": "small"}]), "magic"),
    "tasks that are a list": (resealed(tasks=["text"]), "the list of its"),
    "a task without a digest": (resealed(tasks={"text": {}}), "the list of its tasks"),
}


def spoil(folder, content) -> None:
    if isinstance(content, bytes):
        (folder / MANIFEST).write_bytes(content)
    else:
        write_manifest(folder, content)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("manifests") / "study")


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
@pytest.mark.parametrize("case", CASES)
def test_an_edited_manifest_is_one_line(study, capsys, command, case):
    content, message = CASES[case]
    spoil(study, content)
    line = complaint(capsys, command, str(study))
    assert message in line and (str(study / MANIFEST) in line or "kind" in case)


@pytest.mark.parametrize("case", CASES)
def test_an_edited_manifest_is_one_line_for_export(study, capsys, tmp_path, case):
    content, message = CASES[case]
    spoil(study, content)
    line = complaint(capsys, "export", "--study", str(study), "--cell", "aaaa", f"output={tmp_path / 'out'}")
    assert message in line or "no cells" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", OF_WORK)
def test_cells_that_are_not_as_they_were_frozen(study, capsys, tmp_path, case):
    content, message = OF_WORK[case]
    base = {"settings": VALID_SETTINGS} if case != "a setting that is unknown" else {}
    content = {**content, **base}
    write_manifest(study, content)
    assert message in complaint(capsys, "work", str(study))
    if "cells" in message:
        line = complaint(capsys, "export", "--study", str(study), "--cell", "aaaa", f"output={tmp_path / 'out'}")
        assert message in line


VALID_SETTINGS: dict = {"tasks": {"recall": {"kind": "recall"}}}

PLACES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("command", [*FOLDER_COMMANDS, "run"])
@pytest.mark.parametrize("case", PLACES)
def test_something_else_in_the_place_of_the_manifest(tmp_path, capsys, command, case):
    folder = make_study(tmp_path / "study")
    (folder / MANIFEST).unlink()
    PLACES[case](folder / MANIFEST)
    words = [f"output={folder}", "target=all", "region=fraction", "--quiet"] if command == "run" else [str(folder)]
    assert f"{folder / MANIFEST}: not a file" in complaint(capsys, command, *words)


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_no_manifest(tmp_path, capsys, command):
    assert "holds nothing that harness can read" in complaint(capsys, command, str(tmp_path))
    assert "holds nothing that harness can read" in complaint(capsys, command, str(tmp_path / "nowhere"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(), max_size=9)
    | st.sampled_from(["../..", "/etc", "\0", "\ud800", "\x1b[2J", "=cmd()", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value, path=()):
    """The paths of every value inside a manifest."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


@st.composite
def mutations(draw) -> object:
    """A manifest with one to three values replaced or removed, sometimes with a checksum that fits."""
    content = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([one for one in places(content) if one]))
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        if draw(st.booleans()):
            inside[path[-1]] = draw(JSON)
        else:
            del inside[path[-1]]
        if not content:
            break
    if draw(st.booleans()) and isinstance(content, dict):
        content["checksum"] = checksum_of(content)
    return content


@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=mutations())
@pytest.mark.parametrize("command", ["status", "report", "compact", "work"])
def test_any_mutation_is_one_line_or_goes_on(tmp_path_factory, capsys, study, command, content):
    """Every unit that is called done has its own rows; what cannot be read is refused; nothing ends in a traceback."""
    capsys.readouterr()
    write_manifest(study, content)
    status = main([command, str(study)])
    printed = capsys.readouterr()
    assert status in (0, 2)
    if status == 2:
        assert printed.err.count("\n") == 1 and printed.err.startswith("harness: "), printed.err
    if command == "status" and status == 0:
        done = int(printed.out.split("done ")[1].split()[0])
        assert done <= 3 and (done == 0 or set(UNITS) >= {unit for unit, _ in content["units"]} - {"eeee"})


def test_the_manifest_of_another_study_beside_these_parts(tmp_path, capsys):
    """A manifest that is whole, and of another study: no part counts."""
    folder = make_study(tmp_path / "study")
    shutil.copy(make_study(tmp_path / "other", (*UNITS, "eeee")) / MANIFEST, folder / MANIFEST)
    assert main(["status", str(folder)]) == 0
    assert "done 0  failed 0  missing 5" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    assert "no cell has been measured yet" in capsys.readouterr().out


SUBMISSIONS = {
    "a list": "[]", "no text": "\xff",
    "a position out of range": '{"name": "s", "run_id": "r", "cluster": {}, "shards": [[99]]}',
    "a position that is a text": '{"name": "s", "run_id": "r", "cluster": {}, "shards": [["a"]]}',
    "no shards": '{"name": "s", "run_id": "r", "cluster": {}}', "cut": '{"name": "s"',
}  # fmt: skip


@pytest.mark.parametrize("case", SUBMISSIONS)
def test_an_edited_submission_is_one_line(tmp_path, capsys, case):
    folder = make_study(tmp_path / "study")
    (folder / "shards" / "s").mkdir(parents=True)
    (folder / "shards" / "s" / "plan.json").write_text(SUBMISSIONS[case])
    assert "plan.json" in complaint(capsys, "status", str(folder))
