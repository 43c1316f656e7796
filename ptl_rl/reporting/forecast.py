"""What a recipe will do, by arithmetic: shapes, parameters and FLOPs of every cycle."""

from rich.table import Table

from ptl_rl.config import RunConfig
from ptl_rl.driver.schedule import planned_cuts
from ptl_rl.families import ModelShape


def forecast_table(config: RunConfig, shape: ModelShape, model: str) -> Table:
    """One row per planned cycle; gate decisions can only add recovery or smaller cuts."""
    table = Table(title=f"{config.name}: {model}", title_justify="left")
    for heading in ("cycle", "layers", "channels", "parameters", "FLOPs/token", "GRPO steps", "rollouts"):
        table.add_column(heading, justify="right")
    current, rollouts = shape, 0
    per_step = config.recovery.prompts_per_step * config.recovery.rollouts_per_prompt

    def add(name: str, steps: int) -> None:
        table.add_row(
            name,
            str(current.num_hidden_layers),
            str(current.intermediate_size),
            f"{current.parameters:,} ({current.parameters / shape.parameters:.0%})",
            f"{current.flops_per_token():,} ({current.flops_per_token() / shape.flops_per_token():.0%})",
            str(steps or ""),
            f"{steps * per_step:,}" if steps else "",
        )

    add("original", 0)
    for cut in planned_cuts(config.schedule):
        current = current.sliced(cut.channels, cut.layers)
        steps = config.recovery.steps_of(cut.planned)
        rollouts += steps * per_step
        add(str(cut.planned + 1), steps)
    table.caption = f"{rollouts:,} rollouts of at most {config.data.max_response_tokens:,} tokens in all"
    return table
