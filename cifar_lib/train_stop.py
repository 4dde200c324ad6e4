"""Ctrl-C and SIGTERM: a command ends with status 130 or 143, a training first ends its epoch.

Only the command line listens. In a notebook an interrupt stays a KeyboardInterrupt, which ends a
training at once and, as a kill does, loses the epoch under way and no more.

Imports no torch: the command line listens, and may start again, before it loads that.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_in_epoch = False
_asked = 0  # the number of the signal that the epoch under way outlived


@contextmanager
def listening() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end what runs inside with SystemExit, status 130 or 143.

    During an epoch the first one waits for its end, and says so; the second does not wait. A
    signal that whoever started the process had ignored (a job in the background) stays ignored.
    """
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, _hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def epoch_begins() -> None:
    """From here on the first signal waits."""
    global _in_epoch, _asked
    _in_epoch, _asked = True, 0


def epoch_ended(gather: Callable[[int], list[int]]) -> None:
    """The epoch is saved: ends the command if a signal came, to any rank, in the meantime.

    Args:
        gather: brings every rank's value to each.
    """
    global _in_epoch
    _in_epoch = False
    if asked := max(gather(_asked)):
        raise SystemExit(128 + asked)


def _hear(number: int, _frame: FrameType | None) -> None:
    global _asked
    if _asked or not _in_epoch:
        raise SystemExit(128 + number)
    _asked = number
    os.write(2, b"stopping after this epoch; the same signal again stops at once\n")
