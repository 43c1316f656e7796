"""The real driver from the first stage to the last with stand-ins for stages: what it tells them, and what it keeps."""

import json
import os

import pytest
from driven_runs import DrivenRun, Session, Told, labels_of

from ptl_rl.config import ConfigError, WatchdogConfig
from ptl_rl.driver import loop, ray_session
from ptl_rl.driver.loop import Driver, StageFailed
from ptl_rl.driver.run_folder import MissingArtefact, RunFolder
from ptl_rl.stage import StageContext, load_context

TWO_CYCLES = {"schedule": {"channels_per_cycle": [256, 128], "alignment": 16}, "recovery": {"grpo": {"steps": [3, 5]}}}


def test_two_cycles(make_driven, monkeypatch):
    run, told = make_driven(**TWO_CYCLES), Told()
    state = run.drive(told)
    assert os.environ["PTL_RUN_ID"] == "before"  # what this process starts from now on is not the run's
    run.check_complete(cycles=2)
    assert state.source == "cycles/002/recovered" and not state.stopped
    entries = run.journal.entries()
    assert [entry.time for entry in entries] == sorted(entry.time for entry in entries)
    assert all((entry.seconds > 0) == (entry.stage != "gate") for entry in entries)
    assert run.decisions() == ["accept", "accept"]
    assert told.began == told.finished == labels_of(2)
    assert told.steps == 9 * [(1, 2), (2, 2)] and told.notes == []
    manifest = json.loads((run.path / "cycles/002/manifest.json").read_text())
    assert manifest["stages"] == [entry.model_dump(mode="json") for entry in entries[6:]]
    assert manifest["config"] == run.config.model_dump(mode="json") and "torch" in manifest["versions"]
    check_what_stages_were_told(run)
    monkeypatch.setattr(loop, "package_versions", lambda: {"torch": "later"})
    run.drive()  # nothing is left to do, and what the last cycle was made with stays
    assert json.loads((run.path / "cycles/002/manifest.json").read_text()) == manifest


def check_what_stages_were_told(run: DrivenRun) -> None:
    """Sources, cuts, steps, subsets and seeds of :func:`test_two_cycles`."""
    specs = run.specs()
    assert list(specs) == [f"{label}.1" for label in labels_of(2) if "gate" not in label]
    original = specs["000-evaluate.1"].source
    assert (original / "config.json").exists() and {spec.parent for spec in specs.values()} == {original}
    of = {label.removesuffix(".1"): spec for label, spec in specs.items()}
    places = {label: spec.source.relative_to(run.path) for label, spec in of.items() if spec.source != original}
    assert {label: str(place) for label, place in places.items()} == {
        "001-recover": "cycles/001/sliced",
        "001-evaluate": "cycles/001/recovered",
        "002-score": "cycles/001/recovered",
        "002-slice": "cycles/001/recovered",
        "002-recover": "cycles/002/sliced",
        "002-evaluate": "cycles/002/recovered",
    }
    for cycle, cut, steps in ((1, 256, 3), (2, 128, 5)):
        for name in ("score", "slice", "recover", "evaluate"):
            spec = of[f"{cycle:03d}-{name}"]
            assert (spec.subset, spec.subsets) == (cycle - 1, 2)
            assert (spec.planned, spec.remove_channels, spec.steps) == (cycle - 1, cut, steps)
            scores = run.path / f"cycles/{cycle:03d}/scores" if name == "slice" else None
            assert (spec.scores, spec.alignment) == (scores, 16)
    assert len({StageContext(run.config, spec).seed for spec in of.values()}) == 3  # one for every cycle
    assert len({spec.stage_id for spec in of.values()}) == len(of)


def test_several_recoveries_go_on_from_one_another(make_driven):
    run = make_driven(recovery=[{"cpt": {"steps": 2}}, {"grpo": {"steps": 3}}])
    run.drive()
    assert run.labels() == ["000-evaluate", *(f"001-{s}" for s in ("score", "slice", "recover", "recover-part2")),
                            "001-evaluate", "001-gate"]  # fmt: skip
    first, second = (run.specs()[f"001-recover{part}.1"] for part in ("", "-part2"))
    assert (first.source.name, second.source.name) == ("sliced", "recovered")
    assert (first.part, first.steps, second.part, second.steps) == (0, 2, 1, 3)
    assert (run.path / "best").resolve() == run.path / "cycles/001/recovered-part2"


