"""Models of Hugging Face's hub: `hf://org/name[@revision]` downloaded, folders uploaded, by huggingface_hub
(https://huggingface.co/docs/huggingface_hub), with HF_TOKEN, HF_ENDPOINT and HF_HOME as its own tools read them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.platform.storage.uri import StorageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf://"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a conversion reads: no weights in other formats, which double a download.
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def download_model(uri: str) -> Path:
    """The folder of a repository's files in the cache of the hub's client: a second call loads nothing again.

    Raises StorageError that says what to do.
    """
    name, _, revision = uri.removeprefix(PREFIX).removeprefix("models/").partition("@")
    require_name(name)
    folder = _asked(
        f"download {uri}", lambda api: api.snapshot_download(name, revision=revision or None, allow_patterns=FILES)
    )
    return Path(folder)


def upload_model(folder: str | Path, name: str, private: bool = True) -> str:
    """Upload a folder to a repository, which is made if there is none; the address of what was written.

    Raises StorageError that says what to do.
    """
    require_name(name)

    def upload(api: HfApi) -> str:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by calumma"))

    return _asked(f"upload {folder} to {PREFIX}{name}", upload)


def require_name(name: str) -> None:
    """Raises StorageError for what is no name of a repository."""
    if not NAME.fullmatch(name):
        raise StorageError(f"{name!r} is no repository's name; give org/name")


def _asked(action: str, ask: Callable[[HfApi], Any]) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask(HfApi(endpoint=os.environ.get("HF_ENDPOINT")))
    except GatedRepoError as error:
        advice = "its owner grants access on its page; then set HF_TOKEN"
        raise StorageError(f"cannot {action}: {_line(error)}; {advice}") from error
    except RepositoryNotFoundError as error:
        advice = "check the name; a private repository needs HF_TOKEN"
        raise StorageError(
            f"cannot {action}: there is no such repository, or it is not yours to see; {advice}"
        ) from error
    except RevisionNotFoundError as error:
        raise StorageError(f"cannot {action}: there is no such revision (a branch, tag or commit)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise StorageError(
            f"cannot {action}: {_line(error)}; is there a network? HF_ENDPOINT names another server"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise StorageError(
            f"cannot {action}: {_line(error)}; uploading needs HF_TOKEN with the right to write"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot {action}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
