"""From a dataset's names to WordNet's synsets: found, listed where ambiguous, never guessed."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tree.wordnet import is_wnid, wordnet

_TABLE = Path(__file__).parent / "data/reviewed_labels.tsv"

MAX_SENSES = 8


@cache
def reviewed() -> dict[str, dict[str, str]]:
    """Return wnids by table (``coco``, ``voc``, ``ilsvrc_det``) and name, checked by eye."""
    tables: dict[str, dict[str, str]] = {}
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            table, name, wnid, _ = line.split("\t")
            tables.setdefault(table, {})[name] = wnid
    return tables


def table_of(names: Iterable[str]) -> str | None:
    """Return the reviewed table whose dataset has these names: all of its classes, and no other.

    A few names of a dataset prove nothing: a folder `mouse` beside a folder `cat` may hold animals.
    """
    found = set(names)
    for table, meanings in reviewed().items():
        if found <= set(meanings) and {meanings[n] for n in found} == set(meanings.values()):
            return table
    return None


def resolve(
    names: Iterable[str],
    meanings: Mapping[str, str] | None = None,
    table: str | None = None,
    where: Callable[[str], str] = str,
    own: Iterable[str] = (),
) -> dict[str, str]:
    """Return the wnid of each name.

    A name's meaning is the one that `meanings` gives, else the one of the reviewed table, else the
    wnid that it is, else the only synset of that word.

    Args:
        names: of one dataset.
        meanings: wnids, unambiguous words, or keys of one's own, by name.
        table: of the reviewed ones; the one whose classes these are where None.
        where: says of a name in which file, and line, it stands.
        own: classes of one's own, which a name that is unknown may be meant to be.

    Raises:
        InputError: all names that are unknown or mean several things, with what they may mean.
    """
    wanted = sorted(set(names))
    given = dict(meanings or {})
    known = reviewed()
    if table is not None and table not in known:
        raise InputError(f"table {table!r}; allowed: {', '.join(known)}")
    chosen = known.get(table or table_of(wanted) or "", {})
    found: dict[str, str] = {}
    trouble: list[str] = []
    for name in wanted:
        if name in given:
            found[name] = _meant(given[name], name, where(name), trouble, own)
        elif name in chosen:
            found[name] = chosen[name]
        else:
            found[name] = _meant(name, name, where(name), trouble, own)
    if trouble:
        raise InputError("\n  ".join(trouble))
    return found


def _meant(word: str, name: str, where: str, trouble: list[str], own: Iterable[str]) -> str:
    """Return the wnid that a word means; says in `trouble` why there is none."""
    table = wordnet()
    place = f"{where}: " if where != name else ""
    if is_wnid(word):
        if word not in table:
            trouble.append(f"{place}{name!r}: {word} is no noun of WordNet 3.0")
        return word
    senses = table.senses(word)
    if len(senses) == 1:
        return senses[0]
    if senses:
        listed = "\n    ".join(table.describe(wnid) for wnid in senses[:MAX_SENSES])
        more = f"\n    … and {len(senses) - MAX_SENSES} more" if len(senses) > MAX_SENSES else ""
        trouble.append(
            f"{place}{name!r} means several things; say which one in the mapping{_hint(name)}:"
            f"\n    {listed}{more}"
        )
    else:
        hint = nearest(word.replace("_", " ").lower(), [o.lower() for o in own])
        hint = f"{hint} (of your own classes)" if hint else table.nearest(word)
        said = f"{place}{name!r} is no noun of WordNet 3.0{_hint(name)}"
        trouble.append(
            f"{said}; {hint or 'say what it means in a mapping, or where it hangs in a hierarchy'}"
        )
    return ""


def _hint(name: str) -> str:
    """Return what reviewed tables mean by a name."""
    said = [
        f"{table} {meanings[name]}" for table, meanings in reviewed().items() if name in meanings
    ]
    first = said[0].split()[0] if said else ""
    return f" (of the reviewed tables: {', '.join(said)}; --table {first} takes it)" if said else ""
