"""runtime.batch_tokens=null: the largest batch that fits, found once per study; with real limits of memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.cli import main
from harness.engine.slurm import submit
from harness.errors import InputError
from harness.evaluation import batch_size
from harness.evaluation.batch_size import LARGEST_ON_CPU, SMALLEST, largest_batch, largest_useful
from harness.measurements import ABLATION, compose_settings, find
from harness.measurements.ablation import measure
from harness.measurements.ablation.forecast import forecast
from harness.measurements.ablation.tables import read_metrics
from harness.models.loading import load, loaded_from
from tests.checkpoints import ioi_file, save_checkpoint, text_file
from tests.processes import run_ranks
from tests.studies import MODEL, assert_same_tables, config_of, environment, run_here, run_settings, settings

STUDY = [*MODEL, "tasks.recall.n_sequences=64", "target.layer_types=[up_proj]", "region=decile", "region.deciles=[1]",
         "runtime.threads=1"]
FOUND = [*STUDY, "runtime.batch_tokens=null"]


def batch_of(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["settings"]["runtime"]["batch_tokens"]


def loaded_study(overrides: list[str], folder: Path):
    study = ABLATION.units.plan(config_of(overrides, folder))
    loaded = load(study.settings.model, study.description, study.prepared.tokenizer, False)
    return loaded, study.tasks, study.settings.runtime


def limit_forward(loaded, tokens: int) -> list[int]:
    """Let the model's forward run out of memory above so many tokens; the sizes that were tried."""
    tried = []

    def before(module, args, kwargs):
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loaded.model.register_forward_pre_hook(before, with_kwargs=True)
    return tried


def test_the_largest_power_of_two_that_fits(tmp_path):
    loaded, tasks, runtime = loaded_study(FOUND, tmp_path / "study")
    tried = limit_forward(loaded, 1500)
    assert largest_batch(loaded, tasks, runtime) == 1024
    assert set(tried) == {320, 640, 1280, 2560}  # a quarter more than is then used


def test_no_larger_than_one_batch_of_each_task(tmp_path):
    loaded, tasks, runtime = loaded_study([*FOUND, "tasks.recall.n_sequences=16"], tmp_path / "study")
    limit_forward(loaded, 10**6)
    assert largest_batch(loaded, tasks, runtime) == 2 * 16 * 32  # clean and noisy sequences of 32 tokens


def test_no_larger_than_a_processor_needs(tmp_path):
    loaded, tasks, runtime = loaded_study([*FOUND, "tasks.recall.n_sequences=400"], tmp_path / "study")
    assert largest_batch(loaded, tasks, runtime) == LARGEST_ON_CPU < 400 * 32 * 2


def test_the_most_that_is_useful_follows_the_device_and_the_model():
    """Without a GPU only its size is asked for, of models that have no values."""
    def of(device, **sizes):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        return largest_useful(replace(loaded_from(model), device=torch.device(device)))

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    eight_billion = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    assert of("cpu", **small) == LARGEST_ON_CPU == 8192
    assert of("cuda:0", **small) == 65536
    assert of("cuda:0", **eight_billion) == 32768


def test_where_nothing_fits_one_line_says_so(tmp_path):
    loaded, tasks, runtime = loaded_study(FOUND, tmp_path / "study")
    limit_forward(loaded, 10)
    with pytest.raises(InputError, match=f"runtime.batch_tokens: on cpu, not even {SMALLEST} tokens fit"):
        largest_batch(loaded, tasks, runtime)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    loaded, tasks, runtime = loaded_study(FOUND, tmp_path / "study")
    loaded.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        largest_batch(loaded, tasks, runtime)


def test_what_a_study_keeps_counts(tmp_path, monkeypatch):
    """A device that could hold the batch, but not beside the stream and the decompositions."""
    loaded, tasks, runtime = loaded_study(FOUND, tmp_path / "study")
    asked, real = [], torch.empty
    monkeypatch.setattr(batch_size.torch, "empty", lambda size, **how: asked.append(size) or real(size, **how))
    largest_batch(loaded, tasks, runtime)
    stream = len(tasks["recall"].requests) * 32 * 16 * 4  # sequences, tokens, width, bytes
    vectors, edit = 8 * 16**2 * len(loaded.matrices), 4 * 8 * 16 * 32
    assert max(size for size in asked if isinstance(size, int)) == stream + vectors + edit


