"""The command line, one file per subcommand. Everything heavy is imported inside the commands."""

from __future__ import annotations


def main() -> None:
    """Run `cskv`."""
    from cskv.cli.app import app

    app()
