"""The loop as arithmetic: what comes next follows from the journal alone, at every instant."""

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import parse_config
from ptl_rl.driver.gate import decide, low_baseline
from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import ORIGINAL, data_subsets, fold, next_stage, stage_of
from ptl_rl.planning.schedule import halved, methods_and_steps, planned_cuts, recovery_steps


def config(recovery=None, **gate):
    schedule = {"channels_per_cycle": 128, "channels_total": 256, "alignment": 32}
    return parse_config({"schedule": schedule, "gate": gate, **(recovery or {})})


def simulate(run_config, accuracies: list[float], baseline: float = 0.8, dead: tuple[str, ...] = ()) -> list[Entry]:
    """Follow ``next_stage`` to the end; ``accuracies`` are those of successive evaluations after the first.

    Args:
        dead: labels of recoveries whose rewards taught nothing.
    """
    entries: list[Entry] = []
    remaining = iter(accuracies)
    for _ in range(200):
        state = fold(run_config, entries)
        stage = next_stage(state)
        if stage is None:
            return entries
        metrics: dict = {}
        if stage.label in dead:
            metrics = {"learns": False}
        if stage.name == "evaluate":
            metrics = {"accuracy": baseline if stage.cycle == 0 else next(remaining)}
        elif stage.name == "gate":
            decision = decide(
                run_config.gate,
                accuracy=state.accuracy,
                baseline=state.baseline,
                rounds=state.rounds,
                retries=state.retries,
                divisible=state.cuts[0].channels >= 64,
                learns=state.learns,
                rescue=bool(run_config.recovery_if_unlearnable) and state.rescue_round is None,
            )
            metrics = {"decision": decision}
        entries.append(
            Entry(
                cycle=stage.cycle,
                stage=stage.name,
                round=stage.round,
                part=stage.part,
                artefact=f"cycles/{stage.label}",
                metrics=metrics,
            )
        )
    raise AssertionError("the loop does not end")


def names(entries):
    return [f"{e.cycle}.{e.stage}" + (f".{e.round}" if e.round else "") for e in entries]


def test_a_run_that_only_recovers_neither_scores_nor_slices():
    run_config = parse_config({"schedule": {"recover_only": True}, "gate": {"max_extensions": 1, "max_retries": 2}})
    entries = simulate(run_config, [0.7, 0.79])
    assert names(entries) == [
        "0.evaluate",
        "1.recover",
        "1.evaluate",
        "1.gate",
        *(f"1.{stage}.1" for stage in ("recover", "evaluate", "gate")),
    ]
    state = fold(run_config, entries)
    assert next_stage(state) is None and state.source == entries[4].artefact
    assert halved(planned_cuts(run_config.schedule)[0], 1) is None


def test_straight_run():
    run_config = config()
    entries = simulate(run_config, [0.8, 0.79])
    per_cycle = ["score", "slice", "recover", "evaluate", "gate"]
    assert names(entries) == ["0.evaluate"] + [f"{c}.{s}" for c in (1, 2) for s in per_cycle]
    state = fold(run_config, entries)
    assert next_stage(state) is None and not state.stopped
    assert state.source == "cycles/002-recover"


def test_several_recoveries_follow_one_another():
    schedule = {"channels_per_cycle": 128, "channels_total": 256, "alignment": 32}
    recovery = {"recovery": [{"cpt": {}}, {"grpo": {}}], "recovery_of_cycle": {2: {"cpt": {}}}}
    run_config = parse_config({"schedule": schedule, **recovery})
    entries = simulate(run_config, [0.5, 0.79, 0.79])
    recoveries = [(e.cycle, e.round, e.part) for e in entries if e.stage == "recover"]
    assert recoveries == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 0)]
    after_cpt = fold(run_config, entries[: [e.stage for e in entries].index("recover") + 1])
    assert after_cpt.recovered == "cycles/001-recover"  # what the second of them starts from
    assert next_stage(after_cpt).label == "001-recover-part2"


@pytest.mark.parametrize("recovery", [{}, {"recovery": [{"cpt": {}}, {"grpo": {}}]}])
def test_every_prefix_continues_with_the_next_entry(recovery):
    """Killed after any journal line, the run goes on exactly where it would have."""
    run_config = config(recovery, max_extensions=1, max_retries=1)
    entries = simulate(run_config, [0.5, 0.5, 0.79, 0.79, 0.6, 0.79])
    for length, entry in enumerate(entries):
        assert next_stage(fold(run_config, entries[:length])) == stage_of(entry)
    assert next_stage(fold(run_config, entries)) is None


