"""Resolve class names of datasets to WordNet synsets; ambiguous names are errors."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tree.wordnet import is_wnid, wordnet

_TABLE = Path(__file__).parent / "data/reviewed_labels.tsv"

MAX_SENSES = 8


@cache
def load_reviewed_labels() -> dict[str, dict[str, str]]:
    """Return wnids by table (``coco``, ``voc``, ``ilsvrc_det``) and name, manually reviewed."""
    tables: dict[str, dict[str, str]] = {}
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            table, name, wnid, _ = line.split("\t")
            tables.setdefault(table, {})[name] = wnid
    return tables


def find_table(names: Iterable[str]) -> str | None:
    """Return the reviewed table whose classes are exactly these names, or None.

    A subset does not identify a table: a folder `mouse` next to `cat` may contain animals.
    """
    dataset_names = set(names)
    for table, meanings in load_reviewed_labels().items():
        wnids = {meanings.get(name) for name in dataset_names}
        if wnids == set(meanings.values()):
            return table
    return None


def resolve_labels(
    names: Iterable[str],
    meanings: Mapping[str, str] | None = None,
    table: str | None = None,
    where: Callable[[str], str] = str,
    custom: Iterable[str] = (),
) -> dict[str, str]:
    """Return the wnid of each name of a dataset.

    Sources by priority: `meanings` (wnids or unambiguous words), the reviewed table (default: the
    one with exactly these names), the name if it is a wnid, the only synset of that word. `where`
    (location of a name) and `custom` (names of custom classes) are used in error messages.

    Raises:
        InputError: lists all unknown and ambiguous names, with their possible meanings.
    """
    sorted_names = sorted(set(names))
    tables = load_reviewed_labels()
    if table is not None and table not in tables:
        raise InputError(f"table {table!r}; allowed: {', '.join(tables)}")
    reviewed = tables.get(table or find_table(sorted_names) or "", {})
    wnids: dict[str, str] = {}
    errors: list[str] = []
    for name in sorted_names:
        if name in reviewed and name not in (meanings or {}):
            wnids[name] = reviewed[name]
            continue
        word = (meanings or {}).get(name, name)
        try:
            wnids[name] = _resolve_word(word, name, where(name), custom)
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("\n  ".join(errors))
    return wnids


def _resolve_word(word: str, name: str, where: str, custom: Iterable[str]) -> str:
    table = wordnet()
    label = f"{where}: {name!r}" if where != name else repr(name)
    if is_wnid(word):
        if word not in table:
            raise InputError(f"{label}: {word} is not a noun of WordNet 3.0")
        return word
    senses = table.senses(word)
    if len(senses) == 1:
        return senses[0]
    if senses:
        lines = "\n    ".join(table.describe(wnid) for wnid in senses[:MAX_SENSES])
        more = f"\n    … and {len(senses) - MAX_SENSES} more" if len(senses) > MAX_SENSES else ""
        raise InputError(
            f"{label} is ambiguous; add one of its meanings to the mapping"
            f"{_reviewed_meanings(name)}:\n    {lines}{more}"
        )
    hint = nearest(word.replace("_", " ").lower(), [key.lower() for key in custom])
    hint = f"{hint} (class of yours)" if hint else table.nearest(word)
    raise InputError(
        f"{label} is not a noun of WordNet 3.0{_reviewed_meanings(name)}; "
        f"{hint or 'add its meaning to a mapping, or its parent to a hierarchy'}"
    )


def _reviewed_meanings(name: str) -> str:
    meanings = [
        f"{table} {wnids[name]}" for table, wnids in load_reviewed_labels().items() if name in wnids
    ]
    if not meanings:
        return ""
    table = meanings[0].split()[0]
    return f" (in the reviewed tables: {', '.join(meanings)}; --table {table} uses it)"
