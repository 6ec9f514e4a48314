"""`python -m hpc_kfac` is the `hpc-kfac` command."""

from __future__ import annotations

import sys

from hpc_kfac.cli import main

if __name__ == "__main__":
    sys.exit(main())
