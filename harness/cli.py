"""The command line. Bad input is one line on standard error and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from harness import __version__
from harness.errors import InputError, complain

DESCRIPTION = "Remove chosen spectral regions from chosen weight matrices of a transformer and measure what that does."


EXAMPLES = {
    "run": (
        "harness run",
        "harness run model=pretrained model.name=path/to/model task=text tasks.text.data_files=my.txt",
        "harness run model=gpt2 target=type region=decile task=[wikitext,lambada]",
    ),
    "plan": (
        "harness plan model=gpt2 target=type region=decile task=wikitext",
        "harness plan --freeze model=gpt2 task=wikitext output=results/gpt2    # then harness work results/gpt2",
    ),
    "submit": ("harness submit cluster=slurm_gpu model=gpt2 target=matrix task=wikitext cluster.shards=8",),
    "search": (
        "harness search model=gpt2 target=mlp_matrix region=laser task=[ioi,wikitext] tasks.ioi.data_files=ioi.jsonl",
        "harness search model=gpt2 target=mlp_matrix region=laser task=blimp tasks.blimp.data_files=blimp"
        " search.compose=greedy",
    ),
    "export": (
        "harness export target=all region=fraction region.kinds=[small] region.values=[0.75] output=ablated",
        "harness export --study results/gpt2 --cell 3f9a output=ablated",
    ),
    "spectra": (
        "harness spectra init=both task=recall",
        "harness spectra model=pretrained model.name=path/to/model init=both",
        "harness spectra model=pythia-410m revisions=[step0,step1000,step143000] task=wikitext tasks.wikitext.limit=32",
    ),
}  # fmt: skip


def _epilog(command: str) -> str:
    examples = ["examples:", *(f"  {line}" for line in EXAMPLES[command])]
    if command == "spectra":
        what = "settings are Hydra overrides of conf/spectra.yaml: model, task, and key=value"
        return "\n".join([what, "", *examples])
    from harness.compose import groups

    lines = ["settings are Hydra overrides: group=name chooses a YAML file, key=value sets one value", "", "groups:"]
    lines += [f"  {group}={{{','.join(names)}}}" for group, names in groups().items()]
    return "\n".join([*lines, "", *examples])


STUDY_FOLDER = "of a study: results/<model>-<id> or its output=...; of a search: its selection or its report folder"


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="Hydra overrides of the configs")
    parser.add_argument("--config-dir", help="a folder with config groups of your own, searched beside ours")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="harness", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    formatter = argparse.RawDescriptionHelpFormatter

    run = commands.add_parser("run", help="run what is missing of a study, then report", formatter_class=formatter)
    _add_settings(run)
    run.add_argument("-m", "--multirun", action="store_true", help="one study per combination of a=1,2 settings")
    run.add_argument("--quiet", action="store_true", help="no progress bar and no report")

    plan = commands.add_parser("plan", help="what a study would measure, before any weights are loaded",
                               formatter_class=formatter)
    _add_settings(plan)
    plan.add_argument("--show-config", action="store_true", help="print the composed settings as YAML and stop")
    plan.add_argument("--freeze", action="store_true", help="write the manifest too, for harness work")

    submit = commands.add_parser("submit", help="submit what is missing of a study to Slurm, as arrays of shards",
                                 formatter_class=formatter)
    _add_settings(submit)
    submit.add_argument("-m", "--multirun", action="store_true", help="one study per combination of a=1,2 settings")
    submit.add_argument("--quiet", action="store_true", help="no progress bar while waiting")

    work = commands.add_parser("work", help="run what is missing of a frozen study, from its manifest alone")
    work.add_argument("folder", help="of a frozen study: what harness plan --freeze or harness run wrote")
    work.add_argument("--shard", type=int, help="only this shard, counted from 0 (SLURM_ARRAY_TASK_ID)")
    work.add_argument("--of", type=int, default=1, help="shards in all, the same for every worker")
    work.add_argument("--quiet", action="store_true", help="no progress bar")

    search = commands.add_parser("search", help="the best cells of a grid on some of the examples, judged on the rest",
                                 formatter_class=formatter)
    _add_settings(search)
    search.add_argument("--quiet", action="store_true", help="no progress bar and no summary")

    compact = commands.add_parser("compact", help="merge the small files of done cells, also while a study runs")
    compact.add_argument("folder", help=STUDY_FOLDER)

    status = commands.add_parser("status", help="done, running, pending, failed and missing cells of a study")
    status.add_argument("folder", help=STUDY_FOLDER)
    status.add_argument("--failed", action="store_true", help="print the traceback of every failed cell")

    export = commands.add_parser("export", help="save an ablated model: one ablation, of settings or of a cell",
                                 formatter_class=formatter)
    _add_settings(export)
    export.add_argument("--factored", action="store_true", help="a smaller file, with low-rank factors")
    export.add_argument("--study", metavar="FOLDER", help="with --cell: the study that measured it")
    export.add_argument("--cell", metavar="CELL_ID", help="a cell of that study instead of settings")

    report = commands.add_parser("report", help="tables and figures of a study or of spectra, from parquet only")
    report.add_argument("folder", help=f"{STUDY_FOLDER}; or of spectra: results/spectra-<model>-<id>")

    spectra = commands.add_parser("spectra", help="singular values and vectors of every matrix, beside random matrices",
                                  formatter_class=formatter)
    _add_settings(spectra)
    spectra.add_argument("--quiet", action="store_true", help="no progress bar and no report")

    return parser


def _refuse_search_settings(arguments: argparse.Namespace) -> None:
    """Those that were typed; the YAML of an experiment may serve both commands."""
    for override in arguments.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.split(".")[0] == "search":
            raise InputError(f"{key}: harness {arguments.command} does not read it; harness search does")


def _require_device(device: str) -> None:
    """Raises InputError where this machine does not have it; a job that is submitted may find it elsewhere."""
    if device != "auto":
        from harness.models.loading import pick_device

        pick_device(device)


def _run(arguments: argparse.Namespace) -> int:
    _refuse_search_settings(arguments)
    if arguments.multirun:
        return _multirun(arguments, run_config)
    from harness.compose import compose_config

    return run_config(compose_config(arguments.overrides, arguments.config_dir), quiet=arguments.quiet)


def run_config(config, quiet: bool = False) -> int:
    from harness.execution.ranks import is_main_process
    from harness.execution.runner import run

    _require_device(config.model.device)
    if quiet:
        _hush()
    folder = run(config, progress=not quiet, report_to=(lambda line: None) if quiet else None)
    if not quiet and is_main_process():
        _write_report(folder)
    return 0


def _hush() -> None:
    """No progress bars of the libraries either."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _write_report(folder) -> None:
    from harness.tables.report import report
    from harness.tables.schema import SchemaVersionError

    try:
        report(folder)
    except SchemaVersionError as error:
        raise InputError(str(error)) from error


