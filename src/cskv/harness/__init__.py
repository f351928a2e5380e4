"""lm-evaluation-harness on the compressed cache: the model `cskv`, and the harness's command line with it.

    cskv lm-eval run --model cskv --model_args adapter=my-adapter --tasks hellaswag

The harness looks models up in a registry that only its own package fills: it has no entry points, and takes no
"module:Class". So something has to import `cskv.harness.model` before it starts, which is what `run` does. From Python
that import is all that is needed. The harness itself (`pip install 'cskv[lm-eval]'`) is imported on use only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from cskv.adapter.folder import is_adapter
from cskv.errors import AdapterError, CSKVError

MODEL = "cskv"


def run(args: Sequence[str]) -> None:
    """Run the harness's own command line, with the model `cskv` known to it. It exits as it always does.

    Args:
        args: as for `lm-eval`.

    Raises:
        CSKVError: the harness is not installed, or an adapter is given to a model that would not read it compressed.
    """
    if find_spec("lm_eval") is None:
        raise CSKVError("lm-evaluation-harness is not installed: pip install 'cskv[lm-eval]'")
    import cskv.harness.model  # noqa: F401 (the harness knows the model from here on)

    for path in re.findall(r"pretrained=([^,\s]+)", " ".join(args)):
        if is_adapter(path):
            raise AdapterError(
                f"pretrained={path} is an adapter, which the harness's own models would score without the compressed "
                f"cache; give --model {MODEL} --model_args adapter={path}"
            )
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
