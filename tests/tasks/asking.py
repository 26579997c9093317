"""Tasks as a study asks for them: settings that went through validation."""

from __future__ import annotations

from typing import Any

from harness.measurements.ablation.settings import StudySettings
from harness.settings.validation import validated
from harness.tasks.settings import Task


def asked(name: str, **values: Any) -> Task:
    """The task of that name in a study with these settings. Raises InputError as the command line does."""
    return validated(StudySettings, {"tasks": {name: values}}).tasks[name]
