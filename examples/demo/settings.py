"""Settings of the demo: how much it calibrates on, generates and measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cskv.data.mixed import mixed_source
from cskv.data.sources import TextSource, open_source
from cskv.evaluation.decoding import CONTEXT_FIRST
from cskv.evaluation.settings import PERPLEXITY, EvaluationSettings
from demo.model import BUNDLED

NEEDLES = "niah-single"
RECORDS = "records"  # a name for the text that the bundled model was trained on


@dataclass(frozen=True)
class DemoSettings:
    """Amounts of calibration, generation and measurement. The defaults take four to six minutes on two CPU cores.

    Attributes:
        evaluation: needles and held-out text.
        text: that is calibrated on, a name of `cskv.data.sources`, or "records".
        budgets: shares of the bytes, an adapter each.
        samples: to calibrate on, and `aside` more to choose ranks and widths by.
        sample_len: tokens of a sample.
        answer_tokens: to generate side by side.
        timed_steps: decoded tokens by which the speed is told.
    """

    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    text: str = "offline"
    budgets: tuple[float, ...] = (0.2, 0.1, 0.05)
    samples: int = 16
    aside: int = 4
    sample_len: int = 512
    answer_tokens: int = 48
    timed_steps: int = 16

    @classmethod
    def of(cls, path: str, cases: int, seed: int) -> DemoSettings:
        """Return the settings for a model."""
        is_bundled = Path(path).resolve() == BUNDLED
        evaluation = EvaluationSettings(
            tasks=(NEEDLES, PERPLEXITY),
            tokens=(768,),
            cases=cases,
            protocols=(CONTEXT_FIRST,),
            seeds=(seed,),
            wording="lines" if is_bundled else "ruler",  # the bundled model has learnt no other
            texts=3,
            text_tokens=(768,),
            max_new_tokens=12,
        )
        return cls(evaluation, RECORDS if is_bundled else "offline")

    @property
    def seed(self) -> int:
        return self.evaluation.seeds[0]

    @property
    def source(self) -> TextSource:
        """Return the text that is calibrated on."""
        return mixed_source(200) if self.text == RECORDS else open_source(self.text)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that decides the figures, as JSON-ready values."""
        return self.evaluation.to_dict() | {"demo": {k: v for k, v in vars(self).items() if k != "evaluation"}}