def test_memory_that_is_really_short(tmp_path):
    """A process of which the system limits the address space: its study completes, with the batch that fits."""
    folder, program = tmp_path / "study", tmp_path / "program.py"
    wide = [*FOUND, "model.recall.hidden_dim=16384", "model.recall.steps=1", "model.recall.batch_size=1",
            "tasks.recall.n_sequences=300", "target.blocks=[1]", "region.controls=[]"]
    program.write_text(f"""
import resource
from pathlib import Path
from harness.engine.run import RunOptions, run
from harness.measurements import ABLATION
from harness.measurements.ablation import measure
from tests.studies import config_of
real = measure.largest_batch
def limited(*arguments):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 350 * 2**20,) * 2)
    return real(*arguments)
measure.largest_batch = limited
run(ABLATION, config_of({wide!r}, Path({str(folder)!r})), RunOptions(progress=False))
""")
    # arrow's own allocator would reserve a gigabyte of addresses at its first file
    env = {**environment(), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert SMALLEST <= batch_of(folder) < LARGEST_ON_CPU
    assert f"runtime.batch_tokens: {batch_of(folder)}, the largest that fits" in done.stderr
    table = read_metrics(folder)
    assert set(table["status"]) == {"ok"}
    # no cell needed a second, smaller try
    assert table["settings"].map(lambda text: "batch_tokens" not in json.loads(text)).all()


def test_found_once_and_then_fixed(tmp_path, monkeypatch):
    """In bfloat16 the batch is part of the ids: a rerun takes that of the manifest, however much memory there is."""
    checkpoint = save_checkpoint(tmp_path / "tiny")
    text = text_file(tmp_path / "text.txt", 4000)
    overrides = ["model=pretrained", f"model.name={checkpoint}", "model.dtype=bfloat16", "task=text",
                 f"tasks.text.data_files={text}", "tasks.text.window=32", "target.layer_types=[up_proj]",
                 "region=decile", "region.deciles=[1]", "runtime.threads=1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch_size, "LARGEST_ON_CPU", 512)
    found = run_settings(compose_settings("ablation", [*overrides, "runtime.batch_tokens=null"]))
    assert batch_of(found) == 512
    given = run_settings(compose_settings("ablation", [*overrides, "runtime.batch_tokens=512", "output=given"]))
    assert_same_tables(found, given)
    some = sorted((found / "metrics").iterdir())[0]
    some.unlink()
    monkeypatch.setattr(batch_size, "LARGEST_ON_CPU", 256)
    again = run_settings(compose_settings("ablation", [*overrides, "runtime.batch_tokens=null"]))
    assert again == found and batch_of(found) == 512 and some.exists()
    assert_same_tables(found, given)


def test_two_ranks_take_the_batch_of_the_first(tmp_path):
    folder = tmp_path / "study"
    words = ["run", "--quiet", *settings(FOUND, folder)]
    done = run_ranks(f"from harness.cli import main; raise SystemExit(main({words!r}))", 2, tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_tables(folder, run_here([*STUDY, f"runtime.batch_tokens={batch_of(folder)}"], tmp_path / "clean"))
    assert set(read_metrics(folder)["rank"]) == {0, 1}


def test_submit_needs_a_number(tmp_path):
    with pytest.raises(InputError, match="runtime.batch_tokens: None is wrong; .* harness submit needs"):
        submit(ABLATION, ABLATION.units.plan(config_of(FOUND, tmp_path / "study")), find, print)
    assert not (tmp_path / "study").exists()


def test_a_search_needs_a_number(tmp_path):
    words = [f"tasks.ioi.data_files={ioi_file(tmp_path / 'ioi.jsonl')}", "task=ioi", "runtime.batch_tokens=null"]
    with pytest.raises(InputError, match="runtime.batch_tokens: None is wrong; .* harness search needs"):
        compose_settings("search", [*words, f"output={tmp_path / 'search'}"])
    assert not (tmp_path / "search").exists()


def test_a_study_is_frozen_with_its_batch(tmp_path, capsys):
    assert main(["plan", "--freeze", *settings(FOUND, tmp_path / "study")]) == 2
    assert "runtime.batch_tokens: None is wrong; harness run finds it" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_plan_counts_with_the_default(tmp_path):
    found, default = (forecast(ABLATION.units.plan(config_of(overrides, tmp_path / "study")))
                      for overrides in (FOUND, STUDY))
    assert found == default


def test_found_by_the_runner_before_the_manifest_is_frozen(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "largest_batch", lambda *arguments: 333)
    assert batch_of(run_here(FOUND, tmp_path / "study")) == 333
