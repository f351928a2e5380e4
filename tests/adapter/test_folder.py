"""Parts of an adapter folder, for servers that load layer by layer: each is as the whole, and as well checked."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cskv import AdapterError, BaseModelInfo, CSKVAdapter, CSKVConfig, CSKVError, Factors, LayerFactors
from cskv.adapter.folder import Settings, read_folder, read_layer, read_settings
from tests.disk import disk_full

CONFIG = CSKVConfig(window=4, group=8, mixed_widths=True)
BASE = BaseModelInfo("someone/base", "llama", 16, 4, "a" * 40)
RANKS = {0: {"k": 3, "v": 4, "kv_dim": 8}, 3: {"k": 5, "v": 2, "kv_dim": 8}}
WIDTHS = {(0, "k"): ((8, 1), (4, 2)), (0, "v"): ((3, 4),), (3, "k"): ((2, 5),), (3, "v"): ((6, 2),)}


def factors(rank: int, kv_dim: int = 8) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    sizes = ((rank, 16), (kv_dim, rank), (kv_dim,), (rank,))
    return Factors(*(torch.randn(size, generator=generator) for size in sizes))


@pytest.fixture
def adapter() -> CSKVAdapter:
    layers = {i: LayerFactors(factors(ranks["k"]), factors(ranks["v"])) for i, ranks in RANKS.items()}
    return CSKVAdapter(CONFIG, layers, BASE, {"loss": 0.5}, WIDTHS)


@pytest.fixture
def folder(adapter: CSKVAdapter, tmp_path: Path) -> Path:
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path) | changes
    save_file({name: part for name, part in tensors.items() if part is not None}, path, metadata)


def refused(action: Any, *args: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_settings_need_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert read_settings(folder) == Settings(CONFIG, BASE, RANKS, {"loss": 0.5}, WIDTHS)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (None, "damaged"),
        ({"0": 8}, "damaged"),
        ({"0": {"k": 3, "v": 4}}, "lacks or garbles 'kv_dim'; the folder is damaged"),
        ({"0": {"k": 3, "v": "some", "kv_dim": 8}}, "damaged"),
        ({"0": {"k": 3, "v": None, "kv_dim": 8}}, "damaged"),
        ({"first": RANKS[0]}, "damaged"),
    ],
)
def test_damaged_ranks_are_refused(folder: Path, ranks: Any, message: str) -> None:
    edit_config(folder, ranks=ranks)
    assert message in refused(read_settings, folder)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({}, "widths are given for 0 projections; expected some or all of the 4"),
        ({"1": {"k": [[8, 1]]}}, "widths are given for 1 projections; expected some or all of the 4"),
        (
            {"0": {"k": [[8, 1], [4, 2]], "v": [[3, 4]]}, "3": {"k": [[2, 4]], "v": [[6, 2]]}},
            "layer 3 k has 5 latents, and widths for 4",
        ),
        (
            {"0": {"k": [[8, 1], [4, 2]], "v": [[3, 4]]}, "3": {"k": [[9, 5]], "v": [[6, 2]]}},
            "layer 3 k: widths are ((9, 5),)",
        ),
    ],
)
def test_widths_are_checked_without_weights(folder: Path, widths: Any, message: str) -> None:
    """Or latents that should be packed would be kept plain, or packed past their end."""
    edit_config(folder, widths=widths)
    assert refused(read_settings, folder).startswith(f"{folder / 'config.json'}: {message}")


def test_widths_that_nothing_asks_for_are_refused(folder: Path) -> None:
    edit_config(folder, compression=CSKVConfig().to_dict())
    assert "given for 4 projections; expected none without mixed_widths" in refused(read_settings, folder)


def test_a_newer_folder_is_read_as_far_as_it_is_known(folder: Path) -> None:
    ranks = {str(i): of | {"k_mean": 1} for i, of in RANKS.items()}
    edit_config(folder, ranks=ranks, compression=CONFIG.to_dict() | {"new": 1}, base_model=vars(BASE) | {"size": 2})
    with pytest.warns(UserWarning, match="ignoring unknown") as caught:
        settings = read_settings(folder)
    assert (settings.config, settings.base, settings.ranks) == (CONFIG, BASE, RANKS)
    assert len(caught) == 2


def test_a_layer_is_that_of_the_whole_folder(folder: Path, adapter: CSKVAdapter) -> None:
    settings, whole = read_folder(folder)
    for index in (0, 3):
        layer = read_layer(folder, settings, index)
        for of in (whole[index], adapter.factors(index)):
            for ours, theirs in zip((layer.k, layer.v), (of.k, of.v)):
                for name in ("down", "up", "bias", "down_bias"):
                    assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_layer_whose_name_begins_another_is_alone(tmp_path: Path) -> None:
    """Layer 1 of 12."""
    layers = {i: LayerFactors(factors(2 + i), factors(3)) for i in range(12)}
    CSKVAdapter(CSKVConfig(), layers, BASE).save_pretrained(tmp_path)
    assert read_layer(tmp_path, read_settings(tmp_path), 1).k.rank == 3
    assert read_layer(tmp_path, read_settings(tmp_path), 11).k.rank == 13


def test_what_is_wrong_with_another_layer_is_not_seen(folder: Path) -> None:
    edit_weights(folder, **{"layers.0.k.down": torch.full((3, 16), float("nan"))})
    assert read_layer(folder, read_settings(folder), 3).k.rank == 5
    assert "layers.0.k.down holds NaN" in refused(read_layer, folder, read_settings(folder), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.3.v.up": None}, "lacks 'layers.3.v.up'"),
        ({"layers.3.k.up": torch.full((8, 5), float("inf"))}, "layers.3.k.up holds NaN or infinite values"),
        ({"layers.3.k.bias": torch.zeros(7)}, "layers.3.k has down (5, 16) and up (8, 5)"),
        (
            {"layers.3.v.down": torch.zeros(1, 16), "layers.3.v.up": torch.zeros(8, 1), "layers.3.v.down_bias": None},
            "layer 3 has ranks {'k': 5, 'v': 1, 'kv_dim': 8}",
        ),
    ],
)
def test_a_damaged_layer_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit_weights(folder, **changes)
    assert message in refused(read_layer, folder, read_settings(folder), 3)


def test_truncated_and_missing_weights_are_refused(folder: Path) -> None:
    settings, path = read_settings(folder), folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:20], b""):
        path.write_bytes(damaged)
        assert refused(read_layer, folder, settings, 0).startswith(f"{path} is truncated or corrupted (")
    path.unlink()
    assert refused(read_layer, folder, settings, 0) == f"{path} is missing; the adapter folder is incomplete"


OTHER = CSKVConfig(window=8, group=8, mixed_widths=True)


def other_adapter() -> CSKVAdapter:
    """Of the same ranks: other factors and settings."""
    layers = {i: LayerFactors(factors(ranks["k"]), factors(ranks["v"])) for i, ranks in RANKS.items()}
    layers[0].k.down.neg_()
    return CSKVAdapter(OTHER, layers, BASE, widths=WIDTHS)


def killed_after(steps: int, action: Any) -> None:
    """Run it in a child that is killed after so many replaced files."""
    child = os.fork()
    if child == 0:
        replace, done = os.replace, []

        def killing(*paths: Any) -> None:
            if len(done) == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(replace(*paths))

        os.replace = killing  # type: ignore[assignment]
        action()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(
    folder: Path, adapter: CSKVAdapter, steps: int
) -> None:
    (folder / "train_log.jsonl").write_text("mine")
    other = other_adapter()
    killed_after(steps, lambda: other.save_pretrained(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded, settings = CSKVAdapter.from_pretrained(folder), read_settings(folder)
    expected = adapter if steps == 0 else other
    assert loaded.fingerprint() == expected.fingerprint()
    assert loaded.config == settings.config == expected.config
    assert bool(caught) == (steps == 1)
    assert all("was not saved to the end" in str(warning.message) for warning in caught)
    assert (folder / "train_log.jsonl").read_text() == "mine"
    other.save_pretrained(folder)
    assert CSKVAdapter.from_pretrained(folder).config == OTHER


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "README.md"])
def test_a_full_disk_leaves_the_folder_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    disk_full(monkeypatch, file)
    with pytest.raises(CSKVError, match="cannot write .*[Nn]o space left on device.*free some space there"):
        other_adapter().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_settings_that_were_edited_by_hand_are_taken(folder: Path) -> None:
    edit_config(folder, compression=OTHER.to_dict())
    assert CSKVAdapter.from_pretrained(folder).config == OTHER


def test_an_older_folder_still_loads(folder: Path) -> None:
    """Of before files named a fingerprint."""
    description = json.loads((folder / "config.json").read_text())
    del description["fingerprint"]
    (folder / "config.json").write_text(json.dumps(description))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    assert CSKVAdapter.from_pretrained(folder).config == CONFIG


def test_weights_of_an_older_folder_under_newer_settings_are_refused(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    assert "were not saved together" in refused(read_settings, folder)


def test_equal_adapters_are_equal_files(folder: Path, adapter: CSKVAdapter, tmp_path: Path) -> None:
    adapter.metrics = {"seconds": 2}
    adapter.save_pretrained(tmp_path / "again")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
