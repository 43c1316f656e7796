"""What a recipe will do, by arithmetic: shapes, parameters and FLOPs of every cycle."""

from rich.table import Table

from ptl_rl.config import RunConfig
from ptl_rl.driver.schedule import planned_cuts
from ptl_rl.families import ModelShape
from ptl_rl.recovery.settings import CptConfig


def forecast_table(config: RunConfig, shape: ModelShape, model: str) -> Table:
    """One row per planned cycle; gate decisions can only add recovery or smaller cuts."""
    table = Table(title=f"{config.name}: {model}", title_justify="left")
    for heading in ("cycle", "layers", "channels", "parameters", "FLOPs/token", "steps", "rollouts", "read tokens"):
        table.add_column(heading, justify="right")
    current, rollouts = shape, 0

    def add(name: str, steps: str, rolled_out: int, tokens: int) -> None:
        table.add_row(
            name,
            str(current.num_hidden_layers),
            str(current.intermediate_size),
            f"{current.parameters:,} ({current.parameters / shape.parameters:.0%})",
            f"{current.flops_per_token():,} ({current.flops_per_token() / shape.flops_per_token():.0%})",
            steps,
            f"{rolled_out:,}" if rolled_out else "",
            f"{tokens:,}" if tokens else "",
        )

    add("original", "", 0, 0)
    for cut in planned_cuts(config.schedule):
        current = current.sliced(cut.channels, cut.layers)
        counts = [(recovery, recovery.steps_of(cut.planned)) for recovery in config.recoveries(cut.planned)]
        rolled_out = sum(
            n * r.prompts_per_step * r.rollouts_per_prompt for r, n in counts if not isinstance(r, CptConfig)
        )
        tokens = sum(n * _tokens_per_step(r) for r, n in counts if isinstance(r, CptConfig))
        rollouts += rolled_out
        add(str(cut.planned + 1), " + ".join(f"{n} {r.method}" for r, n in counts), rolled_out, tokens)
    captions = []
    if rollouts:
        captions.append(f"{rollouts:,} rollouts of at most {config.data.max_response_tokens:,} tokens in all")
    if any(isinstance(recovery, CptConfig) for recovery in config.all_recoveries):
        captions.append("read tokens: at most; a sequence may be shorter")
    table.caption = "; ".join(captions)
    return table


def _tokens_per_step(recovery: CptConfig) -> int:
    return recovery.tokens_per_step or recovery.sequences_per_step * recovery.max_tokens
