"""Fixtures shared by all tests: the assets folder, clean runs to compare with, offline hubs."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

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
LONGEST = ("slurm/test_shards.py", "engine/test_ranks.py", "tasks/lm_eval/test_task.py", "search/test_search.py",
           "test_command_line.py", "test_types.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    places = {item.path: next((i for i, name in enumerate(LONGEST) if str(item.path).endswith(name)), len(LONGEST))
              for item in items}
    items.sort(key=lambda item: places[item.path])


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
