from __future__ import annotations

import json

import torch
from transformers import DynamicCache

from benchmarks.speed import graph, llamas
from benchmarks.speed.run import main
from cskv.evaluation.forward import forward


def test_every_method_decodes_by_the_graph_of_its_steps_and_by_forwards(tmp_path, capsys):
    path = tmp_path / "graph.json"
    asked = ["--quick", "--device", "cpu", "--steps", "2", "--rounds", "2", "--out", str(path)]
    assert main(["graph", *asked]) == 0
    rows = json.loads(path.read_text())["rows"]
    eager = {f"{name}, eager" for name in graph.METHODS}
    uncompressed = {graph.UNCOMPRESSED, graph.IN_PLACE, graph.DYNAMIC}
    assert {row["method"] for row in rows.values()} == uncompressed | set(graph.METHODS) | eager
    sizes = {row["method"]: row["nbytes"] for row in rows.values()}
    assert sizes["commuting, 4 bits"] < sizes["commuting"] < sizes[graph.UNCOMPRESSED]
    assert all(row["tokens_per_second"]["repeats"] == 2 for row in rows.values())
    assert main(["graph", "--device", "cpu", "--out", str(tmp_path / "other.json")]) == 2
    assert "error: no GPU" in capsys.readouterr().err


def row(method: str, speed: float, nbytes: int = 100) -> dict:
    cell = {"size": "8B", "batch": 1, "tokens": 65_536}
    return cell | {"method": method, "nbytes": nbytes, "tokens_per_second": {"median": speed}}


def test_ratios_are_over_the_fastest_uncompressed_cache():
    rows = [row(graph.UNCOMPRESSED, 10.0), row(graph.IN_PLACE, 40.0), row("joint", 50.0, 25), row("commuting", 80.0)]
    results = {"rows": {own["method"]: own for own in rows}}
    (table,) = graph.tables(results)
    assert ("8B", "1 x 65536", "joint", "50.0", "1.25x", "25%") in table.rows
    met = {line[0].partition(":")[0]: line[1:] for line in graph.goals(results).rows}
    assert met["commuting"] == ("2.00x", "yes")
    assert met["joint"] == ("1.25x", "**no**")
    assert met["grouped by head"] == ("not measured", "")


def test_a_cache_is_filled_without_attention_and_mlps_which_are_there_again_afterwards():
    model = llamas.TINY["tiny"].model("cpu").float()
    ids = torch.randint(3, 100, (2, 12))
    with torch.no_grad():
        before = model(ids).logits
        cache = llamas.in_place(2, 16)
        token = llamas.filled(model, cache, ids)
        assert torch.equal(model(ids).logits, before)
    assert (token.shape, cache.get_seq_length()) == ((2, 1), 12)


def test_a_cache_that_is_written_in_place_gives_the_logits_of_a_dynamic_one():
    model = llamas.TINY["tiny"].model("cpu").float()
    ids, logits = torch.randint(3, 100, (2, 12)), []
    with torch.no_grad():
        for cache in (llamas.in_place(2, 16), DynamicCache()):
            forward(model, ids[:, :8], cache)
            logits.append([forward(model, ids[:, i : i + 1], cache)[0] for i in range(8, 12)])
    for ours, theirs in zip(*logits, strict=True):
        torch.testing.assert_close(ours, theirs)
