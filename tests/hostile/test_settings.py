"""Hostile settings: `harness plan` answers each with exit status 2 and one line, or plans a study; it never fails.

Everything goes through harness.cli.main with the embedded model, whose plan reads no file.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.errors import SettingError
from harness.measurements import MEASUREMENTS
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.search.settings import SearchSettings
from harness.measurements.spectra.settings import SpectraSettings
from harness.settings.compose import known_keys
from harness.settings.validation import validated
from harness.tasks.evaluate_metrics import read_metrics
from harness.tasks.recall import RecallTask
from harness.tasks.registry import tasks_of

TINY = ["model.recall.dim=16", "model.recall.hidden_dim=16", "model.recall.context_length=32", "model.recall.steps=3"]
STUDY = [*TINY, "tasks.recall.n_sequences=4"]


@pytest.fixture
def planned(capsys, tmp_path, monkeypatch):
    """A function that plans with some settings, and returns the exit status and what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def plan(*words: str, kind: str = "ablation") -> tuple[int, str]:
        capsys.readouterr()
        status = main(["plan", *(STUDY if kind == "ablation" else [kind, *TINY]), *words])
        captured = capsys.readouterr()
        assert status == 0 or not captured.out
        assert not list(tmp_path.iterdir())
        return status, captured.err

    return plan


def assert_refused(outcome: tuple[int, str], *words: str) -> None:
    status, said = outcome
    assert status == 2, said
    assert said.startswith("harness: ") and said.count("\n") == 1 and said.endswith("\n"), said
    assert "Traceback" not in said and "Exception" not in said and len(said) < 1500
    for word in words:
        assert word in said


def test_the_settings_themselves_are_right(planned):
    assert planned() == (0, "")
    assert planned("task=recall", kind="spectra") == (0, "")


