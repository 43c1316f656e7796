"""Tables that ``datasets`` keeps on disk: made once, then memory-mapped. Everything can be deleted at any time."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl_rl.data.records import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

FORMAT = 3
"""Part of every key: raise it whenever what is written, or how it is worked out, changes."""


def cache_folder() -> Path:
    """``$PTL_CACHE``, else ``ptl-rl/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("PTL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptl-rl" / "data"


def key_of(*parts: Any) -> str:
    """One name for everything that a table depends on; ``parts`` must be representable in JSON."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """``datasets`` shows no progress bars of its own meanwhile."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def cached(
    key: str, features: "datasets.Features", make: "Callable[[], Iterator[pyarrow.Table]]"
) -> "datasets.Dataset":
    """The table of ``key``, made if it is missing or cannot be read; of several writers the others wait for the first.

    Raises:
        DataError: the cache cannot be written; and what ``make`` raises.
    """
    import datasets

    from ptl_rl.data.tables import Tables

    root = cache_folder()

    def table() -> "datasets.Dataset":
        builder = Tables(cache_dir=str(root), config_id=key, make=make, features=features)
        builder.download_and_prepare()
        rows = builder.info.splits["train"].num_examples
        if rows == 0:  # which `as_dataset` refuses
            return datasets.Dataset.from_dict({name: [] for name in features}, features)
        found = builder.as_dataset("train")
        if len(found) != rows:
            raise ValueError("the table was cut short")
        return found

    with quiet_datasets():
        try:
            try:
                return table()
            except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):  # the table is damaged
                shutil.rmtree(root / Tables.FOLDER / key, ignore_errors=True)
                return table()
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, OSError):
                raise _unwritable(root, error.__cause__) from None
            raise error.__cause__ or error from None
        except OSError as error:
            raise _unwritable(root, error) from None


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(f"{root}: cannot write prepared data: {error.strerror or error}; set PTL_CACHE to another folder")
