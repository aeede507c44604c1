"""Budgets and structure of the package: sizes, directions of import, what may touch sys.path."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FOLDERS = ("tsae", "notebooks", "tools", "testbed", "benchmarks")
SOURCES = [ROOT / "tsae_utils.py", ROOT / "train.py"]
SOURCES += sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LONGEST_FUNCTION = 60
NOTEBOOK_CODE, LONGEST_CELL = 120, 25


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, under TYPE_CHECKING too; relative ones resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts[:-1]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(name for name in (base, node.module) if name)
            modules |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return modules


def test_documents_and_core_are_short():
    sizes = {name: len((ROOT / name).read_text().splitlines()) for name in LIMITS}
    print(sizes)
    assert all(sizes[name] <= limit for name, limit in LIMITS.items()), sizes


LIMITS = {"README.md": 150, "tsae_utils.py": 450}


def test_the_headline_is_short():
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- headline -->")[1].split("<!-- /headline -->")[0]
    assert len(block.strip().splitlines()) <= 12


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_documents_have_little_prose(path):
    """At most 150 lines that are neither table nor empty; results.md is generated."""
    lines = path.read_text(encoding="utf-8").splitlines()
    prose = [line for line in lines if line.strip() and not line.startswith("|")]
    assert len(prose) <= 150, len(prose)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_short(path):
    cells = nbformat.read(path, as_version=4).cells
    sources = [cell.source.splitlines() for cell in cells if cell.cell_type == "code"]
    code = sum(bool(line.strip()) for source in sources for line in source)
    longest = max(len(source) for source in sources)
    print(f"{path.stem}: {code} lines, longest cell {longest}")
    assert code <= NOTEBOOK_CODE and longest <= LONGEST_CELL


def test_functions_are_short():
    lengths = {
        f"{module_name(path)}.{f.name}": f.end_lineno - f.lineno + 1
        for path in SOURCES
        for f in functions(path)
    }
    longest = max(lengths, key=lengths.get)
    print(f"longest function: {longest}, {lengths[longest]} lines")
    too_long = {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION}
    assert not too_long, too_long


def test_no_cycle_of_imports():
    """Not under TYPE_CHECKING either. Notebooks' modules import each other by their short names."""
    names = {module_name(path): path for path in SOURCES}
    short = {name.removeprefix("notebooks."): name for name in names}
    graph = {
        name: {short[m] for m in imported(path) if m in short} | (imported(path) & names.keys())
        for name, path in names.items()
    }
    for name in graph:
        graph[name].discard(name)
    finished, active = set(), []

    def visit(name: str) -> None:
        assert name not in active, f"cycle: {' -> '.join([*active, name])}"
        if name in finished or name not in graph:
            return
        active.append(name)
        for other in graph[name]:
            visit(other)
        active.pop()
        finished.add(name)

    for name in graph:
        visit(name)


def test_directions_of_import():
    allowed = ("tools", "benchmarks")
    for path in SOURCES:
        name, modules = module_name(path), imported(path)
        if name.startswith("tsae."):
            assert not any(m.split(".")[0] in ("tsae_utils", "notebooks", "lab") for m in modules)
        uses_lab = any(m == "lab" or m.startswith(("lab.", "notebooks.lab")) for m in modules)
        if uses_lab and not name.startswith("notebooks"):
            assert name.startswith(allowed) or name == "testbed.export_saes", name


def test_nothing_edits_sys_path():
    for path in SOURCES:
        assert "sys.path" not in path.read_text(encoding="utf-8"), path
    assert (ROOT / "requirements.txt").read_text().splitlines()[-1].split()[:2] == ["-e", "."]
