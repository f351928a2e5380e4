from __future__ import annotations

import json
from datetime import UTC, datetime

import torch
import transformers

from cskv.evaluation.environment import cpu_name, environment


def test_versions_and_date_are_those_of_this_process():
    values = json.loads(json.dumps(environment().to_dict()))
    assert values["torch"] == torch.__version__
    assert values["transformers"] == transformers.__version__
    assert values["threads"] == torch.get_num_threads()
    assert values["cores"] >= 1
    assert abs((datetime.now(UTC) - datetime.fromisoformat(values["date"])).total_seconds()) < 60


def test_the_processor_is_named_as_linux_names_it(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: Other\n")
    assert cpu_name(cpuinfo) == "Example CPU @ 2 GHz"


def test_a_processor_is_always_named(tmp_path):
    assert cpu_name(tmp_path / "absent")
