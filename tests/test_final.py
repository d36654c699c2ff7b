"""The final: every finalist is finished, and the validation data decides."""

import dataclasses
from types import SimpleNamespace

import pytest
from tiny_search import compressor, quick_autoencoder, search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf import final
from rl_sparsity_tf.errors import ArgumentError, TargetError
from rl_sparsity_tf.final import play_final
from rl_sparsity_tf.objective import Metric, Score
from rl_sparsity_tf.progress import SearchProgress


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is looked at of a finished model."""

    validation: Score
    candidate: object = None


def candidate(name):
    return SimpleNamespace(found_by=name)


def played(monkeypatch, outcomes, higher=True):
    """Plays a final whose candidates come to given scores, or miss the target."""
    seen = []

    def finish(task, one, others):
        seen.append(one.found_by)
        found = outcomes[one.found_by]
        if isinstance(found, Exception):
            raise found
        return Ended(found)

    monkeypatch.setattr(final, "finish_candidate", finish)
    task = SimpleNamespace(
        figures=SimpleNamespace(metric=Metric(name="accuracy", higher_is_better=higher))
    )
    progress = SearchProgress(1, "accuracy", 0)
    finished, best = play_final(task, [candidate(n) for n in outcomes], [], progress, seed=0)
    assert seen == list(outcomes)
    assert finished.validation is outcomes[best.found_by]
    return best.found_by


def score(metric, loss=1.0):
    return Score(metric=metric, loss=loss)


def test_the_best_on_validation_data_wins(monkeypatch):
    outcomes = {"first": score(0.8), "second": score(0.9), "third": score(0.7)}
    assert played(monkeypatch, outcomes) == "second"
    assert played(monkeypatch, outcomes, higher=False) == "third"


def test_the_loss_decides_between_equals_and_the_earlier_is_kept(monkeypatch):
    outcomes = {"first": score(0.8, 0.5), "second": score(0.8, 0.4), "third": score(0.8, 0.4)}
    assert played(monkeypatch, outcomes) == "second"


def test_who_misses_the_target_is_out(monkeypatch):
    outcomes = {"first": TargetError("too large"), "second": score(0.1)}
    assert played(monkeypatch, outcomes) == "second"


def test_where_all_miss_it_the_first_error_is_told(monkeypatch):
    outcomes = {"first": TargetError("too large"), "second": TargetError("also")}
    with pytest.raises(TargetError, match="too large"):
        played(monkeypatch, outcomes)


def test_a_search_finishes_the_best_plans_of_several_proposers(monkeypatch):
    seen = []
    real = final.finish_candidate

    def watched(task, one, others):
        finished = real(task, one, others)
        seen.append((one.proposed_by, finished.validation))
        return finished

    monkeypatch.setattr(final, "finish_candidate", watched)
    with quick_autoencoder():
        one = compressor(trained())
        result = search(one, finalists=3)
    names = [name for name, _ in seen]
    assert len(names) == len(set(names)) == 3
    best = max(seen, key=lambda pair: (pair[1].metric, -pair[1].loss))
    assert result.metrics["compressed"]["proposed_by"] == best[0]
    assert result.metrics["compressed"]["validation_metric"] == best[1].metric


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
def test_a_number_of_finalists_that_cannot_be_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"finalists=.*"):
        rls.Compressor(trained(), rls.Target(sparsity=0.5)).search(None, None, finalists=wrong)
