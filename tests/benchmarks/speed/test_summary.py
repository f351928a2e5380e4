from __future__ import annotations

import json

from benchmarks.speed import methods, ncu, summary, tables
from benchmarks.speed.timing import summary as summarised

TEXT = """
  partials (1, 264, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Frequency                  Ghz         2.62
    Elapsed Cycles                cycle       91,520
    Memory Throughput                 %        55.10
    DRAM Throughput                   %        52.25
    Duration                         us        61.70
    Compute (SM) Throughput           %        40.00
    Memory Throughput           Tbyte/s         1.71
    L2 Hit Rate                       %        12.00
    Achieved Occupancy                %        12.40
    Block Size                                   256
"""
SEEN = {"kernel": "partials", "time": "61.70 us", "memory": "55.10 %", "DRAM": "52.25 %", "SM": "40.00 %"}


def call(microseconds: float) -> dict:
    seconds = summarised([microseconds / 1e6])
    return {"seconds": seconds, "call": seconds, "graph": seconds, "read_nbytes": 200_000_000}


def decoded() -> dict:
    speeds = {methods.BEST: 100.0, methods.FLASH: 120.0, "commuting": 30.0}
    own = {name: call(microseconds) for name, microseconds in speeds.items()}
    own["joint"] = {"failed": "RuntimeError: no such kernel"}
    row = {"tokens": 65_536, "batch": 1, "methods": own}
    copy = {"bytes_per_second": summarised([1e13])}
    settings = {"device": "cuda"}
    return {"settings": settings, "rows": {tables.COPY: copy, "1 x 65536": row}, "lost": ["joint, int8 keys"]}


def test_metrics_are_read_of_every_launch():
    assert ncu.metrics(TEXT) == [SEEN | {"L2 hits": "12.00 %", "occupancy": "12.40 %"}]
    assert ncu.metrics("==ERROR== the user may not read the counters") == []


def test_goals_come_last_and_failures_before_them(tmp_path, capsys):
    (tmp_path / "decode.json").write_text(json.dumps(decoded()))
    (tmp_path / "ncu.json").write_text(json.dumps({"rows": {"joint": {"exit": 0, "kernels": [SEEN]}}}))
    assert summary.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    parts = ("-- The attention call", "-- Nsight Compute", "-- Failed", "-- Goals on a GPU")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "30 4.00x 67%" in text
    assert "joint             RuntimeError: no such kernel" in text
    assert "batch 1, commuting: >= 3x FlashDecoding" in text[places[-1] :]
    assert len(text.splitlines()) < 100


def test_a_folder_of_nothing_still_has_the_goals(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 0
    assert "not measured" in capsys.readouterr().out
