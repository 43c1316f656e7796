"""The tables of ``ptl eval``."""

from typing import Any

from rich.table import Table


def task_table() -> Table:
    """What can be evaluated, and whose questions it asks."""
    from ptl_rl.evaluation.tasks import TASKS

    table = Table(title="tasks", title_justify="left")
    for head in ("task", "what", "questions", "max tokens"):
        table.add_column(head, justify="right" if head == "max tokens" else "left")
    for task in TASKS.values():
        questions = task.sources[0].path if task.sources else f"--data {task.name}=FILE"
        table.add_row(task.name, task.what, questions, f"{task.max_tokens}")
    return table


def result_table(results: dict[str, Any]) -> Table:
    """Accuracy with its interval, lm-eval's own metrics, and what to know before believing them."""
    table = Table(title=results["model"], title_justify="left")
    table.add_column("task")
    for head in ("problems", "accuracy", "95 % interval", "truncated", "prompts cut", "tokens/answer", "time"):
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
            f"{figures['seconds']:.0f} s",
            own or "-",
        )
    return table
