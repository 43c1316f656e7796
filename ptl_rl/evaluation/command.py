"""``ptl eval``: tasks on one model in one process; every finished task is kept, and not made again."""

import atexit
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, EvalConfig, SourceConfig
from ptl_rl.config.recipe import named_source
from ptl_rl.data.records import DataError
from ptl_rl.errors import check_plain, check_sockets, expanded
from ptl_rl.evaluation.harness import TaskResult, make_model, run_task
from ptl_rl.evaluation.task_data import Documents
from ptl_rl.evaluation.tasks import EvalTask, find_tasks, read_task
from ptl_rl.families import ModelShape, read_config_json, read_shape
from ptl_rl.models import check_readable, load_tokenizer, open_model

RESULTS = "results.json"


def default_folder(model: str) -> Path:
    """Where results of a model go: a folder of its own for every path or name."""
    path = expanded(model)
    name = str(path.resolve()) if path.exists() else model
    return Path("evaluations") / re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")


def sources(task: EvalTask, config: EvalConfig) -> tuple[SourceConfig, ...]:
    """Raises :class:`ConfigError` for a task whose questions have to be named and are not."""
    if task.name in config.data:
        return (named_source(config.data[task.name], f"`data` {task.name}", split="test"),)
    if not task.sources:
        raise ConfigError(f"`tasks` {task.name}: whose questions? Name them: `data` {task.name}=FILE")
    return task.sources


@dataclass(frozen=True)
class Prepared:
    """A task that can be run: its questions are read."""

    task: EvalTask
    documents: Documents
    max_tokens: int
    key: str
    """Differs where anything does that the result depends on, but the machine."""


def prepare(model: str, config: EvalConfig) -> tuple[Path, list[Prepared]]:
    """Everything that can be found wrong before a model is loaded, found.

    Raises:
        ConfigError: a model, task or data set that cannot be used.
    """
    check_sockets()
    tasks = find_tasks(config.tasks)
    names = [task.name for task in tasks]
    if unknown := [name for name in config.data if name not in names]:
        raise ConfigError(f"`data` {unknown[0]}: none of the tasks that are run ({', '.join(names)})")
    folder, _ = open_model(model)
    check_plain(folder)
    check_readable(folder)
    load_tokenizer(folder, config.trust_remote_code)
    identity, window = _identity(folder), context_window(folder, config)
    found = []
    for task in tasks:
        try:
            documents = read_task(task, sources(task, config), config.limit)
        except DataError as error:
            raise ConfigError(f"{error} (`data` {task.name}=FILE names another source)") from None
        max_tokens = response_tokens(task, config, window)
        depends = config.model_dump(exclude={"tasks", "data", "tensor_parallel_size", "batch_size"})
        depends |= {"task": task.name, "max_tokens": max_tokens, "data": documents.fingerprint, "model": identity}
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        found.append(Prepared(task, documents, max_tokens, key))
    return folder, found


def context_window(folder: Path, config: EvalConfig) -> int:
    """Tokens that prompt and response may have together."""
    positions = int(read_config_json(folder).get("max_position_embeddings") or 2048)
    return min(positions, config.max_model_tokens or positions)


