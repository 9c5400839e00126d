"""Tensors in, named unweighted terms out; no network runs in here, and the weights live in run files."""
