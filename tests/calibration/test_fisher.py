"""Fisher information predicts what small errors in old keys and values cost, as measured by the divergence itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from cskv import CSKVConfig, DataError, UnsupportedModelError
from cskv.calibration.calibrate import calibrate
from cskv.calibration.fisher import FisherPass
from cskv.calibration.statistics import Statistics
from cskv.calibration.sums import Sums
from cskv.models.calls import AttentionCall
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite
from cskv.models.survey import Survey, survey
from cskv.reading.compressed import compressed_reading
from tests.models.families import tiny_model

CONFIG = CSKVConfig(window=3, group=4, sinks=2)
TEXT = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(3))
# The last query is 17 tokens behind the first one after the sinks: (17 - 3) // 4 groups are sealed then, 12 tokens.
OLD = slice(2, 14)
DRAWS = 768

Errors = dict[tuple[int, str], Tensor]


class Disturbed:
    """Old tokens with errors of our own in what the projections put out, or in keys after their norm."""

    def __init__(self, errors: Errors) -> None:
        self.config, self._errors = CONFIG, errors

    def keys(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall, keys: Tensor) -> Tensor:
        read = recipe.keys.heads(self._output(site, "k", call), call.cos, call.sin)
        if (error := self._errors.get((site.layer_idx, "key"))) is None:
            return read
        return read + recipe.keys.rotated(error.unflatten(-1, (-1, site.head_dim)).transpose(1, 2), call.cos, call.sin)

    def values(self, site: AttentionSite, recipe: SiteRecipe, call: AttentionCall) -> Tensor:
        return recipe.values.heads(self._output(site, "v", call), None, None)

    def _output(self, site: AttentionSite, kind: str, call: AttentionCall) -> Tensor:
        projection = getattr(site, kind)
        return projection.select(projection.linear(call.x)) + self._errors.get((site.layer_idx, kind), 0.0)


@torch.no_grad()
def measured_kl(surveyed: Survey, errors: Errors, tokens: Tensor) -> Tensor:
    """KL of each text's predictions, summed over its tokens: the mean over errors of either sign."""
    model, total = surveyed.model, torch.zeros(len(tokens), dtype=torch.float64)
    exact = model(tokens, use_cache=False).logits.log_softmax(-1)
    for sign in (1, -1):  # what is odd in the errors goes
        with compressed_reading(surveyed, Disturbed({part: sign * error for part, error in errors.items()})):
            ours = model(tokens, use_cache=False).logits.log_softmax(-1)
        total += (exact.exp() * (exact - ours)).sum((1, 2)) / 2
    return total


def random_errors(model: nn.Module, kinds: tuple[str, ...], batch: int, size: float) -> Errors:
    generator = torch.Generator().manual_seed(4)
    return {
        (site.layer_idx, kind): size
        * torch.randn(batch, len(TEXT), site.kv_dim, generator=generator, dtype=torch.float64)
        for site in survey(model).sites
        for kind in kinds
    }


def gradients(surveyed: Survey, tokens: Tensor, seed: int = 0, checkpointed: bool = False) -> dict:
    run = FisherPass(surveyed, CONFIG, checkpointed=checkpointed)
    with run.watching(), torch.no_grad():
        return run.gradients(tokens, seed)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ("k",)),
        ("llama", ("v",)),
        ("qwen2", ("k", "v")),
        ("phi3", ("k", "v")),  # fused weights, partial RoPE
        ("qwen3", ("k",)),  # through a norm
        ("qwen3", ("key",)),  # after it
        ("gemma2", ("k", "v")),  # soft-capped scores and logits
        ("granite", ("k", "v")),  # scaled logits
    ],
)
def test_the_divergence_is_half_the_mean_square_of_what_gradients_say(family: str, kinds: tuple[str, ...]) -> None:
    """One error in all old tokens of all layers at once, and many draws of labels."""
    model = tiny_model(family).double()
    surveyed = survey(model)
    errors = random_errors(model, kinds, 1, 1e-4)
    kl = float(measured_kl(surveyed, errors, TEXT[None]))
    found = gradients(surveyed, TEXT.expand(DRAWS, -1))
    said = sum((found[part][1] * error).sum((1, 2)) for part, error in errors.items())
    squares = said.square() / 2
    spread = float(squares.std()) / DRAWS**0.5
    assert spread < 0.15 * kl
    assert abs(float(squares.mean()) - kl) < 3 * spread
    assert abs(float(said.mean())) < 4 * float(said.std()) / DRAWS**0.5  # a score has no mean


