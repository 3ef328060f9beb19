"""SIGINT and SIGTERM end a command where they arrive, or else at the next step of its work.

What is raised where a signal arrives may be swallowed there: by an `except:` of a library that is
just imported (mpmath's), or by Python in a callback of a weak reference.  Both were seen, and the
run went on.
"""

from __future__ import annotations

import signal
from types import FrameType

_arrived: list[int] = []


class Stopped(BaseException):
    """SIGINT or SIGTERM.  Not KeyboardInterrupt: the libraries between would swallow that."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def stop_on_signals() -> None:
    """Raise Stopped on SIGINT and SIGTERM from now on."""
    _arrived.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    _arrived.append(signum)
    raise Stopped(signum)


def check() -> None:
    """Raise Stopped where a signal has arrived before."""
    if _arrived:
        raise Stopped(_arrived[0])
