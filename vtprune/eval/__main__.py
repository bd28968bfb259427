"""``python -m vtprune.eval``: the command line, for launchers of several processes."""

from __future__ import annotations

from vtprune.__main__ import main

if __name__ == "__main__":
    main()
