"""Shared fixtures: seeds, threads, and a private place for caches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# One thread, also in the processes that tests start: on a loaded machine each parallel region of
# a small operation waits for the slower thread, and the toy models' speed-up drowns in that.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from blast_search import latency, model_latency

# Noise is no reason for tests to time longer (a processor is busy with other tests), and they
# look at no latency so closely that it must be certain to a percent.
model_latency.ATTEMPTS = 1
model_latency.NARROW = 0.02
latency.NARROW = 0.03

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as blast_search.cluster sets it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["BLAST_SEARCH_CACHE"] = "off"  # measured cells of tests are nobody else's


# Begun first, in this order, so that no worker is left with them alone at the end.
LONGEST = ("test_readme.py", "test_pipeline.py", "test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def project() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of the test's own; the handlers that the command line sets go again."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
