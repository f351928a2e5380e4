from __future__ import annotations

import json

from benchmarks.speed import gpu
from benchmarks.speed.run import main
from cskv.attention.triton.plan import Shapes, cut, whole


def test_the_profile_needs_no_gpu_to_be_tried(tmp_path, capsys):
    out = ["--out", str(tmp_path / "gpu.json")]
    assert main(["gpu", "--device", "cpu", "--backend", "torch", "--quick", "--methods", "joint", *out]) == 0
    assert "joint, a call, batch 1" in (tmp_path / "profile.txt").read_text()
    (kernels,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]["profile"]["kernels"].values()
    assert "aten::mm" in [name for name, _, _ in kernels]
    assert main(["gpu", "--device", "cpu", *out]) == 2
    assert "error: no GPU" in capsys.readouterr().err


def test_the_best_plan_is_shown_with_what_it_saves():
    found = {"as planned": 3.0, "tile 32": 2.0, "warps 8": 4.0}
    rows = {name: {"method": "joint", "variant": name, "median": seconds} for name, seconds in found.items()}
    _, table = gpu.tables({"rows": rows | {"other": {"skipped": "it was not set up"}}})
    assert table.rows == [("joint", "3", "tile 32", "1.50x")]


def test_the_kernels_of_a_call_are_shown_by_their_short_names():
    kernels = [["void at::native::vectorized_elementwise_kernel<4, float>(int)", 1.0, 2.5], ["partials", 1.0, 60.0]]
    table, _ = gpu.tables({"rows": {"profile": {"kernels": {"joint": kernels}}}})
    assert table.rows == [("joint", "62.5", "vectorized_elementwise_kerne 2.5; partials 60.0")]


def test_plans_are_changed_in_the_block_alone():
    shapes = Shapes(1, 1, 8, 4, 4096, cut(64), whole(64), 128, packed=False)
    planned = [gpu.launch.plan_scores(shapes, 8), gpu.launch.plan_partials(shapes, 8)]
    assert planned[0].heads == 2
    with gpu.plans({"tile": 128}) as used:
        assert [gpu.launch.plan_scores(shapes, 8).tile, gpu.launch.plan_partials(shapes, 8).tile] == [128, 128]
    assert [plan.tile for plan in used] == [128, 128]
    with gpu.plans({"heads": 1}):  # twice the programs for the same tokens: as many ranges make as many tokens of each
        changed = gpu.launch.plan_scores(shapes, 8)
        assert (changed.heads, changed.splits) == (1, 2 * planned[0].splits)
        assert gpu.launch.plan_partials(shapes, 8) == planned[1]
    assert [gpu.launch.plan_scores(shapes, 8), gpu.launch.plan_partials(shapes, 8)] == planned