@pytest.mark.parametrize(("family", "kind"), [("llama", "k"), ("llama", "v"), ("phi3", "v"), ("qwen3", "key")])
def test_statistics_predict_what_independent_errors_cost(family: str, kind: str) -> None:
    """As those of quantisation are: KL per token = 1/2 tr(F D), D their second moment."""
    model = tiny_model(family).double()
    surveyed = survey(model)
    statistics = calibrate(model, [TEXT.expand(DRAWS, -1)], CONFIG)
    scale = torch.linspace(0.2, 2.0, 32, dtype=torch.float64)  # some channels err more
    errors = {part: scale * error for part, error in random_errors(model, (kind,), DRAWS, 1e-4).items()}
    kl = float(measured_kl(surveyed, errors, TEXT.expand(DRAWS, -1)).mean()) / len(TEXT)
    second = torch.diag((1e-4 * scale).square())
    predicted = sum(float((statistics.get(i, f"{kind}.fisher") * second).sum()) / 2 for i, _ in errors)
    assert predicted == pytest.approx(kl, rel=0.1, abs=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_that_are_never_read_from_latents_have_no_gradient(family: str) -> None:
    for part, (y, gradient) in gradients(survey(tiny_model(family)), TEXT[None]).items():
        assert y.shape == gradient.shape == (1, 20, 32), part
        assert (gradient[0, OLD].abs().amax(-1) > 0).all(), part
        assert gradient[0, : OLD.start].abs().max() == gradient[0, OLD.stop :].abs().max() == 0, part


def test_outputs_are_those_of_the_projections() -> None:
    model = tiny_model("qwen3")
    seen = {}
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: seen.update(k=call[2]))
    normed = model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda *call: seen.update(key=call[2]))
    with torch.no_grad():
        model(TEXT[None])
    hook.remove()
    normed.remove()
    found = gradients(survey(model), TEXT[None])
    assert set(found) == {(i, kind) for i in (0, 1) for kind in ("k", "v", "key")}
    torch.testing.assert_close(found[1, "k"][0], seen["k"])
    torch.testing.assert_close(found[1, "key"][0], seen["key"].reshape(1, 20, 32))


def test_keys_after_their_norm_take_the_gradient_of_what_rope_turns() -> None:
    """Through the norm it is that of what the projection puts out."""
    model = tiny_model("qwen3").double()
    found = gradients(survey(model), TEXT[None])
    for i, layer in enumerate(model.model.layers):
        y = found[i, "k"][0].unflatten(-1, (2, 16)).requires_grad_()
        of_key = found[i, "key"][1].unflatten(-1, (2, 16))
        (through,) = torch.autograd.grad(layer.self_attn.k_norm(y), y, of_key)
        torch.testing.assert_close(through.flatten(-2), found[i, "k"][1], rtol=1e-9, atol=1e-12)


def test_samples_may_be_of_different_lengths() -> None:
    model = tiny_model("qwen3")
    found = calibrate(model, [TEXT, TEXT[:15], torch.stack([TEXT, TEXT.flip(0)])], CONFIG)
    assert found.tokens == 20 + 15 + 40
    assert found.get(0, "key.fisher").trace() > 0


def assert_alike(ours: Statistics, theirs: Statistics, rtol: float = 1e-4) -> None:
    for i, layer in theirs.layers.items():
        for name, tensor in layer.items():
            torch.testing.assert_close(ours.get(i, name), tensor, rtol=rtol, atol=rtol * float(tensor.abs().max()))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2"])
def test_layers_that_run_again_give_the_same_statistics(family: str) -> None:
    kept, again = (
        calibrate(tiny_model(family), [TEXT, TEXT.flip(0)], CONFIG, checkpointed=checkpointed)
        for checkpointed in (False, True)
    )
    assert {name.partition(".")[0] for name in kept.layers[max(kept.layers)]} >= {"input", "k", "v", "query"}
    assert ("key.fisher" in kept.layers[max(kept.layers)]) == (family == "qwen3")
    assert_alike(again, kept)


def test_without_a_backward_pass_all_else_is_the_same() -> None:
    model = tiny_model("qwen3")
    both, plain = (calibrate(model, [TEXT, TEXT.flip(0)], CONFIG, fisher=fisher) for fisher in (True, False))
    assert both.has_fisher
    assert not plain.has_fisher
    for layer, less in zip(both.layers.values(), plain.layers.values(), strict=True):
        assert layer.keys() - less.keys() == {
            f"{kind}.{name}" for kind in ("k", "v", "key") for name in ("fisher", "coherent_mean", "coherent_moment")
        }
    assert_alike(both, plain, rtol=1e-5)
    lean = calibrate(model, [TEXT], CONFIG, covariance=False)  # nothing to weight then
    assert set(lean.layers[0]) == {"input.mean_abs", "input.mean"}


