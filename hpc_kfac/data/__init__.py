"""Readers, loaders, samplers."""
