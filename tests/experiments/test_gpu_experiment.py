"""experiments/speed/gpu.py runs on a bare machine: its stages in small on the CPU, limits, and flushed lines."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.studies import environment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "speed" / "gpu.py"
# What the machine with the GPU does not have.
ABSENT = ("hydra", "omegaconf", "antlr4", "datasets", "evaluate", "lm_eval", "gguf", "pydantic", "submitit")
STAGES = ["machine", "large_model", "passes", "head", "rates", "decompositions", "edits", "cells", "experts",
          "host_stream", "attention", "graph", "trees"]


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_experiment"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_the_stages_run_where_only_torch_transformers_and_tables_are_installed(tmp_path) -> None:
    program = f"""
import runpy, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv = ["gpu.py", "--tiny", "--device", "cpu", "--output", {str(tmp_path / "gpu.jsonl")!r}, *{STAGES!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == STAGES
    assert not [line["error"] for line in lines if "error" in line]
    of = {line["stage"]: line for line in lines}
    assert all(study["states"] == {"ok": study["cells"]} for study in of["cells"]["studies"])
    assert of["host_stream"]["same_bits"] and 0 < of["head"]["share"] < 1
    assert {row["block"] for row in of["passes"]["passes"]} == {0, 2, 3}
    assert of["experts"]["experts"] == 9 and of["experts"]["different_elements"] == 0
    # there are no graphs on a CPU, and FlexAttention is not compiled there
    assert [row["captured"] for row in of["graph"]["passes"]] == [0, 0, 0]
    assert all(row["same_bits"] for row in of["graph"]["passes"])
    assert of["trees"]["of_trees"] > 0 and of["trees"]["largest_difference"] < 1e-4
    assert all(of["rates"][name]["decomposition_weight"] > 0 for name in ("measured", "kept"))


def test_a_stage_over_its_limit_or_with_an_error_is_a_line_and_the_next_one_begins(gpu, tmp_path, monkeypatch) -> None:
    output = tmp_path / "gpu.jsonl"

    def last(bench):
        # what was measured before is on the disk by now
        return {"before": [json.loads(line)["stage"] for line in output.read_text().splitlines()]}

    def too_long(bench):
        while True:
            time.sleep(0.01)

    def broken(bench):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "STAGES", {"too_long": (too_long, 0.2), "broken": (broken, 60), "last": (last, 60)})
    gpu.run(gpu.Bench(torch.device("cpu"), gpu.TINY), ["too_long", "broken", "last"], output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0]["error"].startswith("OverLimit") and lines[1]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert lines[2]["before"] == ["too_long", "broken"] and "error" not in lines[2]


def test_the_limits_of_all_stages_together_are_what_the_machine_is_lent_for(gpu) -> None:
    assert sum(limit for _, limit in gpu.STAGES.values()) <= 15 * 60


def test_without_a_gpu_one_line_says_so(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        gpu.main([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_stage_on_a_gpu_in_small(gpu, tmp_path) -> None:
    output = tmp_path / "gpu.jsonl"
    gpu.main(["--tiny", "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert not [(line["stage"], line["error"]) for line in lines if "error" in line]
