"""Many workers on one study in a real PostgreSQL server, where the machine has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_workers_share_a_study_in_postgresql(project: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("psycopg2", reason="no driver: pip install psycopg2-binary")
    monkeypatch.syspath_prepend(str(project / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(project), *filter(None, sys.path)]))
    from postgres_study import measure, postgres, server_folder

    binaries = server_folder()
    if not binaries:
        pytest.skip("no PostgreSQL server (initdb, postgres) here: install one, or set PG_BIN")
    with postgres(binaries) as url:
        found = measure(url, workers=2, trials=8, seconds=0.2)
    assert 8 <= found["trials"] <= 9  # the last ones may end together
    assert found["unique_ids"] == found["trials"] == sum(found["by_worker"].values())
    assert set(found["by_worker"]) == {"w0", "w1"}
    assert found["sampled_twice"] == 0
    assert 1 <= found["start"] <= 2  # both may begin with it
