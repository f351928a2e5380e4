"""The command line, one file per subcommand. Everything heavy is imported inside the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `cskv`."""
    try:
        from cskv.cli.app import app

        app()
    except KeyboardInterrupt:  # before there is a command that could say more
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