LONG = "a" * 300
# Override -> words of the line. Every one would have been a traceback or a run that nobody meant.
OVERRIDES: dict[str, tuple[str, ...]] = {
    # numbers
    "seed=99999999999999999999": ("seed: a number of 67 bits", "64 bits"),
    f"seed=-{2**63 + 1}": ("seed: ", "64 bits"),
    f"seed={'7' * 5000}": ("seed: the number is too large", "64 bits"),
    "seed=inf": ("seed: inf", "finite"),
    "seed=nan": ("seed: nan", "finite"),
    "seed=1e999": ("seed: inf", "finite"),
    "seed=-1": ("seed: -1", "at least 0"),
    "seed=0.5": ("seed: 0.5", "whole number"),
    "seed=true": ("seed: True", "number"),
    "seed=''": ("seed: ''", "whole number"),
    "seed=[1]": ("seed: [1]", "whole number"),
    "seed={a: 1}": ("seed: {'a': 1}", "whole number"),
    "model.recall.learning_rate=inf": ("model.recall.learning_rate: inf", "finite"),
    "model.recall.learning_rate=-nan": ("model.recall.learning_rate",),
    "model.recall.weight_decay=1e400": ("model.recall.weight_decay: inf", "finite"),
    "model.recall.dim=9999999999999": ("model.recall.dim", "at most 65536"),
    "model.recall.context_length=65537": ("model.recall.context_length", "at most 65536"),
    "model.recall.noise=nan": ("model.recall.noise: nan",),
    "runtime.stream_gib=inf": ("runtime.stream_gib: inf", "finite"),
    "target.blocks=[18446744073709551616]": ("target.blocks", "64 bits"),
    "tasks.recall.seed=18446744073709551616": ("tasks.recall.seed", "64 bits"),
    "tasks.recall.noise=inf": ("tasks.recall.noise: inf", "finite"),
    "+tasks.t={kind: recall, n_sequences: 99999999999999999999}": ("tasks.t.n_sequences", "64 bits"),
    "cluster.time_minutes=99999999999999999999": ("cluster.time_minutes", "64 bits"),
    # the folder of the run
    "output=": ("output: ''", "name a folder"),
    "output=' '": ("output: ' '", "name a folder"),
    "output=/": ("output: '/'", "belongs to the system"),
    "output=//": ("output: '//'", "belongs to the system"),
    "output=/tmp/..": ("output: '/tmp/..'", "belongs to the system"),
    "output=/etc": ("output: '/etc'", "belongs to the system"),
    "output=/tmp": ("output: '/tmp'", "belongs to the system"),
    "output=/usr/bin/": ("output: '/usr/bin/'", "belongs to the system"),
    "output='~'": ("output: '~'", "home folder"),
    "output='~/.'": ("output: '~/.'", "home folder"),
    "output=/dev/null": ("output: '/dev/null'", "is a file"),
    "output='a\tb\nc'": ("output", "one line"),
    f"output={LONG}": ("output", "too long"),
    f"output={'a/' * 3000}": ("output", "too long"),
    "output=[a]": ("output", "text"),
    "output={a: 1}": ("output", "text"),
    # what becomes lines of a job
    "cluster.partition='a\n#SBATCH --wrap=rm'": ("cluster.partition", "one line"),
    "cluster.account='a\rb'": ("cluster.account", "one line"),
    "cluster.qos='a\u2028b'": ("cluster.qos", "one line"),
    "cluster.gres='gpu:1\n'": ("cluster.gres", "one line"),
    "cluster.constraint='a\x85b'": ("cluster.constraint", "one line"),
    "cluster.python='python\nrm'": ("cluster.python", "one line"),
    "cluster.options=['nodelist=n1\nrm']": ("cluster.options", "one line"),
    "cluster.srun_args=[a, 'b\nc']": ("cluster.srun_args", "one line"),
    "cluster.setup=['module load\nrm']": ("cluster.setup", "one line"),
    "cluster.signal='USR2\n'": ("cluster.signal",),
    # characters that are no text
    "output='a\0b'": ("output", "NUL"),
    "model.recall.cache_dir='a\0b'": ("model.recall.cache_dir", "NUL"),
    "model.recall.noise_token='\0'": ("model.recall.noise_token", "NUL"),
    "cluster.partition='\x1b[31m'": ("cluster.partition", "control characters"),
    "region.controls=['\0']": ("region.controls", "NUL"),
    "target.layer_types=['a\0']": ("target.layer_types", "NUL"),
    "output='a\udcffb'": ("output", "UTF-8"),
    "model.recall.noise_token='\ud800'": ("model.recall.noise_token", "UTF-8"),
    # names of tasks
    "+tasks.-a={kind: recall}": ("-a", "grammar"),
    "+tasks.a<script>b={kind: recall}": ("<script>", "name"),
    "+tasks.a\nb={kind: recall}": ("name",),
    f"+tasks.{LONG}={{kind: recall}}": ("tasks.aaa", "at most 200"),
    "+tasks.a={limit: 5}": ("tasks.a.kind",),
    "+tasks.a=[]": ("tasks.a: []",),
    "+tasks.a={kind: [text]}": ("tasks.a.kind",),
    "+tasks.a={kind: null}": ("tasks.a.kind",),
    "+tasks.a.kind='te\nxt'": ("tasks.a.kind",),
    # names of files that are too long
    f"+tasks.t={{kind: text, data_files: {LONG}}}": ("tasks.t.data_files", "no such file"),
    f"+tasks.t={{kind: text, data_files: {'a/' * 3000}}}": ("tasks.t.data_files", "no such file"),
    f"+tasks.t={{kind: lm_eval, task: piqa, include_path: {LONG}}}": ("tasks.t.include_path", "too long"),
    f"+tasks.t={{kind: lm_eval, task: piqa, data_files: {{test: {LONG}}}}}": ("tasks.t.data_files.test", "no such"),
    f"model.recall.cache_dir={LONG}": ("model.recall.cache_dir", "too long"),
    f"runtime.cache_dir={LONG}": ("runtime.cache_dir", "too long"),
    f"model.name={LONG}": ("model.name", "too long"),
    f"model.name=/{'a/' * 3000}": ("model.name", "too long"),
    "model.name='=x'": ("model.name", "./"),
    f"task={LONG}": ("task: there is no",),
    f"+tasks.{'a' * 150}={{kind: recall}}": ("tasks", "at most 100"),
    "model.name=-x": ("model.name", "./"),
    "model.name='a\nb'": ("model.name", "one line"),
    # nesting
    f"region.controls={'[' * 40}{']' * 40}": ("region.controls", "nested"),
    f"region.controls={'[' * 1500}{']' * 1500}": ("nested",),
    f"+tasks.t={'{a: ' * 40}1{'}' * 40}": ("tasks.t", "nested"),
    "region.controls=[[none]]": ("region.controls: ['none']",),
    "region.random_seeds=[[0]]": ("region.random_seeds: [0]",),
    "target.layer_types=[[q_proj]]": ("target.layer_types",),
    # empty lists and groups
    "target.layer_types=[]": ("target.layer_types: []",),
    "target.blocks=[]": ("target.blocks: []",),
    "tasks=[]": ("tasks",),
    "tasks=null": ("tasks: None",),
    "tasks=5": ("tasks: 5",),
    "model=[]": ("model.name",),
    "task=[]": ("task", "choose"),
    "region.controls={}": ("region.controls",),
    "cluster=5": ("cluster",),
    # the grammar of overrides
    "model.recall.noise_token=!": ("model.recall.noise_token: '!'", "'model.recall.noise_token=\"!\"'"),
    "output=~": ("output: '~'", "'output=\"~\"'"),
    "output=a,": ("output",),
    "output='a": ("output", "quotes"),
    "output=[a": ("output", "quotes"),
    "output={a": ("output", "quotes"),
    "output=a)": ("output", "quotes"),
    "seed": ("'seed'", "key=value"),
    "=": ("'='", "key=value"),
    "se ed=1": ("'se ed'", "name of a setting"),
    "${seed}=1": ("'${seed}'", "name of a setting"),
    "a\0b=1": ("name of a setting",),
    "seed=${nothing}": ("seed", "nothing"),
    "seed=${seed}": ("seed", "Recursive"),
    "output=${oc.env:NO_SUCH_VARIABLE}": ("output", "NO_SUCH_VARIABLE"),
    "output=${": ("output",),
    "~nothing": ("nothing",),
    "+seed=1": ("seed",),
    "seed=1,2": ("seed",),
    "seed=range(3)": ("seed",),
}  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text)[:50])
def test_hostile_overrides(planned, override):
    outcome = planned(override)
    assert_refused(outcome, *OVERRIDES[override])


