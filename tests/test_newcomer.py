"""The first hour of a researcher: eight tasks of a newcomer, each through the real command line, as it is typed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.engine import run as engine
from tests.checkpoints import ioi_file, save_checkpoint, text_file

N_CELLS = 2 + 7 * 10  # the baseline, the control, and seven layer types with ten deciles each
TEXT = ["task=text", "tasks.text.data_files=text.txt", "tasks.text.window=16"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a model, a text, and a task of one's own."""
    folder = tmp_path_factory.mktemp("desk")
    save_checkpoint(folder / "tiny")
    save_checkpoint(folder / "tuned", seed=1)
    text_file(folder / "text.txt")
    ioi_file(folder / "ioi.jsonl")
    rows = [{"question": f"the cat sat on the {place}", "answer": int(place == "mat")} for place in ("mat", "tree")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    (folder / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}} .'\ndoc_to_target: answer\ndoc_to_choice: ['red', 'blue']\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


@pytest.fixture(autouse=True)
def there(desk, monkeypatch):
    monkeypatch.chdir(desk)


@pytest.fixture(scope="module")
def deciles(desk) -> tuple[Path, str, str]:
    """Task 1: deciles on a small model. The folder of the study, and what was printed."""
    import contextlib
    import io

    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(desk)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(["run", "model=tiny", *TEXT, "cluster.shards=2", "model.revision=main"]) == 0, err.getvalue()
    finally:
        os.chdir(before)
    (folder,) = (desk / "results").glob("tiny-*")
    return folder, out.getvalue(), err.getvalue()


def test_1_deciles_on_a_small_model(deciles):
    folder, out, err = deciles
    counted = f"{N_CELLS} cells to measure: {N_CELLS - 1} ablations and 1 baseline; "
    assert re.search(rf"^{counted}.* on cpu, as measured on one batch$", err, re.M)
    assert "cluster.shards: harness run does not read it; harness submit does" in err
    assert "model.revision: nothing reads 'main', because the local folder 'tiny' has no revisions" in err
    assert "\r" not in err, "no bars where there is no terminal"
    for said in ("of tiny: 71 ablations, 1 baseline, 0 failed", "sanity check passed: 21 matrices decomposed",
                 " decile ", "no p-values: the examples are in fewer than three clusters (docs/precision.md)"):
        assert said in out
    assert {path.name for path in (folder / "report").iterdir()} >= {"report.md", "metrics.csv"}


