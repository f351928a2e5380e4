"""`python -m benchmarks.speed`."""

import os
import sys

if os.environ.get("TRITON_INTERPRET") == "1":  # a rehearsal
    from tests.interpreter import mend_interpreter

    mend_interpreter()

from benchmarks.speed.run import main

if __name__ == "__main__":
    sys.exit(main())