def response_tokens(task: EvalTask, config: EvalConfig, window: int) -> int:
    """The generation limit: what was asked for, or the task's own where that leaves half of the window to the prompt.

    Raises:
        ConfigError: what was asked for leaves no room for a prompt.
    """
    if config.max_tokens is None:
        return min(task.max_tokens, window // 2)
    if config.max_tokens >= window:
        raise ConfigError(
            f"`max_tokens` {config.max_tokens} leaves no room for a prompt: the model reads {window} tokens"
        )
    return config.max_tokens


def _identity(folder: Path) -> str:
    """Changes with the model's files, as far as names, sizes and times tell."""
    digest = hashlib.sha256(str(folder).encode())
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_results(out: Path) -> dict[str, Any]:
    """What an earlier evaluation left in a folder, by task; nothing if there was none.

    Raises:
        ConfigError: its file cannot be read.
    """
    path = out / RESULTS
    try:
        return json.loads(path.read_text())["tasks"] if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not what ptl eval writes ({error}); name another `out`, or remove it") from None


def evaluate_model(
    folder: Path,
    prepared: list[Prepared],
    config: EvalConfig,
    out: Path,
    *,
    starting: Callable[[str], None] = lambda what: None,
    judged: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run the tasks that ``out`` does not hold yet; each is written when it is done.

    Returns:
        the content of ``results.json``: ``model``, and by task its figures, key and table of samples.
    """
    identity = _identity(folder)
    # What is there of another model, or of this one before it changed, is not carried on.
    results = {name: found for name, found in read_results(out).items() if found.get("model_identity") == identity}
    kept = {p.task.name: results[p.task.name] for p in prepared if results.get(p.task.name, {}).get("key") == p.key}
    missing = [p for p in prepared if p.task.name not in kept]
    shape = read_shape(folder)
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        starting("loading the model")
        cpu = prepare_machine()
        from ptl_rl.checkpoints.read import check_finite  # and torch with it, which --list-tasks does not wait for

        check_finite(folder)
        model = _model(folder, config, cpu)
        tokenizer = model.tokenizer
    for p in missing:
        starting(f"{p.task.name}: {len(p.documents.documents)} questions")
        result, rows = run_task(
            model,
            p.task,
            p.documents.documents,
            prompt=lambda question: zero_shot_prompt(tokenizer, question + config.prompt_suffix),
            max_tokens=p.max_tokens,
            seed=config.seed,
            judged=judged,
        )
        samples = _write_samples(out, p.task.name, rows)
        kept[p.task.name] = {**_figures(p, result, samples, config, shape), "model_identity": identity}
        ordered = {name: kept[name] for name in [q.task.name for q in prepared] if name in kept}
        _write_json(out / RESULTS, {"model": str(folder), "tasks": {**results, **ordered}})
    return {"model": str(folder), "tasks": {p.task.name: kept[p.task.name] for p in prepared}}


def zero_shot_prompt(tokenizer, question: str) -> str:
    """The text of :func:`ptl_rl.data.prompts.prompt_ids`."""
    if tokenizer.chat_template is None:
        return question + "\n"
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _figures(p: Prepared, result: TaskResult, samples: str, config: EvalConfig, shape: ModelShape) -> dict[str, Any]:
    data = config.data.get(p.task.name) or [source.path for source in p.task.sources]
    return {
        "key": p.key,
        "what": p.task.what,
        **asdict(result),
        "parameters": shape.parameters,
        "flops_per_token": shape.flops_per_token(),
        "flops_per_token_without_head": shape.flops_per_token(output_head=False),
        "flops_per_answer": flops_per_answer(shape, result.prompt_tokens, result.tokens_per_answer),
        "left_out": p.documents.left_out,
        "data": data,
        "data_fingerprint": p.documents.fingerprint,
        "samples": samples,
    }


def quieten_libraries() -> None:
    """Set what libraries read when they are imported: no chatter, and bars on a terminal only. Call it first."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def quieten_exit() -> None:
    """For a process of our own alone: Triton's bindings complain at length about references that its end leaves."""
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))  # first in, last out


def flops_per_answer(shape: ModelShape, prompt_tokens: float, response_tokens: float) -> float:
    """FLOPs to read a prompt and write a response: each token attends to those before it, and the head is computed
    for what is written only."""
    length = prompt_tokens + response_tokens
    body = shape.flops_per_token(output_head=False)
    attention = shape.flops_per_token(1, output_head=False) - body  # of one token to one other
    head = shape.flops_per_token() - body
    return length * body + attention * length * (length + 1) / 2 + head * response_tokens


def prepare_machine() -> bool:
    """Set what vLLM reads when it is imported; returns whether this machine has no GPU."""
    from ptl_rl.cpu import checks, vllm_alias

    cpu = checks.is_cpu_only()
    if cpu:
        for name, value in checks.cpu_env_vars().items():
            os.environ.setdefault(name, value)
        # In this process: nothing is left behind when it ends.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    else:
        os.environ.update(checks.cuda_env_vars())
    vllm_alias.register()
    return cpu


def _model(folder: Path, config: EvalConfig, cpu: bool) -> Any:
    try:
        return make_model(
            folder,
            max_model_tokens=context_window(folder, config),
            dtype=("float32" if cpu else "bfloat16") if config.dtype == "auto" else config.dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            bars=sys.stderr.isatty(),
            max_num_seqs=config.batch_size,
            seed=config.seed,
            enforce_eager=cpu,
            trust_remote_code=config.trust_remote_code,
        )
    except ImportError as error:
        raise ConfigError(f"{error}; evaluation needs lm-eval and vLLM: pip install 'ptl-rl[eval]'") from None


def _write_samples(out: Path, name: str, rows: list[Any]) -> str:
    import pyarrow
    import pyarrow.parquet

    path = out / f"{name}.parquet"
    partial = path.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(row) for row in rows]), partial)
    partial.replace(path)
    return path.name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
