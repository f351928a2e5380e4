from __future__ import annotations

from benchmarks.speed import gpu
from benchmarks.speed.run import main
from cskv.attention.triton.plan import Shapes


def test_the_profile_needs_no_gpu_to_be_tried(tmp_path, capsys):
    out = ["--out", str(tmp_path / "gpu.json")]
    assert main(["gpu", "--device", "cpu", "--quick", "--methods", "joint", *out]) == 0
    assert "joint, batch 1, 256 tokens" in (tmp_path / "profile.txt").read_text()
    assert main(["gpu", "--device", "cpu", *out]) == 2
    assert "error: no GPU" in capsys.readouterr().err


def test_the_best_plan_is_shown_with_what_it_saves():
    plans = {"joint": {"as planned": {"median": 3.0}, "tile 32": {"median": 2.0}, "warps 8": {"median": 4.0}}}
    (table,) = gpu.tables({"rows": {"plans": {"plans": plans}}})
    assert table.rows == [("joint", "3", "tile 32", "1.50x")]


def test_plans_are_changed_in_the_block_alone():
    shapes = Shapes(1, 1, 4, 4, 4096, 64, 64, rotated=False, packed=False)
    planned = gpu.launch.plan(shapes, 8)
    with gpu.plans({"tile": 2 * planned.tile}) as used:
        assert gpu.launch.plan(shapes, 8).tile == 2 * planned.tile
    assert [plan.tile for plan in used] == [2 * planned.tile]
    assert gpu.launch.plan(shapes, 8) == planned
