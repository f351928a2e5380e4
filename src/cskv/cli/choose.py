"""Which compressor a command means: an explicit folder, one under a root named by its settings, or one made now."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.cli.settings import adapter_name, block_of, init_of, model_name, statistics_path, window_and_group
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.adapter.adapter import CSKVAdapter


def settings_from(
    *,
    init: str | None,
    use_asvd: bool | None,
    use_window: bool | None,
    q_window_size: int,
    window: int | None,
    group: int | None,
    k_block: str | None,
    v_block: str | None,
    **others: Any,
) -> CSKVConfig:
    """The settings that the options name; `others` are those that options and settings call alike.

    Raises:
        ConfigError: one is out of range, or something was given in two ways.
    """
    exact, sealed = window_and_group(use_window, q_window_size, window, group)
    return CSKVConfig(
        window=exact,
        group=sealed,
        init=init_of(init, use_asvd),
        k_block=block_of("--k-block", k_block),
        v_block=block_of("--v-block", v_block),
        **others,
    )


def widths_of(own: CSKVConfig, wanted: CSKVConfig, window_given: bool) -> CSKVConfig:
    """An adapter's own settings with other widths and blocks, and another window where one was given.

    Raises:
        ConfigError: the blocks do not go with the window.
    """
    names = ["k_bits", "v_bits", "k_block", "v_block", *(("window", "group") if window_given else ())]
    return dataclasses.replace(own, **{name: getattr(wanted, name) for name in names})


@dataclass(frozen=True)
class AdapterChoice:
    """What the options of `cskv generate` say on the compressor.

    Attributes:
        model_path: the base model, or an adapter folder; None where the adapter names its base.
        model_id: the name in folder names; None for the path's last part.
        adapter: an explicit folder or hub id.
        origin: no compressor at all.
        init_only: untrained factors.
        settings: the compression and window options together.
        window_given: whether any window option was given, so that it replaces an explicit adapter's.
        root, calibration_root: folders of adapters and statistics by model id.
        statistics: an explicit file of statistics.
    """

    model_path: str | None
    model_id: str | None
    adapter: str | None
    origin: bool
    init_only: bool
    settings: CSKVConfig
    window_given: bool
    root: Path
    statistics: Path | None
    calibration_root: Path

    def find(self) -> tuple[CSKVAdapter | None, str]:
        """The adapter, or None where there is none to load, and the path of the base model.

        Raises:
            CSKVError: the options contradict each other, or nothing is found.
        """
        from cskv.adapter.adapter import CSKVAdapter

        if self.adapter is not None and (self.origin or self.init_only):
            raise CSKVError("give --adapter, --use-init-params or --use-origin-model, not two of them")
        if self.origin or self.init_only:
            return None, self._needed_model_path()
        explicit = self.adapter or (self.model_path if self._model_path_is_adapter() else None)
        adapter = CSKVAdapter.from_pretrained(explicit or self._folder_under_root())
        if explicit and self.window_given:
            adapter = adapter.with_settings(window=self.settings.window, group=self.settings.group)
        base = adapter.base.name if self.model_path is None or explicit == self.model_path else self.model_path
        if not base:
            raise AdapterError("the adapter does not name its base model; give it with --model-path")
        return adapter, base

    def initial(self, model: PreTrainedModel, base: str) -> CSKVAdapter:
        """Untrained factors of a loaded model, with the statistics of its calibration where ASVD needs them."""
        from cskv.cli.initial import initial_adapter

        name = model_name(base, self.model_id)
        return initial_adapter(model, self.settings, self.statistics or statistics_path(self.calibration_root, name))

    def _needed_model_path(self) -> str:
        if self.model_path is None:
            raise CSKVError("give the base model with --model-path")
        return self.model_path

    def _model_path_is_adapter(self) -> bool:
        from cskv.adapter.folder import read_description

        if self.model_path is None or not Path(self.model_path).is_dir():
            return False
        try:
            read_description(self.model_path)
        except AdapterError:
            return False
        return True

    def _folder_under_root(self) -> Path:
        if self.model_path is None:
            raise CSKVError("give an adapter with --adapter, or the base model with --model-path")
        model = model_name(self.model_path, self.model_id)
        folder = self.root / model / adapter_name(self.settings)
        if not folder.is_dir():
            kept = sorted(path.name for path in (self.root / model).glob("k*") if path.is_dir())
            raise AdapterError(
                f"no adapter at {folder} (beside it: {', '.join(kept) or 'none'}); make it with "
                "`cskv train` and the same options, or give --adapter, --use-init-params or --use-origin-model"
            )
        return folder
