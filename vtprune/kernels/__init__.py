"""Tensor operations that score, select, move and merge tokens: one file, one function each.

Each has a form in torch and a Triton kernel; ``use`` says which one runs, ``stats`` which one ran.
"""

from vtprune.kernels._dispatch import Backend, reset_stats, stats, use

__all__ = ["Backend", "reset_stats", "stats", "use"]