def test_where_rewards_are_dead_what_is_for_that_recovers(make_driven):
    run = make_driven(
        recovery=[{"grpo": {"steps": 2, "min_learnable_fraction": 0.1}}],
        recovery_if_unlearnable=[{"cpt": {"steps": 3}}, {"grpo": {"steps": 4}}],
    )
    run.act({"001-recover": "dead rewards", "001-evaluate": 0.1})
    run.drive()
    specs = run.specs()
    found = [(label, spec.unlearnable, spec.steps) for label, spec in specs.items() if spec.name == "recover"]
    assert found == [("001-recover.1", False, 2), ("001-recover-1.1", True, 3), ("001-recover-1-part2.1", True, 4)]
    methods = [load_context(spec.file).recovery.method for spec in specs.values() if spec.name == "recover"]
    assert methods == ["grpo", "cpt", "grpo"]
    assert run.decisions() == ["rescue", "accept"]


def test_a_cycle_is_extended_then_halved_then_accepted_below(make_driven):
    run = make_driven(gate={"max_extensions": 1, "max_retries": 1, "on_failure": "continue"})
    low = ["001-evaluate", "001-evaluate-1", "003-evaluate", "003-evaluate-1"]
    run.act({"000-evaluate": 0.8, **dict.fromkeys(low, 0.5)})
    assert not run.drive().stopped
    assert run.decisions() == ["extend", "retry", "accept", "extend", "accept_below"]
    gate = run.journal.entries()[5].metrics
    assert (gate["accuracy"], gate["baseline"], gate["ratio"]) == (0.5, 0.8, 0.625)
    once, again = labels_of(3), ["recover-1", "evaluate-1", "gate-1"]
    assert run.labels() == [
        *once[:6], *(f"001-{stage}" for stage in again), *once[6:], *(f"003-{stage}" for stage in again)
    ]  # fmt: skip
    specs = run.specs()
    told = {(spec.cycle, spec.remove_channels, spec.subset) for spec in specs.values() if spec.cycle}
    assert told == {(1, 480, 0), (2, 240, 1), (3, 240, 2)}  # every cycle has its own subset, half a cut is a new one
    assert {(spec.planned, spec.subsets) for spec in specs.values()} == {(0, 3)}
    assert specs["001-recover-1.1"].source == run.path / "cycles/001/recovered"  # on from the first round
    assert specs["002-score.1"].source == specs["000-evaluate.1"].source  # the first cycle is taken back
    assert specs["003-score.1"].source == run.path / "cycles/002/recovered"
    assert (run.path / "best").resolve() == run.path / "cycles/003/recovered-1"
    manifest = json.loads((run.path / "cycles/001/manifest.json").read_text())
    assert len(manifest["stages"]) == 8  # of both rounds


def test_a_cut_is_measured_once_where_the_recipe_says_so(make_driven):
    run = make_driven(gate={"max_extensions": 1}, evaluation={"after_cut": True})
    run.act({"000-evaluate": 0.8, "001-evaluate": 0.1})
    run.drive()
    sliced = run.path / "cycles/001/sliced"
    measured = {label: spec.after_cut for label, spec in run.specs().items() if spec.name == "evaluate"}
    assert measured == {"000-evaluate.1": None, "001-evaluate.1": sliced, "001-evaluate-1.1": None}
    assert {spec.after_cut for spec in run.specs().values() if spec.name != "evaluate"} == {None}
    driver = Driver(RunFolder(run.path), lambda _: Told())
    driver.config = run.config.model_copy(update={"watchdog": WatchdogConfig(startup_seconds=300, stall_seconds=180)})
    silent = {label: driver._limits(spec).stall_seconds for label, spec in run.specs().items()}
    assert {label for label, seconds in silent.items() if seconds == 300} == {"001-evaluate.1"}  # vLLM starts twice


def test_where_nothing_is_cut_there_is_no_cut_to_measure(make_driven):
    run = make_driven(schedule={"recover_only": True}, evaluation={"after_cut": True})
    run.drive()
    assert {spec.after_cut for spec in run.specs().values()} == {None}


def test_a_run_that_the_gate_stops_stays_stopped(make_driven):
    run = make_driven(gate={"max_extensions": 1, "on_failure": "stop"})
    run.act({"001-evaluate": 0.1, "001-evaluate-1": 0.1})
    assert run.drive().stopped and run.decisions() == ["extend", "stop"]
    assert not (run.path / "best").exists()  # nothing was accepted
    before = list(run.specs())
    assert run.drive().stopped and list(run.specs()) == before


def test_what_a_run_started_beside_its_stages_ends_with_it(make_driven):
    """As the processes of Ray's that no stage owns."""
    run, seen = make_driven(), []
    run.act({"001-evaluate": "daemon"})
    told = Told()
    told.stop = lambda: seen.extend(run.processes())
    run.drive(told)
    assert len(seen) == 1
    run.check_complete()