def test_1_without_a_task_the_line_has_an_example(capsys):
    assert main(["run", "model=tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: task: ") and "task=wikitext" in line and "harness list tasks" in line


def test_2_the_search_of_laser(desk, capsys):
    words = ["target=mlp_matrix", "target.layer_types=[up_proj]", "region=laser", "region.keep=[0.5,0.1]", "task=ioi",
             "tasks.ioi.data_files=ioi.jsonl", "search.control_seeds=[0,1]", "output=laser"]
    assert main(["search", "model=tiny", *words]) == 0
    out = capsys.readouterr().out
    sentence = r"^ioi, accuracy: \d\.up_proj, keep top \d+ % \(LASER\): .* -> .* on \d+ fresh examples, controls .*: \w"
    assert re.search(sentence, out, re.M)
    page = (desk / "laser/report/search.md").read_text()
    heads = [line for line in page.splitlines() if line.startswith("| task | metric |")]
    assert heads[0].count("|") - 1 <= 8 and "](grid.png)" in page and (desk / "laser/report/grid.png").is_file()


def test_3_a_task_of_ones_own(desk, capsys):
    pytest.importorskip("lm_eval")
    assert main(["run", "model=tiny", "task=colours.yaml", "+tasks.colours.data_files.test=rows.jsonl", "target=all",
                 "output=own"]) == 0
    captured = capsys.readouterr()
    assert "colours: acc (higher is better)" in captured.out
    assert set(pd.read_parquet("own/metrics").task) == {"colours"}
    # the same as it was written before, where the name of the task was that of the YAML file of the harness
    assert main(["run", "model=tiny", "task=lm_eval", "tasks.lm_eval.task=colours", "tasks.lm_eval.include_path=.",
                 "+tasks.lm_eval.data_files.test=rows.jsonl", "target=all", "output=before"]) == 0
    assert "colours: acc (higher is better)" in capsys.readouterr().out
    assert sorted(pd.read_parquet("own/metrics").cell_id) == sorted(pd.read_parquet("before/metrics").cell_id)


def test_4_interrupt_and_resume(deciles, monkeypatch, capsys):
    words = ["run", "--quiet", "model=tiny", *TEXT, "output=resumed"]
    write, written = engine._write, []

    def interrupted(*arguments):
        written.append(1)
        if len(written) == 5:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_write", interrupted)
        assert main(words) == 130
    done = set(pd.read_parquet("resumed/metrics").cell_id)
    assert 0 < len(done) < N_CELLS
    capsys.readouterr()
    assert main(["status", "resumed"]) == 0
    assert f"done {len(done)}  failed 0  missing {N_CELLS - len(done)}" in capsys.readouterr().out
    assert main(words) == 0
    key = ["cell_id", "metric", "value"]
    whole, resumed = (pd.read_parquet(folder / "metrics")[key].sort_values(key).reset_index(drop=True)
                      for folder in (deciles[0], Path("resumed")))
    assert whole.equals(resumed)


def test_5_without_a_cluster(deciles, desk, monkeypatch, capsys):
    assert main(["plan", "model=tiny", *TEXT]) == 0
    assert f"cells {N_CELLS}: text {N_CELLS}" in capsys.readouterr().out
    assert main(["status", str(deciles[0])]) == 0 and main(["report", str(deciles[0])]) == 0
    assert f"units {N_CELLS}  done {N_CELLS}" in capsys.readouterr().out
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        (desk / "bin").mkdir(exist_ok=True)
        (desk / "bin" / program).write_text(
            "#!/bin/sh\necho 'slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)' >&2\n"
            "exit 1\n")
        (desk / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(desk / "bin"), prepend=":")
    assert main(["submit", "model=tiny", *TEXT, "output=submitted"]) == 2
    assert "no Slurm controller answers here" in capsys.readouterr().err
    assert main(["plan", "--show-config", "model=tiny", *TEXT]) == 0
    shown = capsys.readouterr().out
    assert "kind: type" in shown and not re.search(r"^cluster:|^reference:|recall:|adaptive:", shown, re.M)


def test_6_pandas_and_duckdb(deciles):
    duckdb = pytest.importorskip("duckdb")
    metrics = pd.read_parquet(deciles[0] / "metrics")
    worst = metrics[metrics.metric == "token_perplexity"].nlargest(1, "delta").iloc[0]
    (row,) = duckdb.sql(f"select target, region from '{deciles[0]}/metrics/*.parquet' where metric = 'token_perplexity'"
                        " order by delta desc nulls last limit 1").fetchall()
    assert row == (worst.target, worst.region)
    table = pd.read_csv(deciles[0] / "report/metrics.csv")
    order = [unit[0] for unit in json.loads((deciles[0] / "manifest.json").read_text())["units"]]
    assert table.cell_id.drop_duplicates().tolist() == order, "the order of the study"
    assert {"label", "nominal_start", "fraction_start"} <= set(table.columns)


def test_7_export_and_generate(deciles, desk, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = (deciles[0] / "report/report.md").read_text()
    cell = re.search(r"\| `([0-9a-f]{10})` \|$", page, re.M)[1]
    assert main(["export", "--study", str(deciles[0]), "--cell", cell, "output=ablated"]) == 0
    assert "decile" in capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained("ablated"), AutoModelForCausalLM.from_pretrained("ablated")
    written = model.generate(**tokenizer("the cat sat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 3


def test_8_a_sweep_with_a_bad_name(desk, capsys):
    assert main(["run", "-m", "model=nope,tiny,./tuned", *TEXT, "target=all", "region=fraction"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0].startswith("harness: model=nope: model: there is no 'nope'"), "said before the first run"
    summary = captured.err[captured.err.index("sweep: 2 of 3 runs done"):].splitlines()
    assert [line.split()[0] for line in summary[1:]] == ["model=nope", "model=tiny", "model=./tuned"]
    assert "not done: model: there is no 'nope'" in summary[1] and "done: results/tuned-" in summary[3]
    assert "tiny (a) is compared with tuned (b)" in captured.out and list((desk / "results").glob("compare-*"))


@pytest.mark.parametrize("what", ["tasks", "regions", "models", "experiments"])
def test_every_list_has_one_line_for_each_name(what, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / what.removesuffix("s")).glob("*.yaml"))
    assert [line.split()[0] for line in lines][: len(names)] == names
    assert all(len(line.split()) > 2 and len(line) < 180 for line in lines)


def test_the_completion_of_the_shell(tmp_path, capsys):
    import shutil
    import subprocess

    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    if shutil.which("bash") is None:
        pytest.skip("no bash")

    def completed(line: str) -> list[str]:
        words = line.split(" ")
        typed = " ".join(word or "''" for word in words)
        program = (f"source {tmp_path}/script; COMP_WORDBREAKS=' '; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1};"
                   f" COMP_LINE='{line}'; COMP_POINT={len(line)};"
                   " compopt() { :; }; _harness; echo ${COMPREPLY[@]}")
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert completed("harness sp") == ["spectra"] and completed("harness list re") == ["regions"]
    assert completed("harness run region=dec") == ["region=decile"]
    assert "runtime.batch_tokens=" in completed("harness run runtime.b")
