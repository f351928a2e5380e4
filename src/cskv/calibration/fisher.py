"""What an error in old keys and values costs the model's predictions: Fisher information, by one backward pass.

Let d_s be the error of a key or value that is read from latents, s its token, and g_s the gradient of the
log-probability of tokens drawn from the model itself with respect to it. To second order the KL divergence of a text's
predictions is

    KL = 1/2 E[(sum_s g_s . d_s)^2]                     (the Fisher information of all errors together)

Gradients are those of the copy that queries read in place of the exact one (`cskv.reading.compressed`), so only reads
of tokens that will be sealed count. Two statistics of a projection are kept:

    fisher     sum_s g_s g_s^T, per token: what an error costs where errors of different tokens are independent, as
               those of quantisation are.
    coherent   M^T M, M = sum_s g_s (y_s, 1)^T of a whole sample: a moment of y in which tokens count by their
               gradients, and together. An error that leaves channels out, d = (I - P) y, is alike in tokens that are
               alike, and attention adds it up: KL = 1/2 E[<M, I - P>^2].

Kronecker-factored (Martens and Grosse, arXiv 1503.05671), both are gains and moments of a weighted PCA; see
`cskv.factorization.weighting`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cskv.config import CSKVConfig
from cskv.errors import DataError
from cskv.models.calls import AttentionCall
from cskv.models.evaluation_mode import evaluation_mode, frozen
from cskv.models.placement import device_of
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite, watching
from cskv.models.survey import Survey
from cskv.reading.compressed import compressed_reading
from cskv.reading.head import Head

CHUNK = 256  # positions whose logits exist at the same time
Gradients = dict[tuple[int, str], tuple[Tensor, Tensor]]  # (layer index, kind) -> y and its gradient


class FisherPass:
    """Forwards and backwards of a frozen model whose old tokens are exact copies that take gradients.

    Args:
        surveyed: a decoder model with a language-model head.
        config: window, group and sinks say which reads are those of old tokens.
        checkpointed: keep only the layers' inputs for the backward pass, and run every layer again in it.

    Attributes:
        in_forward: False while layers run again for a backward pass.

    Raises:
        UnsupportedModelError: the model's attention or head is not understood.
    """

    def __init__(self, surveyed: Survey, config: CSKVConfig, *, checkpointed: bool = False) -> None:
        self._surveyed, self._copies = surveyed, _Copies(config)
        self._checkpointed, self.in_forward = checkpointed, True
        self._head = Head(surveyed.model)
        self._least = config.sinks + config.window + config.group + 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model, in evaluation mode and with its weights frozen; undone at the end whatever happens."""
        outputs, sites = self._copies.outputs, self._surveyed.sites
        keys, values = (lambda i, y, kind=kind: outputs.__setitem__((i, kind), y) for kind in ("k", "v"))
        with (
            evaluation_mode(self._surveyed.model),
            frozen(self._surveyed.model),
            watching(sites, keys=keys, values=values),
        ):
            yield

    def gradients(self, input_ids: Int[Tensor, "batch tokens"], seed: int) -> Gradients:
        """Run a forward and a backward of the log-probabilities of labels that are drawn from the model.

        Args:
            input_ids: whole texts without padding.
            seed: of the draw.

        Returns:
            every projection's output, and with it the gradient of what old tokens are read as; "key" is that of keys
            after their norm, before RoPE, where the family has a norm. (batch, tokens, kv_dim) each.

        Raises:
            DataError: the texts are so short that no token is ever old.
        """
        tokens = input_ids.shape[1]
        if tokens < self._least:
            raise DataError(
                f"a sample of {tokens} tokens has none that would be read from latents; give samples of at least "
                f"{self._least} tokens, or a smaller window, or leave Fisher information out (--no-fisher)"
            )
        copies, model = self._copies, self._surveyed.model
        copies.leaves.clear()
        self.in_forward = True
        reading = compressed_reading(self._surveyed, copies, checkpointed=self._checkpointed)
        with torch.enable_grad():
            with reading:
                hidden = model.base_model(input_ids=input_ids.to(device_of(model)), use_cache=False)[0]  # type: ignore[operator]
            self.in_forward = False
            parts = list(copies.leaves)
            of_hidden = self._of_hidden(hidden.detach(), seed)
            found = torch.autograd.grad(hidden, [copies.leaves[part] for part in parts], of_hidden)
        return {part: (copies.outputs[part], gradient) for part, gradient in zip(parts, found, strict=True)}

    def _of_hidden(self, hidden: Tensor, seed: int) -> Tensor:
        """Return the gradient of the labels' log-probabilities with respect to the last hidden states."""
        generator, found = torch.Generator().manual_seed(seed), []
        for chunk in hidden.split(CHUNK, dim=1):
            chunk.requires_grad_()
            logits = self._head(chunk).float().flatten(0, 1)
            threshold = torch.rand(len(logits), 1, generator=generator).to(logits.device)
            sums = logits.detach().softmax(-1).cumsum(-1)
            labels = torch.searchsorted(sums, threshold * sums[:, -1:])[:, 0].clamp(max=logits.shape[1] - 1)
            found.append(torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), chunk)[0])
        return torch.cat(found, dim=1)


class _Copies:
    """Exact keys and values in place of old tokens, plus zeros that take the gradients (see `OldTokens`).

    Attributes:
        outputs: what the projections put out in the forward under way.
        leaves: the zeros.
    """

    def __init__(self, config: CSKVConfig) -> None:
        self.config = config
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.leaves: dict[tuple[int, str], Tensor] = {}

    def keys(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall, keys: Tensor) -> Tensor:
        copies = recipe.keys.heads(self._with_leaf(site.layer_idx, "k"), call.cos, call.sin)
        if recipe.keys.norm is None:
            return copies
        output = self.outputs[site.layer_idx, "k"]  # detached
        self.outputs[site.layer_idx, "key"] = recipe.keys.normalised(output)
        error = self._leaf((site.layer_idx, "key"), output).unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
        if call.cos is not None and call.sin is not None:
            error = recipe.keys.rotated(error, call.cos, call.sin)
        return copies + error

    def values(self, site: AttentionSite, recipe: SiteRecipe, _call: AttentionCall) -> Tensor:
        return recipe.values.heads(self._with_leaf(site.layer_idx, "v"), None, None)

    def _with_leaf(self, layer_idx: int, kind: str) -> Tensor:
        output = self.outputs[layer_idx, kind]
        self.outputs[layer_idx, kind] = output.detach()  # its graph would hold activations of every layer
        return output + self._leaf((layer_idx, kind), output)

    def _leaf(self, part: tuple[int, str], like: Tensor) -> Tensor:
        # A layer that runs again for the backward pass makes no leaves of its own.
        if part not in self.leaves:
            self.leaves[part] = torch.zeros_like(like, requires_grad=True)
        return self.leaves[part]
