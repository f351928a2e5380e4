"""Download from the Hugging Face hub, with an error that a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from cskv.errors import CSKVError, first_line


def download(repository: str, refusal: str, kind: type[CSKVError] = CSKVError, **kwargs: Any) -> Path:
    """Fetch files of a repository into the hub's local cache.

    Args:
        repository: its id.
        refusal: begins the message if that fails.
        kind: the error to raise then.
        **kwargs: `huggingface_hub.snapshot_download`'s own (`allow_patterns`, `revision`, `token`, ...).

    Raises:
        CSKVError: of the given kind; there is no such repository, or the hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repository, **kwargs))
    except (OSError, HFValidationError) as error:
        raise kind(f"{refusal}: {first_line(error)}") from error
