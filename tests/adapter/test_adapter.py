"""The adapter folder: what is saved comes back, and a damaged or foreign one is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cskv
from cskv import AdapterError, CSKVAdapter, CSKVConfig
from cskv.quantization.grid import Grid
from tests.models.families import tiny_model, truncated_adapter

CONFIG = CSKVConfig(k_density=0.25, v_density=0.5)


@pytest.fixture(scope="module")
def adapter() -> CSKVAdapter:
    made = truncated_adapter(tiny_model("qwen2"), CONFIG)  # its projections are biased
    made.metrics = {"loss": {"k": 0.125, "v": 0.5}, "tokens": 4096}
    return made


@pytest.fixture
def folder(adapter: CSKVAdapter, tmp_path: Path) -> Path:
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_saved_comes_back(adapter: CSKVAdapter, folder: Path) -> None:
    loaded = CSKVAdapter.from_pretrained(folder)
    assert loaded.config == adapter.config
    assert loaded.base == adapter.base
    assert loaded.metrics == adapter.metrics
    assert list(loaded.state_dict()) == list(adapter.state_dict())
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_folder_holds_three_readable_files(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert load_file(folder / "model.safetensors")["layers.0.k.down"].shape == (8, 64)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| loss.k | 0.125 |" in card
    assert "| 0 | 8 | 16 | 32 |" in card


def test_factors_are_the_parameters(adapter: CSKVAdapter) -> None:
    names = dict(adapter.named_parameters())
    factors = adapter.factors(1)
    assert factors.k.down is names["layers.1.k.down"]
    assert factors.v.up is names["layers.1.v.up"]
    assert not factors.v.bias.requires_grad
    with pytest.raises(AdapterError, match=r"no layer 7; it has \[0, 1\]"):
        adapter.factors(7)


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="truncated or corrupted") as caught:
        CSKVAdapter.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_garbage_in_place_of_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00garbage" * 10)
    with pytest.raises(AdapterError, match="truncated or corrupted"):
        CSKVAdapter.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(AdapterError, match=missing):
        CSKVAdapter.from_pretrained(folder)


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.v.up"), r"lacks 'layers.1.v.up'"),
        (lambda t: t.update(extra=torch.zeros(1)), r"does not name: \['extra'\]"),
        (lambda t: t["layers.0.k.down"].fill_(float("nan")), "layers.0.k.down holds NaN"),
        (
            lambda t: t.update({"layers.0.k.down": torch.zeros(3, 64)}),
            r"layers.0.k has down \(3, 64\) and up \(32, 8\)",
        ),
        (
            lambda t: t.update({"layers.0.k.down": torch.zeros(3, 64), "layers.0.k.up": torch.zeros(32, 3)}),
            "layer 0 has ranks",
        ),
    ],
)
def test_weights_that_do_not_agree_are_named(folder: Path, change, message: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(AdapterError, match=message):
        CSKVAdapter.from_pretrained(folder)


def edit_config(folder: Path, **changes) -> None:
    description = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "not a cskv adapter"),
        ({"format_version": 99}, "adapter format 99, this cskv reads 2; upgrade"),
        ({"ranks": None}, "damaged"),
        ({"compression": {"k_density": 3.0}}, "k_density is 3.0"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        CSKVAdapter.from_pretrained(folder)


def test_a_folder_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterError, match=r"no adapter folder '\./nowhere'") as caught:
        CSKVAdapter.from_pretrained("./nowhere", local_files_only=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {}, "model_type qwen2, this model has llama"),
        ("qwen2", {"hidden_size": 32}, "hidden_size 64, this model has 32"),
        ("qwen2", {"num_hidden_layers": 3}, "num_layers 2, this model has 3"),
        ("qwen2", {"num_key_value_heads": 4}, "layer 0 k: the adapter maps 64 to 32 channels, the model 64 to 64"),
    ],
)
def test_an_adapter_of_another_model_is_refused(adapter, family: str, changes: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        cskv.attach(tiny_model(family, **changes), adapter)


def test_an_adapter_of_other_weights_is_refused(adapter: CSKVAdapter, folder: Path) -> None:
    """Fine-tuned ones of equal shapes, here the values of one layer alone."""
    model = tiny_model("qwen2")
    weight = model.model.layers[1].self_attn.v_proj.weight  # of entries of 0.2
    weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for made in (adapter, CSKVAdapter.from_pretrained(folder)):
        with pytest.raises(AdapterError, match=r"key and value weights differ by \d.*%.* load the base") as caught:
            cskv.attach(model, made)
        assert "\n" not in str(caught.value)
        cskv.attach(tiny_model("qwen2").bfloat16(), made).detach()


def test_an_adapter_that_names_no_weights_says_so(adapter: CSKVAdapter, tmp_path: Path) -> None:
    base = dataclasses.replace(adapter.base, signature=None)
    CSKVAdapter(CONFIG, {i: adapter.factors(i) for i in (0, 1)}, base).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="by an older cskv: whether from the weights of this model is not known"):
        cskv.attach(tiny_model("qwen2"), CSKVAdapter.from_pretrained(tmp_path)).detach()


@pytest.mark.parametrize("signature", [{}, {"packed": 0, "layers": {"0": {"k": [1.0]}}}, {"packed": 0, "layers": 3}])
def test_a_damaged_signature_is_refused(folder: Path, signature: dict) -> None:
    base = json.loads((folder / "config.json").read_text())["base_model"] | {"signature": signature}
    edit_config(folder, base_model=base)
    with pytest.raises(AdapterError, match="damaged"):
        CSKVAdapter.from_pretrained(folder)


def test_another_window_shares_the_factors(adapter: CSKVAdapter) -> None:
    other = adapter.with_settings(window=4, group=8)
    assert other.config == dataclasses.replace(adapter.config, window=4, group=8)
    assert (adapter.config, other.base, other.metrics) == (CONFIG, adapter.base, adapter.metrics)
    assert other.factors(1).k.down.data_ptr() == adapter.factors(1).k.down.data_ptr()
    assert adapter.with_settings(window=0).config.group == CONFIG.group
    with pytest.raises(cskv.ConfigError, match="group is 0"):
        adapter.with_settings(group=0)


def test_the_fingerprint_tells_caches_apart(adapter: CSKVAdapter, folder: Path) -> None:
    mine = adapter.fingerprint()
    assert len(mine) == 16
    assert int(mine, 16) >= 0
    loaded = CSKVAdapter.from_pretrained(folder)
    assert loaded.fingerprint() == adapter.with_settings(window=5).fingerprint() == mine
    loaded.config = dataclasses.replace(loaded.config, k_bits=4)
    assert loaded.fingerprint() != mine
    loaded.config = adapter.config
    with torch.no_grad():
        loaded.factors(0).k.down[0].neg_()  # sums of sizes and squares stay
        loaded.factors(0).k.up[:, 0].neg_()
    assert loaded.fingerprint() != mine


def test_push_to_hub_uploads_the_same_folder(adapter: CSKVAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the network is real; the upload itself is caught."""
    from huggingface_hub import HfApi

    uploaded = {}

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **_):
        uploaded[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    adapter.push_to_hub("someone/adapter")
    assert sorted(uploaded["someone/adapter"]) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads(uploaded["someone/adapter"]["config.json"]) == adapter.describe() | {
        "fingerprint": adapter.fingerprint()
    }


def centred_factors(rank: int, seed: int) -> cskv.Factors:
    sizes = ((rank, 16), (8, rank), (8,), (rank,))
    return cskv.Factors(
        *(torch.randn(size, generator=torch.Generator().manual_seed(seed + i)) for i, size in enumerate(sizes))
    )


MIXED = CSKVConfig(0.5, 0.5, init="pca", mixed_widths=True, k_block=(8, 2))
WIDTHS = {
    (0, "k"): ((8, 1), (4, 2)),
    (0, "v"): ((3, 4),),
    (3, "k"): ((2, 5),),
    (3, "v"): ((6, 1), (5, 1), (2, 3)),
}


def mixed_layers() -> dict[int, cskv.LayerFactors]:
    ranks = {part: sum(channels for _, channels in runs) for part, runs in WIDTHS.items()}
    return {
        i: cskv.LayerFactors(centred_factors(ranks[i, "k"], 10 * i), centred_factors(ranks[i, "v"], 10 * i + 5))
        for i in (0, 3)
    }


BASE = cskv.BaseModelInfo("somewhere/model", "llama", 16, 4)


@pytest.fixture
def mixed(tmp_path: Path) -> CSKVAdapter:
    """With widths of its own per latent and centred latents, saved in `tmp_path / "adapter"`."""
    made = CSKVAdapter(MIXED, mixed_layers(), BASE, widths=WIDTHS)
    made.save_pretrained(tmp_path / "adapter")
    return made


def test_widths_and_centred_latents_come_back(mixed: CSKVAdapter, tmp_path: Path) -> None:
    loaded = CSKVAdapter.from_pretrained(tmp_path / "adapter")
    assert (loaded.config, loaded.base, loaded.widths) == (mixed.config, mixed.base, WIDTHS)
    assert loaded.describe() == mixed.describe()
    assert sorted(loaded.state_dict()) == sorted(mixed.state_dict())
    assert sum(name.endswith("down_bias") for name in loaded.state_dict()) == 4
    for name, tensor in mixed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for index in (0, 3):
        assert loaded.grids(index) == mixed.grids(index)
        assert torch.equal(loaded.factors(index).v.down_bias, mixed.factors(index).v.down_bias)
    assert loaded.grid(0, "k") == Grid(((8, 1), (4, 2)), 8, 2)
    assert loaded.grid(3, "v") == Grid(((6, 1), (5, 1), (2, 3)), 32, 4)
    assert [name for name, _ in loaded.named_parameters() if "bias" in name] == []  # biases are not trained


def test_projections_without_widths_stay_in_16_bits_when_saved(tmp_path: Path) -> None:
    some = {(0, "k"): WIDTHS[0, "k"], (3, "v"): WIDTHS[3, "v"]}
    made = CSKVAdapter(MIXED, mixed_layers(), BASE, widths=some)
    made.save_pretrained(tmp_path)
    loaded = CSKVAdapter.from_pretrained(tmp_path)
    assert (loaded.widths, loaded.config) == (some, MIXED)
    assert loaded.grid(0, "k") == Grid(((8, 1), (4, 2)), 8, 2)
    assert (loaded.grid(0, "v"), loaded.grid(3, "k")) == (None, None)
    assert loaded.fingerprint() == made.fingerprint()


def test_uniform_widths_need_none_saved(tmp_path: Path) -> None:
    config = CSKVConfig(k_density=0.25, v_density=0.5, k_bits=4, v_bits=3, v_block=(32, 4))
    truncated_adapter(tiny_model("qwen2"), config).save_pretrained(tmp_path)
    assert "widths" not in json.loads((tmp_path / "config.json").read_text())
    loaded = CSKVAdapter.from_pretrained(tmp_path)
    assert loaded.grids(1) == (Grid(((4, 8),), 32, 1), Grid(((3, 16),), 32, 4))
    assert truncated_adapter(tiny_model("qwen2"), CONFIG).grids(1) == (None, None)


@pytest.mark.parametrize(
    ("config", "widths", "message"),
    [
        (MIXED, {**WIDTHS, (3, "k"): ((2, 4),)}, "layer 3 k has 5 latents, and widths for 4"),
        (MIXED, {**WIDTHS, (0, "v"): ((3, 4), (2, 1))}, "layer 0 v has 4 latents, and widths for 5"),
        (MIXED, None, "widths are given for 0 projections; expected some or all of the 4"),
        (MIXED, {**WIDTHS, (1, "k"): ((2, 4),)}, "given for 5 projections; expected some or all of the 4"),
        (CSKVConfig(k_bits=4), WIDTHS, "given for 4 projections; expected none without mixed_widths"),
    ],
)
def test_widths_that_do_not_fit_are_refused(config: CSKVConfig, widths: dict | None, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        CSKVAdapter(config, mixed_layers(), BASE, widths=widths)
    assert "\n" not in str(caught.value)


def edited_widths(**changes: object) -> dict:
    saved = {str(i): {kind: [list(run) for run in WIDTHS[i, kind]] for kind in ("k", "v")} for i in (0, 3)}
    saved["0"].update(changes)
    return saved


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({}, "widths are given for 0 projections; expected some or all of the 4"),
        (edited_widths() | {"1": {"k": [[2, 4]]}}, "given for 5 projections; expected some or all of the 4"),
        (edited_widths(k=[[8, 1], [4, 3]]), "layer 0 k has 3 latents, and widths for 4"),
        (edited_widths(k=[]), "layer 0 k: widths are "),
        (edited_widths(k=[[9, 3]]), "layer 0 k: widths are "),
        (edited_widths(k=[[8, 1], [4, 2], [2, 0]]), "layer 0 k: widths are "),
        (edited_widths(k=None), "damaged"),
        (edited_widths(k=[[8, 1, 4]]), "damaged"),
        (edited_widths(k=[["wide", 3]]), "damaged"),
        (edited_widths(k=7), "damaged"),
        ({"first": {"k": [[8, 1]]}}, "damaged"),
        ([1, 2], "damaged"),
    ],
)
def test_damaged_widths_are_refused(mixed: CSKVAdapter, tmp_path: Path, widths: object, message: str) -> None:
    edit_config(tmp_path / "adapter", widths=widths)
    with pytest.raises(AdapterError, match=message) as caught:
        CSKVAdapter.from_pretrained(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_damaged_down_biases_are_refused(mixed: CSKVAdapter, tmp_path: Path) -> None:
    edit_weights(tmp_path / "adapter", lambda t: t.update({"layers.3.v.down_bias": torch.zeros(4)}))
    with pytest.raises(AdapterError, match=r"layers\.3\.v"):
        CSKVAdapter.from_pretrained(tmp_path / "adapter")
