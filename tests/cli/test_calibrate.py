"""Statistics on the command line: what is taken of a text, and a calibration that is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cskv.calibration.calibrate as calibrate_module
from cskv.calibration.statistics import Statistics
from cskv.data.samples import TokenSamples
from tests.cli.conftest import Run
from tests.cli.support import last_json, mistake

WINDOW = ["--window", 8, "--group", 4]


@pytest.fixture
def options(model_folder: Path, text_file: Path) -> list[object]:
    return ["--model-path", model_folder, "--dataset", text_file, "--num-samples", 6, "--max-seq-len", 64]


def alike(first: str, second: str, names: set[str] | None = None) -> bool:
    ours, theirs = Statistics.load(first), Statistics.load(second)
    return all(
        torch.allclose(ours.get(i, name), tensor, rtol=1e-4, atol=1e-6)
        for i, layer in theirs.layers.items()
        for name, tensor in layer.items()
        if names is None or name in names
    )


def test_fisher_information_is_taken_unless_it_is_not_wanted(run: Run, options: list[object]) -> None:
    first, plain, lean = (
        last_json(run("calibrate", *options, *WINDOW, *more, "-o", f"{name}.safetensors"))
        for name, more in (("a", ()), ("b", ("--no-fisher",)), ("c", ("--no-covariance",)))
    )
    assert [(own["fisher"], own["covariance"]) for own in (first, plain, lean)] == [
        (True, True),
        (False, True),
        (False, False),
    ]
    assert first["tokens"] == plain["tokens"] == 6 * 64
    assert Statistics.load("a.safetensors").has_fisher
    assert not Statistics.load("b.safetensors").has_fisher
    assert alike("a.safetensors", "b.safetensors")
    made = ["-m", options[1], *WINDOW, "--use-init-params", "--statistics"]
    assert "fisher-pca" in last_json(run("train", *made, "a.safetensors"))["adapter"]
    for lacking in ("b.safetensors", "c.safetensors"):
        assert "calibrate again with" in mistake(run("train", *made, lacking))
    last_json(run("train", *made, "b.safetensors", "--init", "weighted-pca"))


def test_layers_that_run_again_change_nothing(run: Run, options: list[object]) -> None:
    last_json(run("calibrate", *options, *WINDOW, "-o", "a.safetensors"))
    last_json(run("calibrate", *options, *WINDOW, "--gradient-checkpointing", "-o", "b.safetensors"))
    assert alike("a.safetensors", "b.safetensors")


def test_sinks_are_left_out_as_asked(run: Run, options: list[object]) -> None:
    for name, sinks in (("a", 0), ("b", 5)):
        last_json(run("calibrate", *options, *WINDOW, "--sinks", sinks, "-o", f"{name}.safetensors"))
        assert Statistics.load(f"{name}.safetensors").sinks == sinks
    assert not alike("a.safetensors", "b.safetensors", {"v.moment"})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--max-seq-len", 12, *WINDOW, "--sinks", 0], "give samples of at least 13 tokens, or a smaller window"),
        (["--max-seq-len", 16, *WINDOW, "--sinks", 4], "give samples of at least 17 tokens"),
        (["--max-seq-len", 64, "--window", 32, "--group", 32, "--sinks", 0], "Fisher information out (--no-fisher)"),
        (["--max-seq-len", 8, "--sinks", 8, "--no-fisher"], "a sample has 8 tokens, and 8 sinks are left out"),
        (["--window", -1], "window is -1; expected a whole number of tokens, at least 0"),
        (["--group", 0], "group is 0; expected a whole number of tokens, at least 1"),
        (["--sinks", -1], "sinks is -1; expected a whole number of tokens, at least 0"),
    ],
)
def test_mistakes_are_one_line(run: Run, options: list[object], wrong: list[object], says: str) -> None:
    assert says in mistake(run("calibrate", *options, *wrong))
    assert not list(Path().rglob("*.safetensors*"))


def test_interrupted_the_same_command_goes_on(run: Run, options: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    last_json(run("calibrate", *options, *WINDOW, "-o", "whole.safetensors"))
    plain, taken = TokenSamples.__iter__, []
    monkeypatch.setattr(calibrate_module, "SAVE_SECONDS", -1.0)

    def watched(interrupt_at: int | None) -> Callable[[TokenSamples], Iterator[torch.Tensor]]:
        def samples(self: TokenSamples) -> Iterator[torch.Tensor]:
            for number, sample in enumerate(plain(self)):
                if number == interrupt_at:
                    raise KeyboardInterrupt
                yield sample

        return samples

    monkeypatch.setattr(TokenSamples, "__iter__", watched(3))
    result = run("calibrate", *options, *WINDOW, "-o", "s.safetensors")
    assert result.exit_code == 130
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: interrupted: no statistics were written; the same command goes on from the sums that are kept"
    ]
    assert "Traceback" not in result.stderr
    assert [path.name for path in sorted(Path().glob("s.*"))] == ["s.safetensors.unfinished"]
    monkeypatch.setattr(TokenSamples, "__iter__", watched(None))
    forward = calibrate_module._Pass.take
    monkeypatch.setattr(calibrate_module._Pass, "take", lambda *args, **kw: taken.append(1) or forward(*args, **kw))
    last_json(run("calibrate", *options, *WINDOW, "-o", "s.safetensors"))
    assert len(taken) == 3
    assert [path.name for path in sorted(Path().glob("s.*"))] == ["s.safetensors"]
    found, whole = load_file("s.safetensors"), load_file("whole.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
