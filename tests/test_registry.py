"""Names that settings choose: ours and those of other packages, imported when they are asked for and not before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.registry import Registry, added_names, nearest

GROUP = "harness.test_things"


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Installs a distribution with entry points in the group of these tests, as pip would lay it out."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def install(package: str, code: str = "", **points: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
        (tmp_path / f"{package}.py").write_text(code)

    yield install
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def things(**builtin) -> Registry:
    return Registry(GROUP, "a thing", builtin or {"stone": 1, "wood": 2})


def test_objects_of_the_harness_by_name():
    registry = things(stone=1, decoder="json:JSONDecoder", module="json.tool")
    assert registry.names() == list(registry) == ["stone", "decoder", "module"]
    assert registry["stone"] == 1 and registry["decoder"].__name__ == "JSONDecoder"
    assert registry["module"].__name__ == "json.tool" and registry["decoder"] is registry["decoder"]
    assert dict(registry.items()).keys() == {"stone", "decoder", "module"}
    assert "stone" in registry and "sand" not in registry and 3 not in registry and None not in registry


def test_what_is_not_asked_for_is_not_imported(add):
    add("lazy_things", "LOADED = 5", paper="lazy_things:LOADED")
    registry = things(own="lazy_things:LOADED")
    assert registry.names() == ["own", "paper"] and "paper" in registry and added_names(GROUP) == ["paper"]
    assert "lazy_things" not in sys.modules
    assert registry["paper"] == registry["own"] == 5 and "lazy_things" in sys.modules


def test_names_of_others_come_after_ours_in_alphabetical_order(add):
    add("first_things", "A = B = 7", sand="first_things:A", clay="first_things:B")
    add("more_things", "C = 8", iron="more_things:C")
    registry = things()
    assert registry.names() == ["stone", "wood", "clay", "iron", "sand"]
    assert dict(registry.items()) == {"stone": 1, "wood": 2, "clay": 7, "iron": 8, "sand": 7}
    assert added_names(GROUP) == ["clay", "iron", "sand"]


def test_unknown_names_are_answered_with_the_nearest(add):
    add("far_things", "A = 1", granite="far_things:A")
    registry = things()
    for name, near in (("stome", "did you mean 'stone'? "), ("granit", "did you mean 'granite'? "), ("xyz", "")):
        with pytest.raises(InputError) as refused:
            registry[name]
        assert str(refused.value) == f"{name!r} is not a thing; {near}use one of stone, wood, granite"
    assert nearest("ston", ["stone", "wood"]) == "did you mean 'stone'? " and nearest("x", iter(["stone"])) == ""


def test_two_of_one_name_are_refused(add):
    add("greedy_things", "A = 1", wood="greedy_things:A")
    with pytest.raises(InputError) as refused:
        things().names()
    assert str(refused.value) == (
        "greedy_things: its entry point 'wood' in harness.test_things is the name of a thing of the harness already;"
        " one of the two must be renamed or uninstalled"
    )
    assert things(stone=1).names() == ["stone", "wood"]
    add("jealous_things", "A = 1", wood="jealous_things:A")
    with pytest.raises(InputError, match="_things: its entry point 'wood' .* of (greedy|jealous)_things already"):
        things(stone=1).names()


@pytest.mark.parametrize("code, value, reason", [
    ("import no_such_module", "broken_things:A", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("", "broken_things:A", "AttributeError: module 'broken_things' has no attribute 'A'"),
    ("raise RuntimeError('two\\nlines')", "broken_things:A", "RuntimeError: two lines"),
    ("A = 1", "no_such_things:A", "ModuleNotFoundError: No module named 'no_such_things'"),
])  # fmt: skip
def test_what_does_not_load_names_its_package(add, code, value, reason):
    add("broken_things", code, dust=value)
    registry = things()
    assert registry["stone"] == 1 and "dust" in registry  # the others are as they were
    with pytest.raises(InputError) as refused:
        registry["dust"]
    assert str(refused.value) == f"broken_things: 'dust', a thing, cannot be loaded ({reason})"


def test_built_in_names_need_no_look_at_installed_packages(monkeypatch):
    """Looking through all distributions takes long; most names are ours."""
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: pytest.fail("looked"))
    registry = things()
    assert registry["stone"] == 1 and "wood" in registry


def test_every_name_of_the_harness_can_be_imported():
    from harness.measurements import MEASUREMENTS
    from harness.models.families import FAMILIES
    from harness.spectral.regions import RULES
    from harness.tasks.registry import TASKS

    for registry in (TASKS, RULES, FAMILIES, MEASUREMENTS):
        for name, own in registry.items():
            assert registry[name] is own
    root = Path(__file__).parents[1]
    assert all((root / "conf" / "region" / f"{name}.yaml").is_file() for name in RULES)
