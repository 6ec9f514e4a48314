"""What a preconditioner places outside itself, on a model and in the process, and how it is taken back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from torch import nn

from hpc_kfac.notices import Refused

_HOLDERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachments]] = weakref.WeakKeyDictionary()
"""Who has hooks on a module."""


class Attachments:
    """Hooks, threads and the like, given back when their owner is removed or dropped.

    A module has the hooks of its last owner alone. When that one goes, the one before has its hooks back.

    Args:
        owner: it is dropped when nobody refers to it any more.
        modules: where it has hooks, by name.
        hook: places the hooks; like all that follow it must not refer to the owner.
        unhook: takes them off.
    """

    def __init__(
        self,
        owner: object,
        modules: Mapping[str, nn.Module],
        hook: Callable[[], object],
        unhook: Callable[[], object],
    ) -> None:
        self._modules, self._hook, self._unhook = modules, hook, unhook
        self._ways: list[Callable[[], object]] = []
        self._earlier: list[Attachments] = []
        self._later: list[Attachments] = []  # their hooks are on some of the modules in the place of these
        self._removed = False
        self._end = weakref.finalize(owner, self._take_back)
        self._end.atexit = False

    @property
    def removed(self) -> bool:
        """Whether all was given back."""
        return self._removed

    def add(self, take_back: Callable[[], object]) -> None:
        """Something else that was placed, and what takes it back on this rank alone."""
        self._ways.append(take_back)

    def claim(self) -> None:
        """Takes the modules over from earlier owners."""
        for module in self._modules.values():
            found = _HOLDERS.get(module)
            holder = found() if found is not None else None
            _HOLDERS[module] = weakref.ref(self)
            if holder is not None and holder is not self and not holder.removed and holder not in self._earlier:
                self._earlier.append(holder)
                holder._later.append(self)
                holder._unhook()

    def take(self, modules: Mapping[str, nn.Module]) -> None:
        """Has hooks on these modules from now on, and on no others."""
        self._modules = modules
        self.claim()

    def end(self) -> None:
        """Gives everything back; a second call does nothing."""
        self._end()

    def check(self) -> None:
        """Raises Refused if they were given back, or another owner has the modules."""
        if self._removed:
            raise Refused("this preconditioner was removed from its model: make a new one, or do not step it")
        if self._later:
            theirs = {id(module) for later in self._later for module in later._modules.values()}
            shared = next(name for name, module in self._modules.items() if id(module) in theirs)
            raise Refused(
                f"this preconditioner was replaced by one that was made later for the same layers ({shared!r}, ...):"
                " step that one, or call its remove() to go on with this one; to use both, give them different layers"
                " with skip="
            )

    def _take_back(self) -> None:
        self._removed = True
        self._unhook()
        while self._ways:
            self._ways.pop()()
        for later in self._later:
            later._earlier.remove(self)
        for earlier in self._earlier:
            earlier._later.remove(self)
            if not earlier._later:
                earlier.claim()
                earlier._hook()
        self._earlier, self._later = [], []