def _multirun(arguments: argparse.Namespace, of_config: Callable[..., int]) -> int:
    from harness.sweep import sweep

    sweep(arguments.overrides, arguments.config_dir, lambda config: of_config(config, quiet=arguments.quiet))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from harness.compose import compose_config

    config = compose_config(arguments.overrides, arguments.config_dir)
    if arguments.show_config:
        import dataclasses

        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(dataclasses.asdict(config)), end="")
        return 0
    from harness.config import require_batch_tokens
    from harness.execution.planned import plan
    from harness.execution.planning import describe_plan

    if arguments.freeze:
        require_batch_tokens(config.runtime, "plan --freeze")
    planned = plan(config)
    print(describe_plan(planned))
    if arguments.freeze:
        from harness.execution.manifest import freeze

        freeze(planned.folder, planned.study)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    _refuse_search_settings(arguments)
    if arguments.multirun:
        return _multirun(arguments, submit_config)
    from harness.compose import compose_config

    return submit_config(compose_config(arguments.overrides, arguments.config_dir), quiet=arguments.quiet)


def submit_config(config, quiet: bool = False) -> int:
    from harness.execution.manifest import read_manifest
    from harness.execution.runner import to_stderr
    from harness.execution.slurm import submit, wait

    folder = submit(config, to_stderr)
    if not config.cluster.wait:
        return 0
    cells = [cell[0] for cell in read_manifest(folder)["cells"]]
    if wait(folder, cells, config.cluster.poll_seconds, progress=not quiet):
        return 0
    print(f"harness: not every cell is done; harness status {folder} shows which", file=sys.stderr)
    return 1


