"""`python -m cskv.cli`, which is also what `torchrun -m cskv.cli train ...` starts on every process."""

from cskv.cli import main

main()
