"""`python -m cskv.harness ARGS...`: the same as `cskv lm-eval ARGS...`, for `accelerate launch -m cskv.harness`."""

from __future__ import annotations

import sys

from cskv.errors import CSKVError
from cskv.harness import run

if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except CSKVError as error:  # one line, like the command's
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
