"""Print the size and the imports of the packages; run by ``make structure``.

A part is a file or a package at the top of ``yolo_lightning/``. An edge from one part or file to
another stands for any number of imports, those inside functions included.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = "yolo_lightning"
MAPPED = {"datamodules": f"{ROOT}.datamodules", "callbacks": f"{ROOT}.callbacks"}

Edges = Mapping[str, set[str]]


def modules_of(repository: Path) -> dict[str, Path]:
    """Return the files of the library by dotted module name."""
    found = {}
    for folder, prefix in {ROOT: ROOT, **MAPPED}.items():
        for file in sorted((repository / folder).rglob("*.py")):
            parts = file.relative_to(repository / folder).with_suffix("").parts
            if folder == ROOT and parts[0] in MAPPED:
                continue  # the symbolic links
            names = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *names))] = file
    return found


def file_edges(modules: Mapping[str, Path], public: Mapping[str, str] | None = None) -> Edges:
    """Return which modules each module imports; `public` gives the module of a public name."""
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [(public or {}).get(i, i if i in modules else node.module) for i in inner]
            else:
                continue
            edges[name] |= {target for target in targets if target in modules} - {name}
    return edges


def part_of(module: str) -> str:
    """Return the part that a module belongs to."""
    return (module.split(".") + ["__init__"])[1]


def part_edges(edges: Edges) -> Edges:
    """Return which parts each part imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        found[part_of(name)] |= {part_of(target) for target in targets} - {part_of(name)}
    return found


def levels_of(edges: Edges) -> dict[str, int]:
    """Return 0 for what imports nothing of the library, else one more than what it imports.

    Raises:
        ValueError: imports form a cycle.
    """
    found: dict[str, int] = {}
    while len(found) < len(edges):
        ready = [name for name in edges if name not in found and edges[name] <= set(found)]
        if not ready:
            raise ValueError(f"cycle: {' -> '.join(_cycle(edges, set(edges) - set(found)))}")
        found |= {name: 1 + max((found[t] for t in edges[name]), default=-1) for name in ready}
    return found


def _cycle(edges: Edges, rest: set[str]) -> list[str]:
    """Return a cycle among modules that all import another one of them."""
    path = [min(rest)]
    while len(set(path)) == len(path):
        path.append(min(edges[path[-1]] & rest))
    return path[path.index(path[-1]) :]


def docstring_lines(files: Iterable[Path]) -> int:
    """Return how many lines are lines of docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    count = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for inner in getattr(node, "body", []) if isinstance(node, documented) else []:
                value = inner.value if isinstance(inner, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    count += inner.end_lineno - inner.lineno + 1
    return count


def lines_of(files: Iterable[Path]) -> int:
    """Return the number of lines."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def report(repository: Path) -> str:
    """Return the tables that ``make structure`` prints."""
    modules = modules_of(repository)
    edges = file_edges(modules)
    # the package's own __init__ imports public names lazily: it is on no level
    inner = {name: targets - {ROOT} for name, targets in edges.items() if name != ROOT}
    between = part_edges(inner)
    levels = levels_of(inner)
    by_part: dict[str, list[Path]] = defaultdict(list)
    for name, file in modules.items():
        by_part[part_of(name)].append(file)
    total = lines_of(modules.values())
    rows = [
        f"{part:<16}{len(files):>6}{lines_of(files):>8}"
        f"{docstring_lines(files) / lines_of(files):>12.1%}  {', '.join(sorted(between[part]))}"
        for part, files in sorted(by_part.items(), key=lambda item: -lines_of(item[1]))
    ]
    tests = sorted((repository / "tests").rglob("*.py"))
    return "\n".join(
        [
            f"{'part':<16}{'files':>6}{'lines':>8}{'docstrings':>12}  imports",
            *rows,
            "",
            f"{total:,} lines in {len(modules)} files; tests {lines_of(tests):,} in {len(tests)}",
            f"docstrings: {docstring_lines(modules.values()) / total:.1%} of the lines",
            f"imports between files: {sum(map(len, edges.values()))} edges on "
            f"{max(levels.values()) + 1} levels",
            f"parts at the top: {len(by_part)}, edges between them: "
            f"{sum(map(len, between.values()))}",
        ]
    )


def main() -> None:
    """Print the report on a checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).parents[2])
    print(report(parser.parse_args().repository))


if __name__ == "__main__":
    main()
