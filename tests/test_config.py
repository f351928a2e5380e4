from __future__ import annotations

import json

import pytest

from cskv import ConfigError, CSKVConfig


@pytest.mark.parametrize(
    ("density", "kv_dim", "rank"), [(0.2, 1024, 205), (0.5, 64, 32), (1.0, 256, 256), (0.2, 256, 51), (0.001, 1024, 1)]
)
def test_rank_is_the_density_rounded(density: float, kv_dim: int, rank: int) -> None:
    config = CSKVConfig(k_density=density, v_density=density)
    assert config.k_rank(kv_dim) == config.v_rank(kv_dim) == rank


def test_a_rank_that_rounds_to_zero_is_refused_with_the_least_density() -> None:
    with pytest.raises(ConfigError, match=r"k_density 0.001 of kv_dim 256 rounds to rank 0.*0.003906"):
        CSKVConfig(k_density=0.001).k_rank(256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_density": 0}, r"k_density is 0; expected .*\(0, 1\]"),
        ({"v_density": 1.5}, "v_density is 1.5"),
        ({"k_density": float("nan")}, "k_density is nan"),
        ({"k_density": "0.5"}, "k_density is '0.5'"),
        ({"k_density": True}, "k_density is True"),
        ({"window": -1}, "window is -1; expected a whole number of tokens, at least 0"),
        ({"group": 0}, "group is 0; expected a whole number of tokens, at least 1"),
        ({"group": 2.0}, "group is 2.0"),
        ({"init": "pca2"}, "init is 'pca2'; expected one of svd, asvd, pca, weighted-pca"),
        ({"head_groups": 0}, "head_groups is 0; expected a whole number of head groups"),
        ({"key_factors": "rotated"}, "key_factors is 'rotated'; expected one of joint, commuting"),
        ({"key_factors": "commuting", "init": "asvd"}, "init 'asvd' and head_groups 1 do not go"),
        ({"key_factors": "commuting", "init": "pca", "head_groups": 2}, "head_groups 2 do not go"),
        ({"asvd_alpha": 2}, "asvd_alpha is 2"),
        ({"k_bits": 1}, "k_bits is 1; expected 2 to 8, or 16"),
        ({"v_bits": 12}, "v_bits is 12; expected 2 to 8, or 16"),
        ({"k_bits": True}, "k_bits is True"),
        ({"k_bits": 4, "mixed_widths": True}, "give one of them"),
        ({"k_block": (0, 1)}, r"k_block is \(0, 1\); expected two whole numbers"),
        ({"v_block": 32}, "v_block is 32; expected two whole numbers"),
        ({"k_block": (12, 1)}, "k_block has 12 tokens, which do not divide the group of 32"),
    ],
)
def test_a_value_out_of_range_is_one_clear_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        CSKVConfig(**settings)
    assert "\n" not in str(caught.value)


def test_with_head_groups_the_rank_is_a_multiple_of_them() -> None:
    config = CSKVConfig(k_density=0.2, head_groups=4)
    assert config.k_rank(256) == 52  # 51.2 is nearer to 52 than to 48
    with pytest.raises(ConfigError, match="one channel per head group"):
        CSKVConfig(k_density=0.005, head_groups=4).k_rank(256)


def test_json_round_trip() -> None:
    config = CSKVConfig(k_density=0.25, v_density=0.75, window=5, group=7, init="svd", asvd_alpha=0.3, k_block=(7, 2))
    assert CSKVConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_a_newer_version_are_dropped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="colour"):
        assert CSKVConfig.from_dict({"k_density": 0.5, "colour": 4}) == CSKVConfig(k_density=0.5, sinks=0)


def test_settings_that_are_older_than_sinks_have_none() -> None:
    assert CSKVConfig().sinks == 4
    older = {name: value for name, value in CSKVConfig().to_dict().items() if name != "sinks"}
    assert CSKVConfig.from_dict(older).sinks == 0
