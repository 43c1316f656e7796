"""Split the training data into disjoint subsets, one per cycle, so that no cycle sees what another was tuned on."""

import hashlib

from ptl_rl.data.corpora import DataError, Record


def subset_hash(records: list[Record]) -> str:
    """Hash over the questions of a subset, order included; written into every plan and manifest."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(hashlib.sha256(record.question.encode()).digest())
    return digest.hexdigest()[:16]


def partition(records: list[Record], subsets: int) -> list[list[Record]]:
    """Deal ``records`` into ``subsets`` lists that share no question.

    A question that stands twice goes to the subset of its first copy, so that repeats cannot leak between cycles.
    The order of the records is kept, and sizes differ by at most one where no question repeats.

    Raises:
        DataError: fewer distinct questions than subsets.
    """
    home: dict[str, int] = {}
    parts: list[list[Record]] = [[] for _ in range(subsets)]
    for record in records:
        key = " ".join(record.question.split()).casefold()
        index = home.setdefault(key, len(home) % subsets)
        parts[index].append(record)
    if len(home) < subsets:
        raise DataError(f"the training data has {len(home)} distinct questions, but the run needs {subsets} subsets")
    return parts
