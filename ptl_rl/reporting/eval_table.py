"""The tables of ``ptl eval``."""

from typing import Any

from rich.table import Table

from ptl_rl.evaluation.speed import Load, ModelSpeed


def task_table(option: str) -> Table:
    """What can be evaluated, and whose questions it asks; ``option`` names others."""
    from ptl_rl.evaluation.tasks import TASKS

    table = Table(title="tasks", title_justify="left")
    for head in ("task", "what", "questions", "max tokens"):
        table.add_column(head, justify="right" if head == "max tokens" else "left")
    for task in TASKS.values():
        questions = task.sources[0].path if task.sources else f"{option} {task.name}=FILE"
        table.add_row(task.name, task.what, questions, f"{task.max_tokens}")
    return table


def result_table(results: dict[str, Any]) -> Table:
    """Accuracy with its interval, lm-eval's own metrics, and what to know before believing them."""
    table = Table(title=results["model"], title_justify="left")
    table.add_column("task")
    for head in (
        "problems",
        "accuracy",
        "95 % interval",
        "truncated",
        "prompts cut",
        "tokens/answer",
        "s/solved",
        "time",
    ):
        table.add_column(head, justify="right")
    table.add_column("lm-eval's own")
    for name, figures in results["tasks"].items():
        own = "\n".join(f"{metric} {value:.1%}" for metric, value in figures["lm_eval"].items())
        table.add_row(
            f"{name} ({figures['few_shot']}-shot)",
            f"{figures['problems']:,}",
            f"{figures['accuracy']:.1%}",
            f"{figures['low']:.1%}-{figures['high']:.1%}",
            f"{figures['truncated']}",
            f"{figures['prompts_cut']}",
            f"{figures['tokens_per_answer']:.0f}",
            "-" if figures["seconds_per_solved"] is None else f"{figures['seconds_per_solved']:.2f}",
            f"{figures['seconds']:.0f} s",
            own or "-",
        )
    return table


def speed_table(models: list[ModelSpeed], loads: list[Load]) -> Table:
    """A column per model: sizes, speeds with their spread, and how much of the speedup that FLOPs promise is there."""
    table = Table(title="median (lowest-highest) of rounds taken in turns", title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(model.model, justify="right", overflow="fold")

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    row("parameters", [f"{m.parameters:,}" for m in models])
    row("weights, MiB", [f"{m.weight_bytes / 2**20:,.1f}" for m in models])
    row("FLOPs per token", [f"{m.flops_per_token:,}" for m in models])
    row("without the output head", [f"{m.flops_per_token_without_head:,}" for m in models])
    row("speedup that FLOPs promise", [f"{m.promised:.2f}" for m in models])
    for load in loads:
        speeds = [m.tokens_per_second[load.name] for m in models]
        ratios = [m.speedup[load.name] for m in models]
        row(f"{load.name}: tokens per second", [f"{s.median:,.0f} ({s.low:,.0f}-{s.high:,.0f})" for s in speeds])
        row(f"{load.name}: speedup", [f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios])
        row(f"{load.name}: of what is promised", [f"{m.kept(load.name):.2f}" for m in models])
    return table
