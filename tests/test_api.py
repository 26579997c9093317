"""The Python door: the examples of its docstrings run, a module of the user's own comes back as it was."""

import doctest
import inspect
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_rel
from torch import nn

import harness as sh
import harness.api.model
import harness.api.runs
import harness.api.scores
import harness.api.tasks
from harness.cli import main
from harness.measurements.ablation.tables import read_examples
from tests.checkpoints import save_checkpoint, text_file, tokenizer
from tests.models.tiny import tiny_model
from tests.studies import N_SMALL

NAMES = ("John", "Mary")


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """ioi.jsonl in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{start} {a} and {b} went to the store and {b} gave a book to", "answer": a}
            for start in ("then", "and", "it was", "in the house") for a, b in (NAMES, NAMES[::-1])]
    (tmp_path / "ioi.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def module():
    """A module in training mode, with gradients, as somebody who trains it has it."""
    found = tiny_model("llama").train()
    found.model.layers[1].eval()
    return found


def everything(module: nn.Module) -> tuple:
    """Weights as bytes, gradients, modes, hooks and whether each parameter wants a gradient."""
    weights = {name: (tensor.data_ptr(), tensor.detach().clone().reshape(-1).view(torch.uint8)) for name, tensor in
               [*module.named_parameters(), *module.named_buffers()]}
    modes = {name: one.training for name, one in module.named_modules()}
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())
    own = {name: sorted(vars(one)) for name, one in module.named_modules()}
    return weights, modes, hooks, own, {name: p.requires_grad for name, p in module.named_parameters()}


def assert_untouched(before: tuple, module: nn.Module) -> None:
    after = everything(module)
    assert before[1:] == after[1:]
    for name, (place, content) in before[0].items():
        assert after[0][name][0] == place and torch.equal(after[0][name][1], content), name


DOCUMENTED = [name for name, one in vars(harness.api).items()
              if getattr(one, "__module__", "").startswith("harness.api") and not name.startswith("_")
              and (inspect.isfunction(one) or inspect.isclass(one))]


def test_what_is_public_is_documented_with_an_example():
    assert set(DOCUMENTED) <= set(sh.__all__)
    for name in ("wrap", "load", "task", "paired", "run", "measure", "open", "compare"):
        assert ">>>" in getattr(sh, name).__doc__, name
    for method in (sh.Model.ablated, sh.Model.score, sh.MatrixView.decompose):
        assert ">>>" in method.__doc__
    for name in sh.__all__:
        assert name.startswith("__") or getattr(sh, name).__doc__, name


def test_examples_of_the_docstrings(prompts):
    checkpoint = save_checkpoint(prompts / "checkpoint", "llama")
    module = tiny_model("llama")
    model, ioi = sh.wrap(module, tokenizer()), sh.task("ioi", data_files="ioi.jsonl")
    study = sh.run(model, "type", regions=[sh.regions.small(0.5)], tasks=[ioi], progress=False)
    tuned = sh.wrap(tiny_model("llama", seed=1), tokenizer())
    tuned_study = sh.run(tuned, "type", regions=[sh.regions.small(0.5)], tasks=[ioi], progress=False)
    known = {"sh": sh, "module": module, "tokenizer": tokenizer(), "model": model, "ioi": ioi, "study": study,
             "tuned_study": tuned_study, "checkpoint": str(checkpoint), "tokens": torch.randint(3, 60, (2, 9))}
    finder, n_tried = doctest.DocTestFinder(exclude_empty=True), 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for part in (harness.api.model, harness.api.runs, harness.api.scores, harness.api.tasks, harness, sh.regions):
        for test in finder.find(part, globs=dict(known)):
            assert runner.run(test).failed == 0, test.name
            n_tried += len(test.examples)
    assert n_tried >= 20


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_a_module_comes_back_as_it_was(model_type, prompts):
    module = tiny_model(model_type).train()
    module.get_input_embeddings().weight.requires_grad_(False)
    before = everything(module)
    model = sh.wrap(module, tokenizer())
    model["1.o_proj"].decompose()
    ioi = sh.task("ioi", data_files="ioi.jsonl")
    edits = ("weight",) if model_type == "mixtral" else ("weight", "branch")
    for edit in edits:
        with model.ablated("mlp", sh.regions.small(0.5), edit=edit):
            model.score(ioi)
    sh.run(model, "type", regions=[sh.regions.small(0.5)], tasks=[ioi], progress=False)
    with pytest.raises(RuntimeError, match="mine"), model.ablated("all", sh.regions.large(0.1)):
        raise RuntimeError("mine")
    assert_untouched(before, module)


def test_gradients_flow_as_before(module):
    model, tokens = sh.wrap(module), torch.randint(3, 60, (2, 9))
    with model.ablated("mlp", sh.regions.small(0.5)):
        module(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_an_ablation_is_the_formula_in_float64(module):
    model = sh.wrap(module)
    weight = model["2.up_proj"].weight.double()
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    kept = (left[:, :12] * sigma[:12]) @ right[:12]
    with model.ablated("2.up_proj", sh.regions.interval(0.5, 1.0)) as removed:
        assert torch.allclose(model["2.up_proj"].weight.double(), kept, atol=1e-6)
        assert removed.energy_removed == pytest.approx(float((sigma[12:] ** 2).sum() / (sigma**2).sum()), rel=1e-9)
    assert torch.equal(model["2.up_proj"].weight.double(), weight)


def test_decompositions_are_kept_until_the_weights_change(module):
    model = sh.wrap(module)
    view = model["0.down_proj"]
    first = view.decompose()
    assert view.decompose() is first
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    second = view.decompose()
    assert second is not first
    assert np.allclose(second.sigma, np.linalg.svd(view.weight.double().numpy(), compute_uv=False), rtol=1e-10)


def test_paired_is_the_paired_t_test(module, prompts):
    model, ioi = sh.wrap(module, tokenizer()), sh.task("ioi", data_files="ioi.jsonl")
    base = model.score(ioi)
    with model.ablated("mlp", sh.regions.large(0.3)):
        ablated = model.score(ioi)
    table = sh.paired(ablated, base).set_index("metric")
    one, other = (score.scores["logprob"].score for score in (ablated, base))
    assert table.p_value["logprob"] == pytest.approx(ttest_rel(one, other).pvalue)
    assert table.delta["logprob"] == pytest.approx((one - other).mean())
    half = model.score(sh.task("ioi", data_files="ioi.jsonl", limit=4))
    with pytest.raises(sh.InputError, match="did not ask the same"):
        sh.paired(half, base)


def test_a_study_equals_the_command_line(prompts):
    folder = save_checkpoint(prompts / "checkpoint", "llama")
    text = text_file(prompts / "text.txt")
    words = ["model=pretrained", f"model.name={folder}", "model.dtype=float32", "target=type", "region=fraction",
             "region.kinds=[small]", "task=text", f"tasks.text.data_files={text}"]
    assert main(["run", "--quiet", *words, f"output={prompts / 'line'}"]) == 0
    line = sh.open(prompts / "line")
    model = sh.load(str(folder), dtype="float32")
    study = sh.run(model, "type", regions=[sh.regions.small(0.1)], tasks=[sh.task("text", data_files=str(text))],
                   output=prompts / "python", progress=False)
    names = ["cell_id", "task", "metric", "value", "stderr", "delta", "p_value", "target", "region"]
    pd.testing.assert_frame_equal(line.metrics[names], study.metrics[names], check_exact=True)
    # and the scores one by one
    with model.ablated("down_proj", sh.regions.small(0.1)):
        score = model.score(sh.task("text", data_files=str(text)))
    cell = study.metrics[study.metrics.target == "down_proj"].iloc[0]
    assert score.metrics.value[0] == cell.value
    examples = read_examples(study.folder, [cell.cell_id])
    nll = examples[examples.metric == "nll"].score.to_numpy()
    assert np.array_equal(score.scores["nll"].score, nll)


def test_a_study_knows_the_weights_that_it_measured(prompts):
    """Other weights are another study, also where they came from a checkpoint whose files did not change."""
    model = sh.load(str(save_checkpoint(prompts / "checkpoint", "llama")))
    asked = {"regions": [sh.regions.small(0.5)], "tasks": [sh.task("ioi", data_files="ioi.jsonl")], "progress": False}
    first = sh.run(model, "all", **asked)
    again = sh.run(model, "all", **asked)
    assert first.folder == again.folder and (first.metrics.started_at == again.metrics.started_at).all()
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    other = sh.run(model, "all", **asked)
    assert not set(other.metrics.cell_id) & set(first.metrics.cell_id)
    value = dict(zip(other.metrics.target + other.metrics.metric, other.metrics.value))
    assert value["baselinelogprob"] == pytest.approx(model.score(asked["tasks"][0]).metrics.value[3], abs=1e-6)


def test_a_study_of_edited_weights_is_refused(module, prompts):
    model = sh.wrap(module, tokenizer())
    with model.ablated("mlp", sh.regions.small(0.1)), pytest.raises(sh.InputError, match="leave the"):
        sh.run(model, regions=[sh.regions.small(0.5)], tasks=[sh.task("ioi", data_files="ioi.jsonl")])


def test_a_study_of_a_module_is_not_taken_up_by_another_process(module, prompts, capsys):
    model = sh.wrap(module, tokenizer(), name="mine")
    study = sh.run(model, "all", regions=[sh.regions.small(0.5)], tasks=[sh.task("ioi", data_files="ioi.jsonl")],
                   progress=False)
    assert set(study.metrics.model) == {"memory/mine"} and set(study.states.values()) == {"ok"}
    capsys.readouterr()
    assert main(["work", str(study.folder)]) == 2
    assert "was handed over by a Python process" in capsys.readouterr().err
    for command in ("status", "report", "compact"):
        assert main([command, str(study.folder)]) == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_an_architecture_that_is_not_in_the_table():
    module = nn.ModuleDict({"stack": nn.ModuleList([Block(), Block()])})
    with pytest.raises(sh.InputError, match="model type None is not known"):
        sh.wrap(module)
    family = sh.Family({"": "stack"}, {"up.weight": sh.Stored(("up_proj",)), "down.weight": sh.Stored(("down_proj",))})
    model = sh.wrap(module, family=family)
    assert model.matrices == ("0.up_proj", "0.down_proj", "1.up_proj", "1.down_proj")
    with model.ablated("down_proj", sh.regions.small(1.0), blocks=[1]) as removed:
        assert removed.energy_removed == pytest.approx(1.0) and not module["stack"][1].down.weight.any()
        assert module["stack"][0].down.weight.any()
    with pytest.raises(sh.InputError, match="without a transformers config"):
        model.score("recall")


MISTAKES = [
    (lambda model: model["3.down_proj"], "'3.down_proj' is not a matrix of this model; did you mean"),
    (lambda model: model.ablated("mpl", sh.regions.small(0.1)).__enter__(), "'mpl' is not a layer type"),
    (lambda model: model.ablated("mlp", sh.regions.small(0.1), blocks=[9]).__enter__(), "9 is not a block"),
    (lambda model: model.ablated("mlp", sh.regions.small(0.1), edit="wait").__enter__(), "use weight or branch"),
    (lambda model: model.score("recall"), "needs the embedded model"),
    (lambda model: sh.task("txt"), "there is no 'txt'"),
    (lambda model: sh.task("text", windw=3), "windw: unknown key; did you mean 'window'"),
    (lambda model: sh.task("text", data_files="none.txt"), "no such file 'none.txt'"),
    (lambda model: sh.task("lm_eval"), "task must be given"),
    (lambda model: sh.load("no/such-model"), "no/such-model"),
    (lambda model: sh.load("recall", dtyp="float32"), "model.dtyp: unknown key; did you mean 'dtype'"),
    (lambda model: sh.run(model, "matrices", regions=[], tasks=[]), "target.kind: 'matrices' is wrong; did you mean"),
    (lambda model: sh.open("."), "no manifest.json"),
    (lambda model: sh.measure("spectre"), "'spectre' is no measurement"),
    (lambda model: sh.measure("spectra", "inti=both"), "inti: unknown key; did you mean 'init'"),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=[words[:30] for _, words in MISTAKES])
def test_mistakes_are_answered_in_one_line(mistake, words, prompts):
    with pytest.raises(sh.InputError) as caught:
        mistake(sh.wrap(tiny_model("llama"), tokenizer()))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, harness; harness.__all__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pandas", "pyarrow", "transformers", "hydra", "pydantic", "yaml"}
    assert not heavy & set(done.stdout.split())


def test_rows_of_a_unit_that_is_not_done_are_not_shown(clean_small, tmp_path):
    """A kill leaves rows of the examples whose row of the metrics, which says that the cell is done, is not written."""
    folder = shutil.copytree(clean_small, tmp_path / "study")
    lost = sorted((folder / "metrics").glob("*.parquet"))[0]
    (cell,) = pd.read_parquet(lost)["cell_id"].unique()
    lost.unlink()
    there = sh.open(folder)
    assert cell in set(pd.read_parquet(folder / "examples")["cell_id"])
    assert cell not in set(there.examples["cell_id"]) and cell not in set(there.metrics["cell_id"])
    assert len(set(there.examples["cell_id"])) == N_SMALL - 1 and there.states[cell] == "missing"


def test_a_name_of_lm_eval_is_a_task():
    found = sh.task("mmlu", limit=3)
    assert (found.name, found.task.task, found.task.limit) == ("mmlu", "mmlu", 3)
