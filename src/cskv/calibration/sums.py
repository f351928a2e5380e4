"""Running sums of named quantities of every layer, from which means are taken; kept on disk while a pass is under way.

Sums are fp64, so that bf16 models and millions of tokens lose nothing. Second moments are products in fp32, one forward
at a time, of values from which the first forward's mean is taken off: a large mean would otherwise drown small
variances in rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cskv.files import tensors_writer, write_atomically

FORMAT = "cskv-calibration-sums-1"
KINDS = ("k", "v", "key")


class Sums:
    """Sums by layer and name, on the layers' devices, each with the number of tokens that it is a sum over.

    Args:
        sinks: tokens at the start of every sample that are left out.
    """

    def __init__(self, sinks: int = 0) -> None:
        self.sinks = sinks
        self._sums: dict[tuple[int, str], tuple[Tensor, int]] = {}
        self._shifts: dict[tuple[int, str], Tensor] = {}

    def add(self, layer_idx: int, name: str, total: Tensor, tokens: int) -> None:
        """Add a sum over so many tokens."""
        before, count = self._sums.get((layer_idx, name), (torch.zeros((), dtype=torch.float64), 0))
        self._sums[layer_idx, name] = before.to(total.device) + total.double(), count + tokens

    def add_input(self, layer_idx: int, x: Tensor) -> None:
        """Add |x| and x of a layer's input, (batch, tokens, hidden)."""
        flat = self._rows(x)
        self.add(layer_idx, "input.mean_abs", flat.abs().sum(0, dtype=torch.float64), flat.shape[0])
        self.add(layer_idx, "input.mean", flat.sum(0, dtype=torch.float64), flat.shape[0])

    def add_output(self, layer_idx: int, kind: str, y: Tensor) -> None:
        """Add y and y y^T of a projection's output, or of normalised keys, (batch, tokens, kv_dim)."""
        flat = self._shifted(layer_idx, kind, self._rows(y))
        self.add(layer_idx, f"{kind}.mean", flat.sum(0, dtype=torch.float64), flat.shape[0])
        self.add(layer_idx, f"{kind}.moment", flat.T @ flat, flat.shape[0])

    def add_energy(self, layer_idx: int, queries: Tensor, kv_dim: int) -> None:
        """Add q^2, summed over the query heads of each kv head, of queries (batch, heads, tokens, head_dim)."""
        head_dim, queries = queries.shape[-1], queries[:, :, self.sinks :]
        energy = queries.float().square().sum((0, 2), dtype=torch.float64)
        per_kv_head = energy.unflatten(0, (kv_dim // head_dim, -1)).sum(1)
        self.add(layer_idx, "query.energy", per_kv_head.flatten(), queries.shape[0] * queries.shape[2])

    def add_gradient(self, layer_idx: int, kind: str, y: Tensor, gradient: Tensor) -> None:
        """Add what the gradients of one draw of labels say about errors in y; see `cskv.calibration.fisher`.

        Args:
            layer_idx, kind: which keys or values.
            y, gradient: (batch, tokens, kv_dim), of whole samples.
        """
        for own, of_own in zip(y.detach()[:, self.sinks :], gradient[:, self.sinks :].float(), strict=True):
            with_one = torch.nn.functional.pad(self._shifted(layer_idx, kind, own), (0, 1), value=1.0)
            total = of_own.T @ with_one  # sum over tokens of g (y, 1)^T
            self.add(layer_idx, f"{kind}.fisher", of_own.T @ of_own, y.shape[1])
            self.add(layer_idx, f"{kind}.coherent", total.T @ total, y.shape[1])

    def means(self) -> dict[int, dict[str, Tensor]]:
        """Return the means over tokens, fp64 on the CPU, under the names of `cskv.calibration.statistics`."""
        means: dict[int, dict[str, Tensor]] = {}
        for (layer_idx, name), (total, count) in sorted(self._sums.items()):
            means.setdefault(layer_idx, {})[name] = (total / max(count, 1)).cpu()
        for (layer_idx, kind), shift in self._shifts.items():
            layer, shift = means[layer_idx], shift.double().cpu()
            if (coherent := layer.pop(f"{kind}.coherent", None)) is not None:
                weight = coherent[-1, -1].clamp(min=torch.finfo(torch.float64).tiny)
                layer[f"{kind}.coherent_mean"] = coherent[:-1, -1] / weight
                layer[f"{kind}.coherent_moment"] = coherent[:-1, :-1] / weight
            for mean, moment in (
                (f"{kind}.mean", f"{kind}.moment"),
                (f"{kind}.coherent_mean", f"{kind}.coherent_moment"),
            ):
                if mean in layer:
                    mixed = torch.outer(layer[mean], shift)
                    layer[moment] = layer[moment] + mixed + mixed.T + torch.outer(shift, shift)
                    layer[mean] = layer[mean] + shift
        return means

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the sums, atomically, with facts that say what they are of."""
        tensors = {f"sum.{i}.{name}": total for (i, name), (total, _) in self._sums.items()}
        tensors |= {f"shift.{i}.{kind}": shift for (i, kind), shift in self._shifts.items()}
        counts = {f"{i}.{name}": count for (i, name), (_, count) in self._sums.items()}
        metadata = {"format": FORMAT, "facts": json.dumps(dict(facts), sort_keys=True), "counts": json.dumps(counts)}
        write_atomically(path, tensors_writer(tensors, metadata))

    @classmethod
    def load(cls, path: Path, sinks: int) -> tuple[Sums, dict[str, Any]] | None:
        """Read what `save` wrote, with its facts; None where there is nothing that can be gone on with."""
        sums = cls(sinks)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    return None
                counts = json.loads(metadata["counts"])
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    what, index, name = key.split(".", 2)
                    tensor = file.get_tensor(key)
                    if what == "shift":
                        sums._shifts[int(index), name] = tensor
                    else:
                        sums._sums[int(index), name] = tensor, counts[f"{index}.{name}"]
                return sums, json.loads(metadata["facts"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach()[:, self.sinks :].flatten(0, -2)

    def _shifted(self, layer_idx: int, kind: str, rows: Tensor) -> Tensor:
        rows = rows.float()
        if (layer_idx, kind) not in self._shifts:
            self._shifts[layer_idx, kind] = rows.mean(0)
        shift = self._shifts[layer_idx, kind] = self._shifts[layer_idx, kind].to(rows.device)
        return rows - shift
