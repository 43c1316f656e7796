"""What a recipe may say of its data."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationInfo, WrapValidator, field_validator, model_validator

from ptl_rl.config.section import Section

TESTBED = "testbed:"
"""Begins the path of a source whose problems are made."""
HUB = "hub:"
"""Begins the path of a source that is a data set of the hub."""
EvaluationSet = Literal["validation", "test"]
MOST_HELD_OUT: dict[EvaluationSet, int] = {"validation": 128, "test": 500}
"""Rows of evaluation sets that no recipe names."""


def sister_split(path: str, split: EvaluationSet) -> str:
    """The test bed's source of the same kind and levels as ``path``, of another split; word problems for other data."""
    if not path.startswith(TESTBED):
        return f"{TESTBED}{split}"
    name, colon, levels = path.removeprefix(TESTBED).partition(":")
    kind = "programs-" if name.startswith("programs-") else ""
    return f"{TESTBED}{kind}{split}{colon}{levels}"


class FieldMap(Section):
    """Names of the columns that hold each part of a record."""

    question: str = Field("question", description="Column of the question.")
    solution: str = Field("solution", description="Column of the worked solution.")
    answer: str | None = Field(
        "answer", description="Column of the answer; null: there is none, for data without rewards."
    )
    text: str | None = Field(
        None, description="Column of plain text, for data without questions; the others are not read."
    )


class SourceConfig(Section):
    path: str = Field(
        description="'testbed:SPLIT', a .jsonl, .parquet or .arrow file, a folder of datasets.save_to_disk, or "
        "'hub:NAME' of a hub data set."
    )
    config: str | None = Field(None, description="Configuration of a hub data set that has several.")
    split: str | None = Field(None, description="Split of a hub data set or a saved folder; default: train.")
    rows: int | None = Field(None, ge=1, description="Use the first so many rows (after a seeded shuffle).")
    fields: FieldMap | None = Field(
        None, description="Names of the columns; default: those of the known corpus, or question, solution and answer."
    )
    layout: str | None = Field(
        None,
        description="Hub name of the known corpus that this is a copy of, to be read as that is; or verl: rows as its "
        "own scripts write them.",
    )

    @field_validator("path")
    @classmethod
    def _named(cls, path: str) -> str:
        if path.startswith(HUB) and not path.removeprefix(HUB).strip("/ "):
            raise ValueError(f"{path!r} names no data set; write {HUB}OWNER/NAME, as {HUB}openai/gsm8k")
        return path

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if self.fields is not None and self.layout is not None:
            raise ValueError("fields and layout both say how rows are read; set one of them")
        return self

    @property
    def is_made(self) -> bool:
        """Whether its problems are the test bed's."""
        return self.path.startswith(TESTBED)

    @property
    def may_have_answers(self) -> bool:
        return self.fields is None or (self.fields.text is None and self.fields.answer is not None)


def _one_or_more(value: Any, _handler: Any) -> Any:
    """Not a plain union, whose errors would name both alternatives."""
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list; name at least one source")
        return TypeAdapter(list[SourceConfig]).validate_python(value)
    return SourceConfig.model_validate(value)


Sources = Annotated[SourceConfig | list[SourceConfig], WrapValidator(_one_or_more)]


class DecontaminateConfig(Section):
    """When a row of the training data counts as a copy of an evaluation question."""

    ngram: int = Field(13, ge=2, description="Words in a row that are compared; shorter questions are compared whole.")
    min_overlap: float = Field(
        0.1, ge=0, le=1, description="Share of a question's n-grams that a row must hold to be dropped; 0: one."
    )


TESTBED_TRAIN = SourceConfig(path="testbed:rl", rows=4096)


def held_out_rows(total: int, share: float) -> dict[EvaluationSet, int]:
    """Rows of each evaluation set where ``share`` of ``total`` are held out: three quarters are test's."""
    return {
        "validation": min(MOST_HELD_OUT["validation"], int(total * share / 4 + 1e-6)),
        "test": min(MOST_HELD_OUT["test"], int(total * share * 3 / 4 + 1e-6)),
    }


