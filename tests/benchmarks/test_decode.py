from __future__ import annotations

import json
import math
from pathlib import Path

import decode
import decode_methods
import decode_problem
import decode_report
import decode_tables
import decode_timing
import generation
import gpu
import pytest
import torch

TINY = decode_problem.Shape(q_heads=8, kv_heads=4, head_dim=32)
PAGE = "\n".join(
    f"<!-- measured: benchmarks/{script}.py -->\nold\n<!-- end of {script} -->\n"
    for script in ("decode", "generation", "gpu")
)


def run(path: Path, *more: str) -> int:
    return decode.main(
        ["--quick", "--device", "cpu", "--lengths", "96", "160", "--batches", "2", "--out", str(path), *more], TINY
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode") / "decode.json"
    assert run(path) == 0
    return json.loads(path.read_text())


def test_every_method_is_checked_and_timed(measured):
    assert set(measured["rows"]) == {"2 x 96", "2 x 160"}
    for row in measured["rows"].values():
        assert set(row["methods"]) == set(decode_methods.methods())
        for name, own in row["methods"].items():
            if "skipped" in own or name == decode_methods.POSITIONS:
                continue
            assert own["error"] < 0.02
            assert 0 < own["seconds"]["p10"] <= own["seconds"]["median"] <= own["seconds"]["p90"]
            assert own["nbytes"] > 0
    assert {"cpu", "threads", "torch", "transformers", "date"} <= set(measured["environment"])


def test_what_was_measured_is_kept_and_other_settings_are_refused(tmp_path, measured, capsys):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps(measured))
    assert run(path) == 0
    assert json.loads(path.read_text()) == measured
    assert run(path, "--dtype", "float32") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [16, 4])
def test_a_wrong_output_is_refused_and_not_stored(tmp_path, monkeypatch, capsys, bits):
    honest = decode_methods.attention
    monkeypatch.setattr(decode_methods, "attention", lambda *a, **k: 1.1 * honest(*a, **k))
    path, name = tmp_path / "decode.json", "commuting" + (", 4 bits" if bits == 4 else "")
    assert run(path, "--methods", name) == 1
    assert f"wrong output, refused: {name}" in capsys.readouterr().err
    assert not path.exists()


def test_garbage_that_a_method_also_claims_to_read_is_refused(tmp_path, monkeypatch):
    def lying(self):
        return torch.zeros(1, 4, 5, 32), torch.zeros(1, 4, 5, 32)

    monkeypatch.setattr(decode_methods.Ours, "represented", lying)
    monkeypatch.setattr(decode_methods.Ours, "attend", lambda self, view: torch.zeros_like(self.problem.token.query))
    assert run(tmp_path / "decode.json", "--methods", "joint") == 1


def test_a_missing_package_is_a_skipped_row(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise decode_methods.CSKVError("it needs hqq")

    monkeypatch.setattr(decode_methods, "quantized_cache", missing)
    path = tmp_path / "decode.json"
    assert run(path, "--methods", decode_methods.QUANTIZED) == 0
    row = json.loads(path.read_text())["rows"]["2 x 96"]["methods"][decode_methods.QUANTIZED]
    assert row == {"skipped": "it needs hqq; it needs hqq"}


def test_a_row_that_does_not_fit_is_skipped_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1000)
    path = tmp_path / "decode.json"
    assert run(path) == 0
    assert "GiB of memory" in json.loads(path.read_text())["rows"]["2 x 96"]["skipped"]


