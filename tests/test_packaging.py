"""What a user gets from `pip install`: the wheel carries its settings and data, and starts quickly from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as installed from a wheel of this checkout."""
    source = tmp_path_factory.mktemp("source")
    # A copy: setuptools leaves a build/ behind, and what an earlier one holds would land in the wheel.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("harness", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", source], check=True)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python from an empty folder outside the checkout, with the unpacked wheel before everything else."""
    folder.mkdir(exist_ok=True)
    environ = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )


def files(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file()}


def test_wheel_carries_every_setting(installed):
    settings = files(ROOT / "conf", "*")
    assert settings == files(installed / "harness" / "conf", "*")
    assert "config.yaml" in settings


def test_wheel_carries_all_code_and_data(installed):
    def shipped(root: Path) -> set[str]:
        names = files(root / "harness", "*")
        return {name for name in names if "__pycache__" not in name and not name.startswith("conf/")}

    assert shipped(installed) == shipped(ROOT)


def test_wheel_holds_nothing_else(installed):
    (info,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"harness", info.name}
    licence = (info / "licenses" / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "harness = harness.__main__:main" in (info / "entry_points.txt").read_text()


def test_listed_packages_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "harness").rglob("__init__.py")}
    assert set(listed) == folders | {"harness.conf"}


def test_installed_wheel_answers_help(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "harness", "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("plan", "run", "status", "report"))


def test_installed_wheel_finds_its_settings_outside_the_checkout(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import harness; print(harness.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed)
    done = run(installed, tmp_path, "-m", "harness", "plan")
    assert done.returncode == 0, done.stderr
    assert "recall" in done.stdout
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


@pytest.mark.parametrize("program", [
    "import sys, harness.cli; print(*sys.modules)",
    "import sys; from harness.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)",
], ids=["import", "--help"])
def test_the_command_line_loads_no_heavy_library(program, installed, tmp_path):
    """`harness --help` answers at once because of this."""
    heavy = {"torch", "transformers", "numpy", "pandas", "pyarrow", "hydra", "datasets", "evaluate", "lm_eval"}
    heavy |= {"matplotlib", "scipy", "submitit", "accelerate", "omegaconf", "pydantic"}
    done = run(installed, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert heavy & set(done.stdout.split()) == set()
