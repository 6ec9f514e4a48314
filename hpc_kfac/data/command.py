"""The command `hpc-kfac pack`."""

from __future__ import annotations

import argparse

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.data.images import pack_images


def pack(arguments: list[str], ranks: Ranks) -> None:
    """Packs images on rank 0. Collective.

    Raises:
        InputError: not two folders, or what is in them cannot be used.
    """
    parser = argparse.ArgumentParser("hpc-kfac pack", description="Packs folders of JPEG files into HDF5.")
    parser.add_argument("folder", metavar="FOLDER", help="holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("out", metavar="OUT", help="folder that gets train.h5 and val.h5")
    if len(arguments) != 2 and not {"-h", "--help"} & set(arguments):
        raise InputError(f"pack takes two folders, FOLDER and OUT; {len(arguments)} arguments were given")
    with ranks.only_first_speaks():
        given = parser.parse_args(arguments)
    with ranks.agreed():
        if ranks.rank == 0:
            for path in pack_images(given.folder, given.out):
                print(f"wrote {path}")
