from __future__ import annotations

import pytest
import torch

from cskv import CSKVConfig, DataError
from cskv.compression.initialise import Factorisation, initialise
from cskv.evaluation.reconstruction import reconstruction_losses
from cskv.models.survey import survey
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import full_rank_adapter, tiny_model

SAMPLES = torch.randint(3, 96, (6, 40), generator=torch.Generator().manual_seed(5))  # those of `statistics_of`


@pytest.mark.parametrize("family", ["llama-mha", "qwen2", "qwen3"])
@pytest.mark.parametrize("key_factors", ["joint", "commuting"])
def test_on_its_own_text_pca_loses_the_eigenvalues_it_leaves_out(family: str, key_factors: str) -> None:
    model = tiny_model(family)
    statistics = statistics_of(model)
    config = CSKVConfig(0.25, 0.5, init="pca", key_factors=key_factors)
    adapter = initialise(model, config, statistics)
    components = Factorisation(survey(model), config, statistics).components()
    for loss in reconstruction_losses(model, adapter, SAMPLES):
        factors = adapter.factors(loss.layer)
        for kind, value, rank in (("k", loss.k, factors.k.rank), ("v", loss.v, factors.v.rank)):
            spectrum = components[loss.layer, kind].spectrum
            assert value == pytest.approx(float(spectrum[rank:].sum()) / len(spectrum), rel=1e-3)


def test_full_rank_loses_nothing_and_no_samples_are_refused() -> None:
    model = tiny_model("llama")
    adapter = full_rank_adapter(model, CSKVConfig(1.0, 1.0))
    assert all(loss.k < 1e-9 and loss.v < 1e-9 for loss in reconstruction_losses(model, adapter, SAMPLES))
    with pytest.raises(DataError, match="no samples"):
        reconstruction_losses(model, adapter, [])
