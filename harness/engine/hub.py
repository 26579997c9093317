"""Push a folder to the Hugging Face Hub, with a card that says what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError, one_line
from harness.files import write_text

CARD = "README.md"


@dataclass(frozen=True)
class Repository:
    """A repository on the hub.

    name: OWNER/NAME. kind: "model" or "dataset". private: whether it is private if it is new.

    Raises InputError for a name that the hub does not take, and if the environment says that Python is offline.
    """

    name: str
    kind: str
    private: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise InputError(f"{self.name[:200]!r}: {one_line(error)}; give OWNER/NAME") from None
        if self.name.count("/") != 1:
            raise InputError(f"{self.name!r} does not say whose repository it is; give OWNER/NAME")
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{self.name}: nothing can be pushed while HF_HUB_OFFLINE is set; unset it")


def push(repository: Repository, folder: Path, message: str) -> str:
    """Upload all files of a folder, and return the address of the repository, which is made if it is not there.

    message: the message of the commit. Raises InputError with what the hub says if it refuses.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = api.create_repo(repository.name, repo_type=repository.kind, private=repository.private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.name, repo_type=repository.kind, folder_path=folder, commit_message=message
        )
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise InputError(f"{repository.name}: the hub refuses: {one_line(error)}; `hf auth login` stores a token that"
                         " may write") from error
    return str(url)


def write_card(folder: Path, front: str, text: str) -> None:
    """Write the card of a folder. front: YAML, which the hub reads. text: Markdown."""
    write_text(folder / CARD, f"---\n{front.rstrip()}\n---\n\n{text.rstrip()}\n")
