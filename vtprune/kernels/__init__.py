"""Tensor operations that score, select, move and merge tokens: one file, one function each."""
