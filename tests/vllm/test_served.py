"""Which adapter a model's configuration names, and what is kept of it on a rank."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cskv import AdapterError, ConfigError, CSKVConfig
from cskv.adapter.folder import Settings
from cskv.cache.ring import Ring
from cskv.errors import CSKVError
from cskv.latents.pages import PageLayout
from cskv.quantization.grid import Grid
from cskv.vllm.served import Served, find_served
from cskv.vllm.shards import ServedShard, Shard
from tests.vllm.adapters import HEAD_DIM, HEADS, KV_DIM, save, served

CONFIG = CSKVConfig(window=8, group=4, sinks=2)
RANKS = [(8, 6), (4, 10)]
WHOLE, HALF = Shard.of_rank(0, 1, HEADS), Shard.of_rank(1, 2, HEADS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder with an adapter in it."""
    save(tmp_path / "model" / "cskv", CONFIG, RANKS)
    return tmp_path / "model"


def find(model: Path | str, **named: Any) -> Served:
    return find_served(str(model), None, SimpleNamespace(cskv=named))


def refused(kind: type[CSKVError], model: Path | str, **named: Any) -> str:
    with pytest.raises(kind) as caught:
        find(model, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_in_the_models_folder(model: Path) -> None:
    found = find(model, adapter="cskv")
    assert found.folder == model / "cskv"
    assert found.config == CONFIG
    assert found.settings.ranks == {0: {"k": 8, "v": 6, "kv_dim": 32}, 1: {"k": 4, "v": 10, "kv_dim": 32}}


def test_an_adapter_elsewhere(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "home" / "other", CSKVConfig(window=0, group=1, sinks=0), RANKS)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for adapter in (str(tmp_path / "home" / "other"), "home/other", "~/other"):
        assert find(model, adapter=adapter).config.group == 1
        assert find("someone/model", adapter=adapter).config.group == 1
    save(tmp_path / "cskv", CSKVConfig(window=0, group=1, sinks=0), RANKS)
    assert find(model, adapter="cskv").config == CONFIG  # what is in the model's folder goes first


def test_window_group_and_sinks_may_be_others(model: Path) -> None:
    config = find(model, adapter="cskv", window=0, group=16, sinks=5).config
    assert (config.window, config.group, config.sinks) == (0, 16, 5)
    config = find(model, adapter="cskv", window=2).config
    assert (config.window, config.group, config.sinks) == (2, 4, 2)
    assert find(model, adapter="cskv", sinks=0).config.sinks == 0
    assert find(model, adapter="cskv").config == CONFIG  # and the folder is as it was


def test_an_older_adapter_has_no_sinks(model: Path) -> None:
    path = model / "cskv" / "config.json"
    described = json.loads(path.read_text())
    del described["compression"]["sinks"]
    path.write_text(json.dumps(described))
    assert find(model, adapter="cskv").config.sinks == 0
    assert find(model, adapter="cskv", sinks=4).config.sinks == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"window": -1}, "window is -1"),
        ({"group": 0}, "group is 0"),
        ({"window": "8"}, "window is '8'"),
        ({"sinks": -1}, "sinks is -1"),
        ({"sinks": None}, "sinks is None"),
    ],
)
def test_overrides_are_checked(model: Path, override: dict[str, Any], message: str) -> None:
    assert message in refused(ConfigError, model, adapter="cskv", **override)


def test_an_overridden_group_must_suit_the_blocks(tmp_path: Path) -> None:
    save(tmp_path / "cskv", CSKVConfig(window=8, group=8, k_bits=4, k_block=(8, 1)), RANKS)
    assert "8 tokens, which do not divide the group of 4" in refused(ConfigError, tmp_path, adapter="cskv", group=4)


@pytest.mark.parametrize("named", [None, {}, {"adapter": 3}, "cskv", {"window": 4}])
def test_a_config_without_an_adapter_is_refused(model: Path, named: Any) -> None:
    with pytest.raises(AdapterError, match=r"expected {\"adapter\": FOLDER}, as `cskv export` writes it"):
        find_served(str(model), None, SimpleNamespace(cskv=named))
    with pytest.raises(AdapterError, match=r"has 'cskv': None"):
        find_served(str(model), None, SimpleNamespace())


def test_unknown_keys_are_refused(model: Path) -> None:
    message = refused(ConfigError, model, adapter="cskv", windw=3, k_bits=4)
    assert message == (
        "'cskv' in the model's config has ['k_bits', 'windw']; expected 'adapter', 'window', 'group' and 'sinks'"
    )


@pytest.mark.parametrize("adapter", ["cksv", "/nowhere/cskv", "~/nowhere/cskv"])
def test_an_adapter_that_is_nowhere_is_refused(model: Path, adapter: str) -> None:
    message = refused(AdapterError, model, adapter=adapter)
    assert message == f"adapter folder {adapter!r} is neither in {model} nor here; export the adapter again"


