"""Fixtures shared by all tests: the assets folder, clean runs to compare with, offline hubs."""

import atexit
import copy
import gc
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models gain nothing from threads, and threads that spin slow each other down on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The user's caches are neither read nor filled: models trained here, decompositions, data sets. The workers of
# pytest-xdist share the folder of the process that started them, so that a model is trained once for all of them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="harness-tests-")
    os.environ["HARNESS_TESTS"] = f"{os.getpid()}:{os.environ['XDG_CACHE_HOME']}"  # for tests/warm.py
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest  # noqa: E402

# The files that take longest. They are begun first, because the last file keeps one process busy and the others wait.
LONGEST = ("slurm/test_shards.py", "test_types.py", "engine/test_ranks.py", "test_command_line.py",
           "hostile/test_settings.py", "hostile/test_terminal.py", "tasks/lm_eval/test_task.py",
           "lm_eval/test_generated_answers.py", "search/test_search.py", "slurm/test_script.py", "test_demo.py",
           "test_notebook.py", "ablation/test_batch_size.py", "experiments/test_gpu_experiment.py", "test_plugin.py",
           "test_packaging.py", "test_newcomer.py", "test_site.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    places = {item.path: next((i for i, name in enumerate(LONGEST) if str(item.path).endswith(name)), len(LONGEST))
              for item in items}
    items.sort(key=lambda item: places[item.path])


def pytest_collection_finish() -> None:
    """Keep the collector of garbage from looking again and again at the libraries and at thousands of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Parse a YAML text of settings once and copy what it says, because thousands of tests compose settings."""
    from omegaconf import OmegaConf

    load, known = OmegaConf.load, {}

    def load_once(file: Any) -> Any:
        if not isinstance(file, io.TextIOBase):
            return load(file)
        text = file.read()
        if text not in known:
            file.seek(0)
            known[text] = load(file)
        return copy.deepcopy(known[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and data; tests that want it skip where it is absent."""
    folder = Path(os.environ.get("HARNESS_ASSETS", Path(__file__).parents[2] / "shared")).resolve()
    if not (folder / "ASSETS.md").exists():
        pytest.skip(f"no assets at {folder} (set HARNESS_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def clean_small(tmp_path_factory) -> Path:
    """The folder of the small study of tests/studies.py, from one process that nothing disturbed: to compare with."""
    from tests.studies import SMALL, run_here

    return run_here(SMALL, tmp_path_factory.mktemp("clean") / "small")


@pytest.fixture(scope="session")
def clean_long(tmp_path_factory) -> Path:
    """The same of the long study."""
    from tests.studies import LONG, run_here

    return run_here(LONG, tmp_path_factory.mktemp("clean") / "long")