def test_failing_cycle_is_extended_then_taken_back_and_halved():
    run_config = config(max_extensions=1, max_retries=1)
    entries = simulate(run_config, [0.5, 0.5, 0.79, 0.79, 0.79])
    decisions = [e.metrics["decision"] for e in entries if e.stage == "gate"]
    assert decisions == ["extend", "retry", "accept", "accept", "accept"]
    after_retry = fold(run_config, entries[: names(entries).index("1.gate.1") + 1])
    assert after_retry.source == ORIGINAL
    assert [cut.channels for cut in after_retry.cuts] == [64, 64, 128]
    assert fold(run_config, entries).cuts == []
    assert len({e.cycle for e in entries}) - 1 <= data_subsets(run_config)


def test_extension_recovers_the_recovered_checkpoint():
    run_config = config(max_extensions=1)
    entries = simulate(run_config, [0.5, 0.79, 0.79])
    before_second = fold(run_config, entries[: names(entries).index("1.recover.1")])
    assert before_second.recovered == "cycles/001-recover"
    assert before_second.source == ORIGINAL


RESCUED = {
    "recovery": [{"grpo": {"min_learnable_fraction": 0.1}}],
    "recovery_if_unlearnable": [{"cpt": {"steps": [3, 5]}}, {"grpo": {"steps": 7}}],
}


def test_where_rewards_taught_nothing_a_cycle_recovers_once_by_what_the_recipe_has_for_that():
    run_config = config(RESCUED, max_extensions=1)
    entries = simulate(run_config, [0.2, 0.5, 0.79, 0.79], dead=("001-recover",))
    decisions = [e.metrics["decision"] for e in entries if e.stage == "gate"]
    assert decisions == ["rescue", "extend", "accept", "accept"]
    recoveries = [(e.cycle, e.round, e.part) for e in entries if e.stage == "recover"]
    assert recoveries == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 0, 0)]
    for length, entry in enumerate(entries):
        state = fold(run_config, entries[:length])
        assert next_stage(state) == stage_of(entry)
        assert state.is_rescuing == ((entry.cycle, entry.round) == (1, 1))
    assert recovery_steps(run_config, 1, part=0, unlearnable=True) == 5
    assert methods_and_steps(run_config, 0, True) == [("cpt", 3), ("grpo", 7)]


def test_rewards_that_taught_nothing_in_one_of_several_recoveries_are_not_asked_for_again():
    several = {**RESCUED, "recovery": [*RESCUED["recovery"], {"cpt": {}}]}
    entries = simulate(config(several, max_extensions=1), [0.2, 0.79, 0.79], dead=("001-recover",))
    assert [e.metrics["decision"] for e in entries if e.stage == "gate"] == ["rescue", "accept", "accept"]


def test_in_place_what_is_for_dead_rewards_makes_the_steps_of_the_last_cut():
    schedule = {"mode": "in_place", "channels_per_cycle": [128, 64], "alignment": 32}
    run_config = parse_config({"schedule": schedule, **RESCUED})
    assert methods_and_steps(run_config, 0, True) == [("cpt", 5), ("grpo", 7)]


def test_rewards_that_stay_dead_are_left_to_the_gate():
    run_config = config(RESCUED, max_extensions=1, on_failure="stop")
    entries = simulate(run_config, [0.2, 0.2], dead=("001-recover", "001-recover-1-part2"))
    assert [e.metrics["decision"] for e in entries if e.stage == "gate"] == ["rescue", "stop"]
    good = simulate(run_config, [0.79, 0.79], dead=("001-recover",))  # dead, as everything is right
    assert [e.metrics["decision"] for e in good if e.stage == "gate"] == ["accept", "accept"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recovery": [{"grpo": {}}]},
            "recovery_if_unlearnable waits for a recovery that ends as rewards teach nothing",
        ),
        (
            {"recovery": [{"grpo": {}}], "recovery_if_unlearnable": [{"grpo": {"min_learnable_fraction": 0.1}}]},
            "recovery_if_unlearnable waits for a recovery that ends as rewards teach nothing",
        ),
        (
            {"gate": {"min_accuracy_ratio": 0}},
            "recovery_if_unlearnable follows where the gate finds too little accuracy",
        ),
        (
            {"recovery_if_unlearnable": [{"cpt": {"learning_rate_schedule": "cosine_after_cuts"}}]},
            "recovery_if_unlearnable: learning_rate_schedule cosine_after_cuts is of a training with several cuts",
        ),
        (
            {"recovery": [{"cpt": {}}], "calibration": {"source": "rollouts"}},
            r"calibration\.source is rollouts, but no recovery is grpo",
        ),
    ],
)
def test_what_would_never_follow_is_refused(changes, message):
    schedule = {"channels_per_cycle": 128, "channels_total": 256, "alignment": 32}
    with pytest.raises(ConfigError, match=message):
        parse_config({"schedule": schedule, **RESCUED, **changes})


