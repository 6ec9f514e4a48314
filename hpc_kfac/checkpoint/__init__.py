"""Checkpoints: sets of HDF5 files that lose nothing and that can be checked before they are believed."""

from hpc_kfac.checkpoint.files import BrokenCheckpoint
from hpc_kfac.checkpoint.library import load, put_back, save, serve
from hpc_kfac.checkpoint.reading import Saved, find, newest, open_set
from hpc_kfac.checkpoint.writer import Checkpointing, Checkpoints

__all__ = [
    "BrokenCheckpoint",
    "Checkpointing",
    "Checkpoints",
    "Saved",
    "find",
    "load",
    "newest",
    "open_set",
    "put_back",
    "save",
    "serve",
]
