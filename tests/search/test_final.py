"""The final: every finalist is finished, and the validation data decides."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import VALIDATION, compressor, quick_search, search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.errors import ArgumentError, TargetError
from rl_sparsity_tf.search import final
from rl_sparsity_tf.search.final import far_below, play_final
from rl_sparsity_tf.search.finishing import Exported
from rl_sparsity_tf.search.heats import winner


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is looked at of a finished model."""

    validation: Score
    candidate: object = None
    exported: object = Exported(content=b"", report="made", test=None)
    warnings: tuple = ()


def candidate(name, plan=None):
    return SimpleNamespace(found_by=name, plan=plan or name)


def task_of(figures, dense):
    """Nothing is trained in it, so that there are no heats."""
    network = SimpleNamespace(dense=dense, decisions=SimpleNamespace(group="element"))
    training = SimpleNamespace(epochs=0)
    return SimpleNamespace(figures=figures, model=object(), network=network, training=training)


def played(monkeypatch, outcomes, higher=True, name="accuracy", rows=10_000):
    """Plays a final whose candidates come to given scores, or miss the target."""
    seen = []

    def finish(task, one, others):
        seen.append(one.found_by)
        found = outcomes[one.found_by]
        if isinstance(found, Exception):
            raise found
        return Ended(found)

    monkeypatch.setattr(final, "finish_candidate", finish)
    figures = SimpleNamespace(
        metric=Metric(name=name, higher_is_better=higher),
        validation=[((np.zeros((rows, 1)),), None)],
    )
    task = task_of(figures, Score(metric=0.0, loss=0.0))
    progress = SearchProgress(1, "accuracy", 0)
    given = (task, [candidate(n) for n in outcomes], [], progress)
    finished, best = play_final(*given, places=len(outcomes), seed=0)
    assert seen == list(outcomes)
    assert finished.validation is outcomes[best.found_by]
    return best.found_by


def test_equal_plans_are_fine_tuned_once(monkeypatch):
    seen = []

    def finish(task, one, others):
        seen.append(one.found_by)
        return Ended(Score(metric=0.5, loss=1.0))

    monkeypatch.setattr(final, "finish_candidate", finish)
    data = [((np.zeros((1, 1)),), None)]
    figures = SimpleNamespace(metric=Metric("accuracy", True), validation=data)
    one, other, twin = candidate("a"), candidate("b"), candidate("c", plan="a")
    task = task_of(figures, Score(metric=0.5, loss=1.0))
    progress = SearchProgress(1, "accuracy", 0)
    _, best = play_final(task, [one, other, twin], [], progress, places=3, seed=0)
    assert seen == ["a", "b"]
    assert best is one


def score(metric, loss=1.0):
    return Score(metric=metric, loss=loss)


def test_the_best_on_validation_data_wins(monkeypatch):
    outcomes = {"first": score(0.8), "second": score(0.9), "third": score(0.7)}
    assert played(monkeypatch, outcomes) == "second"
    assert played(monkeypatch, outcomes, higher=False) == "third"


def test_the_loss_decides_between_equals_and_the_earlier_is_kept(monkeypatch):
    outcomes = {"first": score(0.8, 0.5), "second": score(0.8, 0.4), "third": score(0.8, 0.4)}
    assert played(monkeypatch, outcomes) == "second"


def test_the_loss_decides_where_the_accuracy_cannot(monkeypatch):
    """At 1,000 rows the standard error of 0.9 is 0.0095."""
    outcomes = {"first": score(0.900, 0.5), "second": score(0.891, 0.4), "third": score(0.89, 0.3)}
    assert played(monkeypatch, outcomes, rows=1000) == "second"
    assert played(monkeypatch, outcomes, rows=100_000) == "first"
    assert played(monkeypatch, outcomes, rows=100) == "third"
    assert played(monkeypatch, outcomes, rows=1000, name="auc") == "first"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_the_winner_is_no_worse_than_chance_explains(pairs, rows, higher):
    scores = [Score(*pair) for pair in pairs]
    won = scores[winner(scores, Metric("accuracy", higher), rows)]
    best = (max if higher else min)(one.metric for one in scores)
    margin = np.sqrt(best * (1 - best) / rows) if rows else 0
    assert abs(won.metric - best) <= margin
    assert all(won.loss <= one.loss for one in scores if abs(one.metric - best) <= margin)


