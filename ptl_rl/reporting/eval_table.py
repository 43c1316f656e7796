"""The tables of ``ptl eval``."""

from typing import Any

from rich.table import Table

from ptl_rl.evaluation.speed import Load, ModelSpeed
from ptl_rl.tables import text_table


def task_table(option: str) -> Table:
    """What can be evaluated, and whose questions it asks; ``option`` names others."""
    from ptl_rl.evaluation.tasks import TASKS

    rows = [
        {
            "task": task.name,
            "what": task.what,
            "questions": task.sources[0].path if task.sources else f"{option} {task.name}=FILE",
            "max tokens": f"{task.max_tokens}",
        }
        for task in TASKS.values()
    ]
    return text_table(rows, left=("task", "what", "questions"), title="tasks")


def result_table(results: dict[str, Any]) -> Table:
    """Accuracy with its interval, lm-eval's own metrics, and what to know before believing them."""
    rows = []
    for name, figures in results["tasks"].items():
        own = "\n".join(f"{metric} {value:.1%}" for metric, value in figures["lm_eval"].items())
        solved = figures["seconds_per_solved"]
        rows.append(
            {
                "task": f"{name} ({figures['few_shot']}-shot)",
                "problems": f"{figures['problems']:,}",
                "accuracy": f"{figures['accuracy']:.1%}",
                "95 % interval": f"{figures['low']:.1%}-{figures['high']:.1%}",
                "truncated": f"{figures['truncated']}",
                "prompts cut": f"{figures['prompts_cut']}",
                "tokens/answer": f"{figures['tokens_per_answer']:.0f}",
                "s/solved": "-" if solved is None else f"{solved:.2f}",
                "time": f"{figures['seconds']:.0f} s",
                "lm-eval's own": own or "-",
            }
        )
    return text_table(rows, left=("task", "lm-eval's own"), title=results["model"])


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
