from __future__ import annotations

import pytest

from benchmarks.speed import tables
from benchmarks.speed.methods import BEST, SDPA


def test_slopes_of_a_table_are_per_token_and_sequence():
    rows = {
        f"2 x {tokens}": {"batch": 2, "tokens": tokens, "methods": {"joint": {"seconds": {"median": 1e-6 * tokens}}}}
        for tokens in (100, 200, 400)
    }
    assert tables.slopes({"rows": rows}, 2)["joint"] == pytest.approx(500.0)


def test_goals_are_met_or_not():
    def row(batch: int, tokens: int, **medians: float):
        names = {"sdpa": SDPA, "best": BEST, "packed": "commuting, 4 bits"}
        own = {names.get(name, name): {"seconds": {"median": value}} for name, value in medians.items()}
        return {"batch": batch, "tokens": tokens, "methods": own}

    rows = {
        "1 x 16384": row(1, 16384, sdpa=12.0, best=1.5, commuting=1.0),
        "1 x 65536": row(1, 65536, commuting=2.0, packed=1.0),
    }
    speeds = {"joint": 15.0, "uncompressed, sdpa": 10.0}
    own = {name: {"tokens_per_second": {"median": value}} for name, value in speeds.items()}
    table = tables.cpu_goals(
        {"settings": {"kernels": "amx"}, "rows": rows}, {"rows": {"smollm2, 1024": {"methods": own}}}
    )
    found = {goal: (shown, met) for goal, shown, met in table.rows}
    assert found["commuting, 16K: >= 10x transformers' sdpa path"] == ("12.00x", "yes")
    assert found["commuting, 16K: >= 4x the best uncompressed path"] == ("1.50x", "**no**")
    assert found["commuting, 64K: 4 bits no slower than bf16 latents"] == ("2.00x", "yes")
    assert found["joint, 16K: >= 1x the best uncompressed path"] == ("not measured", "")
    assert found["SmolLM2 after 1K tokens, joint: >= 0.9x the uncompressed cache's tokens/s"] == ("1.50x", "yes")


def test_goals_on_a_gpu_are_of_steps_and_of_replays():
    def seconds(step: float):
        return {"median": step, "p10": step, "p90": step}

    def method(step: float, call: float, **graph: dict):
        return {"seconds": seconds(step), "call": {"median": call}, "read_nbytes": 100, "nbytes": 100, **graph}

    own = {SDPA: {"seconds": seconds(8.0), "nbytes": 900}, BEST: method(4.0, 4.0, graph={"median": 3.0})}
    own["joint"] = method(2.0, 1.5, graph={"median": 0.5})
    own["commuting"] = method(1.0, 1.5)  # no graph could be captured
    rows = {"1 x 65536": {"batch": 1, "tokens": 65536, "methods": own}}
    rows[tables.COPY] = {"bytes_per_second": {"median": 100.0}}
    results = {"rows": rows, "settings": {"device": "cuda"}}
    found = {goal: rest for goal, *rest in tables.gpu_goals(results).rows}
    assert found["batch 1, joint: >= 1.3x FlashDecoding"] == ["2.00x", "6.00x", "yes / yes"]
    assert "batch 1, joint: >= 60 % of copy bandwidth" not in found  # it is bound by arithmetic
    assert found["batch 1, commuting: >= 3x FlashDecoding"] == ["4.00x", "2.00x", "yes / **no**"]
    assert found["batch 1, commuting: >= 60 % of copy bandwidth"] == ["100%", "67%", "yes / yes"]
    assert found["batch 8, joint, int8 keys: >= 2x FlashDecoding"] == ["not measured", "not measured", "- / -"]
    assert ("joint", "1500000, 500000, 200%") in [row for table in tables.tables(results) for row in table.rows]
