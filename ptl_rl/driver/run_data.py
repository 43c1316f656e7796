"""The data of a run before its next stage: written into its folder once, and held against what is known of it."""

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.data.frozen import REMEDY, FrozenData, freeze
from ptl_rl.data.records import DataError
from ptl_rl.driver.journal import Entry
from ptl_rl.driver.run_folder import RunFolder
from ptl_rl.driver.state import data_subsets


def prepare_data(config: RunConfig, folder: RunFolder, entries: list[Entry]) -> None:
    """Freeze the data of a run that has none yet, and compare its hashes.

    A run of an earlier version has none, though stages have read it: then the sources must still give what these read.

    Raises:
        ConfigError: a source cannot be used any more, or the rows are not those that the run began with.
    """

    def compare(data: FrozenData) -> None:
        for entry in entries:
            _compare_subset(config, data, entry)
            _compare_problems(folder, data, entry)

    data, subsets = FrozenData(folder.data), data_subsets(config)
    try:
        if not data.exists:
            freeze(config, subsets, folder.data, compare)
            return
        if others := data.made_otherwise(config, subsets):
            raise ConfigError(
                f"{folder.config}: {', '.join(others)}: not what {folder.data} was written with; {REMEDY}"
            )
        data.check()
        compare(data)
    except DataError as error:
        raise ConfigError(str(error)) from None


def _compare_subset(config: RunConfig, data: FrozenData, entry: Entry) -> None:
    """Hold the subset that a finished stage has read against the run's."""
    read = entry.metrics.get("subset_hash")
    if read is None:
        return
    is_solutions = entry.stage == "score" or entry.metrics.get("method") == "cpt"
    name = data.name_of_solutions if is_solutions else "train"
    frozen = dict(enumerate(data.facts_of(name)["subsets"], 1)).get(entry.cycle)
    if read != frozen:
        sources = config.data.corpus_sources if name == "corpus" else config.data.train_sources
        paths = ", ".join(source.path for source in sources)
        raise ConfigError(
            f"{data.folder.parent}: cycle {entry.cycle} read other rows of data.{name} than there are now "
            f"(hash {read}, now {frozen}): {paths} was changed since; {REMEDY}"
        )


def _compare_problems(folder: RunFolder, data: FrozenData, entry: Entry) -> None:
    """Hold the problems that a finished evaluation has put against the run's."""
    path = folder.path / (entry.artefact or "") / "samples.parquet"
    if entry.stage != "evaluate" or not path.is_file():
        return
    import pyarrow
    import pyarrow.parquet

    try:
        asked = pyarrow.parquet.read_table(path, columns=["question", "expected"]).to_pylist()
    except (OSError, pyarrow.ArrowException):
        return  # a table that was cut short or taken away says nothing
    problems = [(record.question, record.answer) for record in data.evaluation("test")]
    if [(row["question"], row["expected"]) for row in asked] != problems:
        raise ConfigError(
            f"{data.folder.parent}: cycle {entry.cycle} was judged on other problems than data.test has now; {REMEDY}"
        )
