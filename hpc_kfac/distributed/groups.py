"""The communicators of a placement, split once."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_kfac.distributed.communicator import Communicator
from hpc_kfac.distributed.placement import Assignment


class Groups:
    """Communicators by the ranks that they join: all trainers, grad workers, receivers, trainers with one helper.

    Args:
        comm: all ranks. Collective.
        assignment: the placement.

    Attributes:
        everyone: all ranks, helpers included.
        trainers: all ranks but the helpers; on a helper, the helpers.
        helpers: the trainers together with one helper each: all of these on a trainer, its own on a helper.
    """

    def __init__(self, comm: Communicator, assignment: Assignment) -> None:
        self.everyone = self.trainers = comm
        ranks, workers = range(assignment.trainers), assignment.workers
        helps = comm.rank not in ranks
        self.helpers: list[Communicator] = []
        self._made: list[Communicator] = []
        found: dict[tuple[int, ...], Communicator] = {}
        if assignment.helpers:
            self.trainers = self._split(comm, int(helps))
            for helper in range(assignment.trainers, assignment.ranks):
                inside = not helps or comm.rank == helper
                joint = self._split(comm, 0 if inside else 1)
                if inside:
                    found[*ranks, helper] = joint
                    self.helpers.append(joint)
        if not helps:
            found[tuple(ranks)] = self.trainers
            for members, color in (
                (assignment.members(assignment.group(comm.rank)), comm.rank // workers),
                (assignment.receivers(comm.rank), comm.rank % workers),
            ):
                group = self._split(self.trainers, color)
                found.setdefault(tuple(members), group)
        self._by_ranks = found

    def of(self, ranks: Sequence[int]) -> Communicator:
        """The communicator of just these ranks."""
        return self._by_ranks[tuple(ranks)]

    def free(self) -> None:
        """Frees what was split. Collective, over all ranks."""
        for comm in reversed(self._made):
            comm.free()

    def _split(self, comm: Communicator, color: int) -> Communicator:
        self._made.append(comm.split(color))
        return self._made[-1]
