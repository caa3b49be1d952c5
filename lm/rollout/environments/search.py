"""Search over a local corpus by BM25 (Robertson and Zaragoza 2009), with an inverted index in memory."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache

from lm.data.sources import load_rows, texts_of
from lm.experiment import UserError

K1, B = 1.2, 0.75
MOST_WORDS = 64  # of a query


class SearchIndex:
    """The words of passages, and for each word the passages that have it, with its share of their score."""

    def __init__(self, passages: Sequence[str]):
        self.passages = passages
        counts = [Counter(_words(passage)) for passage in passages]
        sizes = [sum(count.values()) for count in counts]
        mean = sum(sizes) / max(len(sizes), 1)
        found: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, (count, size) in enumerate(zip(counts, sizes, strict=True)):
            for word, times in count.items():
                found[word].append((number, times * (K1 + 1) / (times + K1 * (1 - B + B * size / mean))))
        self._scores = {
            word: [(number, score * math.log(1 + (len(passages) - len(those) + 0.5) / (len(those) + 0.5))) for number, score in those]
            for word, those in found.items()
        }  # fmt: skip

    @classmethod
    @cache
    def of_file(cls, path: str) -> SearchIndex:
        """The index of a file's rows, each the passage of its texts. Raises UserError if there is no such file, it has no end, or no text is in it."""
        rows = load_rows(path)
        if rows.generated:
            raise UserError(f"search:{path}: its rows are generated and never end; name a file of passages")
        passages = ["\n".join(filter(None, (str(row.get("title") or ""), *texts_of(row)))) for row in rows]
        if not any(passages):
            raise UserError(f"search:{path}: the rows have no texts; a passage is the column text")
        return cls(passages)

    def best(self, query: str, count: int) -> list[str]:
        """The passages with the highest scores, the best first; of equal ones the earlier."""
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(_words(query)[:MOST_WORDS]):
            for number, score in self._scores.get(word, ()):
                scores[number] += score
        ranked = sorted(scores, key=lambda number: (-scores[number], number))
        return [self.passages[number] for number in ranked[:count]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
