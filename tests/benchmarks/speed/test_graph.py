from __future__ import annotations

import json

from benchmarks.speed import graph
from benchmarks.speed.run import main


def test_every_method_decodes_by_the_graph_of_its_steps(tmp_path, capsys):
    path = tmp_path / "graph.json"
    asked = ["--quick", "--device", "cpu", "--steps", "2", "--rounds", "2", "--out", str(path)]
    assert main(["graph", *asked]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["method"] for row in rows.values()} == {graph.UNCOMPRESSED, *graph.METHODS, graph.AGAIN}
    sizes = {row["method"]: row["nbytes"] for row in rows.values()}
    assert sizes["commuting, 4 bits"] < sizes["commuting"] < sizes[graph.UNCOMPRESSED]
    assert all(row["tokens_per_second"]["repeats"] == 2 for row in rows.values())
    assert main(["graph", "--device", "cpu", "--out", str(tmp_path / "other.json")]) == 2
    assert "error: no GPU" in capsys.readouterr().err
