"""Turn MBPP's records (Austin et al. 2021, "Program Synthesis with Large Language Models") into training rows.

    python -m reward.mbpp mbpp.jsonl rows.jsonl [split]

A record has `text`, `code`, `test_list`, and maybe `task_id`, `split`, `test_setup_code` and
`challenge_test_list`, as in the data set's own file; the sanitised edition calls two of them `prompt` and
`test_imports`. The rows have `question`, `solution`, `answer` and `id`, which is what a recipe reads by default.
"""

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward.programs.names import bound_names, loaded_names
from reward.programs.unit_tests import plan_tests

_PROMPT = """{text}

The program has to pass these tests:
```
{tests}
```
Answer with the whole program in one block that starts with ```python and ends with ```."""


def mbpp_row(record: Mapping[str, Any], *, challenge: bool = False) -> dict[str, str]:
    """Return `question` (which shows the tests), `solution` (the reference program), `answer` (JSON) and `id`.

    With `challenge` the program must also pass the challenge tests, which the question does not show. Raises
    ValueError if the record lacks a part or its tests cannot be used, naming the task.
    """
    task = record.get("task_id", "without task_id")
    try:
        shown = list(record["test_list"])
        text = str(record["text"] if "text" in record else record["prompt"]).strip()
        code = str(record["code"]).replace("\r\n", "\n").strip()
    except (KeyError, TypeError) as error:
        raise ValueError(f"MBPP task {task}: no {error}; a record has text, code and test_list") from None
    tests = shown + (list(record.get("challenge_test_list") or []) if challenge else [])
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    setup = setup.replace("\r\n", "\n")
    try:
        setup = "\n".join([*_imports(code, tests, setup), *([setup] if setup else [])])
        answer = json.dumps({"tests": tests, "setup": setup, "entry": _entry(code, [setup, *tests])})
        plan_tests(answer)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"MBPP task {task}: {error}") from None
    return {
        "question": _PROMPT.format(text=text, tests="\n".join(shown)),
        "solution": f"```python\n{code}\n```",
        "answer": answer,
        "id": f"mbpp/{task}",
    }


def _entry(code: str, texts: list[str]) -> list[str]:
    """Names that the reference program defines and the tests use: some are those of built-in functions."""
    definitions = (ast.FunctionDef, ast.ClassDef, ast.Assign)
    defined = [bound_names(node) for node in ast.parse(code).body if isinstance(node, definitions)]
    return sorted(set[str]().union(*defined) & set[str]().union(*(loaded_names(ast.parse(text)) for text in texts)))


def _imports(code: str, tests: list[str], setup: str) -> list[str]:
    """What tests use and only the reference program imports: it is the tests' own, not any program's to define."""
    wanted = set[str]().union(*(loaded_names(ast.parse(test)) for test in tests)) - bound_names(ast.parse(setup))
    imports = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [ast.unparse(node) for node in imports if bound_names(node) & wanted]


def main(source: str, target: str, split: str | None = None) -> None:
    """Convert a JSON-lines file, all of it or the records of one split."""
    records = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [mbpp_row(record) for record in records if split in (None, record.get("split"))]
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} of {len(records)} records written to {target}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m reward.mbpp SOURCE.jsonl TARGET.jsonl [SPLIT]")
    main(*sys.argv[1:])