def test_damaged_folders_are_refused(model: Path) -> None:
    config = model / "cskv" / "config.json"
    described = json.loads(config.read_text())
    for damage, message in (
        ({"ranks": {"0": {"k": 8, "v": 6}}}, "lacks or garbles 'kv_dim'"),
        ({"format_version": 9}, "has adapter format 9"),
        ({"model_type": "llama"}, "is not a cskv adapter"),
        ({"compression": {"window": -2}}, "window is -2"),
    ):
        config.write_text(json.dumps(described | damage))
        assert message in refused(AdapterError, model, adapter="cskv")
    config.unlink()
    assert "has no config.json" in refused(AdapterError, model, adapter="cskv")


class Hub:
    """Stands in for the hub: repositories are folders in its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, list[tuple[str, str | None, list[str]]]()
        monkeypatch.setattr("cskv.adapter.hub.snapshot_download", self.snapshot_download)

    def snapshot_download(self, repo_id: str, revision: str | None = None, *, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision, allow_patterns))
        if not (self.folder / repo_id).is_dir():
            raise OSError(f"no repository {repo_id}\nand a second line")
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(tmp_path / "hub", monkeypatch)


def test_an_adapter_in_the_models_repository(hub: Hub) -> None:
    save(hub.folder / "someone" / "model" / "cskv", CONFIG, RANKS)
    found = find_served("someone/model", "main", SimpleNamespace(cskv={"adapter": "cskv"}))
    assert found.folder == hub.folder / "someone" / "model" / "cskv"
    assert hub.asked == [("someone/model", "main", ["cskv/*"])]


@pytest.mark.parametrize("local", [True, False])
def test_an_adapter_in_a_repository_of_its_own(hub: Hub, model: Path, local: bool) -> None:
    """Whether the model is a folder here, or a repository as well."""
    save(hub.folder / "someone" / "adapter", CONFIG, RANKS)
    (hub.folder / "someone" / "model").mkdir()
    found = find(model if local else "someone/model", adapter="someone/adapter")
    assert found.folder == hub.folder / "someone" / "adapter"


def test_an_adapter_that_no_repository_has_is_refused(hub: Hub, model: Path) -> None:
    assert "cannot look for adapter folder 'cskv'" in refused(AdapterError, "someone/model", adapter="cskv")
    (hub.folder / "someone" / "model").mkdir(parents=True)
    assert refused(AdapterError, "someone/model", adapter="cskv") == (
        "adapter folder 'cskv' is neither in someone/model nor here; export the adapter again"
    )
    for of in (model, "someone/model"):
        assert "no adapter folder 'someone/other' here" in refused(AdapterError, of, adapter="someone/other")


def share_of(adapter: Served, shard: Shard, dtype: torch.dtype = torch.float32) -> ServedShard:
    return ServedShard(adapter, shard, dtype, HEAD_DIM)


QUANTISED = CSKVConfig(window=8, group=4, sinks=0, k_bits=4, v_bits=3)
GROUPS = CSKVConfig(window=8, group=4, head_groups=2)
WIDTHS = {(0, "k"): ((8, 3), (2, 5)), (0, "v"): ((4, 6),)}


@pytest.mark.parametrize(
    ("config", "shard", "layout"),
    [
        (CONFIG, WHOLE, PageLayout(8, 6, torch.bfloat16)),
        (CONFIG, HALF, PageLayout(8, 6, torch.bfloat16)),  # every rank repeats them
        (GROUPS, WHOLE, PageLayout(8, 6, torch.bfloat16)),
        (GROUPS, HALF, PageLayout(4, 3, torch.bfloat16)),
        (
            QUANTISED,
            WHOLE,
            PageLayout(8, 6, torch.bfloat16, Grid(((4, 8),), 4, 1), Grid(((3, 6),), 1, 32)),
        ),
        (
            CSKVConfig(window=8, group=4, v_bits=8, head_groups=2),
            HALF,
            PageLayout(4, 3, torch.bfloat16, None, Grid(((8, 3),), 1, 32)),
        ),
    ],
)
def test_what_a_page_holds(config: CSKVConfig, shard: Shard, layout: PageLayout) -> None:
    assert share_of(served(config, [(8, 6)]), shard, torch.bfloat16).layouts[0] == layout


def test_pages_of_mixed_widths() -> None:
    adapter = served(CSKVConfig(window=8, group=4, mixed_widths=True), [(8, 6)], widths=WIDTHS)
    share = share_of(adapter, HALF, torch.float16)
    grids = Grid(WIDTHS[0, "k"], 4, 4), Grid(WIDTHS[0, "v"], 4, 4)
    assert share.layouts[0] == PageLayout(8, 6, torch.float16, *grids)
    assert share.is_grouped


@pytest.mark.parametrize(
    ("config", "shard", "expected"),
    [
        (CONFIG, WHOLE, Ring(8, 4, 4, HEAD_DIM, 0, 0, torch.float32, sinks=2)),
        (CONFIG, HALF, Ring(8, 4, 2, HEAD_DIM, 0, 0, torch.float32, sinks=2)),
        (QUANTISED, HALF, Ring(8, 4, 2, HEAD_DIM, 8, 0, torch.float32)),  # values are packed token by token
        (
            CSKVConfig(window=8, group=4, k_bits=4, v_bits=4, v_block=(2, 4), head_groups=2, sinks=7),
            HALF,
            Ring(8, 4, 2, HEAD_DIM, 4, 3, torch.float32, sinks=7),
        ),
    ],
)
def test_what_a_ring_holds(config: CSKVConfig, shard: Shard, expected: Ring) -> None:
    assert share_of(served(config, [(8, 6)]), shard).rings[0] == expected


@pytest.mark.parametrize(
    ("config", "ring", "grouped"),
    [
        (CSKVConfig(window=0, group=1, sinks=0), False, False),
        (CSKVConfig(window=0, group=1, sinks=0, k_bits=4, v_bits=4), False, False),
        (CSKVConfig(window=0, group=1, sinks=1), True, False),
        (CSKVConfig(window=0, group=1, sinks=4, k_bits=4, v_bits=4), True, False),
        (CSKVConfig(window=1, group=1, sinks=0), True, False),
        (CSKVConfig(window=0, group=2, sinks=0), True, False),
        (CSKVConfig(window=0, group=2, k_bits=4), True, True),
        (CSKVConfig(window=0, group=2, v_bits=4), True, False),
        (CSKVConfig(window=0, group=2, v_bits=4, v_block=(2, 1)), True, True),
        (CSKVConfig(window=0, group=2, k_bits=4, k_block=(1, 8)), True, False),
    ],
)
def test_whether_there_are_rings_and_groups(config: CSKVConfig, ring: bool, grouped: bool) -> None:
    share = share_of(served(config, [(8, 6)]), WHOLE)
    assert (share.served.has_ring, share.is_grouped) == (ring, grouped)
    layout = share.layouts[0]
    tokens = [grid.block_tokens for grid in (layout.k_grid, layout.v_grid) if grid is not None]
    assert share.is_grouped == (max(tokens, default=1) > 1)


def test_factors_of_a_rank_are_read_from_the_folder(tmp_path: Path) -> None:
    adapter = save(tmp_path / "cskv", GROUPS, RANKS)
    found = find(tmp_path, adapter="cskv")
    for index in (0, 1):
        whole, here = adapter.factors(index), share_of(found, HALF).factors(index)
        assert torch.equal(share_of(found, WHOLE).factors(index).v.up, whole.v.up)
        assert torch.equal(here.k.down, whole.k.down[whole.k.rank // 2 :])
        assert torch.equal(here.v.down, whole.v.down[whole.v.rank // 2 :])
        assert torch.equal(here.v.up, whole.v.up[KV_DIM // 2 :])
        assert torch.equal(here.v.bias, whole.v.bias[KV_DIM // 2 :])


def test_factors_that_are_not_as_the_settings_say_are_refused(tmp_path: Path) -> None:
    """Cut as the settings say, they would rebuild other keys and values."""
    save(tmp_path / "cskv", GROUPS, RANKS)
    config = tmp_path / "cskv" / "config.json"
    described = json.loads(config.read_text())
    described["compression"]["head_groups"] = 1
    config.write_text(json.dumps(described))
    with pytest.raises(AdapterError) as caught:
        share_of(find(tmp_path, adapter="cskv"), HALF).factors(1)
    assert str(caught.value) == (
        f"adapter {tmp_path / 'cskv'}: layer 1 k has 2 head groups and 32 channels, its settings 1 and 32; train the "
        "adapter again"
    )


def test_what_is_compiled_depends_on_settings_and_ranks() -> None:
    """vLLM keeps what it compiled under a hash of this, as JSON."""
    summaries = [
        json.dumps(adapter.summary())
        for adapter in (
            served(CONFIG, RANKS),
            served(dataclasses.replace(CONFIG, sinks=3), RANKS),
            served(QUANTISED, RANKS),
            served(CONFIG, [(8, 6), (4, 4)]),
        )
    ]
    assert len(set(summaries)) == 4
    assert json.dumps(served(CONFIG, RANKS).summary()) == summaries[0]


def test_settings_are_those_of_the_folder(model: Path) -> None:
    settings = find(model, adapter="cskv").settings
    assert isinstance(settings, Settings)
    assert (settings.base.model_type, settings.base.num_layers, settings.widths) == ("llama", 2, {})
