"""Entry point of the command line, which needs the extra ``eval``."""

from __future__ import annotations

import os
import sys

from vtprune.eval._extras import need

NEEDED = ("typer", "rich", "matplotlib", "sklearn")


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    try:
        several = os.environ.get("WORLD_SIZE", "1") != "1"  # which the command line refuses
        if (
            sys.argv[1:] == ["doctor"] and not several
        ):  # it has to work where the other commands do not
            need("rich", extra="eval")
            from vtprune.eval import doctor

            sys.exit(int(doctor.run()))
        for module in NEEDED:
            need(module, extra="eval")
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    from vtprune.eval.cli import app

    app(prog_name="vtprune")


if __name__ == "__main__":
    main()