@pytest.mark.parametrize("words", [
    ["--config-dir", LONG], ["--config-dir", "a\0b"], ["--config-dir", ""], ["--config-dir", "/dev/null"],
])
def test_hostile_folders_of_settings(planned, words):
    assert_refused(planned(*words), "--config-dir: no folder")


@pytest.mark.parametrize(("text", "words"), [
    ("seed: 1\nseed: 2\n", "duplicate key"), ("seed: [\n", "YAML"), ("\0", "YAML"), ("seed: \t- x: [}", "YAML"),
    ("{" * 3000, "nested"), ("- 1\n- 2\n", ""), ("5\n", ""), (f"seed: {'7' * 5000}\n", ""),
    ("model: {recall: {noise: .inf}}\n", "finite"),
    ("seed: !!python/object/apply:os.getcwd []\n", ""),
    ("a: &a [*a]\n", ""), ("\xff\xfe", ""), ("region: {controls: 5}\n", "controls"),
])
def test_hostile_files_of_settings(capsys, tmp_path, text, words):
    (folder := tmp_path / "experiment").mkdir()
    (folder / "bad.yaml").write_bytes(b"# @package _global_\n" + text.encode("latin-1"))
    capsys.readouterr()
    status = main(["plan", *STUDY, "--config-dir", str(tmp_path), "experiment=bad"])
    assert_refused((status, capsys.readouterr().err), words)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", [
    "wikitext", "2", "arc_easy", "mmlu_abstract-algebra", "a.b", "leaderboard/bbh,acc",
    "x:y@z", "naïve", "文", "my task",
])
def test_names_that_tasks_may_have(name):
    assert tasks_of({name: RecallTask()}) == {name: RecallTask()}
    assert read_metrics([{"name": "f1", "label": name}])[0].called == name


