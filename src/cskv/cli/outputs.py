"""Places to write results to, checked before the work and not after it."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from cskv.cli.common import is_main_process
from cskv.errors import CSKVError


def check_writable(*targets: Path) -> None:
    """Check that files can be written, by writing a temporary one beside each; nothing is left behind.

    Raises:
        CSKVError: a file is a folder, or its folder cannot be made or written.
    """
    for target in targets if is_main_process() else ():
        if target.is_dir():
            raise CSKVError(f"cannot write {target}: it is a folder; expected the name of a file")
        missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
        except OSError as error:
            raise CSKVError(f"cannot write {target}: {error.strerror or error}; choose a writable folder") from error
        finally:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
