"""The demo's folder: each step's result is a file, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cskv.errors import CSKVError
from cskv.files import write_text

OURS = (
    "adapters",
    "training",
    "rows",
    "statistics.safetensors",
    "run.json",
    "results.json",
    "demo.png",
    "training.png",
)


class Workspace:
    """The files of one run.

        run.json                 what the run is of; another run's leftovers are removed
        statistics.safetensors   calibration
        adapters/KEY/            one adapter folder per compressed variant
        training/KEY/            checkpoints and log of a training
        rows/KEY.json            the figures of one variant
        results.json             everything, once the run is complete; the next run begins anew

    Args:
        folder: made if absent.
        facts: JSON-ready; the run is continued only if they are the same.

    Raises:
        CSKVError: the folder cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.resumed = self._read("run.json") == facts and not (folder / "results.json").exists()
        if not self.resumed:
            self._clear()
            self.write("run.json", facts)

    def path(self, *parts: str) -> Path:
        """A file or folder inside the workspace."""
        return self.folder.joinpath(*parts)

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file, atomically."""
        write_text(self.path(name), json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")

    def row(self, key: str) -> dict[str, Any] | None:
        """The figures of a variant that an interrupted run has measured already, or None."""
        return self._read(f"rows/{key}.json")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            values = json.loads(self.path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # files are written atomically: this one is not ours, or from another version
            return None
        return values if isinstance(values, dict) else None

    def _clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        try:
            for name in OURS:
                path = self.path(name)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise CSKVError(f"cannot clear {error.filename}: {error.strerror}; choose another folder") from error
