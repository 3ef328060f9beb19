"""`import blast_search` stays light, and the plain-data modules stay free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
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


def test_the_recipe_for_cluster_nodes_installs_what_workers_import(project: Path):
    code = (
        "import blast_search.trainable, blast_search.panel, blast_search.kernels.cpu, sys; "
        "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('blast_search')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names: set[str] = set()
    for file in done.stdout.split():
        for node in ast.parse(Path(file).read_text()).body:
            names |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    needed = {
        {"yaml": "pyyaml"}.get(name, name) for name in tops - {"blast_search", "llvmlite"}
    }  # numba's
    assert {"torch", "numba", "ray"} < needed
    guide = (project / "docs" / "clusters.md").read_text()
    # The recipe installs the clone, and with it what pyproject.toml asks for.
    (recipe,) = (line for line in guide.splitlines() if line.startswith("      - cd "))
    assert recipe.endswith("pip install -c constraints.txt -e '.[cluster]'")
    project_file = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    asked = [re.match(r"[\w-]+", line)[0] for line in project_file["dependencies"]]
    named = guide.partition("What the nodes need:")[2].partition("\n\n")[0]
    assert needed - set(asked) == set()
    assert {name for name in needed if name not in named.lower()} == set()


def test_files_stay_short(project: Path):
    for path in (project / "blast_search").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 340, path
