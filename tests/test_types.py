"""The package is clean under mypy, as [tool.mypy] in pyproject.toml asks for it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_package_is_clean_under_mypy(request):
    cache = request.config.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", f"--cache-dir={cache}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=580)
    assert done.returncode == 0, f"mypy:\n{done.stdout}"
