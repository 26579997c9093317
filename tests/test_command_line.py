"""The command line end to end: every YAML of conf/ runs, and bad input is one line, exit 2, nothing half-written."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes

from harness.cli import COMMANDS, main
from harness.engine.manifest import MANIFEST
from harness.measurements import compose_settings
from harness.measurements.ablation.cells import ADAPTIVE_VERSION
from harness.measurements.ablation.tables import TABLES, cell_states
from tests.checkpoints import ioi_file, save_checkpoint, text_file
from tests.processes import start_harness

CONF = Path(__file__).parents[1] / "conf"
TINY_RECALL = [
    "model.recall.dim=32", "model.recall.hidden_dim=64", "model.recall.context_length=32", "model.recall.steps=3",
    "model.recall.batch_size=8", "tasks.recall.n_sequences=16",
]  # fmt: skip
HUB_MODELS = {
    "gpt2": "gpt2", "gpt-j-6b": "gptj", "llama-2-7b": "llama", "llama-3.1-8b": "llama", "pretrained": "llama",
    "pythia-410m": "gpt_neox", "smollm2-135m": "llama", "roberta-base": "roberta",
    "llama-3.1-8b-instruct": "llama", "qwen2.5-7b-instruct": "qwen2", "gemma-3-1b-it": "gemma3_text",
    "olmo-2-7b-instruct": "olmo2",
}  # fmt: skip


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def recall(tmp_path_factory) -> list[str]:
    """Overrides that make the embedded model tiny and keep its cache out of the user's."""
    return [*TINY_RECALL, f"model.recall.cache_dir={tmp_path_factory.mktemp('recall')}"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> overrides for a tiny checkpoint of it and a text task on a small file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    text = text_file(folder / "text.txt")
    made: dict[str, Path] = {}

    def overrides(family: str = "llama", task: str = "text", blocks: int | None = None) -> list[str]:
        name = family if blocks is None else f"{family}-{blocks}"
        if name not in made:
            sizes = {} if blocks is None else {"num_hidden_layers": blocks}
            made[name] = save_checkpoint(folder / name, family, **sizes)
        return ["model=pretrained", f"model.name={made[name]}", f"task={task}", f"tasks.{task}.data_files={text}",
                f"tasks.{task}.split=train"]

    overrides.text = text
    return overrides


def run(folder: Path, *overrides: str) -> pd.DataFrame:
    """Run quietly through the command line; the metrics table, all of it ok."""
    output = folder / "study"
    assert main(["run", "--quiet", *overrides, f"output={output}"]) == 0
    table = pd.read_parquet(output / "metrics")
    manifest = json.loads((output / "manifest.json").read_text())
    assert set(table.cell_id) == {unit_id for unit_id, _ in manifest["units"]}
    assert (table.status == "ok").all(), table.error.dropna().tolist()[:1]
    return table


def refused(capsys, *arguments: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("harness: "), captured.err
    assert captured.out == ""
    return lines[0]


def test_no_group_of_settings_is_left_out():
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {
        "model", "reference", "target", "region", "task", "runtime", "cluster", "experiment", "tune",
        "calibration", "tracker",
    }  # fmt: skip


def content(group: str, name: str) -> dict:
    """What a YAML file says."""
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


# tests/models/test_adapter.py runs the model "adapter"
@pytest.mark.parametrize("name", [name for name in names("model") if name != "adapter"])
def test_every_model(name, recall, checkpoint, tmp_path):
    if name.startswith("recall"):
        table = run(tmp_path, f"model={name}", "target.kind=all", *recall)
    else:
        local = checkpoint(HUB_MODELS[name])
        task = local[2:] if HUB_MODELS[name] != "roberta" else checkpoint("roberta", "masked")[2:]
        table = run(tmp_path, f"model={name}", local[1], "target=all", "region=fraction", *task)
    assert table.n_blocks.min() >= 2
    said = content("model", name)
    assert set(table.dtype) == {"float32" if said.get("dtype", "float32") == "auto" else said.get("dtype", "float32")}
    # without what the run above replaces by something small
    settings = compose_settings("ablation", [f"model={name}", *(["model.name=x"] if said["name"] == "???" else [])])
    of_recall = said.pop("recall", {})
    assert {key: getattr(settings.model.recall, key) for key in of_recall} == of_recall
    if said["name"] == "???":
        said["name"] = "x"
    assert {key: getattr(settings.model, key) for key in said} == said


# targets of two blocks with q, k, v, o and the two layer types of a feed-forward layer without gate
ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["up_proj", "down_proj"]


@pytest.mark.parametrize("name", names("target"))
def test_every_target(name, recall, checkpoint, tmp_path):
    """The targets are those that the YAML's kind and layer types mean on a model of two blocks."""
    said = content("target", name)
    types = {"all": ATTENTION + FEED_FORWARD, "mlp": FEED_FORWARD}[said.get("layer_types", ["all"])[0]]
    expected = {
        "matrix": {f"{block}.{layer_type}" for block in range(2) for layer_type in types},
        "type_and_matrix": {*types, *(f"{block}.{layer_type}" for block in range(2) for layer_type in types)},
        "type": set(types), "block": {"block 0", "block 1"}, "all": {"all"},
    }[said["kind"]]
    local = checkpoint("gpt2", blocks=2)
    table = run(tmp_path, f"target={name}", "region=index", "region.intervals=['0:1']", *local)
    assert set(table.target) == {"baseline", "control", *expected}
    of_grid = table[~table.target.isin(["baseline", "control"])]
    assert set(of_grid.target_kind) == set(said["kind"].split("_and_"))
    per_target = {"matrix": 1, "type": 2, "block": len(types), "all": 2 * len(types)}
    assert all(of_grid.n_matrices == of_grid.target_kind.map(per_target))


def regions_of(said: dict) -> dict[str, tuple[str, str, slice | None]]:
    """Label -> (by, kind, which of 32 values) of what the content of a YAML file of conf/region lists; None where that
    depends on the singular values. Written out anew, without the harness."""
    by, listed = said["by"], {}

    def nearest(fraction: float) -> int:
        return round(32 * fraction)  # no boundary of a region in conf/ is a half

    def fraction(start: float, stop: float) -> slice | None:
        return slice(nearest(start), nearest(stop)) if by == "fraction" else None

    for kind in said.get("kinds", []):
        for value in said["values"]:
            start = {"large": 0, "bulk": 0.5 - value / 2, "small": 1 - value}[kind]
            label = f"{kind} {value:g}" if by == "fraction" else f"{kind} energy {value:g}"
            listed[label] = (by, kind, fraction(start, start + value))
    for text in said.get("intervals", []):
        start, stop = text.split(":")
        if by == "index":
            listed[f"index {text}"] = (by, "index", slice(*(int(bound) if bound else None for bound in (start, stop))))
        else:
            listed[f"interval {text}"] = (by, "interval", fraction(float(start), float(stop)))
    for number in said.get("deciles", []):
        part = ((number - 1) / 10, number / 10)
        where = slice(*(nearest(bound) for bound in part))
        listed[f"decile {number} ({part[0]:.1f}-{part[1]:.1f})"] = (by, "decile", where)
    for share in said.get("keep", []):
        listed[f"laser {share:g}"] = (by, "small", slice(int(32 * share), 32))
    if "ends" in said:
        listed |= {f"component {i}": (by, "component", slice(i, i + 1 or None))
                   for i in (*range(said["ends"]), *range(-said["ends"], 0))}
    for ranks in said.get("ranks", []):
        listed |= {f"compression {ratio:g}{' zero_sum' * (ranks == 'zero_sum')}": (by, ranks, None)
                   for ratio in said["ratios"]}
    for kind in said.get("mp", []):
        label = f"mp {kind} {said['estimator']}" + " tracy_widom" * said["tracy_widom"]
        listed[label] = (by, kind, None)
    for kind in said.get("gavish_donoho", []):
        listed[f"gavish_donoho {kind}"] = (by, kind, None)
    assert listed or by == "none", f"nothing that this test knows is listed in {said}"
    if "random" in said.get("controls", []):
        listed |= {f"random ({label}) seed 0": ("control", "random", where) for label, (*_, where) in listed.items()}
    return listed


# tests/measurements/ablation/ runs the regions of a change, which need a reference, and components that need a name
OF_A_CHANGE = ("change", "undo", "reweight")


@pytest.mark.parametrize("name", [name for name in names("region") if name not in (*OF_A_CHANGE, "named")])
def test_every_region(name, recall, tmp_path):
    """The regions of the table are those that the YAML lists, no more and no fewer, and remove what it says."""
    said = content("region", name)
    table = run(tmp_path, f"region={name}", *["target.kind=all"] * (name != "none"), *recall)
    expected = regions_of(said)
    of_grid = table[table.target == "all"].drop_duplicates("region").set_index("region")
    assert set(of_grid.index) == set(expected)
    controls = table[table.target == "control"]
    assert set(controls.region) == ({"none"} if "none" in said.get("controls", ["none"]) else set())
    for label, (by, kind, where) in expected.items():
        row = of_grid.loc[label]
        assert (row.region_by, row.region_kind) == (by, kind)
        assert row.n_values == 32 * row.n_matrices == 32 * 10  # recall's matrices are 32 x 32, 64 x 32 and 32 x 64
        if where is not None:
            assert row.n_removed == len(range(32)[where]) * row.n_matrices, label
        if where is not None and by != "control" and row.n_removed:
            start, stop, _ = where.indices(32)
            assert (row.fraction_start, row.fraction_stop) == (start / 32, stop / 32), label
    sides = [set(said.get(by, [])) for by in ("mp", "gavish_donoho") if by in said]
    if sides and sides[0] in ({"above", "inside", "below"}, {"above", "below"}):
        assert of_grid.n_removed.sum() == of_grid.n_values.iloc[0]  # they share out all values
    if said["by"] == "energy":
        for kind in said["kinds"]:
            for value in said["values"]:
                removed = of_grid.loc[f"{kind} energy {value:g}", "energy_removed"]
                assert removed >= value - 1e-9 if kind == "large" else removed <= value + 1e-9


@pytest.mark.parametrize("name", names("runtime"))
def test_every_runtime(name, checkpoint, tmp_path):
    """Every line of the YAML is in the manifest, and seen in the rows of a study in bfloat16."""
    said = content("runtime", name)
    study = [*checkpoint(), f"tasks.text.data_files={text_file(tmp_path / 'text.txt', 12000)}", "tasks.text.window=16",
             "target=block", "region=fraction", "model.dtype=bfloat16", "runtime.threads=1"]
    batches = [] if "batch_tokens" in said else ["runtime.batch_tokens=512"]
    table = run(tmp_path, f"runtime={name}", *study, *batches)
    frozen = json.loads((tmp_path / "study" / "manifest.json").read_text())["settings"]["runtime"]
    assert {key: frozen[key] for key in said} == said
    settings = [json.loads(text) for text in table.settings]
    edited = table[table.n_removed > 0]
    edit, precision = said.get("edit", "weight"), said.get("precision", "exact")
    assert set(table.edit) == {edit} == {one["edit"] for one in settings}
    # a cast weight keeps some of what was taken off it, a branch nothing
    assert (edited.realised_removal.min() > 0.9999) == (edit == "branch")
    assert set(edited.precision) == {precision}
    assert (edited.n < edited.n_available).any() == (precision == "adaptive") == edited.ci_low.notna().any()
    assert all(("adaptive" in one) == (precision == "adaptive") for one in settings)
    if precision == "adaptive":
        assert all(one["adaptive"] == {**said["adaptive"], "version": ADAPTIVE_VERSION} for one in settings)
        assert edited.n.min() >= said["adaptive"]["min_examples"]
    # only the control of the noise floor is scored in other batches; its row says which, and that they differ
    asked, floor = said.get("batch_tokens", 512), table.region_kind == "other_order"
    of_floor, of_others = [one for one, is_floor in zip(settings, floor) if is_floor], table.settings[~floor]
    assert {json.loads(text)["batch_tokens"] for text in of_others} == {asked}
    assert of_floor and all(one["batch_tokens"] < asked and one["order_differs"] for one in of_floor)
    assert not any("order_differs" in json.loads(text) for text in of_others)


@pytest.mark.parametrize("name", names("cluster"))
@pytest.mark.parametrize("measurement", ["ablation", "spectra", "search"])
def test_every_cluster(name, measurement, tmp_path):
    """tests/slurm has shards that run with them."""
    words = ["task=ioi", f"tasks.ioi.data_files={ioi_file(tmp_path / 'ioi.jsonl')}"] if measurement == "search" else []
    cluster = compose_settings(measurement, [f"cluster={name}", *words]).cluster
    said = content("cluster", name)
    assert said and {key: getattr(cluster, key) for key in said} == said


# tests/measurements/ablation/test_reweight.py has that of a task
@pytest.mark.parametrize("name", [name for name in names("calibration") if name != "label_words"])
def test_every_calibration(name, checkpoint, tmp_path):
    """Every line of the YAML is a setting of the text, and a study in its metric says so in every row."""
    said, text = content("calibration", name), tmp_path / "calibration.txt"
    text.write_text("red blue small big\n" * 200)
    words = [*checkpoint(), "target=all", "region=decile", "region.deciles=[10]", "region.metric=activations",
             f"calibration={name}", f"region.calibration.data_files={text}"]
    found = compose_settings("ablation", words).region.treatment.calibration.plain()
    assert {**said, "data_files": str(text)} == found
    few = ["region.calibration.limit=4", "region.calibration.window=16"]
    rows = run(tmp_path, *words, *few)
    edited = rows[rows.target_kind == "all"]
    assert set(edited.region_metric) == {"activations"} and edited.output_energy_removed.notna().all()
    assert all(json.loads(one)["n_windows"] == 4 for one in edited.calibration)


LOCAL_DATA = {
    "ioi": "ioi/ioi.jsonl", "factual": "counterfact/known_1000.jsonl", "lambada": "lambada/test.jsonl",
    "blimp": "blimp", "text": "tinystories/validation_first_stories.txt", "wikitext": "wikitext-2-raw/test.jsonl",
    "bookcorpus": "wikitext-2-raw/validation.jsonl",
}  # fmt: skip


def lm_eval_files(assets: Path, task: str) -> dict[str, Path]:
    folder = assets / "data" / task
    found = {path.stem: path for path in sorted(folder.rglob("*.jsonl"))}
    return {split: path for split, path in found.items() if split in ("train", "validation", "test")}


@pytest.mark.assets
@pytest.mark.parametrize("name", sorted({*LOCAL_DATA, "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande",
                                         "boolq", "gsm8k", "lm_eval"}))
def test_every_task_of_a_causal_model(name, assets, tmp_path):
    model = ["model=pretrained", f"model.name={assets / 'models' / 'stories260K'}", f"task={name}"]
    few = ["target.kind=all", "region=index", "region.intervals=['0:1']", "region.controls=[]", f"tasks.{name}.limit=3"]
    if name in LOCAL_DATA:
        data = [f"tasks.{name}.data_files={assets / 'data' / LOCAL_DATA[name]}"]
    else:
        task = "piqa" if name == "lm_eval" else name
        data = [f"+tasks.{name}.data_files.{split}={path}" for split, path in lm_eval_files(assets, task).items()]
        data += ["tasks.lm_eval.task=piqa"] if name == "lm_eval" else []
        # 18 words of a question are what a context of 512 characters-like tokens holds
        data += ["tasks.gsm8k.num_fewshot=0", "tasks.gsm8k.limit=1"] if name == "gsm8k" else []
    table = run(tmp_path, *model, *few, *data)
    assert set(table.task) == {name} and table.value.notna().all()


RULER = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
FUNCTIONS = [{"prompt": "def f(a):\n", "test": "def check(f):\n    assert f(1) == 1", "entry_point": "f"}]


@pytest.mark.parametrize("name", ["humaneval", *RULER])
def test_every_task_that_is_asked_in_texts(name, tmp_path):
    """By random weights, so that nothing is right; tests/tasks has models that answer."""
    model = save_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    few = [f"tasks.{name}.n_examples=1", f"tasks.{name}.length={4096 if name == 'cwe' else 600}"]
    if name == "humaneval":
        (tmp_path / "functions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FUNCTIONS))
        few = [f"tasks.{name}.data_files={tmp_path / 'functions.jsonl'}", f"tasks.{name}.execute=true"]
    table = run(tmp_path, "model=pretrained", f"model.name={model}", f"task={name}", *few, "target=all",
                f"tasks.{name}.max_new_tokens=2", "region=fraction", "region.values=[0.1]", "region.kinds=[large]")
    assert set(table.task) == {name} and (table.value == 0).all()


FIRST_LOOK = {
    "first_look_deciles": ["models/stories260K", {"wikitext": "wikitext-2-raw/test.jsonl",
                                                  "text": "tinystories/validation_first_stories.txt"}],
    "first_look_mlp": ["models/stories260K", {"ioi": "ioi/ioi.jsonl", "lambada": "lambada/test.jsonl"}],
}  # fmt: skip


@pytest.mark.assets
@pytest.mark.parametrize("name", sorted(FIRST_LOOK))
def test_first_look_experiments(name, assets, tmp_path):
    model, data = FIRST_LOOK[name]
    files = [f"tasks.{task}.data_files={assets / 'data' / path}" for task, path in data.items()]
    limits = [f"tasks.{task}.limit=2" for task in data]
    table = run(tmp_path, f"experiment={name}", f"model.name={assets / model}", *files, *limits, "target.blocks=[1]")
    assert set(table.task) == set(data)


@pytest.mark.parametrize("name", ["recall", "recall_published"])
def test_recall_experiments(name, recall, tmp_path):
    tiny = [*recall, "tasks.recall_probes.n_sequences=8", "region.intervals=['0:','1:4']"]
    assert set(run(tmp_path, f"experiment={name}", *tiny).task) == {"recall", "recall_probes"}


def test_every_experiment_is_run_by_a_test():
    """laser*: tests/measurements/search/test_search.py; small_values*, pair_*, prune_and_tune*: tests/experiments;
    svd_llm: tests/measurements/ablation/test_treatments.py;
    coupling*: tests/measurements/coupling/test_leaderboard.py."""
    elsewhere = ("laser", "small_values", "svd_llm", "coupling", "pair", "prune_and_tune")
    assert {name for name in names("experiment") if not name.startswith(elsewhere)} == {
        *FIRST_LOOK, "recall", "recall_published"
    }  # fmt: skip


REFUSALS = {
    "no such config": (["task=wikitex"], ["task: there is no 'wikitex'; did you mean 'wikitext'?", "lambada"]),
    "no such config in a list": (["task=[ioi,lambda]"], ["task: there is no 'lambda'; did you mean 'lambada'?"]),
    "unknown key": (["runtime.batch_token=5"], ["runtime.batch_token", "batch_tokens"]),
    "unknown group": (["regoin=fraction"], ["regoin"]),
    "unknown name in a group": (["region=fractions"], ["fractions", "fraction"]),
    "unknown layer type": (["target.layer_types=[up_projj]"], ["target.layer_types", "up_projj", "up_proj"]),
    "output embedding": (["target.layer_types=[lm_head]"], ["target.layer_types", "lm_head", "embedding"]),
    "layer type that the model lacks": (["target.layer_types=[gate_proj]"], ["target.layer_types", "gate_proj"]),
    "block that the model lacks": (["target.blocks=[7]"], ["target.blocks", "7", "0 to 1"]),
    "fraction above 1": (["region=fraction", "region.values=[1.5]"], ["region.values", "1.5"]),
    "fraction of 0": (["region=fraction", "region.values=[0]"], ["region.values"]),
    "fraction that is no number": (["region=fraction", "region.values=[ten]"], ["region.values", "ten"]),
    "empty region": (["region=fraction", "region.values=[0.001]"], ["region", "empty", "singular values"]),
    "no kinds": (["region=energy", "region.kinds=[]"], ["region.kinds: []", "[small]"]),
    "no values": (["region=fraction", "region.values=[]"], ["region.values: []", "region.intervals"]),
    "no deciles": (["region=decile", "region.deciles=[]"], ["region.deciles: []", "[10]"]),
    "no side of the bulk": (["region=mp", "region.mp=[]"], ["region.mp: []", "[above]"]),
    "no side of the threshold": (["region=gavish_donoho", "region.gavish_donoho=[]"], ["region.gavish_donoho: []"]),
    "target of no region": (["region=none", "target=type"], ["target.kind: 'type'", "region=none"]),
    "control of no region": (["region=none", "region.controls=[random]"], ["region.controls: 'random'", "region=none"]),
    "treatment of no region": (["region=none", "region.keep=true"], ["region.by: 'none'", "keep"]),
    "no seeds": (["region.controls=[random]", "region.random_seeds=[]"], ["region.random_seeds: []", "[0]"]),
    "no blocks": (["target.blocks=[]"], ["target.blocks: []", "null"]),
    "values of deciles": (["region=decile", "region.values=[0.3]"], ["region.values: [0.3]", "fraction or energy"]),
    "deciles of the bulk": (["region=mp", "region.deciles=[1]"], ["region.deciles: [1]", "region.by=decile"]),
    "noise of fractions": (["region=fraction", "region.estimator=bulk_fit"], ["region.estimator", "region.by=mp"]),
    "margin of fractions": (["region=fraction", "region.tracy_widom=true"], ["region.tracy_widom", "region.by=mp"]),
    "seeds of no control": (["region=fraction", "region.random_seeds=[1,2]"], ["region.random_seeds: [1, 2]", "none"]),
    "negative seed": (["seed=-1"], ["seed: -1", "at least 0"]),
    "negative seed of a control": (["region.random_seeds=[0,-2]"], ["region.random_seeds: -2", "at least 0"]),
    "negative seed of a task": (["tasks.recall.seed=-1"], ["tasks.recall.seed: -1", "at least 0"]),
    "revision of the embedded model": (["model.revision=main"], ["model.revision: 'main'", "model.name=recall"]),
    "GGUF file of the embedded model": (["model.gguf_file=x.gguf"], ["model.gguf_file: 'x.gguf'", "model.name=recall"]),
    "training of a model that is there": (["model.name=gpt2"], ["model.recall.dim: 32", "'gpt2'"]),
    "task that is a number": (["+tasks.mine=5"], ["tasks.mine: 5", "+tasks.mine.kind"]),
    "output that is a file": (["output={file}"], ["output", "notes.txt is a file"]),
    "output below a file": (["output={file}/study"], ["output", "notes.txt is a file"]),
    "output that cannot be made": (["output=/proc/study"], ["output", "/proc/study"]),
    "setting without a key": (["=5"], ["'=5'", "key=value"]),
    "group that is a number": (["region=5"], ["region: '5'", "fraction"]),
    "group that is null": (["target=null"], ["target: 'null'", "matrix"]),
    "group without a name": (["region="], ["region: there is no ''", "fraction"]),
    "list of tasks with a number": (["task=[recall,5]"], ["task: '[recall,5]'", "recall"]),
    "model without a name": (["model=gpt2", "model.name="], ["model.name: must be set"]),
    "attention of the embedded model": (["model.attn_implementation=flex"], ["attn_implementation: 'flex'", "sdpa"]),
    "unknown attention": (
        ["model=gpt2", "model.name={checkpoint}", "model.attn_implementation=foo"],
        ["model.attn_implementation: 'foo'", "eager", "sdpa", "flash_attention_2"],
    ),
    "settings of a search": (["search.compose=greedy"], ["search.compose", "harness run", "harness search"]),
    "positions beyond the rank": (
        ["region=index", "region.intervals=['200:']"], ["index 200:", "32 singular values", "positions are 0 to 31"]
    ),
    "unknown key of a chosen task": (["tasks.recall.n_sequence=3"], ["tasks.recall.n_sequence", "'n_sequences'"]),
    "unknown key of a task of one's own": (
        ["+tasks.mine.kind=text", "tasks.mine.windw=3"], ["tasks.mine.windw", "did you mean 'window'"]
    ),
    "key that the YAML of a task leaves out": (
        ["task=gsm8k", "tasks.gsm8k.data_files.test=x"], ["+tasks.gsm8k.data_files.test=..."]
    ),
    "task that was not chosen": (["tasks.text.limit=1"], ["tasks.text", "task=text"]),
    "misspelt task": (["tasks.txt.limit=1"], ["tasks.txt", "did you mean 'text'", "task="]),
    "decile 11": (["region=decile", "region.deciles=[11]"], ["region.deciles", "11"]),
    "interval beyond the grammar": (["region=index", "region.intervals=['3-5']"], ["region", "3-5"]),
    "unknown control": (["region.controls=[noen]"], ["region.controls", "noen", "none"]),
    "unknown edit": (["runtime.edit=wieght"], ["runtime.edit", "wieght", "weight"]),
    "no task": (["task=[]"], ["task"]),
    "unknown kind of task": (["+tasks.mine.kind=mine"], ["tasks.mine.kind", "mine", "lambada"]),
    "unknown key of a task": (["+tasks.recall.n_sequence=3"], ["tasks.recall.n_sequence", "n_sequences"]),
    "limit of 0": (["task=text", "tasks.text.limit=0"], ["tasks.text.limit"]),
    "missing data file": (["task=text", "tasks.text.data_files=/no/such.txt"], ["tasks.text.data_files", "/no/such"]),
    "unknown dtype": (["model.dtype=float8"], ["model.dtype", "float8", "bfloat16"]),
    "device that is not there": (["model.device=gpu0"], ["model.device", "gpu0"]),
    "folder that is not there": (["task=wikitext", "model=pretrained", "model.name=./none"], ["model.name", "./none"]),
    "hub name that cannot be had": (["model=no/such-model", "task=wikitext"], ["model.name", "no/such-model"]),
    "model that must be named": (["model=pretrained"], ["model.name: must be set"]),
    "task of another model": (["model=gpt2", "model.name={checkpoint}"], ["tasks.recall", "embedded"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_line_and_leaves_nothing(name, recall, checkpoint, tmp_path, capsys):
    overrides, mentioned = REFUSALS[name]
    folder = checkpoint("gpt2")[1].removeprefix("model.name=") if "{checkpoint}" in str(overrides) else ""
    dropped = "tasks.recall." if any(item.startswith("task=") for item in overrides) else "-"
    dropped = ("model.recall.", dropped) if any(item.startswith("model=") for item in overrides) else dropped
    (file := tmp_path / "notes.txt").write_text("mine")
    output = tmp_path / "study"
    settings = [*(item for item in recall if not item.startswith(dropped)), f"output={output}",
                *(item.format(checkpoint=folder, file=file) for item in overrides)]
    line = refused(capsys, "run", *settings)
    for word in mentioned:
        assert word in line
    assert not output.exists() and file.read_text() == "mine"


def test_no_region_is_the_baseline_alone(recall, tmp_path, capsys):
    """Plan, run, status and report of one cell, whose number is that of the baseline of another study."""
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    assert main(["plan", "region=none", *recall, f"output={alone}"]) == 0
    assert "no targets: the model is measured as it is" in capsys.readouterr().out
    table = run(alone, "region=none", *recall)
    assert main(["status", str(alone / "study")]) == 0 and main(["report", str(alone / "study")]) == 0
    assert "units 1  done 1  failed 0  missing 0" in capsys.readouterr().out
    other = run(beside, "target.kind=all", "region=index", "region.intervals=['0:1']", *recall)
    baseline = other[other.target_kind == "baseline"]
    for column in ("cell_id", "metric", "value", "stderr"):
        assert table[column].tolist() == baseline[column].tolist()
    assert len(table) and "region.by: 'none'" in refused(capsys, "search", "region=none", *recall)


def test_window_longer_than_the_context(checkpoint, tmp_path, capsys):
    line = refused(capsys, "run", *checkpoint(), "tasks.text.window=4096", f"output={tmp_path / 'study'}")
    assert "tasks.text.window" in line and "4096" in line and "128" in line
    assert not (tmp_path / "study").exists()


def test_checkpoint_with_nan_weights(checkpoint, tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "broken", "llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    overrides = [item.replace(checkpoint()[1], f"model.name={folder}") for item in checkpoint()]
    capsys.readouterr()
    assert main(["run", "--quiet", *overrides, f"output={tmp_path / 'study'}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.name" in line and "not finite" in line and name in line
    assert not (tmp_path / "study").exists()


def test_unknown_architecture_is_refused_by_name_before_weights_load(checkpoint, tmp_path, capsys):
    folder = tmp_path / "bloom"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom", "hidden_size": 8, "n_layer": 1}))
    (folder / "model.safetensors").write_bytes(b"weights that cannot be read")
    line = refused(capsys, "run", "model=pretrained", f"model.name={folder}", *checkpoint()[2:])
    assert "bloom" in line and "llama" in line and "gpt_neox" in line


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.settings])
def test_examples_of_the_help_compose(command, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    Path("results", "gpt2-components").mkdir(parents=True)
    for name in ("my.txt", "ioi.jsonl", "blimp", "train.jsonl", "validation.jsonl"):
        Path(name).touch()
    assert COMMANDS[command].examples
    for line in COMMANDS[command].examples:
        words = line.partition("  #")[0].split()
        assert line in shown and words[:2] == ["harness", command]
        measurement, settings = COMMANDS[command].settings, [word for word in words[2:] if word != "--freeze"]
        if settings and "=" not in settings[0] and not settings[0].startswith("-"):
            measurement, *settings = settings  # harness plan spectra ...
        if "--study" not in words and "-m" not in words:
            compose_settings(measurement, settings)


def test_quiet_is_quiet(recall, tmp_path, capfd):
    settings = ["region=index", "target=all", *recall, "model.recall.seed=77"]
    assert main(["run", "--quiet", *settings, f"output={tmp_path / 'study'}"]) == 0
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_folder_of_another_study(recall, tmp_path, capsys):
    run(tmp_path, "target.kind=all", "region=fraction", *recall)
    line = refused(capsys, "run", "target.kind=all", "region=decile", *recall, f"output={tmp_path / 'study'}")
    assert "output" in line and "another ablation" in line and "region.by" in line


def test_folder_of_another_schema_version(recall, tmp_path, capsys, monkeypatch):
    run(tmp_path, "target.kind=all", "region=fraction", *recall)
    monkeypatch.setattr("harness.measurements.ablation.tables.TABLES", replace(TABLES, version=10**6))
    again = ["run", "target.kind=all", "region=fraction", *recall, f"output={tmp_path / 'study'}"]
    for arguments in (again, ["report", str(tmp_path / "study")]):
        assert "schema version" in refused(capsys, *arguments)


@pytest.mark.parametrize("command", ["status", "report"])
def test_folder_without_a_study(command, tmp_path, capsys):
    assert "manifest.json" in refused(capsys, command, str(tmp_path))


def test_a_study_and_spectra_do_not_share_a_folder(recall, tmp_path, capsys):
    """tests/engine/test_kinds.py: nor do any other two kinds, whatever is there of them."""
    for command, other in (("run", "spectra"), ("spectra", "run")):
        folder = tmp_path / command
        words = {"run": [*recall, "target=all"], "spectra": [item for item in recall if not item.startswith("tasks.")]}
        assert main(["plan", "--freeze", other, *words[other], f"output={folder}"]) == 0
        kind = {"run": "ablation"}.get(other, other)
        line = refused(capsys, command, *words[command], f"output={folder}")
        assert f"output: {folder} holds a run of another kind ({kind})" in line
        assert [path.name for path in folder.iterdir()] == [MANIFEST]


def test_no_shards(tmp_path, capsys):
    assert "--of: 0" in refused(capsys, "work", str(tmp_path), "--shard", "0", "--of", "0")


@pytest.mark.parametrize(("n", "device", "words"), [(0, "cuda", "no CUDA device"), (2, "cuda:2", "cuda:0 to cuda:1")])
@pytest.mark.parametrize("command", ["run", "search", "export", "spectra"])
def test_device_that_this_machine_lacks(command, n, device, words, recall, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: n > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: n)
    settings = [item for item in recall if command not in ("spectra", "search") or not item.startswith("tasks.")]
    if command == "search":
        settings += ["task=ioi", f"tasks.ioi.data_files={ioi_file(tmp_path / 'ioi.jsonl')}"]
    line = refused(capsys, command, *settings, f"model.device={device}", f"output={tmp_path / 'new'}")
    assert "model.device" in line and words in line and not (tmp_path / "new").exists()


@pytest.mark.parametrize("setting", [
    "blocks=[]", "seed=-1", "model.revision=main", "model.attn_implementation=foo", "output=/proc/x",
])
def test_bad_settings_of_spectra_are_one_line(setting, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "spectra", setting).startswith(f"harness: {setting.split('=')[0]}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["status", "report", "work", "compact"])
@pytest.mark.parametrize("text", ["{}", "[]", '{"id": "x", "units": 3}'])
def test_manifest_that_is_none(command, text, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(text)
    line = refused(capsys, command, str(tmp_path))
    assert "manifest.json: not a manifest" in line and "settings" in line


def test_kill_9_in_mid_study_then_rerun_equals_an_uninterrupted_run(recall, tmp_path):
    settings = ["region=decile", "target.layer_types=[up_proj,down_proj]", *recall]
    whole = run(tmp_path / "whole", *settings)
    folder = tmp_path / "killed" / "study"
    process = start_harness("run", "--quiet", *settings, f"output={folder}", log=tmp_path / "log")
    while process.poll() is None and len(cell_states(folder) if folder.exists() else ()) < 6:
        time.sleep(0.01)
    process.kill()
    process.wait()
    n_before = len(cell_states(folder))
    assert 6 <= n_before < whole.cell_id.nunique()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "metrics").rglob("*.parquet")}
    resumed = run(tmp_path / "killed", *settings)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    key = ["cell_id", "metric"]
    assert not resumed.duplicated(key).any()
    numbers = [*key, "value", "stderr", "n", "delta", "delta_stderr", "p_value", "n_removed", "realised_removal"]
    whole, resumed = (table.sort_values(key)[numbers].reset_index(drop=True) for table in (whole, resumed))
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)


def test_rerun_measures_nothing_and_a_changed_setting_is_another_study(recall, tmp_path):
    settings = ["target.kind=all", "region=fraction", *recall]
    first = run(tmp_path, *settings)
    again = run(tmp_path, *settings)
    pd.testing.assert_frame_equal(first, again)
    other = run(tmp_path / "other", *settings, "tasks.recall.seed=1")
    assert not set(first.cell_id) & set(other.cell_id)
    threads = run(tmp_path / "threads", *settings, "runtime.threads=1")
    assert set(first.cell_id) == set(threads.cell_id)


def test_plan_reads_no_weights(checkpoint, tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "model", "gpt2")
    (folder / "model.safetensors").write_bytes(safetensors_bytes({}))  # without any weights
    assert main(["plan", "model=pretrained", f"model.name={folder}", "target=type", "region=decile",
                 *checkpoint()[2:]]) == 0  # fmt: skip
    out = capsys.readouterr().out
    # 6 types x 10 deciles, the baseline and the control
    assert "cells 62" in out and "targets 7: control, q_proj" in out


def test_run_reports_with_a_table_and_figures(recall, tmp_path, capsys):
    output = tmp_path / "study"
    assert main(["run", "target.kind=matrix", "region=fraction", *recall, f"output={output}"]) == 0
    out = capsys.readouterr().out
    assert "baseline" in out and "accuracy_clean" in out
    assert (output / "report.md").is_file() or list(output.rglob("*.md"))
    assert list(output.rglob("*.png"))


def test_multirun_makes_one_study_per_combination(recall, tmp_path, monkeypatch, capsys):
    words = ["run", "-m", "--quiet", "model.recall.seed=0,1", "target.kind=all", "region=fraction", *recall,
             "output=" + str(tmp_path) + "/seed${hydra:job.num}"]
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0, capsys.readouterr().err
    ids = {json.loads((tmp_path / f"seed{seed}" / "manifest.json").read_text())["id"] for seed in (0, 1)}
    assert len(ids) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"seed0", "seed1"}


@pytest.mark.parametrize(("overrides", "mentioned"), [
    (["target=foo,bar"], ["target: there is no 'foo'", "matrix"]),
    (["seed=abc,-1"], ["seed: ", "'abc'"]),
    (["region=fraction", "region.values=[3],[4]"], ["region.values: 3.0", "at most 1"]),
    (["hydra.swep.dir=x"], ["hydra.swep"]),
])
def test_multirun_that_cannot_run_is_one_line_and_leaves_nothing(overrides, mentioned, recall, tmp_path, capsys,
                                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "run", "-m", *recall, *overrides, "output=" + str(tmp_path) + "/seed${seed}")
    for word in mentioned:
        assert word in line
    assert not list(tmp_path.iterdir())


def test_cell_whose_loss_is_not_finite_is_an_error_row(checkpoint, tmp_path, capsys):
    """Block 0 takes 40000 off the residual stream and block 1 puts it back: without the former, float16 overflows."""
    folder = save_checkpoint(tmp_path / "steep", "gpt2")
    weights = load_file(folder / "model.safetensors")
    prefix = next(key for key in weights if key.endswith("wpe.weight")).removesuffix("wpe.weight")
    weights[prefix + "wpe.weight"][:, 0] = 4e4
    for block, sign in ((0, -1.0), (1, 1.0)):
        mlp = f"{prefix}h.{block}.mlp."
        weights[mlp + "c_fc.weight"][:, 0] = 0.0
        weights[mlp + "c_fc.bias"][0] = 10.0
        weights[mlp + "c_proj.weight"][0, 0] = sign * 4e3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    output = tmp_path / "study"
    overrides = ["model=pretrained", f"model.name={folder}", *checkpoint()[2:], "region=fraction",
                 "target.layer_types=[down_proj]", "model.dtype=float16", f"output={output}"]  # fmt: skip
    capsys.readouterr()
    assert main(["run", "--quiet", *overrides]) == 1
    n_failed, n_cells = (list(cell_states(output).values()).count("error"), len(cell_states(output)))
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"harness: {n_failed} of {n_cells} units failed; harness status {output} --failed shows why"
    assert sum(line.startswith("harness: ") for line in said) == 1
    table = pd.read_parquet(output / "metrics")
    failed = table[table.status == "error"]
    assert ("0.down_proj", "large 0.1") in set(zip(failed.target, failed.region, strict=True))
    assert failed.value.isna().all() and failed.error.str.contains("not finite").all()
    others = table[(table.status == "ok") & table.target.isin(["baseline", "1.down_proj"])]
    assert len(others) and others.value.notna().all()
    assert main(["status", str(output)]) == 0
    assert "not finite" in capsys.readouterr().out
