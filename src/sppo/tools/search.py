"""`search:path=passages.jsonl`: passages to look for by their words (BM25), and to read whole.

`path` is a file of rows with `text` (and `title`), as data are read elsewhere, or a folder of text files (.txt, .md, .rst), which are cut into
passages at blank lines. `search:path=…,most=3,words=120`: results of a search, words of a passage of a file. Needs `sppo[search]`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, RecipeError
from ..files import readable
from ..tasks.rows import read_rows

KINDS = (".txt", ".md", ".rst")
SHOWN = 160
"""Characters of a passage that a search shows."""


@dataclass(frozen=True)
class Passage:
    """Something to read, and where it is from."""

    title: str
    text: str


def build(path: str = "", most: int = 5, words: int = 150) -> Search:
    """The tools `search` and `read` over passages, which are read and indexed once. Raises RecipeError, DataError."""
    if not path:
        raise RecipeError("environment.tools: search needs passages: search:path=FILE or FOLDER")
    if most < 1 or words < 1:
        raise RecipeError("environment.tools: search: most and words must be at least 1")
    return Search(_index(str(Path(path).expanduser().resolve()), words), most)


class Index:
    """Passages, and what finds them."""

    def __init__(self, passages: list[Passage]) -> None:
        if importlib.util.find_spec("bm25s") is None:
            raise RecipeError("environment.tools: search needs bm25s: pip install 'sppo[search]'")
        import bm25s

        self.passages = passages
        self._tokenize = functools.partial(bm25s.tokenize, stopwords="en", show_progress=False, return_ids=False)
        self._model = bm25s.BM25(backend="numpy")
        self._model.index(self._tokenize([f"{p.title}\n{p.text}" for p in passages]), show_progress=False)

    def find(self, query: str, most: int) -> list[int]:
        """The numbers of the passages that fit best, the best first; of equal ones the first."""
        words = [word for word in self._tokenize([query])[0] if word in self._model.vocab_dict]
        if not words:
            return []
        score_N = self._model.get_scores(words)
        order = (-score_N).argsort(kind="stable")[:most]
        return [int(i) for i in order if score_N[i] > 0]


class Search:
    """The tools."""

    def __init__(self, index: Index, most: int) -> None:
        self._index, self._most = index, most

    def search(self, query: str) -> str:
        """Look for passages by the words in them; gives their numbers, titles and beginnings, the best first.

        Args:
            query: The words to look for.
        """
        found = self._index.find(query[:1000], self._most)
        return "\n".join(self._line(i) for i in found) or "nothing has these words"

    def read(self, number: int) -> str:
        """Read a passage whole.

        Args:
            number: Its number, as a search gave it.
        """
        if not 0 <= number < len(self._index.passages):
            raise ValueError(
                f"there is no passage {number}: they are numbered from 0 to {len(self._index.passages) - 1}"
            )
        passage = self._index.passages[number]
        return f"{passage.title}\n{passage.text}" if passage.title else passage.text

    def _line(self, i: int) -> str:
        passage = self._index.passages[i]
        text = " ".join(passage.text.split())
        return f"[{i}] {passage.title + ': ' if passage.title else ''}{text[:SHOWN]}{'…' if len(text) > SHOWN else ''}"


@functools.cache
def _index(path: str, words: int) -> Index:
    passages = list(_of_folder(Path(path), words) if _is_texts(Path(path)) else _of_rows(Path(path)))
    if not passages:
        raise DataError(f"environment.tools: search: {path} holds no passages")
    return Index(passages)


def _is_texts(path: Path) -> bool:
    return path.is_dir() and any(p.suffix in KINDS for p in path.rglob("*"))


def _of_rows(path: Path) -> Iterator[Passage]:
    for number, row in read_rows(path):
        if not isinstance(row.get("text"), str):
            raise DataError(
                f"{path}:{number}: a passage needs a column `text`; the row has {', '.join(map(str, row)) or 'none'}"
            )
        yield Passage(str(row.get("title") or ""), row["text"])


def _of_folder(folder: Path, words: int) -> Iterator[Passage]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix in KINDS and p.is_file()):
        with readable(f"{path} cannot be read", DataError):
            text = path.read_text(encoding="utf-8")
        for passage in cut(text, words):
            yield Passage(path.relative_to(folder).with_suffix("").as_posix(), passage)


def cut(text: str, words: int) -> list[str]:
    """A text in passages of about so many words, cut at blank lines; longer paragraphs stay whole.

    >>> cut("a b\\n\\nc d\\n\\ne", 4)
    ['a b\\n\\nc d', 'e']
    """
    out, now, count = list[str](), list[str](), 0
    for paragraph in (p.strip() for p in text.split("\n\n")):
        size = len(paragraph.split())
        if now and count + size > words:
            out.append("\n\n".join(now))
            now, count = [], 0
        if size:
            now.append(paragraph)
            count += size
    return [*out, "\n\n".join(now)] if now else out
