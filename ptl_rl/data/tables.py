"""How ``datasets`` is given tables that are made here, batch by batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets
import pyarrow


@dataclass
class TablesConfig(datasets.BuilderConfig):
    """What is made, and its columns."""

    make: Callable[[], Iterator[pyarrow.Table]] | None = None
    features: datasets.Features | None = None


class Tables(datasets.ArrowBasedBuilder):
    """Writes what ``make`` yields as the one split of a data set."""

    BUILDER_CONFIG_CLASS = TablesConfig
    FOLDER = "tables"
    """In the cache, with a folder for each key."""

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[int, pyarrow.Table]]:
        yield from enumerate(self.config.make())
