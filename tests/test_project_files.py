"""What the files around the code say of versions and commands: containers, workflow, hooks of commits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import harness

ROOT = Path(__file__).parents[1]
CONTAINERS = [ROOT / "containers" / "Dockerfile", ROOT / "containers" / "apptainer.def"]


def read(*path: str) -> str:
    return ROOT.joinpath(*path).read_text()


@pytest.fixture(scope="module")
def pythons() -> list[str]:
    """The versions of Python that pyproject.toml names."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml"))


@pytest.fixture(scope="module")
def workflow() -> dict:
    return yaml.safe_load(read(".github", "workflows", "ci.yml"))


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_has_the_pinned_versions(file):
    text = file.read_text()
    (python,) = re.findall(r"Python (3\.\d+)", read("constraints.txt").partition("torch")[0])
    assert re.search(r"python:(3\.\d+)-slim", text).group(1) == python
    assert re.search(r"pip install .*-c /opt/harness/constraints.txt '/opt/harness\[all\]'", text)
    assert "==" not in text  # no version of its own
    assert set(re.findall(r"\b\d+\.\d+\.\d+\b", text)) == {harness.__version__}


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_gets_what_the_package_is_built_from(file):
    copied = set(re.findall(r"^(?:COPY)? +([\w.]+(?: [\w.]+)*) /opt/harness", file.read_text(), flags=re.MULTILINE))
    copied |= set(re.findall(r"^COPY ([\w. ]+) /opt/harness", file.read_text(), flags=re.MULTILINE))
    names = {name for group in copied for name in group.split()}
    assert names == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "harness", "conf"}
    assert all((ROOT / name).exists() for name in names)
    assert names == set(re.findall(r"^!(.+)$", read(".dockerignore"), flags=re.MULTILINE))


def test_the_page_on_clusters_names_the_image():
    text = read("docs", "cluster.md")
    for line in (f"spectral-ablation-harness:{harness.__version__}", "containers/apptainer.def",
                 "containers/Dockerfile", "/shared/harness.sif", "/shared/harness.sqsh"):  # fmt: skip
        assert line in text, line


def test_nothing_needs_a_newer_python_than_the_oldest(pythons):
    """int.is_integer is of 3.12; here it is that of a float, which is old."""
    pytest.importorskip("vermin")
    command = ["-c", "from vermin import main; main()", f"--target={pythons[0]}-", "--violations", "--no-tips",
               "--processes=1", "--exclude", "int.is_integer", "harness"]  # fmt: skip
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_workflow_runs_every_python_that_is_named(pythons, workflow):
    (oldest,) = re.findall(r'requires-python = ">=(3\.\d+)"', read("pyproject.toml"))
    assert pythons[0] == oldest
    jobs = workflow["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    pinned = {step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")}
    assert set(jobs["pythons"]["strategy"]["matrix"]["python"]) | pinned - {"${{ matrix.python }}"} == set(pythons)


def test_the_workflow_runs_commands_that_exist(workflow):
    targets = set(re.findall(r"^(\w+):", read("Makefile"), flags=re.MULTILINE))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    made = {command.split()[1] for command in commands if command.startswith("make ")}
    assert {"lint", "docs", "test"} <= made <= targets
    assert any(command.startswith(".ci/run") for command in commands) and (ROOT / ".ci" / "run").exists()
    extras = {extra for command in commands for found in re.findall(r'"\.\[([\w,]+)\]"', command)
              for extra in found.split(",")}  # fmt: skip
    assert extras and all(re.search(rf"^{extra} = \[", read("pyproject.toml"), re.MULTILINE) for extra in extras)


def test_a_commit_is_checked_by_what_make_lint_runs():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    lint = re.findall(r"^\t\$\(VENV\)/bin/(\w+)", read("Makefile").partition("lint: ")[2].partition("\n\n")[0],
                      flags=re.MULTILINE)  # fmt: skip
    assert [hook["entry"].split()[0] for hook in hooks] == [f".venv/bin/{name}" for name in lint]
    assert [hook["entry"].split()[1:2] for hook in hooks] == [["check"], []]


def test_the_citation_is_of_this_project():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["license"] == "Apache-2.0" and citation["title"] == "The spectral ablation harness"
