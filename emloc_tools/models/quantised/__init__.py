"""Quantised checkpoints read as full-precision ones, tensor by tensor; `methods` says which."""
