"""Programs that loop, hoard, fork, write and talk are stopped; those that do not come to their end."""

from __future__ import annotations

import ctypes
import socket
import sys
import time
from dataclasses import replace

import pytest

from cskv.errors import CSKVError
from cskv.evaluation import sandbox
from cskv.evaluation.sandbox import Limits, run_confined

pytest.importorskip("resource")


def landlock() -> bool:
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


QUICK = Limits(cpu_seconds=1, wall_seconds=2.5, memory_bytes=1 << 28)


def test_a_program_that_ends_has_finished_and_its_output_is_kept():
    found = run_confined("import math\nprint(math.sqrt(16))", QUICK)
    assert found.finished
    assert found.output.strip() == "4.0"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit()",
        "def f(:",
        "import signal; signal.raise_signal(9)",
    ],
)
def test_a_program_that_does_not_come_to_its_end_has_not_finished(program):
    assert not run_confined(program, QUICK).finished


def test_what_went_wrong_can_be_read():
    assert "AssertionError: three" in run_confined("assert False, 'three'", QUICK).output


def test_an_endless_loop_is_stopped():
    began = time.monotonic()
    assert not run_confined("while True: pass", QUICK).finished
    assert time.monotonic() - began < 2.9


def test_sleep_is_stopped():
    assert not run_confined("import time; time.sleep(60)", replace(QUICK, wall_seconds=0.5)).finished


def test_a_hog_of_memory_is_stopped():
    found = run_confined("x = bytearray(1 << 30)", QUICK)
    assert not found.finished
    assert "MemoryError" in found.output


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.fork()",
        "import os; os.system('true')",
        "import os, sys; os.execv(sys.executable, [sys.executable])",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
        "import socket; socket.socket()",
        "import urllib.request as r; r.urlopen('http://127.0.0.1:9')",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_processes_signals_and_sockets_are_refused(program):
    found = run_confined(program, QUICK)
    assert not found.finished
    assert "not permitted" in found.output or "may not" in found.output


def test_files_are_written_in_a_folder_of_its_own_alone(tmp_path):
    target, kept = tmp_path / "written", tmp_path / "kept"
    kept.write_text("kept")
    inside = "open('here', 'w').write('x'); import os; os.mkdir('d'); os.rename('here', 'd/there'); print(os.getcwd())"
    found = run_confined(inside, QUICK)
    assert found.finished, found.output
    for program in (
        f"open({str(target)!r}, 'w')",
        f"open({str(target)!r}, 'wb', 0)",
        f"import os; os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.chmod({str(kept)!r}, 0)",
        f"import os; os.symlink({str(tmp_path)!r}, 'door'); open('door/written', 'w')",
    ):
        found = run_confined(program, QUICK)
        assert not found.finished, program
    assert not target.exists()
    assert kept.read_text() == "kept"
    assert kept.stat().st_mode & 0o777


def test_a_large_file_and_much_output_are_cut():
    limits = replace(QUICK, file_bytes=1 << 16, output_characters=100)
    assert not run_confined("open('large', 'wb').write(bytes(1 << 20))", limits).finished
    found = run_confined("for _ in range(100000): print('much')", limits)
    assert not found.finished
    assert len(found.output) == 100


def test_the_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("CSKV_SECRET", "secret")
    found = run_confined("import os, sys; print(dict(os.environ), sys.flags.no_site, sys.stdin.read())", QUICK)
    assert found.finished
    assert "secret" not in found.output
    assert "No module named 'torch'" in run_confined("import torch", QUICK).output


def test_the_order_of_sets_is_always_the_same():
    program = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert len({run_confined(program, QUICK).output for _ in range(3)}) == 1


def test_threads_are_no_way_out():
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    began = time.monotonic()
    run_confined(program, QUICK)
    assert time.monotonic() - began < 2.0


@pytest.mark.skipif(not landlock(), reason="no kernel with Landlock")
def test_the_kernel_refuses_what_gets_around_the_hook(tmp_path):
    """Without the audit hook, as code that reaches system calls by themselves."""
    unhooked = sandbox.CONFINEMENT.read_text().replace("    sys.addaudithook(_refusal(folder))\n", "")
    script = tmp_path / "confinement.py"
    script.write_text(unhooked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "CONFINEMENT", script)
        for program in (
            "import os; os.fork()",
            "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
            "import socket; socket.socket()",
            f"open({str(tmp_path / 'written')!r}, 'w')",
            f"open({str(script)!r})",
            "import os; os.kill(os.getppid(), 0)",
        ):
            found = run_confined(program, QUICK)
            assert not found.finished, program
            assert "PermissionError" in found.output


def test_no_connection_reaches_a_listening_socket():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        assert not run_confined(program, QUICK).finished


def test_a_platform_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CSKVError, match="limits of POSIX, which this platform does not have"):
        run_confined("pass")


def test_a_process_that_cannot_be_confined_is_an_error_and_no_outcome(tmp_path, monkeypatch):
    script = tmp_path / "confinement.py"
    script.write_text(
        sandbox.CONFINEMENT.read_text().replace("def _limit(", "def _limit(_):\n    raise OSError('old')\n\ndef _old(")
    )
    monkeypatch.setattr(sandbox, "CONFINEMENT", script)
    with pytest.raises(CSKVError, match="cannot confine a program: old"):
        run_confined("pass")
