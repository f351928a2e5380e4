"""Made-up results, and what an image file begins with."""

from __future__ import annotations

from cskv.evaluation.spectra import Spectrum

PNG = b"\x89PNG\r\n\x1a\n"


def decay(layers: int, sources: tuple[str, ...]) -> list[Spectrum]:
    return [
        Spectrum(layer, projection, source, tuple(0.9 ** (i * (1 + layer)) for i in range(16)))
        for layer in range(layers)
        for projection in "kv"
        for source in sources
    ]
