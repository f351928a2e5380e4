"""From window options to settings, and from settings to folder names."""

from __future__ import annotations

from typing import Any

import pytest

from cskv.cli.groups import CompressionOptions
from cskv.cli.settings import adapter_name
from cskv.config import CSKVConfig
from cskv.errors import ConfigError

DEFAULT = CSKVConfig()


@pytest.mark.parametrize(
    ("options", "window", "group", "sinks"),
    [
        ({}, 0, 1, 0),
        ({"use_window": True}, 0, 32, 0),
        ({"use_window": True, "q_window_size": 16}, 0, 16, 0),
        ({"use_window": False}, 0, 1, 0),
        ({"use_window": True, "sinks": 4}, 0, 32, 4),
        ({"sinks": 2}, 0, 1, 2),
        ({"window": 8, "group": 4}, 8, 4, DEFAULT.sinks),
        ({"window": 8}, 8, DEFAULT.group, DEFAULT.sinks),
        ({"window": 8, "group": 4, "sinks": 0}, 8, 4, 0),
    ],
)
def test_the_papers_flags_have_no_sinks_unless_they_are_asked_for(
    options: dict[str, Any], window: int, group: int, sinks: int
) -> None:
    config = CompressionOptions(**options).config()
    assert (config.window, config.group, config.sinks) == (window, group, sinks)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, []),
        ({"sinks": 0}, ["sinks"]),
        ({"window": 8}, ["window", "group"]),
        ({"use_window": True, "sinks": 1}, ["window", "group", "sinks"]),
    ],
)
def test_an_adapter_keeps_what_no_option_names(options: dict[str, Any], changed: list[str]) -> None:
    given = CompressionOptions(**options)
    assert list(given.exact_tokens_given(given.config())) == changed


def test_sinks_are_in_the_name_and_adapters_without_any_keep_theirs() -> None:
    assert adapter_name(CSKVConfig(sinks=0)) == "k0.2-v0.2-fisher-pca-window32-group32"
    assert adapter_name(CSKVConfig(sinks=4, head_groups=2)) == (
        "k0.2-v0.2-fisher-pca-window32-group32-sinks4-headgroups2"
    )


def test_sinks_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="sinks is -1; expected a whole number of tokens, at least 0"):
        CompressionOptions(window=8, sinks=-1).config()
