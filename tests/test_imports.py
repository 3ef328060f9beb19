"""`import blast_search` stays light, and the plain-data modules stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("ray", "optuna", "fvcore", "transformers", "datasets", "triton", "numba", "matplotlib")
PLAIN = ("space", "tables", "plan", "solver", "study", "files", "errors")


def imported_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    assert imported_after("import blast_search") == set()


def test_the_check_can_fail():
    assert "numba" in imported_after("import blast_search.kernels.cpu")


def imports_torch(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "torch" for name in names):
            return True
    return False


@pytest.mark.parametrize("module", PLAIN)
def test_plain_modules_do_not_import_torch(module: str, project: Path):
    assert not imports_torch((project / "blast_search" / f"{module}.py").read_text())
    assert imports_torch("from torch import nn")


def test_files_stay_short(project: Path):
    for path in (project / "blast_search").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 340, path
