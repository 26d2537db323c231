"""The nouns of WordNet 3.0: lemmas, hypernyms, short glosses. Read on first use, from one file.

Made by ``python -m yolo_lightning.tree.wordnet DATA.NOUN INDEX.NOUN``; see `main`.
"""

import lzma
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from yolo_lightning.errors import InputError, nearest

TABLE = Path(__file__).parent / "data/wordnet_nouns.xz"
"""Four columns, a NUL byte between them, a synset a line."""

LICENCE = TABLE.with_name("wordnet_licence.txt")
"""That WordNet, and with it the table, comes under."""

GLOSS_LENGTH = 60

_WNID = re.compile(r"n\d{8}")


class WordNet:
    """Noun synsets, keyed by wnid: ``n`` and the eight digits of the synset's offset.

    Args:
        columns: offsets, hypernyms, lemmas and glosses, a line a synset.

    Attributes:
        wnids: all of them, ascending.

    Source: WordNet 3.0, © 2006 Princeton University; see `LICENCE`.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        offsets, self._hypernym_lines, self._lemma_lines, self._gloss_lines = (
            column.split("\n") for column in columns
        )
        self.wnids = [f"n{offset}" for offset in offsets]
        self._row = {wnid: row for row, wnid in enumerate(self.wnids)}
        self._by_lemma: dict[str, list[tuple[int, str]]] = {}

    def __contains__(self, wnid: object) -> bool:
        return wnid in self._row

    def __len__(self) -> int:
        """Return the number of synsets."""
        return len(self.wnids)

    def hypernyms(self, wnid: str) -> list[str]:
        """Return the synsets directly above, those of which this is an instance included."""
        line = self._hypernym_lines[self._row[wnid]]
        return [f"n{offset}" for offset in line.split()]

    def lemmas(self, wnid: str) -> list[str]:
        """Return the words for a synset, the usual one first, with blanks between their parts."""
        line = self._lemma_lines[self._row[wnid]]
        return [entry.partition("\t")[0] for entry in line.split(";")]

    def name(self, wnid: str) -> str:
        """Return the usual word for a synset."""
        return self.lemmas(wnid)[0]

    def gloss(self, wnid: str) -> str:
        """Return the beginning of a synset's definition."""
        return self._gloss_lines[self._row[wnid]]

    def senses(self, lemma: str) -> list[str]:
        """Return the synsets that a word means, the most frequent first; case does not matter."""
        if not self._by_lemma:
            for row, line in enumerate(self._lemma_lines):
                for entry in line.split(";"):
                    word, _, sense = entry.partition("\t")
                    self._by_lemma.setdefault(_key(word), []).append(
                        (int(sense or 1), self.wnids[row])
                    )
        return [wnid for _, wnid in sorted(self._by_lemma.get(_key(lemma), []))]

    def nearest(self, lemma: str) -> str:
        """Return a hint at words that are spelt like this one, empty where there are none."""
        self.senses(lemma)
        start = _key(lemma)[:2]
        return nearest(_key(lemma), (word for word in self._by_lemma if word.startswith(start)))

    def describe(self, wnid: str) -> str:
        """Return wnid, words and gloss in one line."""
        return f"{wnid} {', '.join(self.lemmas(wnid)[:3])}: {self.gloss(wnid)}"


def _key(word: str) -> str:
    return " ".join(word.replace("_", " ").lower().split())


def is_wnid(text: str) -> bool:
    """Tell whether a text looks like a noun's wnid."""
    return _WNID.fullmatch(text) is not None


@cache
def wordnet() -> WordNet:
    """Return the table, read once."""
    return WordNet(lzma.decompress(TABLE.read_bytes()).decode("utf-8").split("\0"))


def _synset(line: str, senses: dict[tuple[str, str], int]) -> tuple[str, str, str, str]:
    """Return the columns of a line of ``data.noun``."""
    fields, _, gloss = line.partition(" | ")
    parts = fields.split()
    offset, count = parts[0], int(parts[3], 16)
    words = parts[4 : 4 + 2 * count : 2]
    pointers = parts[5 + 2 * count :]
    above = [pointers[k + 1] for k in range(0, len(pointers), 4) if pointers[k] in ("@", "@i")]
    entries = []
    for word in words:
        sense = senses.get((word.lower(), offset), 1)
        entries.append(word.replace("_", " ") + (f"\t{sense}" if sense > 1 else ""))
    return offset, " ".join(above), ";".join(entries), _shortened(gloss.strip())


def _shortened(gloss: str) -> str:
    """Return a definition without its examples, cut between two words."""
    text = gloss.split('; "')[0]
    if len(text) <= GLOSS_LENGTH:
        return text
    return text[: GLOSS_LENGTH - 1].rsplit(" ", 1)[0].rstrip(",;:(") + "…"


def _senses(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Return each (word, offset)'s sense number from ``index.noun``."""
    found: dict[tuple[str, str], int] = {}
    for line in lines:
        if not line.startswith(" "):
            parts = line.split()
            offsets = parts[6 + int(parts[3]) :]
            found |= {(parts[0], offset): k for k, offset in enumerate(offsets, start=1)}
    return found


def main(argv: Sequence[str]) -> None:
    """Write table and licence from WordNet's files; Debian's package ``wordnet-base`` has them.

    Args:
        argv: paths of ``data.noun`` and ``index.noun``, whose head is the licence.

    Raises:
        InputError: not two files.
    """
    if len(argv) != 2 or not all(Path(path).is_file() for path in argv):
        raise InputError("expected the paths of data.noun and index.noun")
    data, index = (Path(path).read_text(encoding="utf-8").splitlines() for path in argv)
    senses = _senses(index)
    rows = [_synset(line, senses) for line in data if not line.startswith(" ")]
    columns = ["\n".join(column) for column in zip(*rows, strict=True)]
    head = [re.sub(r"^\s*\d+ ?", "", line).rstrip() for line in data if line.startswith(" ")]
    packed = lzma.compress("\0".join(columns).encode(), preset=9 | lzma.PRESET_EXTREME)
    TABLE.write_bytes(packed)
    LICENCE.write_text("\n".join(head).strip() + "\n", encoding="utf-8")
    print(f"{TABLE}: {len(rows)} synsets, {len(packed):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
