from __future__ import annotations

import json

from benchmarks.speed import generation
from benchmarks.speed.run import main


def test_generation_decodes_on_every_cache(tmp_path):
    path = tmp_path / "generation.json"
    assert main(["generation", "--quick", "--device", "cpu", "--out", str(path)]) == 0
    row = json.loads(path.read_text())["rows"]["1 x 128"]
    assert set(row["methods"]) == set(generation.METHODS)
    sizes = {name: own["nbytes"] for name, own in row["methods"].items()}
    assert sizes["joint, 4 bits"] < sizes["joint"] < sizes[generation.UNCOMPRESSED]


def test_generation_on_wrong_logits_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "TOLERANCE", 0.0)
    assert main(["generation", "--quick", "--device", "cpu", "--out", str(tmp_path / "generation.json")]) == 1
    assert "wrong output, refused" in capsys.readouterr().err
