from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed import decode, methods, tables
from benchmarks.speed.problem import Problem, Shape
from benchmarks.speed.registry import Unavailable


def test_every_method_is_checked_and_timed(decoded):
    assert set(decoded["rows"]) == {"2 x 96", "2 x 160", tables.COPY}
    assert decoded["rows"][tables.COPY]["bytes_per_second"]["median"] > 0
    for row in tables.cells(decoded):
        assert set(row["methods"]) == set(methods.methods())
        for name, own in row["methods"].items():
            if "skipped" in own or name == methods.POSITIONS:
                continue
            assert own["error"] < 0.02
            assert 0 < own["seconds"]["p10"] <= own["seconds"]["median"] <= own["seconds"]["p90"]
            assert own["nbytes"] > 0
    assert {"cpu", "threads", "torch", "transformers", "date"} <= set(decoded["environment"])


def test_what_was_measured_is_kept_and_other_settings_are_refused(tmp_path, decoded, run_decode, capsys):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps(decoded))
    assert run_decode(path) == 0
    assert json.loads(path.read_text()) == decoded
    assert run_decode(path, "--dtype", "float32") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [16, 4])
def test_a_wrong_output_is_refused_and_not_stored(tmp_path, monkeypatch, run_decode, capsys, bits):
    honest = methods.attention
    monkeypatch.setattr(methods, "attention", lambda *a, **k: 1.1 * honest(*a, **k))
    path, name = tmp_path / "decode.json", "commuting" + (", 4 bits" if bits == 4 else "")
    assert run_decode(path, "--methods", name) == 1
    assert f"wrong output, refused: {name}" in capsys.readouterr().err
    assert not path.exists()


def test_garbage_that_a_method_also_claims_to_read_is_refused(tmp_path, monkeypatch, run_decode):
    def lying(problem, **_):
        zeros = torch.zeros(1, 4, 5, 32)
        return methods.Method(lambda: torch.zeros_like(problem.query), int, int, lambda: (zeros, zeros))

    monkeypatch.setattr(methods, "ours", lying)
    assert run_decode(tmp_path / "decode.json", "--methods", "joint") == 1


def test_a_missing_package_is_a_skipped_row(tmp_path, monkeypatch, run_decode):
    def missing(*args, **kwargs):
        raise methods.CSKVError("it needs hqq")

    monkeypatch.setattr(methods, "quantized_cache", missing)
    path = tmp_path / "decode.json"
    assert run_decode(path, "--methods", methods.QUANTIZED) == 0
    row = json.loads(path.read_text())["rows"]["2 x 96"]["methods"][methods.QUANTIZED]
    assert row == {"skipped": "it needs hqq; it needs hqq"}


def test_a_row_that_does_not_fit_is_skipped_with_its_reason(tmp_path, monkeypatch, run_decode):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1000)
    path = tmp_path / "decode.json"
    assert run_decode(path) == 0
    assert "GiB of memory" in json.loads(path.read_text())["rows"]["2 x 96"]["skipped"]


def test_a_method_that_fails_stops_no_other_where_a_run_keeps_going(tmp_path, monkeypatch, run_decode, capsys):
    honest = methods.attention

    def broken(query, inputs, **how):
        if inputs.rotation is None:  # commuting
            raise RuntimeError("no such kernel")
        return honest(query, inputs, **how)

    monkeypatch.setattr(methods, "attention", broken)
    path = tmp_path / "decode.json"
    assert run_decode(path, "--keep-going", "--methods", "joint", "commuting") == 3
    for row in tables.cells(json.loads(path.read_text())):
        assert row["methods"]["commuting"] == {"failed": "RuntimeError: no such kernel"}
        assert row["methods"]["joint"]["seconds"]["median"] > 0
    assert "no such kernel" in capsys.readouterr().out


def test_what_loses_the_gpu_is_left_out_of_the_next_run(tmp_path, monkeypatch, run_decode):
    def losing(*_args, **_how):
        monkeypatch.setattr(decode, "is_lost", lambda: True)
        raise RuntimeError("an illegal memory access")

    path, asked = tmp_path / "decode.json", ("--keep-going", "--methods", "joint")
    with monkeypatch.context() as patch:
        patch.setattr(methods, "attention", losing)
        assert run_decode(path, *asked) == 4
        assert json.loads(path.read_text())["lost"] == ["joint"]
    monkeypatch.undo()
    assert run_decode(path, *asked) == 3
    for row in tables.cells(json.loads(path.read_text())):
        assert row["methods"]["joint"] == {"failed": "it lost the GPU"}
        assert "seconds" in row["methods"][methods.BEST]


def test_flash_decoding_attends_by_flash_kernels_alone(tmp_path, run_decode):
    path = tmp_path / "decode.json"
    assert run_decode(path, "--methods", methods.FLASH) == 0
    row = json.loads(path.read_text())["rows"]["2 x 96"]["methods"]
    assert row[methods.FLASH] == {"skipped": "it needs a GPU"}
    problem = Problem("joint", Shape(8, 4, 32), 96, 2, torch.float32, torch.device("cpu"))
    flash = methods.BestUncompressed(problem, only_flash=True)
    assert decode.relative_error(flash.step()[-1, :, 0], problem.truth()) < 1e-4


def test_a_candidate_that_torch_has_no_kernel_for_is_left_out(monkeypatch):
    problem = Problem("joint", Shape(8, 4, 32), 96, 2, torch.float32, torch.device("cpu"))

    def refuse(*_args, **_how):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(methods, "scaled_dot_product_attention", refuse)
    assert "sdpa" not in methods.BestUncompressed(problem).note
    with pytest.raises(Unavailable, match="No available kernel"):
        methods.BestUncompressed(problem, only_flash=True)
