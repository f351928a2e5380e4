"""The compressor that a command means: an explicit folder, one under a root named by its settings, or one made now."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cskv.cli import options as opt
from cskv.cli.groups import CompressionOptions
from cskv.cli.initial import initial_adapter
from cskv.cli.settings import adapter_name, model_name, statistics_path
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.adapter.adapter import CSKVAdapter


@dataclass(frozen=True)
class AdapterChoice:
    """Options that choose the compressor of `cskv generate`."""

    model_path: opt.OptionalModelPath = None
    model_id: opt.ModelId = None
    adapter: Annotated[
        str | None, opt.files("--adapter", "-a", help="Adapter folder or hub id, instead of a root.")
    ] = None
    use_origin_model: Annotated[bool, opt.compression("--use-origin-model", help="The uncompressed baseline.")] = False
    use_init_params: Annotated[
        bool, opt.compression("--use-init-params", help="Untrained factors, made now; see --init.")
    ] = False
    kv_ckpt_root_path: opt.AdapterRoot = opt.DEFAULT_ADAPTER_ROOT
    asvd_calib_root: opt.CalibrationRoot = opt.DEFAULT_CALIBRATION_ROOT
    statistics: opt.Statistics = None

    def find(self, compression: CompressionOptions) -> tuple[CSKVAdapter | None, str]:
        """Return the adapter, or None where there is none to load, and the path of the base model.

        Raises:
            CSKVError: the options contradict each other, or nothing is found.
        """
        from cskv.adapter.adapter import CSKVAdapter
        from cskv.adapter.folder import is_adapter

        settings = compression.config()
        if self.adapter is not None and (self.use_origin_model or self.use_init_params):
            raise CSKVError("give --adapter, --use-init-params or --use-origin-model, not two of them")
        if self.use_origin_model or self.use_init_params:
            if self.model_path is None:
                raise CSKVError("give the base model with --model-path")
            return None, self.model_path
        explicit = self.adapter or (self.model_path if self.model_path and is_adapter(self.model_path) else None)
        adapter = CSKVAdapter.from_pretrained(os.path.expanduser(explicit) if explicit else self._folder(settings))
        if explicit:
            adapter = adapter.with_settings(**compression.exact_tokens_given(settings))
        return adapter, adapter.base.path(None if explicit == self.model_path else self.model_path)

    def initial(self, model: PreTrainedModel, base: str, settings: CSKVConfig) -> CSKVAdapter:
        """Make untrained factors of a loaded model, with the statistics of its calibration where they are needed."""
        known = statistics_path(self.statistics, self.asvd_calib_root, model_name(base, self.model_id))
        return initial_adapter(model, settings, known)

    def _folder(self, settings: CSKVConfig) -> Path:
        if self.model_path is None:
            raise CSKVError("give an adapter with --adapter, or the base model with --model-path")
        model = model_name(self.model_path, self.model_id)
        folder = self.kv_ckpt_root_path / model / adapter_name(settings)
        if not folder.is_dir():
            kept = sorted(path.name for path in (self.kv_ckpt_root_path / model).glob("k*") if path.is_dir())
            raise AdapterError(
                f"no adapter at {folder} (beside it: {', '.join(kept) or 'none'}); make it with "
                "`cskv train` and the same options, or give --adapter, --use-init-params or --use-origin-model"
            )
        return folder
