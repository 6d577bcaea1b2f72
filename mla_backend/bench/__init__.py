"""Benchmarks of our kernels beside other people's, in one process on one GPU."""
