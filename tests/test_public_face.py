"""`import cskv` gives the names of the README's flow, imports nothing heavy, and makes transformers know adapters."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cskv

VERBS = ("calibrate", "initialise", "train", "attach", "detach", "cache_report", "CSKVAdapter", "CSKVConfig")


def python(code: str) -> str:
    """Standard output of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_documented() -> None:
    assert set(VERBS) <= set(cskv.__all__)
    assert set(cskv.__all__) <= set(dir(cskv))
    for name in cskv.__all__:
        assert getattr(cskv, name).__doc__, name
    assert callable(cskv.attach)
    assert callable(cskv.calibrate)
    assert cskv.__version__[0].isdigit()


def test_type_checkers_see_the_names_that_there_are() -> None:
    (block,) = (node for node in ast.parse(Path(cskv.__file__).read_text("utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(seen) == sorted(cskv.__all__)
    for name, module in seen.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(cskv, name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        _ = cskv.compress


def test_importing_imports_nothing_heavy() -> None:
    code = "import sys, cskv; cskv.CSKVConfig(); print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert python(code) == "[]\n"


@pytest.mark.parametrize("cskv_first", [True, False])
def test_transformers_knows_adapters_in_either_order(cskv_first: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "cskv", "format_version": 99}')
    auto = "from transformers import AutoConfig, AutoModelForCausalLM"
    code = f"""{"" if cskv_first else auto}
import cskv, inspect, sys
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print("transformers.models.auto.modeling_auto" in sys.modules)
{auto}
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except cskv.AdapterError as error:
    print(error)
assert "class AutoModelForCausalLM" in inspect.getsource(inspect.getmodule(AutoModelForCausalLM))
"""
    name, loaded, message = python(code).splitlines()
    assert (name, loaded) == ("CSKVAdapterConfig", str(not cskv_first))
    assert "has adapter format 99" in message
