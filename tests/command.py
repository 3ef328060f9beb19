"""The command line, called in this process."""

from __future__ import annotations

import pytest

from blast_search import cli


def call(*arguments: str) -> int:
    """The exit code of `blast-search ARGUMENTS`."""
    with pytest.raises(SystemExit) as leave:
        cli.main(list(arguments))
    return int(leave.value.code or 0)
