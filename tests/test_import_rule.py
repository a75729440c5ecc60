"""preprocessing -> cfld <- train: both meet only in shards, and nothing leads back."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FORBIDDEN = {
    "cfld": {"demo", "preprocessing", "train", "shards", "ray", "deepspeed"},
    "preprocessing": {"demo", "train", "deepspeed"},
    "train": {"demo", "preprocessing", "ray"},
    "shards": {"demo", "cfld", "preprocessing", "train", "ray", "deepspeed"},
}


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_the_import_rule_holds(package: str) -> None:
    modules = sorted((REPOSITORY / package).rglob("*.py"))
    assert modules
    found = {
        path.name: FORBIDDEN[package].intersection(imported_packages(path)) for path in modules
    }
    assert not {name: packages for name, packages in found.items() if packages}
