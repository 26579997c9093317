"""The command line, one of the two doors beside api/. Wrong input gives one line and exit status 2."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from harness import __version__, startup
from harness.__main__ import INTERRUPTED
from harness.errors import InputError, complain

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from typing import Any

DESCRIPTION = "Remove chosen spectral regions from chosen weight matrices of a transformer and measure what that does."
OTHERS = "A measurement that another package adds is a command of its own name."


class Command:
    """One command.

    help: one line for `harness --help`. run: does it and returns the exit status. add: adds the arguments of its own.
    settings: the name of the measurement whose settings it takes, or None if it takes no settings.
    examples: lines for the help of the command.
    """

    # A dataclass would need a module whose import takes a tenth of `harness --help`.
    def __init__(
        self, help: str, run: Callable[[argparse.Namespace], int], add: Callable[[argparse.ArgumentParser], None],
        settings: str | None = None, examples: tuple[str, ...] = (),
    ) -> None:
        self.help, self.run, self.add, self.settings, self.examples = help, run, add, settings, examples


class Later:
    """The functions of a module in commands/, each of one argument. The module is imported when one is called.

    The modules take a tenth of `harness --help`.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        def call(argument: Any) -> Any:
            from importlib import import_module

            return getattr(import_module(f"harness.commands.{self._module}"), name)(argument)

        return call


comparison, from_settings, listing, of_folder = map(Later, ("comparison", "from_settings", "listing", "of_folder"))
COMMANDS = {
    "run": Command("run what is missing of a study, then report", from_settings.measure, from_settings.add_measuring,
                   "ablation", (
        "harness run",
        "harness run model=openai-community/gpt2 task=wikitext tasks.wikitext.limit=64",
        "harness run model=gpt2 task=[wikitext,lambada] target=matrix target.layer_types=[mlp] region=laser",
        "harness run model=gpt2 task=text tasks.text.data_files=my.txt region.values=0.1 region=fraction",
        "harness run -m model=gpt2,pythia-410m task=wikitext    # one study for each model, and their comparison",
    )),
    "spectra": Command("compare the singular values and vectors of every matrix with random matrices",
                       from_settings.measure, from_settings.add_measuring, "spectra", (
        "harness spectra init=both task=recall",
        "harness spectra model=pretrained model.name=path/to/model init=both",
        "harness spectra model=pythia-410m revisions=[step0,step1000,step143000] task=wikitext tasks.wikitext.limit=32",
    )),
    "search": Command("find the best cells of a grid on some examples, and judge them on the others",
                      from_settings.measure, from_settings.add_measuring, "search", (
        "harness search model=gpt2 target=mlp_matrix region=laser task=[ioi,wikitext] tasks.ioi.data_files=ioi.jsonl",
        "harness search model=gpt2 target=mlp_matrix region=laser task=blimp tasks.blimp.data_files=blimp"
        " search.compose=greedy",
    )),
    "tune": Command("fine-tune a model from several seeds, with a region removed before or after, or not at all",
                    from_settings.measure, from_settings.add_measuring, "tuning", (
        "harness tune model.name=path/to/encoder task=sst2 tasks.sst2.data_files=validation.jsonl"
        " tune.data_files=train.jsonl",
        "harness tune tune=lora model.name=path/to/model task=label_words region.deciles=[1,10]"
        " tasks.label_words.data_files=validation.jsonl tune.data_files=train.jsonl",
    )),
    "coupling": Command("measure how the residual Jacobians of different blocks share their singular vectors",
                        from_settings.measure, from_settings.add_measuring, "coupling", (
        "harness coupling init=both task=recall",
        "harness coupling model=smollm2-135m init=both task=wikitext tasks.wikitext.window=48 k=[10,30]",
        "harness coupling model=gpt2 task=wikitext tasks.wikitext.window=48 target=type region=fraction",
    )),
    "components": Command("derive metrics to every singular value, and say what its directions read and write",
                          from_settings.measure, from_settings.add_measuring, "components", (
        "harness components calibration=wikitext task=lambada model=smollm2-135m",
        "harness components model=gpt2 calibration=wikitext region.metric=activations blocks=[10,11]",
        "harness components model=gpt2 calibration=wikitext exact=results/gpt2-components",
    )),
    "plan": Command("print what a run would measure, without loading weights", from_settings.plan,
                    from_settings.add_plan, "ablation", (
        "harness plan model=gpt2 target=type region=decile task=wikitext",
        "harness plan spectra model=gpt2 init=both    # the first word may name any measurement",
        "harness plan --freeze model=gpt2 task=wikitext output=results/gpt2    # then harness work results/gpt2",
    )),
    "submit": Command("submit what is missing of a run to Slurm, as arrays of shards", from_settings.submit,
                      from_settings.add_measuring, "ablation", (
        "harness submit cluster=slurm_gpu model=gpt2 target=matrix task=wikitext cluster.shards=8",
        "harness submit spectra cluster=slurm_gpu model=gpt2 init=both",
    )),
    "work": Command("run what is missing of a frozen run, from its manifest alone", of_folder.work, of_folder.add_work),
    "status": Command("count the done, running, pending, failed and missing units of a run", of_folder.status,
                      of_folder.add_status),
    "report": Command("make tables and figures of a run from its parquet files", of_folder.report,
                      of_folder.add_report),
    "compact": Command("merge the small files of done units, also while a run goes on", of_folder.compact,
                       of_folder.add_folder),
    "push": Command("upload the tables of a run to the Hugging Face Hub, as a data set with a card", of_folder.push,
                    of_folder.add_push, examples=("harness push results/gpt2-ab12cd34 me/gpt2-deciles --private",)),
    "compare": Command("compare studies of several models, or one run with published numbers", comparison.compare,
                       comparison.add_compare),
    "list": Command("list the tasks, regions, models or experiments that there are", listing.show_list,
                    listing.add_list),
    "completion": Command("print a script by which your shell completes commands and settings", listing.completion,
                          listing.add_completion),
    "export": Command("save a model with one ablation, which settings mean or a cell has measured",
                      from_settings.export, from_settings.add_export, "ablation", (
        "harness export target=all region=fraction region.kinds=[small] region.values=[0.75] output=ablated",
        "harness export --study results/gpt2 --cell 3f9a output=ablated",
    )),
}  # fmt: skip


