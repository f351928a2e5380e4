"""KL of the compressed model's predictions, and what is built on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cskv import CSKVConfig, UnsupportedModelError
from cskv.compression.initialise import initialise
from cskv.models.survey import survey
from cskv.reading.compressed import compressed_reading
from cskv.reading.divergence import Divergence
from cskv.reading.head import Head
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import full_rank_adapter, tiny_model, truncated_adapter

CONFIG = CSKVConfig(0.25, 0.25, window=0, group=2, init="pca")


def samples(number: int = 4, length: int = 300) -> list[Tensor]:
    return list(torch.randint(3, 96, (number, length), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_divergence_is_that_of_the_two_models_logits(family: str) -> None:
    model = tiny_model(family, max_position_embeddings=512)
    adapter = truncated_adapter(model, CONFIG)
    tokens = torch.stack(samples(2))
    with torch.no_grad():
        exact = model(tokens, use_cache=False).logits.log_softmax(-1)
        with compressed_reading(survey(model), adapter):
            ours = model(tokens, use_cache=False).logits.log_softmax(-1)
    expected = (exact.exp() * (exact - ours)).sum(-1).mean()
    assert Divergence(survey(model)).kl(adapter, tokens).item() == pytest.approx(float(expected), rel=1e-3)


def test_nothing_lost_means_no_divergence_and_less_rank_means_more() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    divergence, statistics = Divergence(survey(model)), statistics_of(model)
    assert abs(divergence.mean(full_rank_adapter(model, CONFIG), samples(1))) < 1e-5
    values = [
        divergence.mean(initialise(model, CSKVConfig(d, d, window=0, group=1, init="pca"), statistics), samples(1))
        for d in (0.75, 0.5, 0.1)
    ]
    assert 0 < values[0] < values[1] < values[2]


def test_chunked_logits_have_the_same_gradients() -> None:
    model = tiny_model("llama", max_position_embeddings=512).requires_grad_(False)
    adapter = truncated_adapter(model, CONFIG)
    tokens = samples(1)[0][None]
    Divergence(survey(model)).kl(adapter, tokens).backward()
    chunked = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    adapter.zero_grad()
    with torch.no_grad():
        exact = model(tokens, use_cache=False).logits.log_softmax(-1)
    with compressed_reading(survey(model), adapter):
        ours = model(tokens, use_cache=False).logits.log_softmax(-1)
    (exact.exp() * (exact - ours)).sum(-1).mean().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-2, atol=1e-6, msg=name)


def test_a_head_that_does_more_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config, self.base_model = inner, inner.config, inner.base_model
            self.get_output_embeddings, self.get_input_embeddings = (
                inner.get_output_embeddings,
                inner.get_input_embeddings,
            )

        def forward(self, *args: object, **kwargs: object) -> object:
            outputs = self.inner(*args, **kwargs)
            outputs.logits = outputs.logits**3
            return outputs

    with pytest.raises(UnsupportedModelError, match="more to its logits"):
        Head(Odd(tiny_model("llama")))
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        Head(tiny_model("llama").model)