def _work(arguments: argparse.Namespace) -> int:
    from harness.execution.worker import work

    quiet = arguments.quiet
    work(arguments.folder, arguments.shard, arguments.of, not quiet, (lambda line: None) if quiet else None)
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from harness.compose import compose_config
    from harness.execution.search import search

    if arguments.quiet:
        _hush()
    config = compose_config(arguments.overrides, arguments.config_dir)
    _require_device(config.model.device)
    search(config, not arguments.quiet, (lambda line: None) if arguments.quiet else None)
    return 0


def _compact(arguments: argparse.Namespace) -> int:
    from harness.execution.manifest import read_manifest
    from harness.tables.schema import SchemaVersionError
    from harness.tables.store import compact

    read_manifest(arguments.folder)
    try:
        merged = compact(arguments.folder)
    except SchemaVersionError as error:
        raise InputError(str(error)) from error
    print(", ".join(f"{table}: {n} files merged" for table, n in merged.items()))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from harness.execution.status import describe_status

    print(describe_status(arguments.folder, arguments.failed))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from harness.execution.manifest import read_manifest
    from harness.tables.spectra_report import is_spectra

    if is_spectra(arguments.folder):
        return _spectra_report(arguments.folder)
    read_manifest(arguments.folder)
    _write_report(arguments.folder)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from harness.compose import compose_config
    from harness.execution.export import export, export_cell

    _hush()
    if arguments.study is None and arguments.cell is None:
        _refuse_search_settings(arguments)
        config = compose_config(arguments.overrides, arguments.config_dir)
        _require_device(config.model.device)
        print(export(config, arguments.factored))
        return 0
    if arguments.study is None or arguments.cell is None:
        raise InputError("--study and --cell: give both, a study's folder and the id of one of its cells")
    output = None
    for override in arguments.overrides:
        key, _, value = override.partition("=")
        if key != "output":
            raise InputError(f"{key}: a cell has its own settings; with --cell only output=FOLDER can be set")
        output = value
    print(export_cell(arguments.study, arguments.cell, output, arguments.factored))
    return 0


def _spectra(arguments: argparse.Namespace) -> int:
    from harness.compose import compose_config
    from harness.execution.ranks import is_main_process
    from harness.execution.spectra import run_spectra

    config = compose_config(arguments.overrides, arguments.config_dir, "spectra")
    _require_device(config.model.device)
    folder = run_spectra(config, not arguments.quiet)
    return 0 if arguments.quiet or not is_main_process() else _spectra_report(folder)


def _spectra_report(folder) -> int:
    from harness.tables.schema import SchemaVersionError
    from harness.tables.spectra_report import spectra_report

    try:
        spectra_report(folder)
    except SchemaVersionError as error:
        raise InputError(str(error)) from error
    return 0


COMMANDS = {"run": _run, "plan": _plan, "submit": _submit, "work": _work, "compact": _compact, "status": _status,
            "search": _search, "export": _export, "report": _report, "spectra": _spectra}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if argv and argv[0] in EXAMPLES and {"-h", "--help"} & set(argv):
        parser._subparsers._group_actions[0].choices[argv[0]].epilog = _epilog(argv[0])
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on settings that stand behind an option
    unknown = [argument for argument in rest if argument.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    try:
        return COMMANDS[arguments.command](arguments)
    except InputError as error:
        complain(error)
        return 2
    except BrokenPipeError:
        # the reader of our output (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("harness: interrupted; what is done is kept, run the same command again to go on", file=sys.stderr)
        return 130