def test_slope_and_summary_of_made_up_seconds():
    assert decode_timing.slope([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx(2.0)
    assert math.isnan(decode_timing.slope([(1.0, 5.0)]))
    found = decode_timing.summary([float(value) for value in range(11)])
    assert (found["p10"], found["median"], found["p90"], found["repeats"]) == (1.0, 5.0, 9.0, 11)


def test_slopes_of_a_table_are_per_token_and_sequence(measured):
    rows = {
        f"2 x {tokens}": {"batch": 2, "tokens": tokens, "methods": {"joint": {"seconds": {"median": 1e-6 * tokens}}}}
        for tokens in (100, 200, 400)
    }
    assert decode_tables.slopes({"rows": rows, "settings": measured["settings"]}, 2)["joint"] == pytest.approx(500.0)


def test_calls_take_turns_and_slow_ones_sit_out():
    seen, seconds = [], {"fast": 0.001, "slow": 0.05, "slowest": 1.0}

    class Stopwatch:
        def seconds(self, call):
            return seconds[call()]

    calls = {name: lambda name=name: seen.append(name) or name for name in seconds}
    found = decode_timing.take_turns(calls, Stopwatch(), budget=0.1, least=1, most=8)
    assert {name: len(own) for name, own in found.items()} == {"fast": 8, "slow": 2, "slowest": 1}
    assert seen[5:] == [*["fast"] * 4, "slow", *["fast"] * 4, "slow"]


def test_the_page_is_filled(tmp_path, measured):
    page, empty = tmp_path / "page.md", {"rows": {}}
    page.write_text(PAGE)
    decode_report.write_report(measured, empty, page)
    text = page.read_text()
    assert "| commuting, 4 bits |" in text
    assert "Goals on a CPU" in text
    assert text.count("old") == 2
    assert (tmp_path / "figures" / "decode-speed.png").stat().st_size > 10_000


def test_goals_are_met_or_not():
    def row(batch: int, tokens: int, **medians: float):
        names = {"sdpa": decode_methods.SDPA, "best": decode_methods.BEST, "packed": "commuting, 4 bits"}
        own = {names.get(name, name): {"seconds": {"median": value}} for name, value in medians.items()}
        return {"batch": batch, "tokens": tokens, "methods": own}

    rows = {
        "1 x 16384": row(1, 16384, sdpa=12.0, best=1.5, commuting=1.0),
        "1 x 65536": row(1, 65536, commuting=2.0, packed=1.0),
    }
    table = decode_tables.cpu_goals({"rows": rows}, {"rows": {}})
    found = {goal: (shown, met) for goal, shown, met in table.rows}
    assert found["commuting keys, 16K: >= 10x transformers' sdpa path"] == ("12.00x", "yes")
    assert found["commuting keys, 16K: >= 2x the best uncompressed path"] == ("1.50x", "**no**")
    assert found["commuting keys, 64K: 4 bits no slower than bf16 latents"] == ("2.00x", "yes")
    assert found["joint keys, 16K: faster than transformers' sdpa path"] == ("not measured", "")


def test_generation_decodes_on_every_cache(tmp_path):
    path = tmp_path / "generation.json"
    assert generation.main(["--quick", "--device", "cpu", "--out", str(path)]) == 0
    row = json.loads(path.read_text())["rows"]["1 x 128"]
    assert set(row["methods"]) == set(generation.METHODS)
    sizes = {name: own["nbytes"] for name, own in row["methods"].items()}
    assert sizes["joint, 4 bits"] < sizes["joint"] < sizes[generation.UNCOMPRESSED]


def test_generation_on_wrong_logits_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "TOLERANCE", 0.0)
    assert generation.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "generation.json")]) == 1
    assert "wrong output, refused" in capsys.readouterr().err


def test_the_gpu_run_needs_no_gpu_to_be_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "BATCHES", (1,))
    monkeypatch.setattr(gpu, "ODD_SIZES", ((3, 129),))
    assert gpu.main([str(tmp_path), "--device", "cpu", "--dry"]) == 0
    found = json.loads((tmp_path / "decode.json").read_text())
    assert set(found["rows"]) == {"1 x 128", "1 x 256", "8 x 256"}
    assert found["attention_calls"]["8 x 256"]["joint"]["share_of_copy"] > 0
    assert "self CPU" in (tmp_path / "profile.txt").read_text().replace("Self CPU", "self CPU")
