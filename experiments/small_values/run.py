"""Do small singular values matter, and is it because of the activations? The claim of arXiv 2410.17770, tested.

    python experiments/small_values/run.py                 # two processes of one thread each
    python experiments/small_values/run.py --report-only   # tables and figure from what is there

Runs go to results/small_values/ (--studies for elsewhere). What is there is not measured again, so the command may be
interrupted and started again. Weights and data come from ../shared (--assets). Tables and the figure go beside this
file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
WINDOWS, FEW_WINDOWS = 24, 12  # of 256 tokens
SIZES = {"1x": 8, "4x": 32, "16x": 128}  # windows of calibration text
TENTHS = "[1,3,5,7,8,9,10]"  # of single matrices, to save time; decile 1 is the largest tenth


@dataclass(frozen=True)
class Job:
    """One run of the harness. name: that of its folder. command: "run" or "spectra". settings: in their order."""

    name: str
    settings: tuple[str, ...]
    command: str = "run"
    model: str = "stories15M"


def stories(assets: Path, windows: int) -> list[str]:
    return [
        "+tasks.stories.kind=text", f"+tasks.stories.data_files={assets}/data/tinystories/validation_first_stories.txt",
        "+tasks.stories.bos=false", f"+tasks.stories.limit={windows}",
    ]  # fmt: skip


def wikitext(assets: Path, windows: int) -> list[str]:
    return [
        "+tasks.wikitext.kind=text", f"+tasks.wikitext.data_files={assets}/data/wikitext-2-raw/test.jsonl",
        "+tasks.wikitext.bos=false", f"+tasks.wikitext.limit={windows}",
    ]  # fmt: skip


def calibration(assets: Path, windows: int, text: str = "stories") -> list[str]:
    """Settings of the text of the metric. It is never the text of a task, and each token of it counts once."""
    files = {"stories": "tinystories/tinystories_1000_train.jsonl", "wikitext": "wikitext-2-raw/validation.jsonl"}
    return [
        "calibration=text", f"region.calibration.data_files={assets}/data/{files[text]}",
        "region.calibration.bos=false", f"region.calibration.limit={windows}",
    ]  # fmt: skip


def jobs(assets: Path, random_model: Path) -> list[Job]:
    """Return all runs, those that the verdict needs most first."""
    both = [*stories(assets, WINDOWS), *wikitext(assets, FEW_WINDOWS)]
    some, few = stories(assets, WINDOWS), stories(assets, FEW_WINDOWS)
    large = calibration(assets, SIZES["16x"])
    activations = "region.metric=activations"
    spectra = [
        "task=text", f"tasks.text.data_files={assets}/data/tinystories/tinystories_1000_train.jsonl",
        "tasks.text.bos=false", f"tasks.text.limit={SIZES['16x']}",
    ]  # fmt: skip

    def job(name: str, *settings: str | list[str], **more: str) -> Job:
        flat = [word for part in settings for word in ([part] if isinstance(part, str) else part)]
        return Job(name, tuple(flat), **more)

    matrix = ["target=matrix", "region=decile", f"region.deciles={TENTHS}", "region.controls=[]"]
    by_type = ["target=type", "region=decile"]
    mlp = "target.layer_types=[mlp]"
    smollm = [
        "target=type", "target.layer_types=[down_proj]", "region=decile", "region.deciles=[9,10]",
        "region.controls=[]", "+tasks.wikitext.kind=text", "+tasks.wikitext.window=512", "+tasks.wikitext.limit=2",
        f"+tasks.wikitext.data_files={assets}/data/wikitext-2-raw/test.jsonl", "calibration=text",
        f"region.calibration.data_files={assets}/data/wikitext-2-raw/validation.jsonl",
        "region.calibration.window=512", "region.calibration.limit=4",
    ]  # fmt: skip
    return [
        job("type-weight", by_type, both, large),
        job("type-activations-16x", by_type, both, large, activations),
        job("matrix-weight", matrix, few, large),
        job("spectra", spectra, "init=both", command="spectra"),
        job("outliers", "target=type", "region=mp", "region.mp=[above,below]", "region.controls=[lower_bulk]", few,
            large),
        *(job(f"type-activations-{size}", by_type, mlp, "region.deciles=[8,9,10]", "region.controls=[]", some,
              calibration(assets, SIZES[size]), activations) for size in ("1x", "4x")),
        job("draws", by_type, "target.layer_types=[v_proj,mlp]", "region.deciles=[10]",
            "region.controls=[random,energy_matched]", "region.random_seeds=[0,1,2]", few, large),
        job("random-weight", by_type, "region.deciles=[1,9,10]", "region.controls=[]", few, large,
            model=str(random_model)),
        job("type-activations-wikitext", by_type, mlp, "region.deciles=[9,10]", "region.controls=[]", both,
            calibration(assets, SIZES["16x"], "wikitext"), activations),
        *(job(f"smollm2-{metric}", smollm, f"region.metric={metric}", model="smollm2")
          for metric in ("weight", "activations")),
        job("matrix-activations", matrix, few, large, activations),
    ]  # fmt: skip


def random_weights(assets: Path, folder: Path) -> Path:
    """Save a model of the same architecture with newly drawn weights, once, and return its folder."""
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        source = assets / "models" / "stories15M"
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    return folder


def run(job: Job, assets: Path, studies: Path) -> None:
    """Run one job, whose output goes to a log beside its folder."""
    start = time.monotonic()
    model = [f"model.name={job.model if '/' in job.model else assets / 'models' / job.model}"]
    if job.model == "smollm2":
        model = [f"model.name={assets}/models", "model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf"]
    threads = ["runtime.threads=1", "task=[]"] if job.command == "run" else ["threads=1"]
    command = [sys.executable, "-m", "harness", job.command, "--quiet", "model=pretrained", *model, "model.device=cpu",
               *threads, *job.settings, f"output={studies / job.name}"]
    with (studies / f"{job.name}.log").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    said = "done" if status == 0 else f"FAILED with status {status}, see {studies / job.name}.log"
    print(f"{job.name}: {said}, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("HARNESS_ASSETS", "../shared")))
    parser.add_argument("--studies", type=Path, default=Path("results/small_values"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    assets, studies = arguments.assets.resolve(), arguments.studies.resolve()
    studies.mkdir(parents=True, exist_ok=True)
    if not arguments.report_only:
        os.environ["OMP_NUM_THREADS"] = "1"
        todo = jobs(assets, random_weights(assets, studies / "random-model"))
        with ThreadPoolExecutor(arguments.workers) as pool:
            list(pool.map(lambda job: run(job, assets, studies), todo))
    sys.path.insert(0, str(HERE))
    import tables

    tables.write(studies, HERE)


if __name__ == "__main__":
    main()
