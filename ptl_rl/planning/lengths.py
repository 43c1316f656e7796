"""Whether a model can read as many tokens as a recipe has it read."""

from typing import Any

from ptl_rl.config import CptConfig, RunConfig


def positions(values: dict[str, Any]) -> int | None:
    """Tokens that a model reads at once, by its ``config.json``; None if that does not say."""
    found = values.get("max_position_embeddings")
    if not isinstance(found, int):
        return None
    scaling = values.get("rope_scaling") or values.get("rope_parameters")
    if isinstance(scaling, dict) and isinstance(scaling.get("factor"), int | float):
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind in ("yarn", "linear", "dynamic"):
            before = scaling.get("original_max_position_embeddings")
            return int(scaling["factor"] * (before if isinstance(before, int) else found))
    return found


def too_long(config: RunConfig, values: dict[str, Any], where: str) -> str | None:
    """Why vLLM would refuse the longest prompt and response, if it would."""
    most, data = positions(values), config.data
    responses = {"data.max_response_tokens": data.max_response_tokens if config.needs_answers else 0}
    name = "data.max_response_tokens"
    if config.evaluation.max_response_tokens is not None:
        name = "evaluation.max_response_tokens"
    responses[name] = config.evaluation.max_response_tokens or data.max_response_tokens
    longest = max(responses, key=lambda setting: responses[setting])
    if most is None or data.max_prompt_tokens + responses[longest] <= most:
        return None
    return (
        f"data.max_prompt_tokens {data.max_prompt_tokens} and {longest} {responses[longest]} are more than the {most} "
        f"tokens that {where} can read at once (max_position_embeddings); lower them, together to {most} at most"
    )


def length_notes(config: RunConfig, values: dict[str, Any]) -> list[str]:
    """Settings by which longer texts than the model can read would be read, if there are any."""
    most, settings = positions(values), {}
    if most is None:
        return []
    if not config.schedule.recover_only:
        settings["calibration.max_tokens"] = config.calibration.max_tokens
    for recovery in config.all_recoveries:
        if isinstance(recovery, CptConfig):
            settings["recovery.max_tokens"] = max(recovery.max_tokens, settings.get("recovery.max_tokens", 0))
    return [
        f"{name} {tokens} is more than the {most} tokens that the model can read at once; if there are texts so long, "
        f"set it to {most}"
        for name, tokens in settings.items()
        if tokens > most
    ]
