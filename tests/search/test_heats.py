"""Heats: short trainings decide from where, and with which masks, the final trainings begin."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
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
from rl_sparsity_tf.search.heats import Start, entrants, run_heats, starts_of
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
    assert [one.candidate.plan for one in starts] == [ranked.plan, lamp, plain.plan]
    lines = ["lamp, episode 1", "lamp, episode 1, masks of the largest weights", "erk, episode 1"]
    assert [str(one) for one in starts] == lines
    # Their weights are fitted to them.
    evaluate_plan(network, lamp)
    fitted = Candidate.of(network, 0.0, 0, "lamp")
    for path, weights in starts[1].candidate.weights.items():
        for one, other in zip(weights, fitted.weights[path], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_plans_in_another_storage_begin_as_they_are(network, candidates):
    plan = rls.baselines.lamp(wide(), sparsity=0.6, group="block4")
    other = dataclasses.replace(candidates[0], plan=plan)
    assert starts_of(network, [other]) == [Start(other)]


def task_of(network, epochs, mask="straight_through"):
    figures = SimpleNamespace(validation=network.validation, metric=Metric("accuracy", True))
    training = FineTuning(epochs=epochs, mask=mask)
    return SimpleNamespace(network=network, figures=figures, training=training, model="model")


def heat(monkeypatch, task, candidates, scores, places=2):
    """The starts, best first, how many are finished, and what was trained for how long."""
    trained = []

    def train(model, candidate, figures, training, warnings):
        assert (model, figures) == ("model", task.figures)
        trained.append((candidate.plan, training.epochs))
        warnings.append("it says nothing")
        return None, Score(*scores[len(trained) - 1])

    monkeypatch.setattr(heats, "trained", train)
    progress = SearchProgress(1, "accuracy", 0)
    starts, finished = run_heats(task, candidates, progress, places=places, seed=0)
    return plans_of(starts), finished, trained


def plans_of(starts):
    return [one.candidate.plan for one in starts]


@pytest.fixture(scope="module")
def many(network, candidates):
    """Candidates of ten plans."""
    found = list(candidates)
    for sparsity in np.linspace(0.81, 0.88, 8):
        plan = rls.baselines.uniform(wide(), sparsity=float(sparsity))
        found.append(dataclasses.replace(candidates[1], plan=plan))
    return found


@pytest.mark.parametrize(
    ("epochs", "length", "count"), [(4, 1, 4), (5, 1, 5), (15, 1, 8), (16, 2, 8), (30, 3, 8)]
)
def test_heats_take_no_longer_than_a_training(
    network, many, monkeypatch, epochs, length, count, caplog
):
    values = [0.2, 0.5, 0.9, 0.4, 0.6, 0.1, 0.3, 0.8][:count]
    scores = [(value, 1.0) for value in values]
    starts, finished, trained = heat(monkeypatch, task_of(network, epochs), many, scores, 3)
    assert finished == 2
    every = plans_of(starts_of(network, many)[:count])
    assert trained == [(plan, length) for plan in every]
    assert length * count <= epochs
    assert starts == [every[n] for n in sorted(range(count), key=lambda n: -values[n])]
    assert "it says nothing" not in caplog.text


def test_the_loss_decides_between_accuracies_that_are_the_same(network, candidates, monkeypatch):
    scores = [(0.90, 0.5), (0.91, 0.4), (0.90, 0.3)]
    starts, _, trained = heat(monkeypatch, task_of(network, 4), candidates, scores)
    # Of 60 rows four in a hundred are chance.
    assert starts == [trained[n][0] for n in (2, 1, 0)]


def test_what_came_to_nothing_is_the_last(network, candidates, monkeypatch):
    nan = math.nan
    scores = [(nan, nan), (0.5, 1.0), (nan, 0.1)]
    starts, _, trained = heat(monkeypatch, task_of(network, 4), candidates, scores)
    assert starts[0] == trained[1][0]


def test_one_place_is_left_if_there_was_one(network, candidates, monkeypatch):
    scores = [(0.2, 1.0), (0.8, 1.0)]
    starts, finished, _ = heat(monkeypatch, task_of(network, 4), candidates[:1], scores, 1)
    assert (len(starts), finished) == (2, 1)
    assert starts[0] == ranked_as_trained(network, candidates[0].plan)
    # A plan with the masks of the largest weights has nobody to compete with.
    starts, finished, trained = heat(monkeypatch, task_of(network, 4), candidates[1:], [], 1)
    assert (starts, finished, trained) == ([candidates[1].plan], 1, [])


@pytest.mark.parametrize(
    ("epochs", "mask"), [(1, "straight_through"), (3, "straight_through"), (16, "hard_concrete")]
)
def test_without_heats_the_first_starts_are_finished(
    network, candidates, monkeypatch, epochs, mask
):
    task = task_of(network, epochs, mask)
    starts, finished, trained = heat(monkeypatch, task, candidates, [])
    assert (trained, finished) == ([], 2)
    lamp = ranked_as_trained(network, candidates[0].plan)
    assert starts == [candidates[0].plan, lamp, candidates[1].plan]
    assert entrants(task, 3) == 3


def test_a_search_keeps_more_plans_for_the_heats(network):
    task = task_of(network, 4)
    assert [entrants(task, places) for places in (1, 2, 3)] == [1, 4, 5]


def test_channels_and_what_is_not_trained_begin_as_they_are(network, candidates, monkeypatch):
    plans = [one.plan for one in candidates]
    starts, finished, _ = heat(monkeypatch, task_of(network, 0), candidates, [])
    assert (starts, finished) == (plans, 2)
    channels = SimpleNamespace(decisions=SimpleNamespace(group="channel"))
    task = SimpleNamespace(network=channels, training=FineTuning(epochs=20), figures=None)
    starts, finished, _ = heat(monkeypatch, task, candidates, [])
    assert (starts, finished) == (plans, 2)
    assert entrants(task, 3) == 3


@pytest.mark.slow
def test_a_search_finishes_what_the_heats_say(monkeypatch):
    """The last of them, to see that it is not the first of the finalists anyway."""
    ended, said = [], []
    real, run = final.finish_candidate, final.run_heats

    def watched(task, one, others):
        ended.append(one.plan)
        return real(task, one, others)

    def last_first(*args, **kwargs):
        starts, places = run(*args, **kwargs)
        said.append(plans_of(starts)[::-1])
        return starts[::-1], places

    monkeypatch.setattr(final, "finish_candidate", watched)
    monkeypatch.setattr(final, "run_heats", last_first)
    with quick_search():
        options = {"recovery": "least_squares", "target": rls.Target(sparsity=0.9)}
        one = compressor(wide(), "random", **options)
        data = {"train": WIDE_TRAIN, "validation_data": WIDE_VALIDATION}
        result = search(one, **data, finalists=2, finetune_epochs=4)
    assert 2 <= len(said[0]) <= 4  # an epoch each
    assert ended == said[0][:1]  # of two, the heats have taken one's time
    assert result.candidate.plan == ended[0]
