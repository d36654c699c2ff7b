"""Heats: short trainings decide from where, and with which masks, the final trainings begin."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import WIDE_TRAIN, WIDE_VALIDATION, compressor, quick_search, search, wide

import rl_sparsity_tf as rls
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import Context, ranked_as_trained
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search import final, heats
from rl_sparsity_tf.search.heats import Start, run_heats, starts_of
from rl_sparsity_tf.training.mask_training import FineTuning

SPARSITY = 0.8


@pytest.fixture(scope="module")
def network():
    model = wide()
    return CompressedNetwork(
        model,
        training_data(WIDE_TRAIN, model, batch_size=32),
        evaluation_data(WIDE_VALIDATION, model, "validation_data"),
        target=rls.Target(sparsity=SPARSITY),
        recovery=rls.Recovery(method="least_squares"),
    )


@pytest.fixture(scope="module")
def candidates(network):
    """LAMP's plan ranked anew in context, and ERK's as it is."""
    found = []
    for name, anew in (("lamp", True), ("erk", False)):
        evaluate_plan(network, getattr(rls.baselines, name)(wide(), sparsity=SPARSITY))
        if anew:
            evaluate_plan(network, Context(network).plan(0.5, 1.0))
        found.append(Candidate.of(network, 0.5, 0, name))
    return found


def live(plan):
    return [entry.operations != Operation.PRUNE for entry in plan.kernels.values()]


def test_masks_as_trained_are_those_of_the_largest_weights(network, candidates):
    ranked, plain = (one.plan for one in candidates)
    assert ranked_as_trained(network, plain) == plain
    found = ranked_as_trained(network, ranked)
    assert found == rls.baselines.lamp(wide(), sparsity=SPARSITY) != ranked
    for kernel, alive, before in zip(network.kernels, live(found), live(ranked), strict=True):
        assert alive.sum() == before.sum()
        sizes = np.abs(network.originals[kernel.path]).reshape(alive.shape)
        assert sizes[alive].min() >= sizes[~alive].max()


def test_every_plan_begins_with_its_own_masks_and_with_those_as_trained(network, candidates):
    ranked, plain = candidates
    starts = starts_of(network, [ranked, plain, plain])
    lamp = ranked_as_trained(network, ranked.plan)
    assert [(one.candidate.plan, one.train_masks) for one in starts] == [
        (plan, learns) for plan in (ranked.plan, lamp, plain.plan) for learns in (True, False)
    ]
    lines = ["lamp, episode 1", "lamp, episode 1, masks of the largest weights", "erk, episode 1"]
    stay = ", masks that stay"
    assert [str(one) for one in starts] == [line + end for line in lines for end in ("", stay)]
    # Their weights are fitted to them.
    evaluate_plan(network, lamp)
    fitted = Candidate.of(network, 0.0, 0, "lamp")
    for path, weights in starts[2].candidate.weights.items():
        for one, other in zip(weights, fitted.weights[path], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_plans_in_another_storage_begin_as_they_are(network, candidates):
    plan = rls.baselines.lamp(wide(), sparsity=0.6, group="block4")
    other = dataclasses.replace(candidates[0], plan=plan)
    assert [one.candidate for one in starts_of(network, [other])] == [other, other]


def task_of(network, epochs, mask="straight_through"):
    figures = SimpleNamespace(validation=network.validation, metric=Metric("accuracy", True))
    training = FineTuning(epochs=epochs, mask=mask)
    return SimpleNamespace(network=network, figures=figures, training=training, model="model")


def heat(monkeypatch, task, candidates, scores):
    """The starts that are named, best first, and what was trained for how long."""
    trained = []

    def train(model, candidate, figures, training, *, train_masks, warnings):
        assert (model, figures) == ("model", task.figures)
        trained.append((candidate.plan, train_masks, training.epochs))
        warnings.append("it says nothing")
        return None, Score(*scores[len(trained) - 1])

    monkeypatch.setattr(heats, "trained", train)
    progress = SearchProgress(1, "accuracy", 0)
    starts, places = run_heats(task, candidates, progress, seed=0)
    return starts, places, trained


@pytest.mark.parametrize(
    ("epochs", "length", "count"), [(4, 1, 4), (5, 1, 5), (15, 1, 6), (16, 2, 6), (30, 3, 6)]
)
def test_heats_take_no_longer_than_a_training(
    network, candidates, monkeypatch, epochs, length, count, caplog
):
    values = [0.2, 0.5, 0.9, 0.4, 0.6, 0.1][:count]
    scores = [(value, 1.0) for value in values]
    starts, places, trained = heat(monkeypatch, task_of(network, epochs), candidates, scores)
    assert places == 1
    every = starts_of(network, candidates)[:count]
    assert trained == [(one.candidate.plan, one.train_masks, length) for one in every]
    assert length * count <= epochs
    order = sorted(range(count), key=lambda n: -values[n])
    found = [(one.candidate.plan, one.train_masks) for one in starts]
    assert found == [(every[n].candidate.plan, every[n].train_masks) for n in order]
    assert "it says nothing" not in caplog.text


def test_the_loss_decides_between_accuracies_that_are_the_same(network, candidates, monkeypatch):
    scores = [(0.90, 0.5), (0.91, 0.4), (0.90, 0.3), (0.2, 0.1)]
    starts, _, trained = heat(monkeypatch, task_of(network, 4), candidates, scores)
    order = [next(n for n, t in enumerate(trained) if t[:2] == pair) for pair in pairs(starts)]
    assert order == [2, 1, 0, 3]  # of 60 rows four in a hundred are chance


def pairs(starts):
    return [(one.candidate.plan, one.train_masks) for one in starts]


def test_what_came_to_nothing_is_the_last(network, candidates, monkeypatch):
    nan = math.nan
    scores = [(nan, nan), (0.5, 1.0), (nan, nan), (0.7, nan)]
    starts, _, trained = heat(monkeypatch, task_of(network, 4), candidates, scores)
    assert pairs(starts)[:2] == [trained[3][:2], trained[1][:2]]


@pytest.mark.parametrize(
    ("epochs", "mask"), [(1, "straight_through"), (3, "straight_through"), (16, "hard_concrete")]
)
def test_without_heats_as_many_begin_as_there_are_candidates(
    network, candidates, monkeypatch, epochs, mask
):
    task = task_of(network, epochs, mask)
    starts, places, trained = heat(monkeypatch, task, candidates, [])
    assert (trained, places) == ([], 2)
    lamp = ranked_as_trained(network, candidates[0].plan)
    plans = [candidates[0].plan, lamp, candidates[1].plan]
    assert pairs(starts) == [(plan, True) for plan in plans]


def test_channels_and_what_is_not_trained_begin_as_they_are(network, candidates, monkeypatch):
    starts, places, _ = heat(monkeypatch, task_of(network, 0), candidates, [])
    assert (starts, places) == ([Start(one) for one in candidates], 2)
    channels = SimpleNamespace(decisions=SimpleNamespace(group="channel"))
    task = dataclasses.replace(task_of(network, 0).training, epochs=20)
    fake = SimpleNamespace(network=channels, training=task, figures=None, model="model")
    starts, places, _ = heat(monkeypatch, fake, candidates, [])
    assert (starts, places) == ([Start(one) for one in candidates], 2)


@pytest.mark.slow
def test_a_search_ends_with_what_the_heats_say(monkeypatch):
    """Masks that stay are finished as they were planned."""
    ended = []
    real, run = final.finish_candidate, final.run_heats

    def watched(task, one, others, train_masks):
        finished = real(task, one, others, train_masks)
        ended.append((one.plan, train_masks, finished.plan))
        return finished

    def fixed_first(*args, **kwargs):
        starts, places = run(*args, **kwargs)
        return sorted(starts, key=lambda one: one.train_masks), places

    monkeypatch.setattr(final, "finish_candidate", watched)
    monkeypatch.setattr(final, "run_heats", fixed_first)
    with quick_search():
        one = compressor(
            wide(), "random", recovery="least_squares", target=rls.Target(sparsity=0.9)
        )
        data = {"train": WIDE_TRAIN, "validation_data": WIDE_VALIDATION}
        result = search(one, **data, finalists=2, finetune_epochs=4)
    ((plan, learned, finished),) = ended  # of two, the heats have taken one's time
    assert not learned
    for one, other in zip(live(finished), live(plan), strict=True):
        np.testing.assert_array_equal(one, other)
    assert result.plan == finished
    assert isinstance(result.model, keras.Model)
