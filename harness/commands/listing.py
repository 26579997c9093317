"""The commands that say what there is: `harness list`, and `harness completion` for the shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from harness.errors import InputError

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from pathlib import Path

GROUPS = {"tasks": "task", "regions": "region", "models": "model", "experiments": "experiment"}
# What else a group takes, and the entry points by which other packages add to it.
MORE = {
    "tasks": "any task of lm-eval by its name or its YAML file: task=mmlu, task=mine.yaml",
    "regions": "",
    "models": "any other model: model=owner/name (on the hub), model=path/to/folder, model=path/to/file.gguf",
    "experiments": "",
}  # fmt: skip
ENTRY_POINTS = {"tasks": ("harness.tasks", "+tasks.NAME.kind={}"), "regions": ("harness.regions", "region.by={}")}


def add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help=f"what is listed: {', '.join(GROUPS)}")
    parser.add_argument("--config-dir", help="a folder of yours with more YAML files of settings")


def show_list(arguments: argparse.Namespace) -> int:
    """Print one line for each name of a config group, and what else the group takes."""
    from pathlib import Path

    from harness.registry import added_names
    from harness.settings.configs import config_folder

    if arguments.what not in GROUPS:
        raise InputError(f"list: {arguments.what[:200]!r} is wrong; use one of {', '.join(GROUPS)}")
    group = GROUPS[arguments.what]
    folders = [config_folder(), *([Path(arguments.config_dir)] if arguments.config_dir else [])]
    found = {path.stem: path for folder in folders for path in (folder / group).glob("*.yaml")}
    lines = {name: described(found[name]) for name in sorted(found)}
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    point, override = ENTRY_POINTS.get(arguments.what, ("", ""))
    for name in added_names(point) if point else ():
        print(f"{name:<{width}}  of another package: {override.format(name)}")
    if MORE[arguments.what]:
        print(MORE[arguments.what])
    return 0


def described(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a YAML file; without one, what it names."""
    import textwrap

    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    text = " ".join(comment)
    if not text:
        return next((line.partition(": ")[2] for line in lines if line.startswith(("name: ", "kind: ", "by: "))), "")
    end = text.find(". ")
    return textwrap.shorten((text if end < 0 else text[:end]).rstrip("."), 150, placeholder=" ...")


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", help="your shell: bash or zsh")


def completion(arguments: argparse.Namespace) -> int:
    """Print a script that completes commands, the names of config groups and the names of settings.

    arguments.commands: the commands by name, as `harness.cli` has them.
    """
    from harness.settings.configs import groups

    if arguments.shell not in ("bash", "zsh"):
        raise InputError(f"completion: {arguments.shell[:200]!r} is wrong; use bash or zsh")
    words = sorted({*(f"{group}={name}" for group, names in groups().items() for name in names), *_keys()})
    commands = arguments.commands
    folders = " ".join(name for name, command in commands.items() if command.settings is None and name != "list")
    if arguments.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(_SCRIPT.format(commands=" ".join(commands), words=" ".join(words), folders=folders, lists=" ".join(GROUPS)))
    return 0


def _keys() -> Iterator[str]:
    """Yield the names of all settings of a study and of a search, with = behind."""
    from harness.measurements import SEARCH, source_of

    def below(tree: object, prefix: str) -> Iterator[str]:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from below(value, f"{prefix}.{key}" if prefix else str(key))
        elif prefix != "tasks":
            yield f"{prefix}="

    yield from below(source_of(SEARCH).keys, "")


_SCRIPT = """# harness: source this in your shell, for example  source <(harness completion bash)
_harness() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} line=${{COMP_LINE:0:COMP_POINT}}
    local word=${{line##* }}
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [ "${{COMP_WORDS[1]}}" = list ]; then
        COMPREPLY=($(compgen -W "{lists}" -- "$word"))
    elif [[ " {folders} " == *" ${{COMP_WORDS[1]}} "* ]]; then
        COMPREPLY=($(compgen -d -- "$word"))
    else
        local found=($(compgen -W "{words}" -- "$word"))
        # bash breaks words at = : what stands before it is on the line already
        [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] && found=("${{found[@]#*=}}")
        COMPREPLY=("${{found[@]}}")
        [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
    fi
}}
complete -F _harness harness"""
