"""docs/architecture.md tells the truth of the rooms: who imports whom, and what runs without which library."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "harness"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = re.findall(r"(?m)^\| `harness/(\w+)/` \|", PAGE)
APART = ROOMS[-3:]  # "the last three rooms know nothing of each other"
GROUND = ("errors", "files", "registry", "optional", "startup")
# libraries of the command line, of tasks, of tables and of figures
NOT_OF_THE_CORE = (
    "pydantic", "hydra", "omegaconf", "datasets", "evaluate", "lm_eval", "pandas", "pyarrow", "matplotlib",
)


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a module imports anywhere in it, but for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "harness":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("harness.")}
    return found


def test_every_room_is_on_the_page() -> None:
    assert set(ROOMS) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "cli", *GROUND}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room: str) -> None:
    """A room imports those below it on the page; what names a class in a registry by text imports nothing."""
    below = set(ROOMS[ROOMS.index(room) + 1 :]) | {room, *GROUND}
    if room in APART:
        below -= set(APART) - {room}
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(imported_rooms(path) - below - {"__version__"})
        for path in (PACKAGE / room).rglob("*.py") if imported_rooms(path) - below - {"__version__"}
    }
    assert not wrong


def test_the_ground_imports_nothing_of_ours_above_it() -> None:
    for name in GROUND:
        assert imported_rooms(PACKAGE / f"{name}.py") <= set(GROUND), name


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions, or for types alone. The package itself hands on names lazily, and is left out."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in modules else node.module for one in inside}
        graph[name] = found & (modules.keys() - {"harness", "harness.__main__"})
    graphlib.TopologicalSorter(graph).prepare()


def run_without(libraries: tuple[str, ...], code: str) -> str:
    """The output of a fresh process in which some libraries cannot be imported."""
    blocked = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {libraries!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_runs_with_torch_and_transformers_alone() -> None:
    """Decompose, ablate, score and restore a model where no other library can be imported."""
    assert run_without(NOT_OF_THE_CORE, """
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from harness.evaluation.requests import ScoredTask, continuation_request
from harness.evaluation.scoring import Scorer
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.loading import loaded_from
from harness.models.targets import Target
from harness.spectral.regions import small

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
loaded = loaded_from(LlamaForCausalLM(config).eval())
task = ScoredTask("t", {}, [continuation_request([1, 2, 3], [4, 5])], ["0"], lambda scores: {})
scorer = Scorer(loaded, {"t": task})
before = scorer.score("t").logprob
target = Target("matrix", "1.down_proj", (loaded.matrices[-1].name,), 1)
with ablated(loaded, Ablation(target, small(0.5)), DecompositionCache(loaded, 1 << 20)) as realised:
    inside = Scorer(loaded, {"t": task}).score("t").logprob
after = Scorer(loaded, {"t": task}).score("t").logprob
print((inside != before).any(), (after == before).all())
""").split() == ["True", "True"]


def test_spectral_runs_with_torch_alone() -> None:
    others = (*NOT_OF_THE_CORE, "transformers", "accelerate")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (PACKAGE / "spectral").rglob("*.py")
    ]
    assert run_without(others, f"""
import importlib
for name in {modules!r}:
    importlib.import_module(name)
print("done")
""").strip() == "done"
