"""docs/paper.md: its links resolve, and it lists every deviation and choice that the code names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import REPO

PAGE = REPO / "docs/paper.md"
TEXT = PAGE.read_text(encoding="utf-8")
LINKS = re.findall(r"\[`([^`\]]+)`\]\(([^)#]+\.(?:py|yaml))\)", TEXT)
MARKER = re.compile(r"\b(Deviation|Paper is silent)\b")
FOLDERS = ("yolo_lightning", "datamodules", "callbacks")


def named(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST, str | None]]:
    """Yield the name, the node and the docstring of everything that a file defines."""
    body: list[ast.stmt] = getattr(tree, "body", [])
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = prefix + statement.name
            yield name, statement, ast.get_docstring(statement)
            if isinstance(statement, ast.ClassDef):
                yield from named(statement, f"{name}.")
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            text = following.value if isinstance(following, ast.Expr) else None
            value = text.value if isinstance(text, ast.Constant) else None
            docstring = value if isinstance(value, str) else None
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield prefix + part.id, statement, docstring


def parameters(function: ast.AST) -> set[str]:
    arguments = getattr(function, "args", None)
    return {argument.arg for argument in arguments.args} if arguments else set()


def names_of(path: Path) -> set[str]:
    """Return what a file defines: names, methods as Class.method, and a class's parameters."""
    if path.suffix == ".yaml":
        return set(keys_of(yaml.safe_load(path.read_text(encoding="utf-8"))))
    names: set[str] = set()
    for name, node, _ in named(ast.parse(path.read_text(encoding="utf-8"))):
        names.add(name)
        if name.endswith(".__init__"):
            names |= {name.removesuffix("__init__") + parameter for parameter in parameters(node)}
    return names


def keys_of(values: object) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from keys_of(value)
    for value in values if isinstance(values, list) else []:
        yield from keys_of(value)


def in_code() -> Iterator[tuple[str, str, str]]:
    """Yield the file, the object and the kind of every deviation and choice in docstrings."""
    for folder in FOLDERS:
        for path in sorted((REPO / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            tree, file = ast.parse(source), path.relative_to(REPO).as_posix()
            texts = [("", ast.get_docstring(tree)), *((n, text) for n, _, text in named(tree))]
            found = [(name, kind) for name, text in texts for kind in MARKER.findall(text or "")]
            assert len(found) == len(MARKER.findall(source)), f"{file}: outside of docstrings"
            yield from ((file, name, kind) for name, kind in found)


def on_page() -> list[tuple[str, str, str]]:
    """Return the rows of the page's last table."""
    rows = re.findall(r"^\| \[`([^`]+)`\]\(\.\./([^)]+)\) \| ([^|]+) \| [^|]+ \|$", TEXT, re.M)
    return [(file, name, kind) for name, file, kind in rows if MARKER.fullmatch(kind)]


@pytest.mark.parametrize(("name", "target"), sorted(set(LINKS)))
def test_what_a_link_names_exists_in_its_file(name, target):
    path = PAGE.parent / target
    assert path.is_file()
    assert name in names_of(path)


def test_every_row_of_the_map_names_code_and_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "../tests/" in line]
    assert len(rows) > 20
    for row in rows:
        _, _, code, tests, choice, _ = row.split("|")
        assert re.search(r"\]\(\.\./(?!tests/)", code), row
        assert re.findall(r"\[`(\w+)`\]\(\.\./tests/", tests), row
        assert all(name.startswith("test_") for name in re.findall(r"\[`(\w+)`\]", tests)), row
        assert choice.strip(), row


def test_every_deviation_in_the_code_is_on_the_page():
    assert sorted(on_page()) == sorted(in_code())
    assert len(on_page()) > 10


def test_names_of_a_file(tmp_path):
    source = (
        'A = B = 1\n"""Deviation: one."""\n\nclass C:\n    """Paper is silent: two."""\n\n'
        '    d: int = 2\n    """Three."""\n\n    def __init__(self, e: int) -> None:\n'
        '        """Four."""\n'
    )
    (tmp_path / "m.py").write_text(source)
    assert names_of(tmp_path / "m.py") == {"A", "B", "C", "C.d", "C.__init__", "C.self", "C.e"}
    docstrings = {name: text for name, _, text in named(ast.parse(source))}
    assert docstrings["A"] == "Deviation: one."
    assert docstrings["C"] == "Paper is silent: two."
    assert docstrings["C.d"] == "Three."
