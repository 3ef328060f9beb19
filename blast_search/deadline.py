"""A moment that a stage must not run past."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """`at` is in seconds of time.monotonic(); the default never comes."""

    at: float = math.inf

    def expired(self) -> bool:
        return time.monotonic() > self.at

    def share(self, part: float) -> Deadline:
        """The deadline of a stage that may take this part of what is left."""
        now = time.monotonic()
        return Deadline(now + part * max(0.0, self.at - now))


FOREVER = Deadline()
