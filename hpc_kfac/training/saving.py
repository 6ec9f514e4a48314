"""A run's checkpoints: when they are due, what the trainer adds to them, and the way back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from hpc_kfac.checkpoint import BrokenCheckpoint, Checkpointing, Checkpoints, Saved, open_set, put_back
from hpc_kfac.checkpoint.reading import together
from hpc_kfac.checkpoint.sets import list_sets, remove
from hpc_kfac.checkpoint.state import collect
from hpc_kfac.checkpoint.values import as_tree, from_tree
from hpc_kfac.cluster.errors import InputError, RunInterrupted, RunStopped
from hpc_kfac.cluster.lease import Lease
from hpc_kfac.distributed import Communicator, communicator
from hpc_kfac.training.loop_state import Progress
from hpc_kfac.training.run_folder import RunFolder
from hpc_kfac.training.setup import Setup
from hpc_kfac.training.stop import StopRequests

PATIENCE = 100
"""Steps that a checkpoint due by time waits at most for statistics to be averaged."""


class Saver:
    """Saves a run and puts it back.

    Args:
        setup: the parts of the run.
        folder: of the run.
        say: gets what the user should know, on rank 0.
        requests: why the run may have to stop.
        lease: on the folder, on rank 0.

    Attributes:
        prepare: called before a save, to bring the progress up to date.
    """

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        say: Callable[[str], None],
        requests: StopRequests,
        lease: Lease | None = None,
    ) -> None:
        self._setup, self._folder, self._say, self._requests, self._lease = setup, folder, say, requests, lease
        self.comm: Communicator = communicator(setup.ranks.carrier)
        self.settings: Checkpointing | None = setup.settings.parts["checkpoint"]()
        self._checkpoints: Checkpoints | None = None
        if self.settings is not None:
            self._checkpoints = Checkpoints(folder.path / "checkpoints", self.settings, self.comm, say, self._refusal)
        self._saved_at = time.monotonic()
        self._due: int | None = None
        self.prepare: Callable[[], None] = lambda: None

    @property
    def keeps_best(self) -> bool:
        """Whether the best evaluated state is to be saved."""
        return self.settings is not None and self.settings.keep_best

    # In every step

    def scalars(self) -> dict[str, float]:
        """What the ranks have to agree on in the step's scalar reduction."""
        minutes = self.settings.minutes if self.settings is not None else None
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        return {
            "interrupt": float(self._requests.wanted or self._refusal() is not None),
            "saving": float(self._checkpoints is not None and self._checkpoints.working),
            "late": float(late and self.comm.rank == 0),
        }

    def after_step(self, agreed: dict[str, float], progress: Progress) -> None:
        """Goes on with a checkpoint under way and begins one that is due. Collective.

        Raises:
            RunInterrupted: the run is to stop; it has been saved.
            RunStopped: another job has taken the folder over.
        """
        if self._checkpoints is not None:
            was_busy = self._checkpoints.busy
            self._checkpoints.advance(agreed["saving"])
            if was_busy and not self._checkpoints.busy:
                self._requests.saving_took(self._checkpoints.longest)
        if agreed["interrupt"] > 0:
            self._interrupt(progress)
        if self._checkpoints is None or self.settings is None:
            return
        steps = self.settings.steps
        if self._due is None and (agreed["late"] > 0 or (steps is not None and progress.step % steps == 0)):
            self._due = progress.step
        if self._due is not None and not self._checkpoints.busy:
            patience = PATIENCE if steps is None else steps // 10
            if self._setup.preconditioner.reduced or progress.step - self._due >= patience:
                self.save(progress)

    def save(self, progress: Progress, score: float | None = None, wait: bool = False) -> None:
        """Begins a checkpoint, after the one that is under way. Collective.

        Args:
            progress: of the loop.
            score: of an evaluation of this very state.
            wait: until it is written.
        """
        if self._checkpoints is None or self.settings is None:
            return
        self._checkpoints.finish()
        self._due, self._saved_at = None, time.monotonic()
        progress.checkpoints += 1
        self.prepare()
        setup = self._setup
        optimizer = setup.averaging.saved
        common, own = collect(setup.model, optimizer, setup.preconditioner)
        common["run"] = {
            "settings": setup.settings.resolved,
            "metrics": self._folder.metrics(),
            "progress": as_tree(progress.state(), "progress"),
        }
        facts = {
            "epoch": progress.epoch,
            "loss": progress.loss,
            "score": score,
            "number": progress.checkpoints,
            "healthy": int(progress.healthy),
        }
        helpers = setup.preconditioner.order_save(progress.step)
        self._checkpoints.save(progress.step, common, own, facts, helpers)
        if wait or not self.settings.asynchronous:
            self._checkpoints.finish()

    def end(self, progress: Progress, score: float | None) -> None:
        """Saves the end of the training. Collective.

        Raises:
            RunStopped: it could not be written.
        """
        self.save(progress, score, wait=True)
        if self._checkpoints is not None and self._checkpoints.problem is not None:
            raise RunStopped(
                f"step {progress.step}: training is complete, but its last checkpoint could not be written:"
                f" {self._checkpoints.problem}. Mend that and start again with --resume auto"
            )

    def close(self) -> None:
        """Waits for what is under way. Collective."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    # Back

    def restore(self, saved: Saved) -> Progress:
        """Puts a checkpoint's state back, and tells how far it had come. Collective.

        Raises:
            InputError: it is another model's, optimizer's or method's, or damaged.
        """
        setup = self._setup

        try:
            progress = together(self.comm, lambda: Progress.of(from_tree(saved.common["run"]["progress"])))
            put_back(saved, self.comm, setup.model, setup.averaging.saved, setup.preconditioner, hyperparameters=False)
        except BrokenCheckpoint as error:
            raise InputError(f"{saved.path.name} cannot be gone on from: {error}") from error
        if self._checkpoints is not None:
            self._checkpoints.last = saved.step
        saved.forget()
        return progress

    def last_healthy(self) -> Saved | None:
        """The newest checkpoint from before the loss went up, once newer ones have been removed. Collective."""
        if self._checkpoints is None:
            return None
        self._checkpoints.finish()
        newer: list[Path] = []
        for path in self._setup.ranks.broadcast(list_sets(self._checkpoints.folder)):
            try:
                saved = open_set(path, self.comm)
            except BrokenCheckpoint:
                continue
            if saved.manifest.facts.get("healthy"):
                if self.comm.rank == 0:
                    for other in newer:
                        remove(other)
                return saved
            newer.append(path)
        return None

    # Small helpers

    def _refusal(self) -> str | None:
        if self._lease is not None and self._lease.lost:
            return f"another job has taken over {self._folder.path}"
        return None

    def _interrupt(self, progress: Progress) -> None:
        reasons = [text for text in self._setup.ranks.gather(self._refusal() or self._requests.reason) if text]
        refusal = self._setup.ranks.broadcast(self._refusal())
        if refusal is not None:
            raise RunStopped(f"step {progress.step}: {refusal}; it goes on there")
        reason = reasons[0] if reasons else "a request"
        if self._checkpoints is None:
            raise RunInterrupted(f"stopped at step {progress.step} by {reason}; nothing was saved (checkpoint: none)")
        self.save(progress, wait=True)
        if self._checkpoints.problem is None:
            state = "all of it is saved; --resume auto goes on"
        elif self._checkpoints.last is not None:
            state = f"it could not be saved, and --resume auto goes on from step {self._checkpoints.last}"
        else:
            state = "it could not be saved"
        raise RunInterrupted(f"stopped at step {progress.step} by {reason}; {state}")
