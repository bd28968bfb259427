"""Triton kernels, a file per operation; each is imported when it is first launched."""
