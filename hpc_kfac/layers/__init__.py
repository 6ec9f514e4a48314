"""Capture: what the modules of a model hand over for curvature statistics."""
