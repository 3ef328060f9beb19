"""Cells that runs share: what one run measured, the next ones on the same device copy.

One CSV file per device fingerprint and version of the measuring code, in the format of a run's
latency.csv, in the cache folder ($XDG_CACHE_HOME/blast-search, else ~/.cache).  Failed cells are
not shared: the memory they lacked may be there next time.  BLAST_SEARCH_CACHE=off switches
it off.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from blast_search.errors import UsageError
from blast_search.files import cache_folder
from blast_search.tables import FIELDS, LatencyTable

SWITCH = "BLAST_SEARCH_CACHE"
MEASURED_BY = ("latency.py", "modes.py", "matrix.py", "product.py", "kernels/*.py")


def open_cache(fingerprint: str) -> LatencyTable:
    """The cells that earlier runs measured on this device; a table without a file if off.

    Raises:
        UsageError: another value of BLAST_SEARCH_CACHE than "on" or "off".
        IncompatibleInputError: a damaged file.
    """
    value = os.environ.get(SWITCH) or "on"
    if value not in ("on", "off"):
        raise UsageError(f"{SWITCH} is {value!r}, expected on or off.")
    if value == "off":
        return LatencyTable(fingerprint)
    try:
        folder = cache_folder() / "latency"
        folder.mkdir(exist_ok=True)
    except OSError:  # a home that cannot be written is no reason to measure nothing
        return LatencyTable(fingerprint)
    if not os.access(folder, os.W_OK):
        return LatencyTable(fingerprint)
    return LatencyTable.open(folder / f"{fingerprint}-{code_digest()}.csv", fingerprint)


@functools.cache
def code_digest() -> str:
    """Digest of the code that measures and is measured: no cell outlives its kernels."""
    package = Path(__file__).parent
    digest = hashlib.sha256(repr(FIELDS).encode())
    for pattern in MEASURED_BY:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
