"""Several processes wait and decide as one.

A swap of the index that did not happen after the same step everywhere would leave them
in different programs. So the first process looks at the shared folder, waits and
decides, and tells the others of all that they have to do with it meanwhile: agree on
whether SIGTERM came, and gather weights that lie on several hosts. Each message is a
broadcast, which waits for the device. One process alone is only told by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from realm_retro.parallel import hosts
from realm_retro.train.recipe import LoopState

_WAIT, _PUBLISH, _DECIDED = range(3)


def told_to_stop(loop: LoopState) -> bool:
    """Whether SIGTERM came; for the first process while the others `decide`."""
    _tell(_WAIT)
    return loop.should_stop()


def publish(action: Callable[[], None]) -> None:
    """Does what all have to do together; for the first while the others `decide`."""
    _tell(_PUBLISH)
    action()


def decide(loop: LoopState, decision: int, action: Callable[[], None]) -> int:
    """The first process's decision, on every process.

    Args:
      loop: whose `should_stop` the others ask with the first.
      decision: of the first process; that of the others does not count.
      action: what the others do at each `publish` of the first.
    """
    while (message := _tell(_DECIDED, decision))[0] != _DECIDED:
        if message[0] == _PUBLISH:
            action()
        else:
            loop.should_stop()
    return message[1]


def _tell(what: int, value: int = 0) -> tuple[int, int]:
    told = hosts.broadcast(np.asarray([what, value], np.int32))
    return int(told[0]), int(told[1])
