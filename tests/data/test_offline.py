"""The offline corpus: deterministic, split by name, free of generated files."""

from __future__ import annotations

from itertools import islice

import pytest

from cskv.data import offline


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    return {split: [name for name, _ in offline.documents(split)] for split in ("train", "heldout")}


def test_splits_are_disjoint_and_about_one_in_twenty_is_held_out(names: dict[str, list[str]]):
    assert not set(names["train"]) & set(names["heldout"])
    share = len(names["heldout"]) / (len(names["train"]) + len(names["heldout"]))
    assert 0.02 < share < 0.10


def test_order_is_the_same_every_time(names: dict[str, list[str]]):
    assert names["heldout"] == [name for name, _ in offline.documents("heldout")]
    assert list(islice(offline.documents("train"), 3)) == list(islice(offline.documents("train"), 3))


def test_topics_and_sources_but_no_tests_or_packages(names: dict[str, list[str]]):
    everything = names["train"] + names["heldout"]
    assert "topics/while" in names["train"]
    assert "stdlib/json/decoder.py" in everything
    assert not [name for name in everything if offline.SKIPPED_FOLDERS & set(name.split("/"))]


def test_held_out_text_is_long_enough_to_measure_on(names: dict[str, list[str]]):
    assert sum(len(text) for _, text in offline.documents("heldout")) > 100_000


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be"):
        next(offline.documents("validation"))
