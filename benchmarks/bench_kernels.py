"""Time of the operations in torch and as kernels: ``vtprune bench kernels`` from a clone.

It cannot be called ``kernels.py``: transformers would take that for the package ``kernels``, here
and in every other script of this folder.
"""

from __future__ import annotations

import sys

from vtprune.eval.cli import app

if __name__ == "__main__":
    app(["bench", "kernels", *sys.argv[1:]])
