"""What a recipe may say of its data."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationInfo, WrapValidator, field_validator, model_validator

from ptl_rl.config.section import Section


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
        None, description="Hub name of the known corpus that this is a copy of, to be read as that is."
    )

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if self.fields is not None and self.layout is not None:
            raise ValueError("fields and layout both say how rows are read; set one of them")
        return self


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


class DataConfig(Section):
    train: Sources = Field(
        SourceConfig(path="testbed:rl", rows=4096), description="Problems; one source, or a list that is merged."
    )
    corpus: Sources | None = Field(
        None, description="Worked solutions or text for scoring and continued pre-training; default: train."
    )
    validation: SourceConfig = Field(
        SourceConfig(path="testbed:validation", rows=128), description="Problems that verl measures accuracy on in RL."
    )
    test: SourceConfig = Field(
        SourceConfig(path="testbed:test", rows=500),
        description="Problems that a run's accuracy, and so the gate, is of.",
    )
    prompt_suffix: str = Field("", description="Appended to every question, e.g. the instruction to box the answer.")
    max_prompt_tokens: int = Field(128, ge=1, description="Longest prompt, in tokens; RL leaves longer ones out.")
    max_response_tokens: int = Field(96, ge=1, description="Longest response, in tokens; generation ends there.")
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
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def corpus_sources(self) -> list[SourceConfig]:
        """Those of ``train`` where there is no corpus of its own."""
        if self.corpus is None:
            return self.train_sources
        return self.corpus if isinstance(self.corpus, list) else [self.corpus]

    def check_prompts(self, train: bool) -> None:
        """Raise ValueError for sources of problems that cannot be answered or judged; ``train``: those of train too."""
        named = {"data.validation": self.validation, "data.test": self.test}
        if train and isinstance(self.train, list):
            named |= {f"data.train.{place}": source for place, source in enumerate(self.train)}
        elif train:
            named["data.train"] = self.train_sources[0]
        for name, source in named.items():
            if source.fields is not None and source.fields.text is not None:
                raise ValueError(f"{name}.fields.text: plain text has no questions to be answered")
            if source.fields is not None and source.fields.answer is None:
                raise ValueError(f"{name}.fields.answer: null, but responses are judged by the answer")