def test_what_is_no_number_never_wins():
    nan = float("nan")
    metric = Metric("accuracy", True)
    assert winner([score(0.5, nan), score(0.5, 2.0)], metric, 100) == 1
    assert winner([score(nan, nan), score(nan, nan)], metric, 100) == 0
    assert winner([score(nan, 0.1), score(0.5, 2.0)], metric, 100) == 1


def test_who_misses_the_target_is_out(monkeypatch):
    outcomes = {"first": TargetError("too large"), "second": score(0.1)}
    assert played(monkeypatch, outcomes) == "second"


def test_where_all_miss_it_the_first_error_is_told(monkeypatch):
    outcomes = {"first": TargetError("too large"), "second": TargetError("also")}
    with pytest.raises(TargetError, match="too large"):
        played(monkeypatch, outcomes)


@pytest.mark.slow
def test_a_search_finishes_the_best_plans_of_several_proposers(monkeypatch):
    seen = []
    real = final.finish_candidate

    def watched(task, one, others):
        finished = real(task, one, others)
        seen.append((one.proposed_by, finished.validation))
        return finished

    monkeypatch.setattr(final, "finish_candidate", watched)
    with quick_search():
        one = compressor(trained())
        result = search(one, finalists=3)
    names = [name for name, _ in seen]
    assert len(names) == len(set(names)) == 3
    best = seen[winner([one for _, one in seen], Metric("accuracy", True), len(VALIDATION[0]))]
    assert result.metrics["compressed"]["proposed_by"] == best[0]
    assert result.metrics["compressed"]["validation_metric"] == best[1].metric


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
def test_a_number_of_finalists_that_cannot_be_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"finalists=.*"):
        rls.Compressor(trained(), rls.Target(sparsity=0.5)).search(None, None, finalists=wrong)


@pytest.mark.parametrize(
    ("name", "higher", "dense", "found", "says"),
    [
        ("accuracy", True, 0.95, 0.5, True),  # of ten classes, so 0.1 is chance
        ("accuracy", True, 0.95, 0.53, False),
        ("auc", True, 0.9, 0.44, True),
        ("auc", True, 0.9, 0.46, False),
        ("loss", False, 0.2, 0.41, True),
        ("loss", False, 0.2, 0.39, False),
        ("loss", False, -3.0, -1.0, False),  # twice of it says nothing
        ("accuracy", True, 0.95, float("nan"), True),
    ],
)
def test_a_result_far_below_the_dense_model_is_said_to_be_so(name, higher, dense, found, says):
    task = SimpleNamespace(
        figures=SimpleNamespace(metric=Metric(name, higher)),
        network=SimpleNamespace(dense=Score(dense, 1.0)),
        model=SimpleNamespace(output_shape=(None, 10)),
    )
    said = far_below(task, Score(found, 1.0))
    assert bool(said) == says
    if says:
        assert f"({name} {dense:.4g} -> {found:.4g})" in said
        assert "choose a target that leaves more" in said


@pytest.mark.slow
def test_of_what_is_left_of_nothing_the_summary_warns(caplog):
    lines = []
    result = search(compressor(trained(), target=rls.Target(sparsity=0.97)), finetune_epochs=0)
    result.summary(print_fn=lines.append)
    (warning,) = [one for one in result.metrics["warnings"] if "far below" in one]
    assert warning in caplog.text
    assert f"warning: {warning}" in "\n".join(lines)
