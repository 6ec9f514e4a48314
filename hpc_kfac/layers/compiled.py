"""Compiled models: hooks see nothing inside compiled code, so the passes that they have to see run as written."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any

import torch

_wanting: set[int] = set()
_ours: Any = None  # what set_stance returned last


class Uncompiled:
    """While it is wanted, what torch.compile has made runs uncompiled, in all of the process.

    Nothing is compiled anew for it: under the stance "force_eager" torch leaves compiled code alone, whenever and
    however it was made, and afterwards goes back to it. Before torch 2.6 there are no stances, and nothing happens.
    """

    def __init__(self) -> None:
        weakref.finalize(self, _want, id(self), False).atexit = False

    def want(self, wanted: bool) -> None:
        """From now on, or no longer."""
        _want(id(self), wanted)


def _want(who: int, wanted: bool) -> None:
    global _ours
    (_wanting.add if wanted else _wanting.discard)(who)
    if not hasattr(torch.compiler, "set_stance"):
        return
    # A user may have set another stance in between, or come back to ours when a context ended.
    is_set = _ours is not None and sys.modules["torch._dynamo.eval_frame"]._stance is _ours.stance
    if _wanting and not is_set:
        _ours = torch.compiler.set_stance("force_eager")
    elif is_set and not _wanting:
        with contextlib.suppress(
            RuntimeError
        ):  # inside compiled code, as when garbage is collected; the next call does
            _ours.__exit__(None, None, None)
