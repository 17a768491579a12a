"""The searcher without Ray: what is asked, what is known, what is on disk."""

import json
import pickle

import pytest
from optuna import create_study
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler

from animediffusion.pipelines.tuning.optuna_searcher import Study, TrialEntry, TrialLog, Verdict

SPACE = {"a": IntDistribution(0, 3), "b": CategoricalDistribution(["x", "y"])}


def meaning(params):
    """Eight sets of parameters, five points: where a is 0, b has no effect; so too for a = 1 and a = 2."""
    return {"a": params["a"], "b": params["b"] if params["a"] == 3 else "-"}


def judge(trial_id, result):
    return Verdict([float(result["got"])], {"got": result["got"]}) if result else None


@pytest.fixture
def new_study(tmp_path):
    def make(first=()):
        study = create_study(direction="maximize", sampler=RandomSampler(seed=1))
        return Study(study, SPACE, meaning, judge, TrialLog(tmp_path / "known" / "points.jsonl"), first)

    return make


def points(path):
    return [entry.point for entry in TrialLog(path).read()]


def test_no_point_is_asked_twice_and_all_are_found(new_study):
    study, found = new_study(), []
    for number in range(5):
        found.append(study.suggest(str(number)))
        study.on_trial_complete(str(number), {"got": number})
    assert len({json.dumps(point) for point in found}) == 5
    assert study.suggest("6") == Study.FINISHED
    assert study.num_known == 5


def test_points_under_way_are_not_asked_for_either(new_study):
    study = new_study()
    asked = [study.suggest(str(number)) for number in range(5)]
    assert len({json.dumps(point) for point in asked}) == 5
    assert study.suggest("6") == Study.FINISHED


def test_a_search_resumes_where_another_was_killed(new_study, tmp_path):
    killed = new_study()
    for number in range(3):
        killed.suggest(str(number))
        killed.on_trial_complete(str(number), {"got": number})
    known = points(tmp_path / "known" / "points.jsonl")
    path = tmp_path / "known" / "points.jsonl"
    path.write_bytes(path.read_bytes() + b'{"params": {"a"')  # killed in the middle of a line
    study = new_study()
    assert (study.num_known, len(study.study.trials)) == (3, 3)
    assert study.study.best_value == 2.0
    rest = [study.suggest(str(number)) for number in range(2)]
    assert all(point not in known for point in rest)
    study.on_trial_complete("0", {"got": 9})
    assert points(path) == [*known, rest[0]]


def test_the_first_points_come_first_unless_they_are_known(new_study):
    first = [{"a": 3, "b": "y"}, {"a": 0, "b": "x"}, {"a": 0, "b": "y"}, {"a": 1, "b": "x"}]
    study = new_study(first)
    assert [study.suggest(str(number)) for number in range(3)] == [
        {"a": 3, "b": "y"},
        {"a": 0, "b": "-"},
        {"a": 1, "b": "-"},
    ]
    study.on_trial_complete("0", {"got": 1})
    assert new_study(first).suggest("0") == {"a": 0, "b": "-"}


def test_a_failed_trial_is_not_repeated_in_this_search_but_in_the_next(new_study):
    study = new_study([{"a": 3, "b": "y"}])
    study.suggest("0")
    study.on_trial_complete("0", error=True)
    assert study.num_known == 1
    assert study.suggest("1") != {"a": 3, "b": "y"}
    assert new_study([{"a": 3, "b": "y"}]).suggest("0") == {"a": 3, "b": "y"}


def test_a_trial_that_was_cut_short_is_as_if_it_had_not_been(new_study, tmp_path):
    study = new_study([{"a": 3, "b": "y"}])
    study.suggest("0")
    study.on_trial_complete("0", {})
    assert study.num_known == 0
    assert points(tmp_path / "known" / "points.jsonl") == []


def test_what_was_found_in_another_space_is_known_but_teaches_nothing(new_study, tmp_path):
    log = TrialLog(tmp_path / "known" / "points.jsonl")
    log.write(TrialEntry({"a": 7, "b": "-"}, [1.0], {"a": 7, "b": "x"}))
    log.write(TrialEntry({"c": 7}, [1.0], {"c": 7}))
    study = new_study()
    assert (study.num_known, len(study.study.trials)) == (2, 0)


def test_a_line_of_the_log_has_parameters_point_values_and_details_in_this_order(tmp_path):
    log = TrialLog(tmp_path / "points.jsonl")
    entries = [
        TrialEntry({"a": 1}, [2.0], {"c": 3}, {"got": 4}),
        TrialEntry({"a": 1}, None, details={"ended": "failed"}),
    ]
    for entry in entries:
        log.write(entry)
    assert log.path.read_text().splitlines() == [
        '{"params": {"c": 3}, "point": {"a": 1}, "values": [2.0], "got": 4}',
        '{"point": {"a": 1}, "values": null, "ended": "failed"}',
    ]
    assert log.read() == entries


def test_rays_own_copy_of_a_searcher_is_empty(new_study):
    assert vars(pickle.loads(pickle.dumps(new_study()))) == {}