class DataConfig(Section):
    train: Sources | None = Field(
        None,
        description="Problems; one source, or a list that is merged. Default: 4096 problems of the test bed, for its "
        "own models alone.",
    )
    corpus: Sources | None = Field(
        None, description="Worked solutions or text for scoring and continued pre-training; default: train."
    )
    validation: SourceConfig | None = Field(
        None, description="Problems that RL is measured on before its first step; default: held out, as test."
    )
    test: SourceConfig | None = Field(
        None,
        description="Problems that every cycle is judged on. Default: rows held out of train (of corpus, where train "
        "is not set or has no answers); the test bed's own where all of that is the test bed's.",
    )
    held_out: float = Field(
        0.2,
        gt=0,
        le=0.5,
        description="Where test or validation is not set, most of the rows that go there: three quarters to test, at "
        "most 500, a quarter to validation, at most 128.",
    )
    prompt_suffix: str | None = Field(
        None,
        description="Appended to every question. Default: the instruction to reason and to box the answer, where "
        "answers are judged by their box; none for problems of the test bed.",
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Longest prompt, in tokens; RL leaves longer ones out, evaluation cuts their beginning."
    )
    max_response_tokens: int = Field(3072, ge=1, description="Longest response, in tokens; generation ends there.")
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="Share of malformed rows that is dropped.")
    deduplicate: Literal["question", "exact", "off"] = Field(
        "question",
        description="Of train and of corpus, rows with a question that came before go; exact: question and solution.",
    )
    decontaminate: DecontaminateConfig | None = Field(
        DecontaminateConfig(), description="Rows of train and corpus that overlap with validation or test go; or: off."
    )

    @field_validator("deduplicate", "decontaminate", mode="before")
    @classmethod
    def _switch(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a plain ``off`` as false."""
        if value in (False, "off"):
            return "off" if info.field_name == "deduplicate" else None
        return cls.model_fields[str(info.field_name)].default if value in (True, "on") else value

    @property
    def train_sources(self) -> list[SourceConfig]:
        if self.train is None:
            return [TESTBED_TRAIN]
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def corpus_sources(self) -> list[SourceConfig]:
        """Those of ``train`` where there is no corpus of its own."""
        if self.corpus is None:
            return self.train_sources
        return self.corpus if isinstance(self.corpus, list) else [self.corpus]

    def learnt(self, train: bool) -> tuple[Literal["train", "corpus"], list[SourceConfig]]:
        """Name and sources of what evaluation sets are held out of where none are named.

        That is train wherever it is set and may have answers, whatever the recovery, so that different recoveries on
        the same data are judged on the same problems.

        Args:
            train: training prompts are answered, so that train is read where it is not set, too.
        """
        is_usable = self.train is not None and any(source.may_have_answers for source in self.train_sources)
        if self.corpus is None or is_usable or (train and self.train is None):
            return "train", self.train_sources
        return "corpus", self.corpus_sources

    def evaluation_set(self, name: EvaluationSet, train: bool) -> SourceConfig | None:
        """The source of an evaluation set; None: rows held out of :meth:`learnt`."""
        named: SourceConfig | None = getattr(self, name)
        sources = self.learnt(train)[1]
        if named is not None or not all(source.is_made for source in sources):
            return named
        return SourceConfig(path=sister_split(sources[0].path, name), rows=MOST_HELD_OUT[name])

    def unnamed_sets(self, train: bool) -> list[EvaluationSet]:
        """Those that are held out."""
        names: tuple[EvaluationSet, ...] = ("test", "validation")
        return [name for name in names if self.evaluation_set(name, train) is None]

    def check_prompts(self, train: bool) -> None:
        """Raise ValueError for sources of problems that cannot be answered or judged; ``train``: those of train too."""
        named = {"data.validation": self.validation, "data.test": self.test}
        if train and isinstance(self.train, list):
            named |= {f"data.train.{place}": source for place, source in enumerate(self.train)}
        elif train:
            named["data.train"] = self.train_sources[0]
        for name, source in named.items():
            if source is None or source.fields is None:
                continue
            if source.fields.text is not None:
                raise ValueError(f"{name}.fields.text: plain text has no questions to be answered")
            if source.fields.answer is None:
                raise ValueError(f"{name}.fields.answer: null, but responses are judged by the answer")
        unnamed, (name, sources) = self.unnamed_sets(train), self.learnt(train)
        if unnamed and not any(source.may_have_answers for source in sources):
            raise ValueError(
                f"{' and '.join(f'data.{unset}' for unset in unnamed)}: not set, and data.{name} has no answers to be "
                "judged by (plain text, or fields.answer: null), so that no rows can be held out of it; set data.test "
                "and data.validation to problems with answers"
            )
