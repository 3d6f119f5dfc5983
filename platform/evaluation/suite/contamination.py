"""Which items of benchmarks the training data hold: a run of 13 words in common, as GPT-3's authors counted.

Documents are read once for all tasks; what is kept is 8 bytes for every run of words of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from calumma.platform.cluster.progress import Progress
from calumma.platform.curation.steps.words import Hashes, all_text, hashes, ngrams, words
from calumma.platform.shards.documents import read_documents

NGRAM = 13
SHORTEST = 8  # words: shorter items are in everything


def contaminated(
    texts: Mapping[str, Sequence[str]], training: Sequence[str], progress: Progress
) -> dict[str, list[bool]]:
    """Task -> of each item whether a training document has 13 words of it in a row, or all where it has fewer."""
    items: list[tuple[str, int, Hashes, int]] = []
    for task, own in texts.items():
        for number, text in enumerate(own):
            hashed = hashes(words(text))
            length = min(NGRAM, len(hashed))
            if length >= SHORTEST:
                items.append((task, number, ngrams(hashed, length), length))
    known = {
        length: np.unique(np.concatenate([runs for _, _, runs, own in items if own == length]))
        for length in {own for *_, own in items}
    }
    seen = {length: np.zeros(len(runs), bool) for length, runs in known.items()}
    count = 0
    for location in training:
        for document in read_documents(location):
            hashed = hashes(words(all_text(document)))
            for length, runs in known.items():
                said = ngrams(hashed, length)
                places = np.minimum(np.searchsorted(runs, said), len(runs) - 1)
                seen[length][places[runs[places] == said]] = True
            count += 1
            if count % 1000 == 0:
                progress(0, 1, f"contamination: {count:,} training documents")
    found = {task: [False] * len(own) for task, own in texts.items()}
    for task, number, runs, length in items:
        found[task][number] = bool(seen[length][np.searchsorted(known[length], runs)].any())
    return found
