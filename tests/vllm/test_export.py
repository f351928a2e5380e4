"""`cskv.vllm.export`: the checkpoint is the base model's files and the adapter; it is whole, or absent and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cskv
from cskv import AdapterError, ConfigError, CSKVError, UnsupportedModelError
from cskv.attachment.cache_bytes import adapter_report
from cskv.vllm.export import export
from tests.vllm.support import CONFIG, adapter_for, as_hub_cache, edit_config, files_in, save_base

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def adapter() -> cskv.CSKVAdapter:
    return adapter_for()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("pristine") / "base")


@pytest.fixture
def base(pristine: Path, tmp_path: Path) -> Path:
    """A copy of its own for tests that change it."""
    return Path(shutil.copytree(pristine, tmp_path / "base"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "served"


def refused(kind: type[CSKVError], message: str, action: Callable[[], Any], out: Path) -> None:
    """The action is refused in one line, and writes nothing."""
    before = files_in(out.parent) if out.parent.exists() else None
    with pytest.raises(kind, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert (files_in(out.parent) if out.parent.exists() else None) == before


def test_the_config_is_the_bases_but_for_two_entries(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    edit_config(base, of_a_newer_version={"a": [1e-06, "ä", False]}, rms_norm_eps=1e-05)
    report = export(adapter, base, out)
    exported, original = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (out, base))
    assert exported.pop("cskv") == {"adapter": "cskv"}
    assert exported.pop("architectures") == ["CSKVLlamaForCausalLM"] == [report.architecture]
    assert original.pop("architectures") == ["LlamaForCausalLM"]
    assert list(exported.items()) == list(original.items())


def test_a_fine_tuned_base_is_refused(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    """No model is loaded: the weights are read from its files."""
    tensors = load_file(base / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith("v_proj.weight"):
            tensor.mul_(1.1)
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    message = (
        r"key and value weights differ by \d.*; load the base model that it names, or make an adapter for this one"
    )
    refused(AdapterError, message, lambda: export(adapter, base, out), out)


def test_the_checkpoint_is_the_base_model_and_the_adapter(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    export(adapter, base, out)
    expected = {path for path in files_in(base) if not path.startswith(".")}
    assert "additional_chat_templates/tools.jinja" in expected
    assert set(files_in(out)) == expected | {"cskv/README.md", "cskv/config.json", "cskv/model.safetensors"}
    for path in expected - {"config.json"}:
        assert (out / path).read_bytes() == (base / path).read_bytes(), path
    loaded = cskv.CSKVAdapter.from_pretrained(out / "cskv")
    assert (loaded.config, loaded.base) == (adapter.config, adapter.base)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, out)]
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_are_hard_links_and_the_rest_is_not(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    report = export(adapter, base, out)
    assert (report.linked, report.copied) == ((WEIGHTS,), ())
    assert (out / WEIGHTS).stat().st_ino == (base / WEIGHTS).stat().st_ino
    assert (out / "tokenizer.json").stat().st_ino != (base / "tokenizer.json").stat().st_ino


def test_copies_are_copies(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    report = export(adapter, base, out, copy=True)
    assert (report.linked, report.copied) == ((), (WEIGHTS,))
    assert (out / WEIGHTS).stat().st_nlink == 1
    assert (out / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


def test_across_file_systems_weights_are_copied(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert export(adapter, base, out).copied == (WEIGHTS,)
    assert (out / WEIGHTS).stat().st_ino != (base / WEIGHTS).stat().st_ino


def test_the_hubs_symlinks_are_resolved(adapter: cskv.CSKVAdapter, pristine: Path, tmp_path: Path, out: Path) -> None:
    snapshot = as_hub_cache(pristine, tmp_path / "hub", "someone/model", "0" * 40)
    assert (snapshot / WEIGHTS).is_symlink()
    export(adapter, snapshot, out)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert (out / WEIGHTS).stat().st_ino == (snapshot / WEIGHTS).resolve().stat().st_ino
    shutil.rmtree(tmp_path / "hub")
    AutoModelForCausalLM.from_pretrained(out)


def test_weights_that_vllm_would_not_read_are_left_out(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    unwanted = ["pytorch_model.bin", "a.pt", "b.pth", "consolidated.safetensors", "checkpoint-500/model.safetensors"]
    (base / "checkpoint-500").mkdir()
    for path in unwanted:
        (base / path).write_bytes(b"")
    (base / "params.json").write_text("{}")
    report = export(adapter, base, out)
    assert sorted(report.left_out) == sorted(unwanted)
    assert not set(unwanted) & set(files_in(out))
    assert report.linked == (WEIGHTS,)


def shard(base: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="40KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


def test_shards_are_what_their_index_names(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    shards = shard(base)
    (base / "left-over.safetensors").write_bytes(b"")
    report = export(adapter, base, out)
    assert (report.linked, report.left_out) == (tuple(shards), ("left-over.safetensors",))
    AutoModelForCausalLM.from_pretrained(out)


def test_incomplete_weights_are_refused(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    shards = shard(base)
    (base / shards[1]).unlink()
    message = rf"lacks 1 of the {len(shards)} weight files .* {shards[1]}; copy or download"
    refused(CSKVError, message, lambda: export(adapter, base, out), out)
    (base / "model.safetensors.index.json").write_text("{}")
    refused(CSKVError, r"cannot read .*index\.json", lambda: export(adapter, base, out), out)


def test_pickled_weights_alone_are_refused(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    (base / WEIGHTS).rename(base / "pytorch_model.bin")
    refused(CSKVError, r"no weights as \*\.safetensors .*save_pretrained", lambda: export(adapter, base, out), out)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_the_last_file_leaves_nothing(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    real, copied = shutil.copyfile, []

    def copyfile(source: Path, target: Path) -> None:
        real(source, target)
        copied.append(target)
        if source.name == "tokenizer.json":
            raise failure

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CSKVError) as caught:
        export(adapter, base, out, copy=True)
    assert len(copied) > 2
    assert isinstance(failure, KeyboardInterrupt) or "No space left on device" in str(caught.value)
    assert list(out.parent.iterdir()) == []
    assert (base / WEIGHTS).stat().st_size > 0


def test_an_export_is_replaced_only_when_asked(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(adapter, base, out, window=16)
    (out / "stale.txt").write_text("")
    refused(CSKVError, "is not empty; .* --overwrite", lambda: export(adapter, base, out), out)

    with monkeypatch.context() as patch:
        patch.setattr(cskv.CSKVAdapter, "save_pretrained", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(adapter, base, out, overwrite=True)
    assert cskv.CSKVAdapter.from_pretrained(out / "cskv").config.window == 16

    export(adapter, base, out, overwrite=True)
    assert not (out / "stale.txt").exists()
    assert cskv.CSKVAdapter.from_pretrained(out / "cskv").config.window == CONFIG.window
    assert list(out.parent.iterdir()) == [out]
    assert (base / WEIGHTS).stat().st_size > 0


def test_overwriting_never_deletes_what_is_no_export(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("")
    message = "holds something other than an earlier export"
    refused(CSKVError, message, lambda: export(adapter, base, out, overwrite=True), out)
    shutil.copy(base / "config.json", out)
    refused(CSKVError, message, lambda: export(adapter, base, out, overwrite=True), out)


def test_an_empty_folder_is_filled_also_through_a_link(adapter: cskv.CSKVAdapter, base: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(adapter, base, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("where", [".", "served", "..", "../base/../base/deep/er"])
def test_an_export_is_apart_from_its_base(adapter: cskv.CSKVAdapter, base: Path, where: str) -> None:
    before = files_in(base)
    with pytest.raises(CSKVError, match="is, lies in or holds .* choose a folder apart from it"):
        export(adapter, base, base / where, overwrite=True)
    assert files_in(base) == before


def test_a_file_is_not_replaced(adapter: cskv.CSKVAdapter, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CSKVError, match="is a file"):
        export(adapter, base, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_window_group_and_sinks_are_those_asked_for(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    report = export(adapter, base, out, window=0, group=1, sinks=0)
    loaded = cskv.CSKVAdapter.from_pretrained(out / "cskv")
    assert loaded.config == dataclasses.replace(CONFIG, window=0, group=1, sinks=0)
    assert (report.window, report.group, report.sinks, report.prefix_caching) == (0, 1, 0, True)
    assert report.to_dict()["sinks"] == 0
    assert "newest 0 to 0 tokens" in (out / "cskv" / "README.md").read_text()
    assert adapter.config == CONFIG


@pytest.mark.parametrize("changes", [{}, {"window": 0, "sinks": 0}, {"window": 0, "group": 1}, {"sinks": 3}])
def test_exact_tokens_rule_out_prefix_caching(base: Path, out: Path, changes: dict[str, Any]) -> None:
    report = export(adapter_for(), base, out, **changes)
    assert not report.prefix_caching
    assert report.sinks == changes.get("sinks", CONFIG.sinks)


def test_a_group_that_the_blocks_do_not_divide_is_refused(base: Path, out: Path) -> None:
    packed = adapter_for(config=dataclasses.replace(CONFIG, k_bits=4, k_block=(4, 2)))
    message = "k_block has 4 tokens, which do not divide the group of 6"
    refused(ConfigError, message, lambda: export(packed, base, out, group=6), out)
    refused(ConfigError, "window is -1", lambda: export(packed, base, out, window=-1), out)
    refused(ConfigError, "sinks is -1", lambda: export(packed, base, out, sinks=-1), out)
    export(packed, base, out, group=8)
    assert cskv.CSKVAdapter.from_pretrained(out / "cskv").grid(0, "k").block_tokens == 4


@pytest.mark.parametrize("changes", [{}, {"k_bits": 4, "v_bits": 3}, {"k_bits": 2, "v_bits": 8, "v_block": (4, 16)}])
@pytest.mark.parametrize("group", [4, 8])
def test_the_bytes_are_those_that_a_cache_allocates(base: Path, out: Path, changes: dict[str, Any], group: int) -> None:
    made = adapter_for(config=dataclasses.replace(CONFIG, **changes))
    report = export(made, base, out, window=0, group=group, sinks=0)
    tokens = 64
    cache = adapter_report(cskv.CSKVAdapter.from_pretrained(out / "cskv").with_settings(sinks=0), tokens)
    assert report.bytes_per_token * tokens == cache.payload_bytes + cache.scale_bytes + cache.minimum_bytes
    assert report.uncompressed_bytes_per_token * tokens == cache.uncompressed_bytes == 256 * tokens
    assert report.to_dict()["ratio"] == report.bytes_per_token / 256


@pytest.mark.parametrize(
    ("key", "named", "served"),
    [("dtype", "bfloat16", "bfloat16"), ("torch_dtype", "float16", "float16"), ("dtype", "float32", "bfloat16"),
     ("dtype", None, "bfloat16")],
)  # fmt: skip
def test_the_dtype_is_what_vllm_serves(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, key: str, named: str | None, served: str
) -> None:
    edit_config(base, "dtype")
    edit_config(base, **{key: named})
    assert export(adapter, base, out).dtype == served


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_layers 2, this model has 3"),
        ({"hidden_size": 96}, "hidden_size 64, this model has 96"),
        ({"model_type": "mistral", "sliding_window": None}, "model_type llama, this model has mistral"),
        ({"num_key_value_heads": 4}, "layer 0 k: the adapter maps 64 to 32 channels, the model 64 to 64"),
        ({"num_key_value_heads": None}, "layer 0 k: the adapter maps 64 to 32 channels, the model 64 to 64"),
        ({"head_dim": 8}, "layer 0 k: the adapter maps 64 to 32 channels, the model 64 to 16"),
        ({"model_type": "cskv"}, "is an adapter; expected the folder of its base model"),
    ],
)
def test_another_base_is_refused(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(base, **changes)
    refused(AdapterError, message, lambda: export(adapter, base, out), out)


def test_a_head_size_that_follows_from_the_others_is_understood(
    adapter: cskv.CSKVAdapter, base: Path, out: Path
) -> None:
    edit_config(base, "head_dim")
    export(adapter, base, out)


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", [7]])
def test_a_base_without_architectures_is_refused(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, named: object
) -> None:
    edit_config(base, architectures=named)
    refused(UnsupportedModelError, "names no architectures", lambda: export(adapter, base, out), out)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "has no config.json"), ("{", "cannot read"), ("[]", "holds list; expected a JSON object"),
     ('{"architectures": ["X"], "model_type": "unheard-of"}', "transformers cannot read")],
)  # fmt: skip
def test_a_base_that_cannot_be_read_is_refused(
    adapter: cskv.CSKVAdapter, base: Path, out: Path, text: str | None, message: str
) -> None:
    (base / "config.json").unlink()
    if text is not None:
        (base / "config.json").write_text(text)
    refused(CSKVError, message, lambda: export(adapter, base, out), out)


def test_an_exported_checkpoint_is_no_base(adapter: cskv.CSKVAdapter, base: Path, out: Path, tmp_path: Path) -> None:
    export(adapter, base, out)
    again = tmp_path / "again" / "served"
    message = "exported checkpoint already"
    refused(UnsupportedModelError, message, lambda: export(adapter, out, again), again)
    (base / "cskv").mkdir()
    refused(UnsupportedModelError, message, lambda: export(adapter, base, again), again)


SLIDING = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {}), ("mistral", {"sliding_window": 12}), ("qwen2", SLIDING), ("qwen3", SLIDING)],
)
def test_sliding_layers_are_refused(tmp_path: Path, out: Path, family: str, changes: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", family, **changes)
    made = adapter_for("qwen2")
    refused(UnsupportedModelError, "has layers of sliding_attention", lambda: export(made, base, out), out)


UNUSED = {"use_sliding_window": False, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("family", "removed"), [("qwen2", ()), ("qwen2", ("layer_types",)), ("qwen3", ("layer_types",))]
)
def test_a_sliding_window_that_is_not_used_is_fine(
    tmp_path: Path, out: Path, family: str, removed: tuple[str, ...]
) -> None:
    base = save_base(tmp_path / "base", family)
    edit_config(base, *removed, **UNUSED)
    export(adapter_for(family), base, out)


def test_a_mistral_without_a_window_is_fine(tmp_path: Path, out: Path) -> None:
    base = save_base(tmp_path / "base", "mistral")
    assert json.loads((base / "config.json").read_text())["sliding_window"] is None
    export(adapter_for("mistral"), base, out)


def test_an_adapter_of_some_layers_is_refused(adapter: cskv.CSKVAdapter, base: Path, out: Path) -> None:
    part = cskv.CSKVAdapter(adapter.config, {1: adapter.factors(1)}, adapter.base)
    refused(AdapterError, r"compresses layers \[1\] of 2; .* every layer", lambda: export(part, base, out), out)
