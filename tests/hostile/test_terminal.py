"""What a terminal, a shell or a user does to a command: it ends in one line and a status, and never in a traceback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from harness import cli
from harness.cli import COMMANDS, main
from tests.studies import MODEL

ROOT = Path(__file__).parents[2]
RECALL = [*MODEL, "tasks.recall.n_sequences=8"]
# Each command with settings or a folder that are right; "{folder}" is a finished study.
RIGHT = {
    "run": ["--quiet", *RECALL, "model.recall.cache_dir={cache}", "output='{folder}'", "target.kind=all",
            "target.layer_types=[v_proj]", "region=decile", "region.deciles=[1]"],
    "plan": RECALL, "status": ["{folder}"], "report": ["{folder}"], "compact": ["{folder}"], "work": ["{folder}"],
    "spectra": ["--help"], "search": ["--help"], "submit": ["--help"], "export": ["--help"],
    "compare": ["--help"], "tune": ["--help"], "coupling": ["--help"],
    "components": ["--help"], "list": ["tasks"], "completion": ["bash"], "push": ["--help"],
}  # fmt: skip
WRONG = {
    **{name: ["seed=±σ"] for name, command in COMMANDS.items() if command.settings},
    **{name: ["/no/such/±"] for name, command in COMMANDS.items() if not command.settings},
    "push": ["/no/such/±", "me/±"],
}
ENCODINGS = ["ascii", "latin-1", "cp437", "utf-8"]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict[str, str]:
    """The folder of a finished study of a few cells, and the cache of its model."""
    folder = tmp_path_factory.mktemp("terminal")
    places = {"folder": str(folder / "stüdy"), "cache": str(folder / "cache")}
    assert main(["run", *(word.format(**places) for word in RIGHT["run"])]) == 0
    return places


def test_every_command_is_here():
    assert set(RIGHT) == set(WRONG) == set(COMMANDS)


def called(words: list[str]) -> int | str | None:
    try:
        return main(words)
    except SystemExit as end:  # argparse, after --help
        return end.code


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", RIGHT)
def test_an_output_that_lacks_characters(command, encoding, study, monkeypatch):
    """Reports have ± and σ, and folders have any character."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, "strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert called([command, *(word.format(**study) for word in RIGHT[command])]) == 0
    for stream in streams.values():
        stream.flush()
    said = streams["stdout"].buffer.getvalue().decode(encoding)
    if command == "report" and encoding == "ascii":
        assert "\\" in said


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", WRONG)
def test_an_error_in_an_output_that_lacks_characters(command, encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, "strict")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main([command, *WRONG[command]]) == 2
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    assert said.startswith("harness: ") and said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_was_deleted(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main([command, *WRONG[command]]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("harness: the current folder")


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError("Unable to allocate 7 TiB"), 2, "not enough memory: Unable to allocate 7 TiB"),
    (BrokenPipeError(), 0, ""),
])
def test_what_ends_a_command(error, status, words, capfd, monkeypatch):
    def fails(_):
        raise error

    monkeypatch.setattr(cli, "_run", fails)
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    assert main(["status", "x"]) == status
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == (1 if words else 0)


def test_an_error_of_the_disk_is_not_one_of_the_output(monkeypatch):
    """It is a fault of a run, whose traceback is wanted."""
    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_run", fails)
    with pytest.raises(OSError, match="No space left"):
        main(["status", "x"])


# ---------------------------------------------------------------- processes


def process(words: str, before: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `harness <words>` by a shell, in which "$HARNESS" stands for the command. before: code that runs first."""
    code = f"{before}\nimport runpy; runpy.run_module('harness', run_name='__main__', alter_sys=True)"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "CODE": code}
    words = words.replace("$HARNESS", '"$PYTHON" -c "$CODE"')
    # A shell lets what it starts in the background ignore interrupts, these tests too, and this is inherited.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.run(["bash", "-c", words], env=environment, cwd=cwd, text=True, capture_output=True, timeout=120,
                          check=False, preexec_fn=heed)


def assert_one_line(done: subprocess.CompletedProcess[str], status: int, words: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("harness: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


@pytest.mark.parametrize("environment", [
    "PYTHONIOENCODING=ascii", "PYTHONIOENCODING=ascii:strict", "LC_ALL=C",
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
])
def test_a_locale_without_characters(environment, study):
    done = process(f"{environment} $HARNESS status '{study['folder']}'")
    if "UTF8=0" in environment:  # Python then takes the bytes of ü for no characters
        assert_one_line(done, 2, "LC_ALL=C.UTF-8")
    else:
        assert done.returncode == 0 and not done.stderr
    assert_one_line(process(f"{environment} $HARNESS status /no/such/±"), 2, "no/such/")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed, study):
    done = process(f"$HARNESS status '{study['folder']}' {closed}")
    assert done.returncode == 0 and not done.stderr
    assert process(f"$HARNESS status /no/such {closed}").returncode == 2


def test_an_output_that_is_full(study):
    status = f"$HARNESS status '{study['folder']}'"
    for words in (status, f"PYTHONUNBUFFERED=1 {status}", "$HARNESS --version", "$HARNESS --help"):
        done = process(f"{words} > /dev/full")
        assert_one_line(done, 2, "standard output: No space left on device")


def test_errors_that_nobody_can_read():
    # 120 is Python's own status for a stream that it cannot write at the end
    assert process("$HARNESS status /no/such 2> /dev/full").returncode in (2, 120)


def test_a_reader_that_ends(study):
    done = process(f"set -o pipefail; $HARNESS status '{study['folder']}' | true")
    assert done.returncode == 0 and not done.stderr


def test_a_process_in_a_folder_that_was_deleted(tmp_path):
    done = process("mkdir gone && cd gone && rmdir ../gone && $HARNESS status x", cwd=tmp_path)
    assert_one_line(done, 2, "the current folder cannot be used")


INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize("module", [
    "harness.cli", "argparse", "harness.errors", "harness.commands.of_folder", "harness.engine.manifest",
    "harness.measurements", "harness.tables.store",
])
def test_an_interrupt_while_a_module_is_imported(module, study):
    before = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Interrupting())
"""
    assert_one_line(process(f"$HARNESS status '{study['folder']}'", before), 130, "interrupted")


def test_an_interrupt_at_the_end(study):
    before = f"import atexit; atexit.register(lambda: exec('{INTERRUPT}'))"
    done = process(f"$HARNESS status '{study['folder']}'", before)
    assert done.returncode == 0 and not done.stderr
    twice = f"""
{before}
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "harness.cli":
            os.kill(os.getpid(), signal.SIGINT)

import os, signal
sys.meta_path.insert(0, Interrupting())
"""
    assert_one_line(process("$HARNESS status x", twice), 130, "interrupted")
