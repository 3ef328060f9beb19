"""The console command.  Outside the package, because importing that loads PyTorch, which takes
seconds in which Ctrl-C should end the program as quietly as it does later."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _stop(signum: int, frame: FrameType | None) -> None:
    os._exit(128 + signum)  # nothing is begun yet that would have to be ended


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from blast_search.cli import main as run  # puts its own handlers in their place

    run()


if __name__ == "__main__":
    main()