def test_workers_that_become_free_late_are_waited_for(make_driven, monkeypatch):
    run, asked = make_driven(), []
    monkeypatch.setattr(ray_session, "_end_leftovers", lambda namespaces: None)

    def is_free() -> bool:
        asked.append(run.processes())
        return len(asked) > 3 or not run.labels()  # after the first stage, not at once

    monkeypatch.setattr(Session, "is_free", staticmethod(is_free))
    run.drive()
    run.check_complete()
    assert len(asked) == 5 + 2 and asked == 7 * [[]]  # asked when no stage is at work


def test_workers_that_stay_held_end_the_run_in_a_sentence(make_driven, monkeypatch):
    run, ended = make_driven(), []
    monkeypatch.setattr(ray_session, "_end_leftovers", ended.append)
    monkeypatch.setattr(ray_session, "_holders", lambda: ", by actor scorer (process 7 on 10.0.0.1, job 01000000)")
    monkeypatch.setattr(Session, "is_free", staticmethod(lambda: "001-score" not in run.labels()))
    with pytest.raises(StageFailed) as failure:
        run.drive()
    assert "stage 001-slice cannot start: of 1 x 1 GPUs some are still held after 0.5 s" in str(failure.value)
    assert "by actor scorer (process 7 on 10.0.0.1, job 01000000)" in str(failure.value)
    assert f"continue with: ptl resume {run.path}" in str(failure.value)
    run_id = json.loads((run.path / ".owner").read_text())["run_id"]
    assert ended == [run_id]  # this run's own leftovers, once
    assert run.labels() == ["000-evaluate", "001-score"]
    monkeypatch.setattr(Session, "is_free", staticmethod(lambda: True))
    run.drive()
    run.check_complete()
    assert run.starts("001-score") == 1


def test_the_data_is_frozen_before_the_first_stage_and_a_change_is_refused(make_driven):
    run = make_driven()
    run.act({"001-slice": "raise"})
    with pytest.raises(StageFailed):
        run.drive()
    assert {spec.data for spec in run.specs().values()} == {run.path / "data"}
    before = {path.name: path.read_bytes() for path in (run.path / "data").iterdir()}
    assert set(before) == {"data.json", "train.arrow", "validation.arrow", "test.arrow"}
    run.act({})
    test = run.path / "data/test.arrow"
    test.write_bytes(before["test.arrow"].replace(b"marbles", b"Marbles") + b" ")
    with pytest.raises(ConfigError, match=r"test\.arrow: the run's data was changed; put it back as it was"):
        run.drive()
    assert run.starts("001-slice") == 1
    test.write_bytes(before["test.arrow"])
    run.drive()
    run.check_complete()
    assert {path.name: path.read_bytes() for path in (run.path / "data").iterdir()} == before


def test_a_model_that_solves_nothing_ends_the_run_before_anything_is_cut(make_driven):
    run = make_driven()
    run.act({"000-evaluate": 0.0})
    for _ in range(2):  # and again when it is resumed
        with pytest.raises(ConfigError) as refusal:
            run.drive()
        assert run.labels() == ["000-evaluate"] and list(run.specs()) == ["000-evaluate.1"]
    said = str(refusal.value)
    assert "the model solves none of 100 problems before anything is cut" in said
    assert f"7 of its answers were cut off at {run.config.data.max_response_tokens} tokens" in said
    assert f"{run.path}/cycles/000/evaluation/samples.parquet" in said
    assert "chat template" in said and "gate.min_accuracy_ratio: 0 goes on" in said


def test_a_gate_that_takes_everything_may_begin_with_nothing(make_driven):
    run = make_driven(gate={"min_accuracy_ratio": 0})
    run.act({"000-evaluate": 0.0, "001-evaluate": 0.0})
    run.drive()
    run.check_complete()


def test_chance_at_the_gate_is_said_once(make_driven):
    run, told = make_driven(), Told()
    run.act({"000-evaluate": 0.02, "001-evaluate": 0.02})
    run.drive(told)
    (note,) = told.notes
    assert "solves 2 of 100 problems" in note and "one answer is 50% of that" in note


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("fails", "file"),
    [
        ("001-slice", "scores/scores.safetensors"),
        ("001-recover", "sliced/model.safetensors"),
        ("001-recover", "sliced/plan.json"),
        ("001-evaluate", "recovered/config.json"),
        ("001-evaluate", "sliced/config.json"),
    ],
)
def test_an_artefact_that_changed_is_not_used(make_driven, fails, file):
    run = make_driven(evaluation={"after_cut": True})
    run.act({fails: "raise"})
    with pytest.raises(StageFailed):
        run.drive()
    run.act({})
    path = run.path / "cycles/001" / file
    before = path.read_bytes()
    flip(path)
    with pytest.raises(MissingArtefact, match=rf"{file}: is not what its stage wrote .*put it back as it was"):
        run.drive()
    path.unlink()
    with pytest.raises(MissingArtefact, match=rf"{file}: is gone|the journal names this checkpoint"):
        run.drive()
    assert run.starts(fails) == 1  # no stage has seen it
    path.write_bytes(before)
    run.drive()
    run.check_complete()