def commands(asked: str) -> dict[str, Command]:
    """Return the commands by name: the harness's own, then one for each measurement that another package adds.

    asked: the command that was asked for. Only a name that is not the harness's own is looked for in other packages,
    because the search takes longer than all the rest of `harness --help`.
    """
    if asked in COMMANDS or asked.startswith("-") or not asked:
        return COMMANDS
    from harness.registry import added_names

    others = {name: Command(f"measure {name}", from_settings.measure, from_settings.add_measuring, name)
              for name in added_names("harness.measurements") if name not in COMMANDS}
    return {**COMMANDS, **others}


def _columns() -> int:
    """Return the width of help. argparse would ask shutil, whose import takes a twentieth of `harness --help`."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked) - 2
    try:
        return (os.get_terminal_size(sys.stdout.fileno()).columns or 80) - 2
    except (AttributeError, ValueError, OSError):  # the output is no terminal
        return 78


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns())


class _RawFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    pass


def _parser(known: dict[str, Command], argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for a command line. Only commands that are in it get their own arguments, which takes time."""
    parser = argparse.ArgumentParser(prog="harness", description=DESCRIPTION, epilog=OTHERS, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in known.items():
        one = subparsers.add_parser(name, help=command.help, formatter_class=_RawFormatter)
        if name not in argv:
            continue
        one.set_defaults(measurement=command.settings, commands=known)
        if command.settings is not None:
            one.add_argument("overrides", nargs="*", metavar="setting=value", help="overrides in the grammar of Hydra")
            one.add_argument("--config-dir", help="a folder of yours that is also searched for YAML files of settings")
        command.add(one)
    return parser


_EXPLAINED = """A study takes one model, removes singular values from some of its matrices,
measures a task, and undoes the removal. Each removal on each task is a cell: a row with its value, its change against
the unedited model, the standard error of that change, and its p-value. These settings say what the cells are:

  model=   whose weights: owner/name on the hub, a folder, a GGUF file, or a name of the list below
  task=    what is measured: a name of the list below, any task of lm-eval (task=mmlu), or several: task=[ioi,wikitext]
  target=  the matrices that are edited together: each matrix alone, a layer type in all blocks, a block, or all
  region=  the singular values that are removed: tenths of the rank (decile), shares of it (fraction), LASER's, ...

Without settings the small embedded model is trained and measured. For any other model, task= must be given, and target=
and region= are type and decile by default: each layer type in all blocks, ten tenths of the spectrum. A line says how
many cells there are and how long they take before the first is measured. Interrupt a run as you like: the same command
goes on where it stopped. `harness plan` says everything and measures nothing.
"""


def _epilog(command: Command) -> str:
    from harness.settings.configs import groups

    lines = [_EXPLAINED] if command.settings in ("ablation", "search") else []
    lines += ["settings are Hydra overrides: group=name chooses a YAML file of conf/, key=value sets one value", "",
              "groups (harness list tasks|regions|models|experiments has a line for each name):"]
    lines += [f"  {group}={{{','.join(names)}}}" for group, names in groups().items()]
    if command.examples:
        lines += ["", "examples:", *(f"  {line}" for line in command.examples)]
    return "\n".join(lines)


def _one_line_for_skipped_parts(show: Callable[..., None]) -> Callable[..., None]:
    """Return a function that shows warnings as `show` does, but those of the tables without the place in the code."""

    def shown(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        from harness.tables.reader import SkippedParts

        if issubclass(category, SkippedParts):
            complain(Exception(message))
        else:
            show(message, category, *rest)

    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. argv: the arguments, by default those of the process."""
    _write_any_character()
    startup.rest(keep=argv is None)
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # so that a full or closed output is found here, and not when Python ends
    except InputError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has ended, as in `| head`.
        _drop_output()
        return 0
    except MemoryError as error:
        complain(InputError(f"not enough memory: {error or 'none is left'}; use a smaller model, or smaller settings"))
        return 2
    except OSError as error:
        if not _output_fails():
            raise
        _drop_output()
        complain(InputError(f"standard output: {error.strerror}; write it to another place"))
        return 2
    finally:
        startup.wake()


def _run(argv: list[str]) -> int:
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the current folder cannot be used ({error.strerror}); change to another folder") from error
    for argument in argv:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise InputError(f"{ascii(argument)}: this is not text in the encoding of the terminal; use names in UTF-8"
                             " and a locale of UTF-8, for example LC_ALL=C.UTF-8")
    known = commands(argv[0] if argv else "")
    parser = _parser(known, argv)
    if argv and argv[0] in known and known[argv[0]].settings and {"-h", "--help"} & set(argv):
        subcommands: Any = parser._subparsers
        subcommands._group_actions[0].choices[argv[0]].epilog = _epilog(known[argv[0]])
    arguments, rest = parser.parse_known_args(argv)
    # argparse does not recognise settings that follow an option.
    unknown = [argument for argument in rest if argument.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_for_skipped_parts(warnings.showwarning)
        return known[arguments.command].run(arguments)


def _write_any_character() -> None:
    """Let the output write an escape such as \\xb1 for a character that its encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _output_fails() -> bool:
    """Return whether the standard output takes nothing more, as on a full disk."""
    try:
        sys.stdout.write("\n")  # without a buffer there is nothing left to flush
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Write the rest of the output to nowhere. Python would fail when it flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
