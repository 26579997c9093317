"""What people type for a model or a task that is the name of no YAML file, and the defaults for models of their own."""

from __future__ import annotations

import pytest

from harness.errors import InputError
from harness.measurements import compose_settings
from harness.measurements.shorthands import as_meant, with_own_defaults
from harness.tasks.lm_eval import index

NAMES = {"model": ["gpt2", "recall"], "reference": ["llama"], "task": ["ioi", "lm_eval", "text"]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The present folder, with models of several kinds."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "sub/o'neil's model", "gpt2"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("small.Q4_1.gguf", "sub/other.gguf", "mine/model.safetensors"):
        (tmp_path / file).touch()
    return tmp_path


def model_of(*words: str):
    return compose_settings("spectra", words).model


def test_a_model_may_be_a_folder_a_file_or_a_name_on_the_hub(place):
    assert model_of("model=mine").name == "mine" and model_of("model=./mine").name == "./mine"
    assert model_of(f"model={place}/mine").name == f"{place}/mine"
    assert model_of("model=sub/o'neil's model").name == "sub/o'neil's model"
    assert model_of("model=EleutherAI/pythia-70m").name == "EleutherAI/pythia-70m"
    assert model_of("model=gpt2").name == "openai-community/gpt2", "the name of a YAML file comes first"
    here, below = model_of("model=small.Q4_1.gguf"), model_of("model=sub/other.gguf")
    assert (here.name, here.gguf_file, here.stem) == (str(place), "small.Q4_1.gguf", "small.Q4_1")
    assert (below.name, below.gguf_file, below.stem, below.dtype) == ("sub", "other.gguf", "other", "auto")
    assert compose_settings("spectra", ["model=mine", "reference=owner/base"]).reference.name == "owner/base"


@pytest.mark.parametrize(("typed", "words"), [
    ("model=none/of/that", ["model: no such folder 'none/of/that'", "owner/name", "gpt2"]),
    ("model=./none", ["model: no such folder './none'"]),
    ("model=none.gguf", ["model: no such file 'none.gguf'"]),
    ("model=mine/model.safetensors", ["model: 'mine/model.safetensors' is a file", "folder"]),
    ("model=gtp2", ["model: there is no 'gtp2'; did you mean 'gpt2'?", "owner/name"]),
    ("reference=small.Q4_1.gguf", ["reference: 'small.Q4_1.gguf' is a GGUF file"]),
    ("task=none.yaml", ["task: no such file 'none.yaml'"]),
])
def test_what_is_nothing_of_that_is_one_line(place, typed, words):
    with pytest.raises(InputError) as caught:
        compose_settings("spectra", [typed])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_task_may_be_any_of_lm_eval(place, monkeypatch):
    monkeypatch.setattr(index, "knows", lambda name: name in ("mmlu", "arc-it"))
    (place / "own.yaml").write_text("# mine\ntask: colours\ndataset_path: json\n")
    settings = compose_settings("ablation", ["task=[text,mmlu,own.yaml]", "tasks.mmlu.limit=5",
                                             "tasks.text.data_files=own.yaml", "model=mine"])
    assert list(settings.tasks) == ["text", "mmlu", "colours"]
    assert (settings.tasks["mmlu"].task, settings.tasks["mmlu"].limit) == ("mmlu", 5)
    assert (settings.tasks["colours"].task, settings.tasks["colours"].include_path) == ("colours", ".")
    assert as_meant(["task=arc-it"], NAMES)[-1] == "task=[]"
    for typed in ("task=text", "task=[text,ioi]", "task=lambda", "task=[text,lambda]", "task=null", "task=[]",
                  "task=${x}", "tasks.text.limit=1", "model=", "model={a: 1}", "+model=mine", "model"):
        assert as_meant([typed], NAMES) == [typed]


@pytest.mark.parametrize(("name", "known"), [("mmlu_abstract_algebra", True), ("mmlu", True), ("sciqq", False)])
def test_lm_eval_is_asked_without_importing_it(name, known):
    pytest.importorskip("lm_eval")
    assert index.knows(name) is known


def test_defaults_are_for_models_of_ones_own_and_for_groups_of_which_nothing_is_typed():
    own = ["target=type", "region=decile"]
    for typed in ([], ["model=recall"], ["seed=1"], ["experiment=laser", "model.name=x"], ["model.name=recall"],
                  ["model=gpt2", "model=recall_published"]):
        assert with_own_defaults(typed) == typed
    for typed in (["model=gpt2"], ["model.name=x/y"], ["model=adapter", "model.adapter=a"], ["+model.name=x"]):
        assert with_own_defaults(typed) == [*own, *typed]
    assert with_own_defaults(["model=gpt2", "target.blocks=[0]"])[:1] == own[1:]
    assert with_own_defaults(["model=gpt2", "region.values=[0.1]", "target=all"])[0] == "model=gpt2"
    assert with_own_defaults(["model=gpt2", "+tasks.a.kind=text"])[2] == "task=[]"


def test_settings_of_a_model_of_ones_own(place):
    settings = compose_settings("ablation", ["model=mine", "task=text", "tasks.text.data_files=small.Q4_1.gguf"])
    assert (settings.target.kind, settings.region.by, settings.region.controls) == ("type", "decile", ["none"])
    embedded = compose_settings("ablation", [])
    assert (embedded.target.kind, embedded.region.by) == ("matrix", "fraction")
    searched = compose_settings("search", ["model=mine", "task=ioi", "tasks.ioi.data_files=small.Q4_1.gguf"])
    assert (searched.target.kind, searched.region.by) == ("matrix", "fraction")


def test_one_number_is_a_list_of_one():
    settings = compose_settings("ablation", ["region=fraction", "region.values=0.2", "target.blocks=1",
                                             "region.random_seeds=3", "region.controls=[random]"])
    assert (settings.region.rule.values, settings.target.blocks, settings.region.random_seeds) == ([0.2], [1], [3])
    assert compose_settings("ablation", ["region=decile", "region.deciles=10"]).region.rule.deciles == [10]
    with pytest.raises(InputError, match="region.kinds: 'large' is wrong; it must be a list"):
        compose_settings("ablation", ["region=fraction", "region.kinds=large"])