def test_stop_keeps_the_last_accepted():
    run_config = config(max_extensions=0, on_failure="stop")
    entries = simulate(run_config, [0.79, 0.1])
    state = fold(run_config, entries)
    assert state.stopped and state.source == "cycles/001-recover"


def test_gate_decisions():
    gate = config(min_accuracy_ratio=0.9, max_extensions=1, max_retries=1, on_failure="stop").gate
    base = {"baseline": 0.8, "rounds": 1, "retries": 0, "divisible": True}
    assert decide(gate, accuracy=0.72, **base) == "accept"
    assert decide(gate, accuracy=0.71, **base) == "extend"
    assert decide(gate, accuracy=0.71, **base, learns=False) == "retry"  # the same again would bring nothing
    assert decide(gate, accuracy=0.71, **base, learns=False, rescue=True) == "rescue"
    assert decide(gate, accuracy=0.71, **base, rescue=True) == "extend"
    assert decide(gate, accuracy=0.72, **base, learns=False, rescue=True) == "accept"
    assert decide(gate, accuracy=0.71, **{**base, "rounds": 2}) == "retry"
    assert decide(gate, accuracy=0.71, **{**base, "rounds": 2, "divisible": False}) == "stop"
    assert decide(gate, accuracy=0.71, **{**base, "rounds": 2, "retries": 1}) == "stop"
    relaxed = gate.model_copy(update={"on_failure": "continue"})
    assert decide(relaxed, accuracy=0.71, **{**base, "rounds": 2, "retries": 1}) == "accept_below"


def test_a_baseline_of_nothing_stops_the_run_after_cycle_0():
    """0 is 95 % of 0: every cycle would be accepted."""
    entries = simulate(config(), [], baseline=0.0)
    assert names(entries) == ["0.evaluate"]
    state = fold(config(), entries)
    assert state.stopped and next_stage(state) is None
    assert (
        simulate(config(), [], baseline=float("nan")) != [] and len(simulate(config(), [], baseline=float("nan"))) == 1
    )
    unjudged = config(min_accuracy_ratio=0, max_extensions=0)
    assert len(simulate(unjudged, [0.0, 0.0], baseline=0.0)) == 11  # asked for


def test_a_run_of_an_earlier_version_that_went_on_from_nothing_is_read_as_it_was():
    entries = simulate(config(min_accuracy_ratio=0, max_extensions=0), [0.0, 0.1], baseline=0.0)
    for length in range(1, len(entries) + 1):
        state = fold(config(), entries[:length])
        assert state.stopped and next_stage(state) is None
    assert state.source == "cycles/002-recover" and state.cuts == []


def test_a_model_that_was_cut_before_may_solve_nothing():
    cut = parse_config(
        {"schedule": {"recover_only": True}, "model": {"parent": "testbed"}, "gate": {"max_extensions": 0}}
    )
    assert names(simulate(cut, [0.4], baseline=0.0)) == ["0.evaluate", "1.recover", "1.evaluate", "1.gate"]
    assert "solves 0 of 500 problems" in low_baseline(cut, {"accuracy": 0.0, "problems": 500})


@pytest.mark.parametrize(
    ("accuracy", "says"),
    [(0.002, "solves 1 of 500"), (0.018, "solves 9 of 500"), (0.0007, "solves 0.35 of 500"), (0.02, None), (1.0, None)],
)
def test_a_baseline_too_low_to_judge_by_is_said(accuracy, says):
    note = low_baseline(config(), {"accuracy": accuracy, "problems": 500})
    assert (note is None) == (says is None) and (says is None or says in note)
    assert low_baseline(config(min_accuracy_ratio=0), {"accuracy": accuracy, "problems": 500}) is None
    assert low_baseline(config(), {"accuracy": accuracy}) is None  # of an earlier version