def test_weights_are_frozen_meanwhile_and_as_they_were_afterwards() -> None:
    model = tiny_model("llama")
    fixed = {"model.norm.weight", "model.layers.0.self_attn.v_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)
    during = []
    progress = lambda done, total: during.extend(p.requires_grad for p in model.parameters())  # noqa: E731
    calibrate(model, [TEXT], CONFIG, progress=progress)
    assert not any(during)
    assert {name for name, own in model.named_parameters() if not own.requires_grad} == fixed
    with pytest.raises(IndexError):
        calibrate(model, [TEXT, torch.full((20,), 999)], CONFIG)
    assert {name for name, own in model.named_parameters() if not own.requires_grad} == fixed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_labels_follow_the_seed_alone() -> None:
    surveyed = survey(tiny_model("llama"))
    first, again, other = (gradients(surveyed, TEXT[None], seed)[0, "v"][1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # A batch of samples draws for each of them, and samples one after another draw anew.
    batch = gradients(surveyed, TEXT.expand(2, -1))[0, "v"][1]
    assert not torch.allclose(batch[0], batch[1])
    one, two = (calibrate(surveyed.model, [TEXT] * number, CONFIG) for number in (1, 2))
    assert not torch.allclose(one.get(0, "v.fisher"), two.get(0, "v.fisher"))


def test_bf16_models_take_the_same_information() -> None:
    texts = [torch.randint(3, 96, (64, 20), generator=torch.Generator().manual_seed(6))]
    exact = calibrate(tiny_model("llama"), texts, CONFIG)
    found = calibrate(tiny_model("llama").bfloat16(), texts, CONFIG)
    for i, kind in ((0, "k"), (1, "v")):
        fisher = found.get(i, f"{kind}.fisher")
        assert fisher.dtype == torch.float64
        assert float(fisher.trace()) == pytest.approx(float(exact.get(i, f"{kind}.fisher").trace()), rel=0.1)


def test_sums_of_gradients_by_hand() -> None:
    """Of a sink that does not count, y = 1 and 3, and g = 2 and 1: M = sum g (y, 1) = (5, 3)."""
    sums = Sums(sinks=1)
    y, gradient = torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[[9.0], [2.0], [1.0]]])
    sums.add_gradient(0, "v", y, gradient)
    found = sums.means()[0]
    assert found["v.fisher"].item() == pytest.approx((4 + 1) / 3)  # per token of the text
    assert found["v.coherent_mean"].item() == pytest.approx(5 * 3 / 9)
    assert found["v.coherent_moment"].item() == pytest.approx(25 / 9)


def test_of_samples_gradients_add_up_within_each_alone() -> None:
    """Opposite gradients of two tokens cancel in one text, not in two."""
    y = torch.ones(1, 2, 1)
    together, apart = Sums(), Sums()
    together.add_gradient(0, "k", y, torch.tensor([[[1.0], [-1.0]]]))
    apart.add_gradient(0, "k", y.view(2, 1, 1), torch.tensor([[[1.0]], [[-1.0]]]))
    assert together.means()[0]["k.fisher"] == apart.means()[0]["k.fisher"] == 1.0
    assert apart._sums[0, "k.coherent"][0][-1, -1] == 2.0
    assert together._sums[0, "k.coherent"][0][-1, -1] == 0.0


def test_gradients_that_are_all_zero_leave_finite_statistics() -> None:
    sums = Sums()
    sums.add_gradient(0, "v", torch.ones(1, 3, 2), torch.zeros(1, 3, 2))
    assert all(torch.isfinite(tensor).all() for tensor in sums.means()[0].values())


def test_a_sample_in_which_nothing_grows_old_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match=r"a sample of 9 tokens has none .* at least 10 tokens, or a smaller") as caught:
        calibrate(model, [TEXT, TEXT[:9]], CONFIG)
    assert "\n" not in str(caught.value)
    assert calibrate(model, [TEXT[:10]], CONFIG).get(0, "v.fisher").trace() > 0


def test_models_whose_attention_or_head_is_not_understood_are_refused_for_this_alone() -> None:
    def like_flash(module: nn.Module, *states: Tensor, **kwargs: object) -> tuple:
        return sdpa_attention_forward(module, *states[:3], None, **{**kwargs, "is_causal": True})

    AttentionInterface.register("like_fa", like_flash)
    AttentionMaskInterface.register("like_fa", flash_attention_mask)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="has no language-model head; load it as a causal LM"):
        calibrate(model.model, [TEXT], CONFIG)
    assert not calibrate(model.model, [TEXT], CONFIG, fisher=False).has_fisher
    model.set_attn_implementation("like_fa")
    with pytest.raises(UnsupportedModelError, match="the model's is 'like_fa': call model.set_attn") as caught:
        calibrate(model, [TEXT], CONFIG)
    assert "\n" not in str(caught.value)
    assert not calibrate(model, [TEXT], CONFIG, fisher=False).has_fisher
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())
