from __future__ import annotations

import pytest

from cskv.errors import DataError
from cskv.plots import plot_spectra
from tests.plots.support import PNG, decay

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("layers", "sources"), [(3, ("weight", "calibrated")), (12, ("calibrated",)), (1, ("weight",))]
)
def test_spectra_are_drawn(tmp_path, layers, sources):
    path = plot_spectra(decay(layers, sources), tmp_path / "spectra.png")
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.png"]


def test_an_unknown_image_format_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="no image format"):
        plot_spectra(decay(1, ("weight",)), tmp_path / "spectra.docx")
    assert not list(tmp_path.iterdir())
