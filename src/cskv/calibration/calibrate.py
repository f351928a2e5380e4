"""One streaming pass over text that takes statistics of every attention layer.

With Fisher information, a backward pass follows every forward. Memory depends on the model's shape and the length of a
sample only, never on the number of samples. A pass that is interrupted goes on from what is kept on disk.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from cskv.adapter.base_model import BaseModelInfo
from cskv.calibration.fisher import FisherPass
from cskv.calibration.hooks import decode
from cskv.calibration.statistics import Statistics
from cskv.calibration.sums import Sums
from cskv.config import CSKVConfig
from cskv.errors import DataError
from cskv.fingerprint import digest
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of, plain_arithmetic
from cskv.models.sites import Watcher, watching
from cskv.models.survey import Survey, survey

SAVE_SECONDS = 30.0  # of work that an interruption can cost


def calibrate(
    model: nn.Module,
    samples: Iterable[Int[Tensor, "*batch tokens"]],
    config: CSKVConfig | None = None,
    *,
    covariance: bool = True,
    fisher: bool = True,
    checkpointed: bool = False,
    source: str | None = None,
    seed: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    kept: Path | None = None,
) -> Statistics:
    """Take statistics of a model's layers over token samples.

    The model runs where it is, frozen; its mode and hooks are as before when this returns or raises.

    Args:
        model: a transformers decoder model.
        samples: token ids, one sample or a batch of equally long ones at a time; consumed once.
        config: its `sinks` are left out at the start of every sample, and with its `window` and `group` say which reads
            Fisher information is about; the default settings where not given.
        covariance: also take the moments of keys and values and the energy of queries, which all but plain SVD and
            ASVD need.
        fisher: also take the Fisher information of keys and values (`cskv.calibration.fisher`), by a backward pass,
            which "fisher-pca" and budgets need. Not without `covariance`.
        checkpointed: with Fisher information, keep only the layers' inputs for the backward pass, and run every layer
            again in it: slower, in far less memory.
        source: the text's name, to be noted in the statistics; taken from `TokenSamples` where not given.
        seed: the same for the seed of its order.
        progress: called with (batches done, batches in all or None) after each batch.
        kept: a file in which unfinished sums are kept. If it is there, of the same model and settings and as many
            samples that begin with the same one, the pass goes on from it; it is gone at the end.

    Raises:
        CSKVError: a compressor is attached to the model.
        UnsupportedModelError: the model has no layer that can be compressed, or for Fisher information its attention or
            head is not understood.
        DataError: there are no samples, one is too short, or a layer's statistics are not finite; the message names the
            layer.
    """
    run = _Pass(survey(model), config or CSKVConfig(), covariance, fisher and covariance, checkpointed)
    facts: dict[str, Any] = {
        "source": source if source is not None else getattr(getattr(samples, "source", None), "name", ""),
        "seed": seed if seed is not None else getattr(samples, "seed", 0),
    }
    total, stream = len(samples) if isinstance(samples, Sized) else None, iter(samples)
    if (first := next(stream, None)) is None:
        raise DataError("there are no samples to calibrate on; give text")
    same = facts | {"samples": total, "first_sample": digest([("tokens", first)])}
    done = run.go_on(kept, same) if kept is not None else 0
    saved = time.monotonic()
    with plain_arithmetic(device_of(model)), run.watching():
        left = itertools.islice(itertools.chain(iter([first]), stream), done, None)
        del first
        for done, sample in enumerate(left, start=done + 1):  # noqa: B020 (goes on counting)
            run.take(sample if sample.ndim > 1 else sample[None], seed=facts["seed"] + done)
            if done == 1:
                run.statistics(facts)  # a model that overflows does so at once; better told now than after an hour
            if kept is not None and time.monotonic() - saved > SAVE_SECONDS:
                run.keep(kept, same, done)
                saved = time.monotonic()
            if progress is not None:
                progress(done, total)
        statistics = run.statistics(facts)
    if kept is not None:
        kept.unlink(missing_ok=True)
    return statistics


class _Pass:
    """A pass under way."""

    def __init__(self, found: Survey, config: CSKVConfig, covariance: bool, fisher: bool, checkpointed: bool) -> None:
        self._found, self._config = found, config
        self._base: BaseModelInfo = found.base  # runs the projections, so before anything watches them
        self._covariance = covariance
        self._fisher = FisherPass(found, config, checkpointed=checkpointed) if fisher else None
        self._sums, self.tokens = Sums(config.sinks), 0

    def watching(self) -> ExitStack:
        """Hook the model, in evaluation mode, until the stack is closed."""
        stack = ExitStack()
        stack.enter_context(evaluation_mode(self._found.model))
        watchers: dict[str, Watcher] = {"inputs": self._sums.add_input}
        if self._covariance:
            watchers |= self._moment_watchers()
        # Not while layers run again for the backward pass.
        only_once = {name: self._in_forward(watcher) for name, watcher in watchers.items()}
        stack.enter_context(watching(self._found.sites, **only_once))
        if self._fisher is not None:
            stack.enter_context(self._fisher.watching())
        return stack

    def take(self, input_ids: Int[Tensor, "batch tokens"], seed: int) -> None:
        """Add the statistics of a batch of samples."""
        if input_ids.shape[1] <= self._config.sinks:
            raise DataError(
                f"a sample has {input_ids.shape[1]} tokens, and {self._config.sinks} sinks are left out of statistics; "
                "give longer samples"
            )
        if self._fisher is None:
            decode(self._found.model, input_ids)
        else:
            for (layer_idx, kind), (y, gradient) in self._fisher.gradients(input_ids, seed).items():
                self._sums.add_gradient(layer_idx, kind, y, gradient)
        self.tokens += input_ids.numel()

    def statistics(self, facts: dict[str, Any]) -> Statistics:
        """Return the statistics so far."""
        result = Statistics(
            layers=self._sums.means(), base=self._base, tokens=self.tokens, sinks=self._config.sinks, **facts
        )
        result.check_finite(f"after {self.tokens} tokens: the model overflows; try it in bf16 or fp32")
        return result

    def keep(self, path: Path, same: dict[str, Any], done: int) -> None:
        """Write the sums, to go on from later with samples of which the same facts hold."""
        self._sums.save(path, self._identity(same) | {"done": done, "tokens": self.tokens})

    def go_on(self, path: Path, same: dict[str, Any]) -> int:
        """Take over sums that were kept of the same pass, and return how many samples they hold; 0 without any."""
        found = Sums.load(path, self._config.sinks)
        if found is None:
            return 0
        sums, kept = found
        done, tokens = kept.pop("done", None), kept.pop("tokens", None)
        if kept != self._identity(same) or not isinstance(done, int) or not isinstance(tokens, int):
            return 0
        self._sums, self.tokens = sums, tokens
        return done

    def _moment_watchers(self) -> dict[str, Watcher]:
        sums, recipes = self._sums, self._found.recipes
        kv_dims = {site.layer_idx: site.kv_dim for site in self._found.sites}

        def on_keys(layer_idx: int, y: Tensor) -> None:
            sums.add_output(layer_idx, "k", y)
            keys = recipes[layer_idx].keys
            if keys.norm is not None:
                sums.add_output(layer_idx, "key", keys.normalised(y.detach()))

        def on_queries(layer_idx: int, y: Tensor) -> None:
            queries = recipes[layer_idx].queries.heads(y.detach(), None, None)
            sums.add_energy(layer_idx, queries, kv_dims[layer_idx])

        return {
            "keys": on_keys,
            "values": lambda layer_idx, y: sums.add_output(layer_idx, "v", y),
            "queries": on_queries,
        }

    def _in_forward(self, watcher: Watcher) -> Watcher:
        def watch(layer_idx: int, tensor: Tensor) -> None:
            if self._fisher is None or self._fisher.in_forward:
                watcher(layer_idx, tensor)

        return watch

    def _identity(self, same: dict[str, Any]) -> dict[str, Any]:
        """Return what has to be equal for a pass to go on from kept sums."""
        config = {name: getattr(self._config, name) for name in ("sinks", "window", "group")}
        base = json.loads(json.dumps(asdict(self._base)))
        return {**same, **config, "base": base, "covariance": self._covariance, "fisher": self._fisher is not None}
