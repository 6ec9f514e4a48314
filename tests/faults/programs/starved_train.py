"""hpc-kfac, the files of some checkpoints of which cannot grow. All the rest is the real thing.

The variable STARVED says, as JSON, on which ranks the how-manieth checkpoint finds no space: {"2": [0, 1], "3": [1]}.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from hpc_kfac import cli
from hpc_kfac.checkpoint import Checkpoints
from hpc_kfac.cluster.ranks import alone

STARVED: dict[str, list[int]] = json.loads(os.environ["STARVED"])
SPACE = 4096  # more than metrics.jsonl gets, less than any file of a checkpoint
number = 0
save = Checkpoints.save


def save_in_little_space(checkpoints: Checkpoints, *words: Any) -> None:
    global number
    number += 1
    starved = alone().rank in STARVED.get(str(number), [])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SPACE if starved else hard, hard))
    save(checkpoints, *words)


Checkpoints.save = save_in_little_space  # type: ignore[method-assign]
try:
    sys.exit(cli.main())
finally:  # what the process writes at its exit is not the run's
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