def test_a_journal_of_an_earlier_version_has_no_checksums_and_goes_on(make_driven):
    run = make_driven()
    run.act({"001-recover": "raise"})
    with pytest.raises(StageFailed):
        run.drive()
    lines = [json.loads(line) for line in run.folder.journal.read_text().splitlines()]
    assert all(line.pop("files") for line in lines)
    run.folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.act({})
    run.drive()
    run.check_complete()


IN_PLACE = {"mode": "in_place", "channels_per_cycle": [256, 128], "alignment": 16}


def cuts_of(run) -> list[tuple[int, int]]:
    return [(e.part, e.metrics["intermediate_size"]) for e in run.journal.entries() if e.stage == "cut"]


def test_cuts_in_place_are_journaled_as_they_are_made(make_driven):
    run, told = make_driven(schedule=IN_PLACE), Told()
    run.act({"001-recover": "cuts"})
    run.drive(told)
    assert [entry.part for entry in told.cuts] == [0, 1] and cuts_of(run) == [(0, 384), (1, 256)]
    assert told.finished == ["000-evaluate", "001-recover", "001-evaluate", "001-gate"]
    labels = run.labels()
    assert labels.index("001-cut-part2") < labels.index("001-recover")  # before the stage that makes them has ended
    assert run.specs()["001-recover.1"].source == run.specs()["000-evaluate.1"].source
    assert run.specs()["001-recover.1"].steps == 16  # 8 after each cut
    assert (run.path / "cycles/001/cuts/002/plan.json").exists()
    run.drive()  # nothing is left to do
    assert run.labels() == labels


@pytest.mark.parametrize(("first", "kept"), [("one cut, then raise", 1), ("one other cut, then raise", 2)])
def test_a_cut_is_journaled_once_unless_it_was_made_again(make_driven, first, kept):
    run = make_driven(schedule=IN_PLACE)
    run.act({"001-recover": first})
    with pytest.raises(StageFailed):
        run.drive()
    assert [part for part, _ in cuts_of(run)] == [0]
    run.act({"001-recover": "cuts"})
    run.drive()
    assert cuts_of(run)[-2:] == [(0, 384), (1, 256)] and len(cuts_of(run)) == 1 + kept
    assert run.decisions() == ["accept"]


def test_where_the_gate_asks_for_more_the_sliced_model_is_trained(make_driven):
    run = make_driven(schedule=IN_PLACE, gate={"max_extensions": 1}, recovery=[{"grpo": {"steps": [2, 5]}}])
    run.act({"001-recover": "cuts", "001-evaluate": 0.1})
    run.drive()
    specs = run.specs()
    assert (specs["001-recover.1"].steps, specs["001-recover-1.1"].steps) == (7, 5)
    assert specs["001-recover-1.1"].source == run.path / "cycles/001/recovered"
    assert len(cuts_of(run)) == 2


@pytest.mark.parametrize("act", ["cuts", "cuts and the last as it was made"])
def test_in_place_the_first_evaluation_is_of_the_model_right_after_its_last_cut_too(make_driven, act):
    run = make_driven(schedule=IN_PLACE, gate={"max_extensions": 1}, evaluation={"after_cut": True})
    run.act({"001-recover": act, "001-evaluate": 0.1})
    run.drive()
    specs = run.specs()
    as_cut = run.path / "cycles/001/recovered/after_cut"
    assert specs["001-evaluate.1"].after_cut == (as_cut if act != "cuts" else None)  # a run may find no cut to make
    assert specs["001-evaluate-1.1"].after_cut is specs["000-evaluate.1"].after_cut is None


def test_what_the_last_cut_left_is_held_against_its_checksum(make_driven):
    run = make_driven(schedule=IN_PLACE, evaluation={"after_cut": True})
    run.act({"001-recover": "cuts and the last as it was made", "001-evaluate": "raise"})
    with pytest.raises(StageFailed):
        run.drive()
    (run.path / "cycles/001/recovered/after_cut/config.json").write_text("{ }")
    run.act({"001-recover": "cuts and the last as it was made"})
    with pytest.raises(MissingArtefact, match=r"after_cut/config.json: is not what its stage wrote"):
        run.drive()


def test_a_cycle_in_place_is_not_halved(make_driven):
    run = make_driven(schedule=IN_PLACE, gate={"max_extensions": 0, "max_retries": 1, "on_failure": "stop"})
    run.act({"001-recover": "cuts", "001-evaluate": 0.1})
    run.drive()
    assert run.decisions() == ["stop"]
