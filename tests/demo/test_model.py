"""Which model the demo takes: the fetched one, or the bundled one where nothing can be fetched."""

from __future__ import annotations

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from demo import model
from demo.model import BUNDLED, fast_dtype, find_model


def fake(path: Path, body: str) -> Path:
    """Write a script in place of the one that fetches."""
    path.write_text(f"import os, pathlib, subprocess, sys, time\n{body}\n", encoding="utf-8")
    return path


def test_a_fetched_model_is_taken_and_the_line_says_where_it_is_from(tmp_path):
    script = fake(tmp_path / "fetch.py", "print('asking the hub'); print(sys.argv[2], 'holds it, from the hub')")
    path, line = find_model(script, tmp_path / "smollm2")
    assert path == os.path.relpath(tmp_path / "smollm2")
    assert line == f"model: {path} holds it, from the hub"


def test_where_nothing_can_be_fetched_the_bundled_model_is_taken_and_the_line_says_why(tmp_path):
    script = fake(
        tmp_path / "fetch.py", "print('asking'); print('error: no\\nerror: no network', file=sys.stderr); sys.exit(2)"
    )
    path, line = find_model(script, tmp_path / "smollm2")
    assert Path(path).resolve() == BUNDLED
    assert line == "model: the small bundled one, since SmolLM2-135M could not be fetched (no network)"


def test_a_network_that_never_answers_is_given_up_with_everything_that_was_started(tmp_path):
    waits = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    note = "pathlib.Path(__file__).with_name('child').write_text(str(child.pid))\ntime.sleep(60)"
    began = time.perf_counter()
    path, line = find_model(fake(tmp_path / "fetch.py", waits + note), tmp_path / "smollm2", limit=1.0)
    assert time.perf_counter() - began < 10
    assert Path(path).resolve() == BUNDLED
    assert "(not there after 1 s)" in line
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until init has buried it
            os.kill(int((tmp_path / "child").read_text()), 0)
            time.sleep(0.02)


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(model.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(model, "PATIENCE", 0.2)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_does_not_answer_is_left_out(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    script = fake(tmp_path / "fetch.py", "print('offline' if os.environ.get('HF_HUB_OFFLINE') else 'online')")
    began = time.perf_counter()
    assert find_model(script, tmp_path / "smollm2")[1] == "model: offline"
    assert time.perf_counter() - began < 10
    assert find_model(script, tmp_path)[1] == "model: online"  # it is there, so nobody is asked


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_answers_is_asked(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # which knows no page, and says so
    monkeypatch.setattr(BaseHTTPRequestHandler, "log_message", lambda *_: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(model, "PATIENCE", 5.0)
    monkeypatch.setattr(model.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert model.hub_answers()
    finally:
        server.shutdown()
        server.server_close()


def test_pip_is_told_not_to_wait_for_a_dead_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "180")
    body = "print(os.environ['PIP_RETRIES'], 'retries,', os.environ['PIP_DEFAULT_TIMEOUT'], 'seconds')"
    assert find_model(fake(tmp_path / "fetch.py", body), tmp_path)[1] == "model: 1 retries, 10 seconds"


@pytest.mark.parametrize(("supported", "expected"), [(True, "auto"), (False, "float32")])
def test_a_processor_without_bf16_computes_in_fp32(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert fast_dtype() == expected
