"""A pass that was interrupted goes on from the sums that are kept, and only from those of the same pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cskv.calibration.calibrate as calibrate_module
from cskv import CSKVConfig
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.data.samples import TokenSamples
from cskv.data.sources import TextSource
from tests.cli.support import byte_tokenizer
from tests.disk import disk_full
from tests.models.families import tiny_model

CONFIG = CSKVConfig(window=2, group=2, sinks=1)


def texts(number: int = 6, seed: int = 0, length: int = 12) -> list[Tensor]:
    return list(torch.randint(3, 96, (number, length), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(autouse=True)
def _after_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_module, "SAVE_SECONDS", -1.0)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "statistics.safetensors.unfinished"


class Interruption(KeyboardInterrupt):
    """Not that of whoever runs the tests."""


def interrupted(model: nn.Module, samples: Iterable[Tensor], config: CSKVConfig, after: int, **given: Any) -> None:
    def stop(done: int, _total: int | None) -> None:
        if done == after:
            raise Interruption

    with pytest.raises(Interruption):
        calibrate(model, samples, config, progress=stop, **given)


def finished(model: nn.Module, samples: Iterable[Tensor], config: CSKVConfig, **given: Any) -> tuple[Statistics, int]:
    """The statistics, and how many samples were run for them."""
    done: list[int] = []
    found = calibrate(model, samples, config, progress=lambda now, _total: done.append(now), **given)
    return found, len(done)


def same(ours: Statistics, theirs: Statistics) -> bool:
    facts = [(own.base, own.tokens, own.source, own.seed, own.sinks) for own in (ours, theirs)]
    return facts[0] == facts[1] and all(
        torch.equal(ours.get(i, name), tensor) for i, layer in theirs.layers.items() for name, tensor in layer.items()
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_it_ends_with_the_same_statistics(family: str, fisher: bool, streamed: bool, kept: Path) -> None:
    model = tiny_model(family)
    stream = (lambda: iter(texts())) if streamed else texts
    whole, _ = finished(model, stream(), CONFIG, fisher=fisher, source="a text", seed=3)
    for after in (2, 5):
        interrupted(model, stream(), CONFIG, after, fisher=fisher, source="a text", seed=3, kept=kept)
        assert kept.exists()
    found, run = finished(model, stream(), CONFIG, fisher=fisher, source="a text", seed=3, kept=kept)
    assert run == 1
    assert same(found, whole)
    assert not list(kept.parent.iterdir())


def test_token_samples_go_on_likewise(kept: Path) -> None:
    source = TextSource("letters", lambda seed: iter(["The cache keeps the latents of old tokens. " * 9]))
    samples = TokenSamples(source, byte_tokenizer(), 5, 16, seed=2)
    model = tiny_model("llama", vocab_size=300)
    whole, _ = finished(model, samples, CONFIG)
    interrupted(model, samples, CONFIG, 3, kept=kept)
    found, run = finished(model, samples, CONFIG, kept=kept)
    assert run == 2
    assert same(found, whole)


OTHERS: dict[str, dict[str, Any]] = {
    "text": {"source": "another"},
    "seed": {"seed": 1},
    "samples": {"samples": texts(seed=1)},
    "longer samples": {"samples": [torch.cat([text, text]) for text in texts()]},
    "fewer samples": {"samples": texts()[:4]},
    "sinks": {"config": replace(CONFIG, sinks=2)},
    "window": {"config": replace(CONFIG, window=3)},
    "group": {"config": replace(CONFIG, group=1)},
    "no Fisher information": {"fisher": False},
    "no covariance": {"covariance": False},
}


@pytest.mark.parametrize("changed", [*OTHERS, "weights", "model"])
def test_sums_of_another_pass_are_not_gone_on_with(changed: str, kept: Path) -> None:
    model, plain = tiny_model("llama"), {"samples": texts(), "config": CONFIG}
    interrupted(model, kept=kept, after=3, **plain)
    other = tiny_model("qwen2") if changed == "model" else model
    if changed == "weights":
        other.model.layers[1].self_attn.v_proj.weight.data.mul_(-1)
    given = plain | OTHERS.get(changed, {})
    found, run = finished(other, kept=kept, **given)
    assert run == len(given["samples"])
    assert same(found, calibrate(other, **given))
    assert not kept.exists()


@pytest.mark.parametrize("damage", ["cut", "text", "another file", "absent"])
def test_what_cannot_be_read_is_begun_again(damage: str, kept: Path) -> None:
    model = tiny_model("llama")
    interrupted(model, texts(), CONFIG, 3, kept=kept)
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-9])
    elif damage == "text":
        kept.write_text("no tensors")
    elif damage == "another file":
        calibrate(model, texts(1), CONFIG).save(kept)
    else:
        kept.unlink()
    found, run = finished(model, texts(), CONFIG, kept=kept)
    assert run == 6
    assert same(found, calibrate(model, texts(), CONFIG))


def test_an_interruption_while_sums_are_written_keeps_the_former_ones(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    interrupted(model, texts(), CONFIG, 3, kept=kept)
    before = kept.read_bytes()
    with monkeypatch.context() as full:
        disk_full(full, kept.name)
        with pytest.raises(Exception, match="No space left on device"):
            calibrate(model, texts(), CONFIG, kept=kept)
    assert kept.read_bytes() == before
    assert finished(model, texts(), CONFIG, kept=kept)[1] == 3


def test_no_file_is_written_for_little_work(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_module, "SAVE_SECONDS", 3600.0)
    interrupted(tiny_model("llama"), texts(), CONFIG, 3, kept=kept)
    assert not list(kept.parent.iterdir())
