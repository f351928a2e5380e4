"""`python -m cskv.harness ARGS...`: the same as `cskv lm-eval ARGS...`, for `accelerate launch -m cskv.harness`."""

from __future__ import annotations

import sys

from cskv.errors import CSKVError
from cskv.harness import run


def main() -> None:
    """Run the harness; a mistake is one line and exit code 2."""
    try:
        run(sys.argv[1:])
    except CSKVError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
