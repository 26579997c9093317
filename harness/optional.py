"""Check for packages that only some uses need, at the time of such a use."""

from __future__ import annotations

from importlib.util import find_spec

from harness.errors import InputError


def require(package: str, extra: str, what: str) -> None:
    """Raise InputError if a package is not installed.

    extra: the extra of this package in pyproject.toml that installs it. what: what needs the package, for the message.
    """
    if find_spec(package) is None:
        raise InputError(
            f"{what} needs the package {package}, which is not installed:"
            f" pip install 'spectral-ablation-harness[{extra}]'"
        )
