"""Wilson's score interval for a share of successes (E. B. Wilson, JASA 1927)."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the interval in [0, 1] that holds the true share with 95 % confidence.

    Unlike the normal approximation it stays inside [0, 1] and has width at 0 and `n` successes. A sum of scores between
    0 and 1 may be given as well: none varies more than successes of the same mean, so the interval is wide enough.

    Raises:
        ValueError: `n` is not positive, or `successes` is outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes of {n}; expected 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf(0.975)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
