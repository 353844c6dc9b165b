"""The house: imports go down only, and no two files import each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "iada_plugin"
#: Floor of each room, a folder or a file of the package. The same table, for people, is in docs/CONTRIBUTING.md.
FLOORS = {
    "functional": 1, "metrics": 1, "runtime": 1,
    "config": 2, "data": 2, "head": 2, "perturbation": 2,
    "attachment": 3, "soft_targets": 3, "statistics": 3, "trusted": 3, "warmup": 3, "wrong_labels": 3,
    "meta": 4, "report": 4,
    "step": 5,
    "criterion": 6,
    "integrations": 7,
    "__init__": 8,
}  # fmt: skip


def imports(path):
    """Modules of the package that a file names in an import, also inside functions and for type checkers."""
    package = list(path.relative_to(PACKAGE.parent).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] + [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE.name:
                yield node.lineno, parts[1:]


def module_of(parts):
    """File that ``parts`` lead to."""
    place = PACKAGE.joinpath(*parts)
    for found in (place.with_suffix(".py"), place / "__init__.py"):
        if parts and found.is_file():
            return found
    return None


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward(files):
    found = []
    for path in files:
        for line, parts in imports(path):
            target = module_of(parts)
            if target is None or room(target) == room(path):
                continue
            if FLOORS[room(target)] >= FLOORS[room(path)]:
                found.append(f"{path.relative_to(PACKAGE)}:{line} ({room(path)}) imports {'.'.join(parts)}")
    return found


def test_every_room_has_a_floor():
    rooms = {room(p) for p in PACKAGE.rglob("*.py")}
    assert rooms == set(FLOORS) and max(FLOORS.values()) <= 8


def test_imports_go_down_only():
    assert not upward(sorted(PACKAGE.rglob("*.py")))


@pytest.mark.parametrize(
    "line", ["from ..criterion import MetaIADA", "import iada_plugin.step", "def f():\n    from .. import meta"]
)
def test_an_import_upward_is_found(line, monkeypatch):
    """In a file of the lowest floor, whatever form it has."""
    original = Path.read_text
    file = PACKAGE / "runtime" / "capture.py"
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: original(self, *a, **k) + (f"\n{line}\n" if self == file else "")
    )
    assert len(upward([file])) == 1


def test_no_circle():
    """Also within a room, where a package's own ``__init__`` may gather what is in it."""
    arrows = {}
    for path in PACKAGE.rglob("*.py"):
        targets = {module_of(parts) for _, parts in imports(path)} - {None, path}
        if path.name != "__init__.py":
            targets = {t for t in targets if t != path.parent / "__init__.py"}
        arrows[path] = targets
    done, open_ = set(), []

    def visit(path):
        assert path not in open_, " -> ".join(str(p.relative_to(PACKAGE)) for p in [*open_[open_.index(path) :], path])
        if path in done:
            return
        open_.append(path)
        for target in arrows[path]:
            visit(target)
        open_.pop()
        done.add(path)

    for path in arrows:
        visit(path)
