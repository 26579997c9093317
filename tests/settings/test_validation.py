"""From plain values to settings: what is right arrives as it was meant, what is wrong is a line that names the key."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from harness.errors import InputError, SettingError
from harness.measurements import compose_settings
from harness.measurements.ablation.region_settings import RegionSettings
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.search.settings import SearchSettings
from harness.measurements.spectra.settings import SpectraSettings
from harness.registry import Registry
from harness.settings.compose import config_folder, groups
from harness.settings.constraints import Bounds, ReadBy, at_least
from harness.settings.output import require_folder
from harness.settings.validation import chosen, keys_of, plain, refuse_unread, validated
from harness.spectral.regions.decile import DecileRule
from harness.spectral.regions.fraction import FractionRule
from harness.tasks.ioi import IoiTask
from harness.tasks.registry import TASKS, task_of
from harness.tasks.text import TextTask

ROOT = Path(__file__).parents[2]
KINDS = {"ablation": StudySettings, "search": SearchSettings, "spectra": SpectraSettings}


def refusal(values: Any, kind: type = StudySettings) -> str:
    with pytest.raises(SettingError) as refused:
        validated(kind, values)
    message = str(refused.value)
    assert "\n" not in message and message == f"{refused.value.key}: {refused.value.reason}"
    return message


# ---------------------------------------------------------------- what is right


def test_nothing_given_is_the_default():
    for kind in KINDS.values():
        assert validated(kind, {}) == kind()


def test_values_arrive_as_they_were_meant():
    found = validated(StudySettings, {
        "model": {"name": "a/b", "revision": 1000, "recall": {"dim": "32", "noise": 0}},
        "target": {"blocks": [0.0, 3]}, "seed": 7.0, "cluster": {"options": ["nodelist=n1", 3], "memory_gib": 2},
        "region": {"by": "decile", "deciles": [1, 10], "controls": ["none", "random"], "random_seeds": [2]},
        "runtime": {"adaptive": {"sign": True}, "precision": "adaptive", "batch_tokens": None},
        "tasks": {"mine": {"kind": "text", "window": 8, "column": "body"}, "2": {"kind": "ioi"}},
    })  # fmt: skip
    assert (found.model.name, found.model.revision, found.seed) == ("a/b", "1000", 7)
    assert (found.model.recall.dim, found.model.recall.noise) == (32, 0.0) and found.target.blocks == [0, 3]
    assert all(type(value) is int for value in (found.seed, found.model.recall.dim, *found.target.blocks))
    assert found.cluster.options == ["nodelist=n1", "3"] and found.cluster.memory_gib == 2.0
    assert found.region == RegionSettings("decile", DecileRule([1, 10]), ["none", "random"], [2])
    assert found.tasks == {"mine": TextTask(window=8, column="body"), "2": IoiTask()}
    assert found.runtime.adaptive.sign is True and found.runtime.batch_tokens is None


def test_settings_that_are_made_already_are_taken_as_they_are():
    settings = StudySettings(seed=3)
    assert validated(StudySettings, settings) is settings
    task = TextTask(window=8)
    assert validated(StudySettings, {"tasks": {"t": task}}).tasks["t"] is task
    assert task_of(task) is task


def test_the_values_handed_in_are_left_alone():
    values = {"region": {"by": "decile", "deciles": [1], "kinds": None}, "tasks": {"t": {"kind": "text"}}}
    before = copy.deepcopy(values)
    found = validated(StudySettings, values)
    found.region.rule.deciles.append(2)
    assert values == before


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("values, message", [
    # unknown keys, at every depth, with the nearest
    ({"sed": 1}, "sed: unknown key; did you mean 'seed'? known here: model, reference, target, region, tasks, runtime,"
                 " cluster, report, tracker, output, seed"),
    ({"model": {"recall": {"stepps": 1}}}, "model.recall.stepps: unknown key; did you mean 'steps'? known here: dim,"
     " hidden_dim, context_length, feed_forward, n_triggers, noise, noise_token, optimizer, learning_rate, momentum,"
     " weight_decay, batch_size, steps, checkpoint, seed, cache_dir"),
    ({"target": {"xyz": 1}}, "target.xyz: unknown key; known here: kind, layer_types, blocks"),
    ({"tasks": {"t": {"kind": "ioi", "limmit": 1}}}, "tasks.t.limmit: unknown key; did you mean 'limit'? known here:"
     " limit, part, selection_share, dataset, data_files, dataset_config, split, cluster_column, bos, chat,"
     " system_prompt"),
    ({"region": {"by": "decile", "decile": [1]}}, "region.decile: unknown key; did you mean 'deciles'? known here:"
     " deciles"),
    # names out of a list
    ({"model": {"dtype": "float23"}}, "model.dtype: 'float23' is wrong; did you mean 'float32'? use one of auto,"
     " float32, bfloat16, float16"),
    ({"target": {"kind": "x"}}, "target.kind: 'x' is wrong; use one of matrix, type, block, all,"
     " type_and_matrix"),
    ({"region": {"by": "mp", "mp": ["above", "belov"]}}, "region.mp: 'belov' is wrong; did you mean 'below'? use one of"
     " above, inside, below"),
    ({"region": {"by": "fractoin"}}, "region.by: 'fractoin' is not a region rule; did you mean 'fraction'? use one of"
     " fraction, decile, index, laser, energy, mp, gavish_donoho, component, named, compression, reweight, none"),
    ({"tasks": {"t": {"kind": "textt"}}}, "tasks.t.kind: 'textt' is not a kind of task; did you mean 'text'? use one of"
     f" {', '.join(TASKS.names())}"),
    ({"tasks": {"t": {}}}, f"tasks.t.kind: None is not a kind of task; use one of {', '.join(TASKS.names())}"),
    # types
    ({"seed": 1.5}, "seed: 1.5 is wrong; it must be a whole number"),
    ({"seed": "x"}, "seed: 'x' is wrong; it must be a whole number"),
    ({"seed": None}, "seed: None is wrong; it must be a whole number"),
    ({"runtime": {"stream_gib": "much"}}, "runtime.stream_gib: 'much' is wrong; it must be a number"),
    ({"runtime": {"reuse": "maybe"}}, "runtime.reuse: 'maybe' is wrong; it must be true or false"),
    ({"output": ["a"]}, "output: ['a'] is wrong; it must be text"),
    ({"target": {"layer_types": "mlp"}}, "target.layer_types: 'mlp' is wrong; it must be a list, for example [mlp]"),
    ({"region": {"controls": "none"}}, "region.controls: 'none' is wrong; it must be a list, for example [none]"),
    ({"region": {"values": 0.1}}, "region.values: 0.1 is wrong; it must be a list, for example [0.1]"),
    ({"target": {"blocks": [0, "x"]}}, "target.blocks: 'x' is wrong; it must be a whole number"),
    ({"runtime": None}, "runtime: None is wrong; it must be a group of keys with values"),
    ({"runtime": {"adaptive": 3}}, "runtime.adaptive: 3 is wrong; it must be a group of keys with values"),
    ({"region": "decile"}, "region: 'decile' is wrong; it must be a group of keys with values, for example"
     " {by: decile}"),
    ({"tasks": {"t": 3}}, "tasks.t: 3 is wrong; it must be a task's settings, for example +tasks.t.kind=text"),
    ({"tasks": ["t"]}, "tasks: ['t'] is wrong; it must be names with the settings of tasks"),
    ({"tasks": {"t": {"kind": "lm_eval"}}}, "tasks.t.task: must be set"),
    # bounds
    ({"seed": -1}, "seed: -1 is wrong; it must be at least 0"),
    ({"runtime": {"batch_tokens": 0}}, "runtime.batch_tokens: 0 is wrong; it must be at least 1"),
    ({"runtime": {"stream_gib": float("nan")}}, "runtime.stream_gib: nan is wrong; it must be at least 0"),
    ({"runtime": {"adaptive": {"confidence": 1}}}, "runtime.adaptive.confidence: 1 is wrong; it must be at least 0.5"
     " and below 1"),
    ({"runtime": {"adaptive": {"relative": 0}}}, "runtime.adaptive.relative: 0 is wrong; it must be above 0"),
    ({"runtime": {"adaptive": {"min_examples": 7}}}, "runtime.adaptive.min_examples: 7 is wrong; it must be at least"
     " 8"),
    ({"model": {"recall": {"noise": 1}}}, "model.recall.noise: 1 is wrong; it must be at least 0 and below 1"),
    ({"model": {"recall": {"context_length": 7}}}, "model.recall.context_length: 7 is wrong; it must be at least 8"),
    ({"cluster": {"poll_seconds": 0}}, "cluster.poll_seconds: 0 is wrong; it must be at least 0.1"),
    ({"tasks": {"t": {"kind": "classification", "label_map": {"a": -1}}}}, "tasks.t.label_map.a: -1 is wrong; it must"
     " be at least 0"),
    # what one setting says of another
    ({"model": {"recall": {"steps": 5, "checkpoint": 6}}}, "model.recall.checkpoint: 6 is wrong; it must be within"
     " 0..5, model.recall.steps"),
    ({"model": {"device": "gpu"}}, "model.device: 'gpu' is wrong; use auto, cpu, cuda or cuda:<index>"),
    ({"target": {"blocks": []}}, "target.blocks: [] is wrong; name at least one, for example [0]; null: every block"),
    ({"target": {"layer_types": []}}, "target.layer_types: [] is wrong; name at least one, for example [mlp]"),
    ({"runtime": {"precision": "adaptive", "adaptive": {"relative": None, "of_baseline": None}}}, "runtime.adaptive:"
     " None is wrong; set relative, of_baseline, absolute or sign; without any no cell would stop"),
    ({"runtime": {"adaptive": {"sign": True}}}, "runtime.precision: 'exact' is wrong; the settings of runtime.adaptive"
     " need runtime.precision=adaptive"),
    ({"runtime": {"compile": True, "edit": "branch"}}, "runtime.compile: True is wrong; branches are hooks, which"
     " compiled blocks leave out; use runtime.edit=weight"),
    ({"runtime": {"compile": True}, "model": {"device_map": "auto"}}, "runtime.compile: True is wrong; it needs the"
     " whole model on one device; leave model.device_map unset"),
    ({"cluster": {"signal": "SIGUSR2"}}, "cluster.signal: 'SIGUSR2' is wrong; it must be the name of a signal without"
     " SIG, for example USR2"),
    ({"cluster": {"time_minutes": 4}}, "cluster.time_minutes: 4 is wrong; with cluster.signal_seconds=120 it must be at"
     " least 5"),
    ({"tasks": {"t": {"kind": "text", "data_files": "no.txt"}}}, "tasks.t.data_files: no such file 'no.txt'; give the"
     " path of an existing file"),
    # regions
    ({"region": {"by": "decile", "deciles": [0]}}, "region.deciles: 0 is wrong; deciles are 1 (the largest tenth) to 10"
     " (the smallest)"),
    ({"region": {"by": "decile", "deciles": []}}, "region.deciles: [] is wrong; region.by=decile needs at least one,"
     " for example [10]"),
    ({"region": {"values": [0.1, 1.5]}}, "region.values: 1.5 is wrong; a fraction must be above 0 and at most 1"),
    ({"region": {"by": "index", "intervals": ["5"]}}, "region.intervals: interval '5' is not start:stop with whole"
     " numbers"),
    ({"region": {"by": "decile", "values": [0.2]}}, "region.values: [0.2] is wrong; only region.by=fraction or energy"
     " reads it, here it is decile"),
    ({"region": {"by": "energy", "tracy_widom": True}}, "region.tracy_widom: True is wrong; only region.by=mp reads it,"
     " here it is energy"),
    ({"region": {"controls": ["lower_bulk"]}}, "region.controls: 'lower_bulk' is wrong; it is matched to the outliers"
     " of region.by=mp"),
    ({"region": {"controls": ["randon"]}}, "region.controls: 'randon' is wrong; use one of random, energy_matched,"
     " lower_bulk, rotated, rotated_output, shuffled, swap_values, swap_vectors, reference_matrices, reference_model,"
     " none, other_order"),
    ({"region": {"controls": ["random"], "random_seeds": []}}, "region.random_seeds: [] is wrong; the controls that"
     " draw (random, energy_matched, rotated, rotated_output, shuffled) need at least one, for example [0]"),
    ({"region": {"random_seeds": [-1]}}, "region.random_seeds: -1 is wrong; it must be at least 0"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(values, message):
    assert refusal(values) == message


@pytest.mark.parametrize("values, message", [
    ({"search": {"choice": "gradiant"}}, "search.choice: 'gradiant' is wrong; did you mean 'gradient'? use one of"
     " exhaustive, gradient, compare"),
    ({"search": {"keep": 0}}, "search.keep: 0 is wrong; it must be above 0 and at most 1"),
    ({"search": {"report_limit": 1}}, "search.report_limit: 1 is wrong; it must be at least 2"),
    ({"search": {"control_seeds": []}}, "search.control_seeds: [] is wrong; name at least two different ones, for"
     " example [0,1,2]; how much draws differ needs two"),
    ({"search": {"control_seeds": [4, 4]}}, "search.control_seeds: [4, 4] is wrong; name at least two different ones,"
     " for example [0,1,2]; how much draws differ needs two"),
    ({"search": {"control_seeds": [0, -1]}}, "search.control_seeds: -1 is wrong; it must be at least 0"),
    ({"search": {"metrics": []}}, "search.metrics: [] is wrong; name at least one, for example [accuracy]"),
])  # fmt: skip
def test_settings_of_a_search(values, message):
    assert refusal(values, SearchSettings) == message


@pytest.mark.parametrize("values, message", [
    ({"estimator": "usvd"}, "estimator: 'usvd' is wrong; did you mean 'usvt'? use one of gavish_donoho, usvt,"
     " bulk_fit"),
    ({"revisions": ["a", "a"]}, "revisions: ['a', 'a'] is wrong; each may be named once"),
    ({"revisions": ["a"], "model": {"revision": "b"}}, "model.revision: 'b' is wrong; name it among the revisions"),
    ({"blocks": []}, "blocks: [] is wrong; name at least one, for example [0]; null: every block"),
    ({"tasks": {"t": {"kind": "ioi"}}}, "tasks.t.kind: 'ioi' is wrong; the covariance is taken over a task of kind text"
     " or recall"),
    ({"tasks": {"a": {"kind": "text"}, "b": {"kind": "text"}}}, "task: ['a', 'b'] is wrong; the covariance is taken"
     " over one text; choose one, for example wikitext"),
    ({"tasks": {"a": {"kind": "text"}}, "vectors": False}, "vectors: False is wrong; the overlap with a task's"
     " activations needs vectors=true"),
])  # fmt: skip
def test_settings_of_spectra(values, message):
    assert refusal(values, SpectraSettings) == message


@pytest.mark.parametrize("values, message", [
    ({"seed": True}, "seed: True is wrong; it must be a number"),
    ({"runtime": {"stream_gib": True}}, "runtime.stream_gib: True is wrong; it must be a number"),
    ({"runtime": {"batch_tokens": False}}, "runtime.batch_tokens: False is wrong; it must be a number"),
    ({"model": {"recall": {"noise": True}}}, "model.recall.noise: True is wrong; it must be a number"),
    ({"model": {"revision": True}}, "model.revision: True is wrong; it must not be true or false"),
    ({"model": {"dtype": False}}, "model.dtype: False is wrong; it must not be true or false"),
    ({"target": {"blocks": True}}, "target.blocks: True is wrong; it must not be true or false"),
    ({"target": {"blocks": [0, True]}}, "target.blocks: True is wrong; it must be a number"),
    ({"target": {"layer_types": [True]}}, "target.layer_types: True is wrong; it must not be true or false"),
    ({"region": {"by": "decile", "deciles": [True]}}, "region.deciles: True is wrong; it must be a number"),
    ({"region": {"values": [True]}}, "region.values: True is wrong; it must be a number"),
    ({"region": {"by": True}}, "region.by: True is wrong; it must not be true or false"),
    ({"region": {"random_seeds": [True]}}, "region.random_seeds: True is wrong; it must be a number"),
    ({"tasks": {"t": {"kind": "text", "window": True}}}, "tasks.t.window: True is wrong; it must be a number"),
    ({"tasks": {"t": {"kind": "ioi", "limit": True}}}, "tasks.t.limit: True is wrong; it must be a number"),
    ({"tasks": {"t": {"kind": "classification", "label_map": {"a": True}}}}, "tasks.t.label_map.a: True is wrong; it"
     " must be a number"),
])  # fmt: skip
def test_true_is_not_a_number(values, message):
    assert refusal(values) == message


def test_true_in_a_search():
    assert refusal({"search": {"control_seeds": [0, True]}}, SearchSettings).startswith("search.control_seeds: True")


def test_errors_say_where_and_travel_between_processes():
    with pytest.raises(SettingError) as refused:
        validated(FractionRule, {"values": [2]}, "region")
    assert refused.value.key == "region.values" and isinstance(refused.value, InputError)
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.key, again.reason, str(again)) == (refused.value.key, refused.value.reason, str(refused.value))
    assert str(again.below("study")) == f"study.{again}" and str(again.below("")) == str(again)


# ---------------------------------------------------------------- marks


@dataclass
class Inner:
    near: Annotated[float, Bounds(above=0, at_most=1)] = 0.5
    names: list[Literal["a", "b"]] = field(default_factory=lambda: ["a"])


@dataclass
class Outer:
    count: Annotated[int, at_least(1)]
    inner: Inner = field(default_factory=Inner)
    maybe: Annotated[int, at_least(3)] | None = None
    inners: list[Inner] = field(default_factory=list)
    by_name: dict[str, Inner] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    made: Annotated[list[str], ReadBy(lambda value: [*value, "made"], lambda: {"x": None})] = field(
        default_factory=list
    )

    def unread(self):
        if self.maybe is not None:
            yield SettingError("maybe", "nothing reads it")


@pytest.mark.parametrize("bounds, inside, outside, words", [
    (at_least(1), (1, 1.5, 10**9, float("inf")), (0.999, -1), "at least 1"),
    (Bounds(above=0), (1e-300, 5), (0, -0.0, -1), "above 0"),
    (Bounds(at_least=0.5, below=1), (0.5, 0.999), (0.499, 1, 2), "at least 0.5 and below 1"),
    (Bounds(above=0, at_most=1), (0.1, 1), (0, 1.001), "above 0 and at most 1"),
    (Bounds(at_most=3), (3, -100), (3.5,), "at most 3"),
])  # fmt: skip
def test_bounds(bounds, inside, outside, words):
    assert bounds.words() == f"it must be {words}"
    assert [bounds.check(value) for value in inside] == list(inside)
    for value in (*outside, float("nan")):
        with pytest.raises(ValueError, match=f"^it must be {words}$"):
            bounds.check(value)


def test_marks_inside_lists_mappings_and_options():
    found = validated(Outer, {"count": 2, "inners": [{"near": 1}, {}], "by_name": {"k": {"names": ["b"]}},
                              "made": ["x"], "anything": {"a": True, "b": [1, None]}, "maybe": None})  # fmt: skip
    assert found.inners == [Inner(1.0), Inner()] and found.by_name == {"k": Inner(names=["b"])}
    assert found.made == ["x", "made"] and found.anything == {"a": True, "b": [1, None]} and found.maybe is None
    assert keys_of(Outer) == ["count", "inner", "maybe", "inners", "by_name", "anything", "made"]
    for values, message in (
        ({}, "count: must be set"),
        ({"count": 0}, "count: 0 is wrong; it must be at least 1"),
        ({"count": 1, "maybe": 2}, "maybe: 2 is wrong; it must be at least 3"),
        ({"count": 1, "inner": {"near": 0}}, "inner.near: 0 is wrong; it must be above 0 and at most 1"),
        ({"count": 1, "inners": [{}, {"near": 2}]}, "inners.near: 2 is wrong; it must be above 0 and at most 1"),
        ({"count": 1, "inners": [{"nearr": 2}]}, "inners.nearr: unknown key; did you mean 'near'? known here: near,"
                                                 " names"),
        ({"count": 1, "inners": [{"near": True}]}, "inners.near: True is wrong; it must be a number"),
        ({"count": 1, "by_name": {"k": {"near": 2}}}, "by_name.k.near: 2 is wrong; it must be above 0 and at most 1"),
        ({"count": 1, "by_name": {"k": {"names": ["c"]}}}, "by_name.k.names: 'c' is wrong; use one of a, b"),
        ({"count": 1, "by_name": {"k": {"near": False}}}, "by_name.k.near: False is wrong; it must be a number"),
    ):
        assert refusal(values, Outer) == message


def test_one_of_several_kinds_is_chosen_by_name():
    registry = Registry("harness.test_kinds", "an ending", {"inner": Inner, "decile": DecileRule})
    assert chosen(registry, "kind", {"kind": "inner", "near": 0.25}) == Inner(0.25)
    for values, message in (
        ({"kind": "inmer"}, "kind: 'inmer' is not an ending; did you mean 'inner'? use one of inner, decile"),
        ({}, "kind: None is not an ending; use one of inner, decile"),
        ({"kind": ["inner"]}, "kind: ['inner'] is not an ending; did you mean 'inner'? use one of inner, decile"),
        ({"kind": "inner", "deciles": [1]}, "deciles: unknown key; known here: near, names"),
    ):
        with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
            chosen(registry, "kind", values)


def test_settings_that_nothing_reads_are_refused_where_they_are_composed_only():
    read = validated(Outer, {"count": 1, "maybe": 3})
    with pytest.raises(SettingError, match="^maybe: nothing reads it$"):
        refuse_unread(read)
    with pytest.raises(SettingError, match="^somewhere.maybe: nothing reads it$"):
        refuse_unread(read, "somewhere")
    refuse_unread(validated(Outer, {"count": 1}))
    for values, message in (
        ({"model": {"name": "recall", "revision": "x"}}, "model.revision: 'x' is wrong; the embedded model"),
        ({"model": {"name": "a/b", "recall": {"dim": 8}}}, "model.recall.dim: 8 is wrong; only the embedded model"),
        ({"region": {"random_seeds": [1]}}, r"region.random_seeds: \[1\] is wrong; only the controls random,"),
    ):
        with pytest.raises(SettingError, match=f"^{message}"):
            refuse_unread(validated(StudySettings, values))
    refuse_unread(validated(StudySettings, {"model": {"name": "a/b", "recall": {"cache_dir": "x"}}}))
    refuse_unread(validated(StudySettings, {"region": {"random_seeds": [1], "controls": ["random"]}}))
    for values, key in (({"keep": 0.5}, "keep"), ({"gradient_examples": 5}, "gradient_examples")):
        with pytest.raises(SettingError, match=f"^search.{key}: .*only search.choice=gradient.* reads it"):
            refuse_unread(validated(SearchSettings, {"search": values}))
        refuse_unread(validated(SearchSettings, {"search": {**values, "choice": "gradient"}}))


# ---------------------------------------------------------------- round trips


def test_plain_values_of_anything():
    settings = Outer(2, maybe=3, inners=[Inner(1.0)], by_name={"k": Inner()}, anything={"a": (1, 2)})
    assert plain(settings) == {
        "count": 2, "inner": {"near": 0.5, "names": ["a"]}, "maybe": 3, "inners": [{"near": 1.0, "names": ["a"]}],
        "by_name": {"k": {"near": 0.5, "names": ["a"]}}, "anything": {"a": [1, 2]}, "made": [],
    }  # fmt: skip
    assert plain(RegionSettings("decile", DecileRule([3]))) == {
        "by": "decile", "deciles": [3], "controls": ["none"], "random_seeds": [0],
    }  # fmt: skip
    assert plain(IoiTask(limit=3))["kind"] == "ioi"


def assert_round_trip(settings: Any) -> None:
    written = json.loads(json.dumps(plain(settings)))
    again = validated(type(settings), written)
    assert again == settings and plain(again) == plain(settings)
    for field_ in dataclasses.fields(settings):
        assert type(getattr(again, field_.name)) is type(getattr(settings, field_.name))


def needed(group: str, name: str) -> list[str]:
    """What a YAML file leaves to be set."""
    values = yaml.safe_load((config_folder() / group / f"{name}.yaml").read_text()) or {}
    where = f"tasks.{name}" if group == "task" else group
    if name == "adapter":
        values["name"] = "???"  # else the adapter would be asked for the name of its base
    if name in ("change", "undo"):
        return ["reference.name=some/thing"]
    if (group, name) in OF_A_TASK:
        return ["reference.name=some/thing", "region=reweight" if group == "calibration" else "calibration=label_words"]
    return [f"{where}.{key}=some/thing" for key, value in values.items() if value == "???"]


OF_A_TASK = (("region", "reweight"), ("calibration", "label_words"))  # parts of a change, chosen by the loss of a task
YAMLS = [(group, name) for group, names in groups().items() for name in names if group != "experiment"]
OF_STUDIES = [pair for pair in YAMLS if pair[0] != "tune"]


@pytest.mark.parametrize("group, name", OF_STUDIES)
def test_every_yaml_of_a_study_is_read_back(group, name):
    read_by = ["region=change"] if group == "reference" else []
    settings = compose_settings("ablation", [f"{group}={name}", *needed(group, name), *read_by])
    assert isinstance(settings, StudySettings)
    assert_round_trip(settings)


@pytest.mark.parametrize("group, name", [
    pair for pair in OF_STUDIES
    if pair[0] not in ("task", "runtime", "reference") and pair[1] not in ("change", "undo")
    and pair not in (("region", "none"), *OF_A_TASK)
])  # fmt: skip
def test_every_yaml_of_a_search_is_read_back(group, name):
    settings = compose_settings("search", [f"{group}={name}", *needed(group, name), "task=[ioi]", "search.keep=0.1"])
    assert isinstance(settings, SearchSettings)
    assert_round_trip(settings)


@pytest.mark.parametrize("group, name", [pair for pair in YAMLS if pair[0] in ("model", "reference", "cluster")])
def test_every_yaml_of_spectra_is_read_back(group, name):
    assert_round_trip(compose_settings("spectra", [f"{group}={name}", *needed(group, name), "task=wikitext"]))


@pytest.mark.parametrize("name", groups()["tune"])
def test_every_yaml_of_a_tuning_is_read_back(name, tmp_path):
    (tmp_path / "train.jsonl").touch()
    settings = compose_settings("tuning", [f"tune={name}", "model.name=some/thing", "task=sst2",
                                           f"tune.data_files={tmp_path / 'train.jsonl'}"])
    assert_round_trip(settings)


@pytest.mark.parametrize("group, name", [
    pair for pair in YAMLS
    if pair[0] in ("target", "region", "cluster") and pair[1] not in ("change", "undo", "reweight")
])  # fmt: skip
def test_every_yaml_of_coupling_is_read_back(group, name):
    region = [] if group == "region" else ["region=fraction"]
    assert_round_trip(compose_settings("coupling", [f"{group}={name}", *region, "task=recall"]))


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_yaml_of_an_experiment_is_read_back(name):
    text = (config_folder() / "experiment" / f"{name}.yaml").read_text()
    named = ["model.name=some/thing"] if re.search(r"override /model: pretrained\b", text) else []
    kinds = {"coupling": "coupling", "prune_and_tune": "tuning"}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), "ablation")
    assert_round_trip(compose_settings(kind, [f"experiment={name}", *named]))


def test_an_experiment_of_another_command_is_one_line():
    with pytest.raises(InputError, match=r"^experiment: 'prune_and_tune_sst2' is for another command, because this one "
                                         r"has no settings 'tune'; the first lines of experiment/prune_and_tune_sst2"):
        compose_settings("ablation", ["experiment=prune_and_tune_sst2"])


# ---------------------------------------------------------------- rooms


def test_settings_may_stand_in_rooms_without_pydantic():
    """Marks and dataclasses are imported with the standard library alone; pydantic comes with the first validation."""
    code = (
        "import sys, harness.settings.constraints, harness.settings.validation, harness.engine.settings\n"
        "heavy = {'pydantic', 'hydra', 'omegaconf', 'torch', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_folders_that_cannot_be_made_are_refused(tmp_path):
    require_folder(None)
    require_folder(str(tmp_path))
    require_folder(str(tmp_path / "deep" / "er"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(SettingError, match=f"^output: '.*{path}' is wrong; .*/file is a file; name a folder"):
            require_folder(str(tmp_path / path))
    with pytest.raises(SettingError, match="^output: '/proc/no/folder' is wrong; no folder can be made in /proc"):
        require_folder("/proc/no/folder")
