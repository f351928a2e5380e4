"""The settings of a compressed cache: one frozen, validated dataclass, saved as JSON."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

from cskv.errors import ConfigError

INITS = ("svd", "asvd", "pca", "weighted-pca", "fisher-pca")
KEY_FACTORS = ("joint", "commuting")
BITS = (2, 3, 4, 5, 6, 7, 8, 16)
BLOCK_CHANNELS = 32  # of a block within one token, as in KIVI
MIXED_CHANNELS = 4  # of a block over a group of tokens, where neighbours vary alike: docs/quantisation.md


@dataclass(frozen=True)
class CSKVConfig:
    """Settings of a compressed KV cache (CSKV, arXiv 2409.10593, sections 3.1 to 3.3).

    Attributes:
        k_density: share of the key channels kept as latents, in (0, 1]. The rank is `round(k_density * kv_dim)`.
        v_density: the same for values.
        window: tokens, at least 0. The newest `window` tokens are always read exactly.
        group: tokens, at least 1. Tokens leave the window in groups of this many ("sealing"), so that the window holds
            between `window` and `window + group - 1` tokens when a forward begins. The paper's `--use_window
            --q_window_size g` is `window=0, group=g`; without `--use_window` it is `window=0, group=1`.
        sinks: tokens, at least 0. The first `sinks` real tokens of every sequence are never sealed: nearly every head
            of a language model looks at them (attention sinks, arXiv 2309.17453). The paper has 0.
        init: how the factors are made: "fisher-pca", the closed form of what errors cost the predictions;
            "weighted-pca", that of the training objective with keys weighted by queries and values by the output
            projection; "pca", without the weights; "svd" and "asvd" (activation-aware) of the paper. All but "svd" need
            calibration statistics, and "fisher-pca" Fisher information in them.
        asvd_alpha: the exponent of ASVD's channel scale, s = (mean|x| + eps)^alpha (arXiv 2312.05821, equation 5).
        key_factors: "joint" mixes all key channels before RoPE; "commuting" mixes kv heads within each RoPE frequency,
            so that latents are kept rotated and nothing is rotated at decode. It is one of the PCA inits.
        head_groups: groups of kv heads with factors of their own, at least 1: cheaper to rebuild, less accurate.
        k_bits, v_bits: bits per latent, 2 to 8, or 16: latents stay in the model's own dtype.
        mixed_widths: every latent channel has a width of its own, chosen under a budget of bytes (`compression`); the
            adapter holds them, and `k_bits` and `v_bits` stay 16.
        k_block, v_block: (tokens, channels) of the blocks that share a minimum and a scale (`cskv.quantization.grid`).
            The tokens divide `group`. None is KIVI's layout: keys (group, 1), values (1, 32). Where widths
            are mixed it is (group, 4) for both, and with groups of one token (1, 32) for both.

    Raises:
        ConfigError: a value is out of range.
    """

    k_density: float = 0.2
    v_density: float = 0.2
    window: int = 32
    group: int = 32
    sinks: int = 4
    init: str = "fisher-pca"
    asvd_alpha: float = 0.5
    key_factors: str = "joint"
    head_groups: int = 1
    k_bits: int = 16
    v_bits: int = 16
    mixed_widths: bool = False
    k_block: tuple[int, int] | None = None
    v_block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("k_density", "v_density"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 < value <= 1.0:
                raise ConfigError(f"{name} is {value!r}; expected a share of kv_dim in (0, 1], for instance 0.2")
        for name, least, unit in (
            ("window", 0, "tokens"),
            ("group", 1, "tokens"),
            ("sinks", 0, "tokens"),
            ("head_groups", 1, "head groups"),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of {unit}, at least {least}")
        for name, choices in (("init", INITS), ("key_factors", KEY_FACTORS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.key_factors == "commuting" and ("pca" not in self.init or self.head_groups > 1):
            raise ConfigError(
                f"commuting key factors are principal components over all kv heads; init {self.init!r} and head_groups "
                f"{self.head_groups} do not go with them: expected 'fisher-pca', 'weighted-pca' or 'pca', and 1"
            )
        if not is_number(self.asvd_alpha) or not 0.0 <= self.asvd_alpha <= 1.0:
            raise ConfigError(f"asvd_alpha is {self.asvd_alpha!r}; expected a number in [0, 1], the paper's is 0.5")
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            if type(value) is not int or value not in BITS:
                raise ConfigError(f"{name} is {value!r}; expected 2 to 8, or 16 for latents that are not quantised")
        if not isinstance(self.mixed_widths, bool):
            raise ConfigError(f"mixed_widths is {self.mixed_widths!r}; expected true or false")
        if self.mixed_widths and (self.k_bits, self.v_bits) != (16, 16):
            raise ConfigError(
                f"k_bits {self.k_bits} and v_bits {self.v_bits} are one width for all, mixed_widths one for every "
                "channel: give one of them"
            )
        for name in ("k_block", "v_block"):
            self._check_block(name, getattr(self, name))

    def _check_block(self, name: str, value: object) -> None:
        if value is None:
            return
        sizes = tuple(value) if isinstance(value, (list, tuple)) else ()
        if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
            raise ConfigError(f"{name} is {value!r}; expected two whole numbers (tokens, channels), at least 1")
        if self.group % sizes[0]:
            raise ConfigError(f"{name} has {sizes[0]} tokens, which do not divide the group of {self.group}")
        object.__setattr__(self, name, sizes)  # JSON gives lists

    @property
    def is_quantised(self) -> bool:
        """Return whether any latents are stored in fewer than 16 bits."""
        return self.mixed_widths or min(self.k_bits, self.v_bits) < 16

    def block(self, kind: str) -> tuple[int, int]:
        """Return (tokens, channels) of the blocks of key ("k") or value ("v") latents."""
        chosen = self.k_block if kind == "k" else self.v_block
        if chosen is not None:
            return chosen
        if self.group == 1:
            return 1, BLOCK_CHANNELS
        if self.mixed_widths:
            return self.group, MIXED_CHANNELS
        return (self.group, 1) if kind == "k" else (1, BLOCK_CHANNELS)

    def bits(self, kind: str) -> int:
        """Return the bits per latent of keys ("k") or values ("v"); 16 is not quantised."""
        return self.k_bits if kind == "k" else self.v_bits

    def k_rank(self, kv_dim: int) -> int:
        """Return the number of key latents per token for a projection with `kv_dim` output channels."""
        return density_to_rank(self.k_density, kv_dim, "k_density", self.head_groups)

    def v_rank(self, kv_dim: int) -> int:
        """Return the number of value latents per token for a projection with `kv_dim` output channels."""
        return density_to_rank(self.v_density, kv_dim, "v_density", self.head_groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CSKVConfig:
        """Read what `to_dict` gives. Keys that this version does not know are dropped with a warning.

        Settings that name no `sinks` are older than these: they have 0.

        Raises:
            ConfigError: these are no settings, or one is out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"got {type(values).__name__} in place of settings; expected a JSON object of them")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(f"ignoring unknown CSKV settings {unknown}: written by a newer cskv?", stacklevel=2)
        return cls(**{"sinks": 0} | {key: value for key, value in values.items() if key in known})


def density_to_rank(density: float, kv_dim: int, name: str = "density", groups: int = 1) -> int:
    """Return `density * kv_dim` rounded to the nearest whole rank (halves up), or multiple of the head groups.

    Raises:
        ConfigError: the rank rounds to 0.
    """
    rank = math.floor(density * kv_dim / groups + 0.5) * groups
    if rank < 1:
        raise ConfigError(
            f"{name} {density} of kv_dim {kv_dim} rounds to rank 0; "
            f"give at least {groups / kv_dim:.4g} to keep one channel{' per head group' if groups > 1 else ''}"
        )
    return rank


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
