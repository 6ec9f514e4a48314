"""Numerics on plain tensors: structured symmetric matrices, packed triangles, damped solves."""
