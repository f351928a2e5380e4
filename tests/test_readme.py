from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import cskv
from cskv.compression.initialise import initialise
from tests.cli.support import save_llama

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_committed_results_name_no_folder_of_a_machine() -> None:
    for path in (*ROOT.glob("docs/results/*.json"), *ROOT.glob("benchmarks/results/*.json")):
        absolute = re.findall(r'"(/[^"]*/[^"]*|[A-Z]:\\\\[^"]*)"', path.read_text(encoding="utf-8"))
        assert absolute == [], path.name


def test_the_readmes_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_llama(tmp_path / "base", seed=0)
    config = cskv.CSKVConfig(k_density=0.5, v_density=0.5, window=8, group=4, init="svd")
    initialise(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = block.replace("models/smollm2", str(base)).replace("outputs/demo/adapters/20", str(tmp_path / "adapter"))
    assert code.count(str(tmp_path)) == 3
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def main():")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_option_in_the_documents_exists() -> None:
    """`--option` in a shell block of the documents belongs to the command that it stands behind."""
    from typer.testing import CliRunner

    from cskv.cli.app import app

    used: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                call = re.search(r"\bcskv(?:\.cli)? +([a-z-]+)(.*)", line)
                if call and call[1] != "lm-eval":  # whose options are another package's: tests/harness/test_command.py
                    used.setdefault(call[1], set()).update(re.findall(r"--[a-zA-Z_-]+", call[2].split("#")[0]))
    assert {"calibrate", "train", "generate"} <= set(used)
    for command, options in used.items():
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        assert {option for option in options if option.replace("_", "-") not in shown} == set(), command
