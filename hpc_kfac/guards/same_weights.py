"""Whether all ranks still have the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hpc_kfac.distributed.communicator import Communicator

CHUNK = 1 << 20
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsDiffer(RuntimeError):
    """The weights of some ranks have drifted apart."""


def fingerprint(tensor: Tensor) -> Tensor:
    """A number that changes with any bit of the tensor and with the order of its elements, int64."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        piece = bits[start : start + CHUNK].to(torch.int64)
        odd = torch.arange(start, start + piece.numel(), device=tensor.device).mul_(2).add_(1)
        total = total * 1_000_003 + (piece * odd).sum()  # modulo 2^64
    return total


DRIFTED = (
    "the weights have drifted apart",
    "look for ranks with other data types, libraries or hardware, for weights that one rank alone changes, and for"
    " all_local decompositions on unlike machines",
)
STARTED = (
    "the ranks start from different weights",
    "give all ranks rank 0's before the first step: hvd.broadcast_parameters(model.state_dict(), root_rank=0) with"
    " Horovod, DistributedDataParallel does it by itself; or make the model after torch.manual_seed(0) on all ranks",
)


def check_weights(
    parameters: Mapping[str, nn.Parameter], comm: Communicator, step: int, told: tuple[str, str] = DRIFTED
) -> None:
    """Compares this rank's weights with rank 0's. Collective; two messages of a number a parameter and one a rank.

    Args:
        parameters: by name.
        comm: the ranks.
        step: of the training.
        told: what a difference means, and its mend.

    Raises:
        WeightsDiffer: on all ranks, naming the first parameter that differs and the ranks where it does.
    """
    names = list(parameters)
    own = torch.stack([fingerprint(parameter) for parameter in parameters.values()]).cpu()
    reference = own.clone()
    comm.broadcast(reference, 0, "hash", "weight hashes").wait()
    differing = (own != reference).nonzero().flatten().tolist()
    first = torch.tensor([differing[0] if differing else len(names)])
    found, work = comm.allgather(first, "hash", "weight hashes")
    work.wait()
    worst = int(found.min())
    if worst < len(names):
        ranks = listed(rank for rank, value in enumerate(found.flatten().tolist()) if value == worst)
        raise WeightsDiffer(
            f"step {step}: {told[0]}: {names[worst]} on rank(s) {ranks} differs from rank 0's; {told[1]}"
        )


def listed(ranks: Iterable[int]) -> str:
    """Ranks in words, eight at most by number."""
    listed = [str(rank) for rank in ranks]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
