"""The YAML files of settings that come with the harness. `harness --help` lists them, so nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from harness.errors import InputError


def config_folder() -> Path:
    """Return conf/ of the checkout, or harness/conf of an installed wheel. Raises InputError if there is neither."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError(f"the configs that come with the harness are missing beside {package}; install it again")


def groups(folder: Path | None = None) -> dict[str, list[str]]:
    """Return the config groups of a folder, by default conf/, and the names in each group."""
    folder = folder or config_folder()
    return {
        group.name: sorted(path.stem for path in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir() and any(group.glob("*.yaml"))
    }