@pytest.mark.parametrize("name", [
    "", " ",
    "=cmd()", "+1", "-1", "@x", "<script>", "a<b", "a|b", "a\nb", "a\tb", "a\0b", "a\x1b[0m", "a`b", "a\"b", "a'b",
    "../x", "/x", "a" * 101, "\u202eab", "a;b", "a&b", "a$b", "a*b", "[x](y)", "a\\b", "a#b", "\ud800",
])
def test_names_that_tasks_and_metrics_may_not_have(name):
    for make in (lambda: tasks_of({name: RecallTask()}),
                 lambda: validated(StudySettings, {"tasks": {name: {"kind": "recall"}}}),
                 lambda: read_metrics([{"name": "metrics/f1", "label": name or " "}])):
        with pytest.raises(SettingError, match="use letters, digits"):
            make()


# ---------------------------------------------------------------- tasks that are not chosen


def test_settings_of_an_experiment_for_a_task_that_is_not_chosen(planned):
    assert planned("experiment=recall", "task=recall") == (0, "")
    assert planned("experiment=recall", "task=recall_probes", "~tasks.recall") == (0, "")


def test_settings_that_are_typed_for_a_task_that_is_not_chosen(planned):
    words = ("tasks.recall_probes: not a task of these settings", "task=recall_probes")
    assert_refused(planned("experiment=recall", "task=recall", "tasks.recall_probes.n_sequences=4"), *words)
    assert_refused(planned("+tasks.recall_probes.n_sequences=4"), "tasks.recall_probes.kind")


# ---------------------------------------------------------------- any value of any key


def leaves(tree: Any, where: str = "") -> list[str]:
    """Every key of a tree of settings, groups included."""
    if not isinstance(tree, dict) or not tree:
        return [where]
    return [*([where] if where else []), *(key for name, one in tree.items()
                                           for key in leaves(one, f"{where}.{name}" if where else name))]


def written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


# Numbers of thousands would be right for some keys, and their plans large.
NUMBERS = st.integers(-3, 70) | st.integers(2**62, 2**70) | st.integers(-(2**70), -(2**62)) | st.floats()
TEXTS = st.text(max_size=8) | st.sampled_from(["auto", "all", "0:1", "~", "../..", LONG, "a\nb", "${x}", "1e400"])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
ANY = st.recursive(SCALARS, lambda inside: st.lists(inside, max_size=3)
                   | st.dictionaries(st.sampled_from(["a", "kind", "by"]), inside, max_size=2), max_leaves=4)
KEYS = {
    "ablation": [*leaves(known_keys(StudySettings)), "tasks.recall", "tasks.recall.noise", "tasks.recall.seed",
                 "tasks.recall.n_sequences"],
    "spectra": leaves(known_keys(SpectraSettings)),
    "search": [f"search.{key}" for key in known_keys(SearchSettings)["search"]],
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys
                                           if kind == "ablation" or key.split(".")[0] not in ("model", "cluster")])
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(value=ANY)
def test_any_value_of_any_key_is_one_line_or_a_plan(planned, kind, key, value):
    assert kind in MEASUREMENTS
    status, said = planned(f"{key}={written(value)}", kind=kind)
    if status:
        assert_refused((status, said))
