"""The nouns of WordNet 3.0: lemmas, hypernyms, short glosses; from one file that `main` creates."""

import lzma
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from yolo_lightning.errors import InputError, nearest

TABLE = Path(__file__).parent / "data/wordnet_nouns.xz"
"""Four columns separated by NUL bytes, with one line per synset."""

LICENCE = TABLE.with_name("wordnet_licence.txt")  # licence of WordNet and of the table

ENTITY = "n00001740"
"""The root of all nouns."""

GLOSS_LENGTH = 60

# organism, artifact, natural object, and two kinds of food
_THINGS = {"n00004475", "n00021939", "n00019128", "n00021265", "n07555863"}
_PERSON = "n00007846"
_VULGAR = re.compile(
    "obscene|vulgar|offensive|slur\\b|disparag|derogat|insult|slang|sexual|genital"
)

_WNID = re.compile(r"n\d{8}")


class WordNet:
    """Noun synsets by wnid: ``n`` and the eight digits of the synset's offset.

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
        return len(self.wnids)

    def hypernyms(self, wnid: str) -> list[str]:
        """Return the direct hypernyms, including those that this synset is an instance of."""
        line = self._hypernym_lines[self._row[wnid]]
        return [f"n{offset}" for offset in line.split()]

    def lemmas(self, wnid: str) -> list[str]:
        """Return the words of a synset, the most usual first."""
        line = self._lemma_lines[self._row[wnid]]
        return [entry.partition("\t")[0] for entry in line.split(";")]

    def name(self, wnid: str) -> str:
        """Return the most usual word of a synset."""
        return self.lemmas(wnid)[0]

    def gloss(self, wnid: str) -> str:
        """Return the beginning of a synset's gloss."""
        return self._gloss_lines[self._row[wnid]]

    def senses(self, lemma: str) -> list[str]:
        """Return the synsets of a word, the most frequent first; case is ignored."""
        if not self._by_lemma:
            for row, line in enumerate(self._lemma_lines):
                for entry in line.split(";"):
                    word, _, sense = entry.partition("\t")
                    self._by_lemma.setdefault(_key(word), []).append(
                        (int(sense or 1), self.wnids[row])
                    )
        return [wnid for _, wnid in sorted(self._by_lemma.get(_key(lemma), []))]

    def above(self, wnids: Iterable[str]) -> set[str]:
        """Return these synsets and all above them."""
        pending, found = [wnid for wnid in wnids if wnid in self], set[str]()
        while pending:
            wnid = pending.pop()
            if wnid not in found:
                found.add(wnid)
                pending += self.hypernyms(wnid)
        return found

    def nearest(self, lemma: str) -> str:
        """Return a hint with words of similar spelling for what can be seen; empty if none."""
        self.senses(lemma)
        start = _key(lemma)[:2]
        words = (word for word in self._by_lemma if word.startswith(start))
        return nearest(_key(lemma), filter(self._is_visible, words))

    def _is_visible(self, word: str) -> bool:
        """Return whether a word is a thing and no person, and no meaning of it is vulgar."""
        senses = self.senses(word)
        above, glosses = self.above(senses), " ".join(map(self.gloss, senses))
        return bool(above & _THINGS) and _PERSON not in above and not _VULGAR.search(glosses)

    def describe(self, wnid: str) -> str:
        """Return wnid, words and gloss in one line."""
        return f"{wnid} {', '.join(self.lemmas(wnid)[:3])}: {self.gloss(wnid)}"


def _key(word: str) -> str:
    return " ".join(word.replace("_", " ").lower().split())


def is_wnid(text: str) -> bool:
    """Return whether a text has the format of a noun's wnid."""
    return _WNID.fullmatch(text) is not None


@cache
def wordnet() -> WordNet:
    """Return WordNet; it is read once."""
    return WordNet(lzma.decompress(TABLE.read_bytes()).decode("utf-8").split("\0"))


def _parse_synset(line: str, senses: dict[tuple[str, str], int]) -> tuple[str, str, str, str]:
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
    return offset, " ".join(above), ";".join(entries), _shorten(gloss.strip())


def _shorten(gloss: str) -> str:
    """Remove examples from a gloss and shorten it at a word boundary."""
    text = gloss.split('; "')[0]
    if len(text) <= GLOSS_LENGTH:
        return text
    return text[: GLOSS_LENGTH - 1].rsplit(" ", 1)[0].rstrip(",;:(") + "…"


def _sense_numbers(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Return the sense number of each (word, offset) from ``index.noun``."""
    numbers: dict[tuple[str, str], int] = {}
    for line in lines:
        if not line.startswith(" "):
            parts = line.split()
            offsets = parts[6 + int(parts[3]) :]
            numbers |= {(parts[0], offset): k for k, offset in enumerate(offsets, start=1)}
    return numbers


def main(argv: Sequence[str]) -> None:
    """Write table and licence: ``python -m yolo_lightning.tree.wordnet DATA.NOUN INDEX.NOUN``."""
    if len(argv) != 2 or not all(Path(path).is_file() for path in argv):
        raise InputError("expected the paths of data.noun and index.noun")
    data, index = (Path(path).read_text(encoding="utf-8").splitlines() for path in argv)
    senses = _sense_numbers(index)
    rows = [_parse_synset(line, senses) for line in data if not line.startswith(" ")]
    columns = ["\n".join(column) for column in zip(*rows, strict=True)]
    head = [re.sub(r"^\s*\d+ ?", "", line).rstrip() for line in data if line.startswith(" ")]
    packed = lzma.compress("\0".join(columns).encode(), preset=9 | lzma.PRESET_EXTREME)
    TABLE.write_bytes(packed)
    LICENCE.write_text("\n".join(head).strip() + "\n", encoding="utf-8")
    print(f"{TABLE}: {len(rows)} synsets, {len(packed):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
