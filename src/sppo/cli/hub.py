"""Uploading a folder to a hub of models, with every way it goes wrong as one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import first_line


def create(name: str, private: bool) -> str:
    """Make sure that a repository is there and can be written to; returns its whole name, OWNER/NAME. Raises UserError."""
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    with _one_sentence(f"--hub {name}"):
        if get_token() is None:
            raise UserError(f"--hub {name} needs a token: run `hf auth login`, or set HF_TOKEN")
        made = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(made.repo_id).private:
            raise UserError(
                f"--private: {made.repo_id} is there and public; make it private first, or choose another name"
            )
        return str(made.repo_id)


def upload(name: str, folder: Path) -> None:
    """Upload all of a folder. Raises UserError; the folder stays."""
    from huggingface_hub import HfApi

    with _one_sentence(f"{folder} is written, and could not be uploaded (later: hf upload {name} {folder})"):
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from sppo export")


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = "the token may not write there" if status in (401, 403) else error.server_message or first_line(error)
        raise UserError(f"{what}: {constants.ENDPOINT} refuses it ({status}): {why}") from None
    except ValueError as error:  # a name that cannot be, or a card that the hub cannot read
        raise UserError(f"{what}: {first_line(error)}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE forbids the network; unset it") from None
    except OSError as error:
        raise UserError(f"{what}: {constants.ENDPOINT} cannot be reached: {first_line(error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise UserError(f"{what}: {constants.ENDPOINT} cannot be reached: {first_line(error)}") from None
