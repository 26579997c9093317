"""The collector of garbage rests while the command line starts, and never longer."""

import gc
import importlib
import inspect
import re

from harness import cli, startup
from harness.cli import main
from harness.models.loading import load
from harness.models.settings import ModelSettings
from tests.checkpoints import save_checkpoint


def test_the_collector_works_again_after_a_command(capsys):
    assert gc.isenabled() and main(["plan", "nonsense=1"]) == 2 and gc.isenabled()


def test_a_collector_that_is_switched_off_stays_off():
    gc.disable()
    try:
        startup.rest()
        startup.wake()
        assert not gc.isenabled()
    finally:
        gc.enable()
    startup.rest()
    assert not gc.isenabled()
    startup.wake()
    assert gc.isenabled()


def test_only_a_process_of_one_command_keeps_what_there_is(monkeypatch, capsys):
    def kept(*arguments) -> int:
        before = gc.get_freeze_count()
        assert main(*arguments) == 2
        return gc.get_freeze_count() - before

    monkeypatch.setattr("sys.argv", ["harness", "plan", "nonsense=1"])
    try:
        assert kept(["plan", "nonsense=1"]) == 0 and kept() > 1000
    finally:
        gc.unfreeze()


def test_the_collector_works_before_weights_are_loaded(tmp_path):
    startup.rest()
    load(ModelSettings(name=str(save_checkpoint(tmp_path / "model"))))
    assert gc.isenabled()


def test_every_function_that_the_table_of_commands_names_exists():
    """The table looks a function up when it is called, so that neither mypy nor an import finds a wrong name."""
    named = set(re.findall(r"\b(comparison|from_settings|listing|of_folder)\.(\w+)", inspect.getsource(cli)))
    assert len(named) > 10
    for module, name in named:
        assert callable(getattr(importlib.import_module(f"harness.commands.{module}"), name))
