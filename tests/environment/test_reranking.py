"""Masks in context: which weights of a kernel live, ranked anew in the network that was fitted."""

import functools

import numpy as np
import pytest
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.datasets import load_digits_data
from rl_sparsity_tf.environment import reranking
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import (
    RELEASE,
    SCHEDULE,
    Context,
    _output_weights,
    can_rerank,
    rank_anew,
)
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search.plan_search import climb, search_randomly

L = keras.layers
SPARSITY = 0.92


def compiled(model, loss="sparse_categorical_crossentropy", metrics=("accuracy",)):
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=list(metrics))
    return model


def network_of(model, x, y, group="element", sparsity=0.8, **options):
    return CompressedNetwork(
        model,
        training_data((x, y), model, batch_size=64),
        evaluation_data((x, y), model, "validation_data"),
        target=rls.Target(sparsity=sparsity),
        decisions=KernelDecisions(group),
        **options,
    )


@pytest.fixture(scope="module")
def digits():
    """A trained network with a convolution, a depthwise one and a dense layer called twice."""
    data = load_digits_data()
    keras.utils.set_random_seed(1)
    twice = L.Dense(24, activation="relu", name="twice")
    given = keras.Input(data.input_shape)
    x = L.Conv2D(12, 3, activation="relu", name="conv")(given)
    x = L.DepthwiseConv2D(3, activation="relu", name="deep")(x)
    x = L.Dense(24, activation="relu", name="first")(L.Flatten()(x))
    x = L.Dense(data.num_classes, activation="softmax", name="last")(twice(twice(x)))
    model = compiled(keras.Model(given, x))
    model.fit(data.x_train, data.y_train, batch_size=64, epochs=8, verbose=0)
    return model, data


@pytest.mark.slow
@pytest.mark.parametrize("group", ["element", "block4"])
def test_ranking_anew_is_better_and_prunes_as_much(digits, group):
    model, data = digits
    network = network_of(model, data.x_train, data.y_train, group, SPARSITY)
    plan = rls.baselines.lamp(model, sparsity=SPARSITY, group=group)
    assert can_rerank(network)
    first = best = evaluate_plan(network, plan)
    last, as_many = plan, []

    def restore():
        evaluate_plan(network, last)

    def improves(new):
        nonlocal last, best
        pruned = [
            {path: np.count_nonzero(one.operations == Operation.PRUNE) for path, one in plan}
            for plan in (new.kernels.items(), last.kernels.items())
        ]
        as_many.append(pruned[0] == pruned[1])
        for path, entry in new.kernels.items():
            old = last.kernels[path].operations
            both = (entry.operations != Operation.PRUNE) & (old != Operation.PRUNE)
            np.testing.assert_array_equal(entry.operations[both], old[both])
        outcome = evaluate_plan(network, new)
        assert outcome.sparsity == pytest.approx(first.sparsity, abs=2e-3)
        better = outcome.loss < best.loss
        if better:
            last, best = new, outcome
        return better

    rank_anew(network, restore, improves)
    assert best.loss < 0.9 * first.loss
    assert sum(as_many) >= 3  # all but what was released


@pytest.mark.slow
def test_looking_at_a_network_leaves_it_as_it_was(digits):
    model, data = digits
    network = network_of(model, data.x_train, data.y_train, sparsity=SPARSITY)
    plan = rls.baselines.lamp(model, sparsity=SPARSITY)
    evaluate_plan(network, plan)
    weights = network.model.get_weights()
    context = Context(network)
    context.plan(0.5, 0.5)
    assert network.plan == plan
    for one, other in zip(network.model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    # A single kernel is ranked as it is among all.
    path = context.paths[1]
    one, all_of_them = context.plan(0.5, 0.5, [path]), context.plan(0.5, 0.5)
    assert one.kernels[path] == all_of_them.kernels[path] != plan.kernels[path]
    for other in set(plan.kernels) - {path}:
        assert one.kernels[other] == plan.kernels[other]


def test_outputs_weigh_what_their_gradients_say():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([L.Input((3,)), L.Dense(5, "relu", name="one"), L.Dense(2)])
    compiled(model, "mse", ["mae"])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 3)).astype("float32"), rng.normal(size=(64, 2)).astype("float32")
    network = network_of(model, x, y, sparsity=0.3)
    evaluate_plan(network, rls.baselines.uniform(model, sparsity=0.3))
    with network.recovered():
        wrapped = network.model
        found = _output_weights(network, network.kernels)
        inner = [layer.layer for layer in wrapped.layers if hasattr(layer, "layer")]
        assert [layer.activation.__name__ for layer in inner] == ["relu", "linear"]
        hidden = wrapped.layers[0](x).numpy()
        last = wrapped.layers[-1].effective_kernel("kernel").numpy()
        residual = wrapped(x).numpy() - y
    # Of the mean over batch and outputs: the factor drops out.
    own = np.square(residual).mean(0)
    behind = np.square((residual @ last.T) * (hidden > 0)).mean(0)
    paths = [kernel.path for kernel in network.kernels]
    np.testing.assert_allclose(found[paths[1]], own / own.mean(), rtol=1e-4)
    np.testing.assert_allclose(found[paths[0]], behind / behind.mean(), rtol=1e-4)


class OwnStep(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.slow
def test_what_cannot_be_ranked_anew_is_left_alone():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 4)).astype("float32"), rng.integers(0, 3, 64)
    given = keras.Input((4,))
    out = L.Dense(3, activation="softmax")(L.Dense(6, activation="relu")(given))
    model, own = compiled(keras.Model(given, out)), compiled(OwnStep(given, out))
    assert not can_rerank(network_of(own, x, y, sparsity=0.5))
    trained = rls.Recovery(method="finetune", steps=1)
    assert not can_rerank(network_of(model, x, y, sparsity=0.5, recovery=trained))
    network = network_of(model, x, y, sparsity=0.5)
    plan = rls.baselines.uniform(model, sparsity=0.5)
    shuffled = {
        path: np.where(entry.operations == Operation.PRUNE, entry.operations, Operation.SHUFFLE)
        for path, entry in plan.kernels.items()
    }
    network.reset()
    for path, operations in shuffled.items():
        network.assign(path, operations.astype(np.uint8))
    network.finish(evaluated=False)
    assert Context(network).plan(0.5, 1.0) == network.plan


@pytest.mark.parametrize("released", ["released", None])
@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_what_was_no_better_is_not_tried_twice(most, better, released, monkeypatch):
    tried, restored = [], []

    class Asked:
        def __init__(self, network):
            assert network == "network"

        def plan(self, *powers):
            return powers

        def released(self):
            return released

    def improves(powers):
        tried.append(powers)
        return better

    monkeypatch.setattr(reranking, "Context", Asked)
    rank_anew("network", lambda: restored.append(None), improves, most)
    plans = [released if powers is RELEASE else powers for powers in SCHEDULE]
    expected = [one for one in plans if one is not None]  # nothing to release is no plan
    assert tried == [*(expected if better else dict.fromkeys(expected))][:most]
    # What was seen of the best plan holds until there is a better one.
    assert len(restored) == min(1, most)


@functools.cache
def hidden_units():
    """A network of 6 inputs, the last of them always 0, eight hidden units, and three classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    x[:, -1] = 0.0
    y = x[:, :3].argmax(axis=1)
    keras.utils.set_random_seed(0)
    hidden, last = L.Dense(8, "relu", name="hidden"), L.Dense(3, "softmax", name="last")
    model = compiled(keras.Sequential([L.Input((6,)), hidden, last]))
    model.fit(x, y, epochs=20, batch_size=20, verbose=0)
    return model, x, y


def half_read(network, group="element"):
    """A plan in which nothing reads the first four hidden units, though all their weights live."""
    shapes = {path: grouping.shape for path, grouping in network.groupings.items()}
    live = {path: np.ones(shape, bool) for path, shape in shapes.items()}
    rows = shapes["last/kernel"][0]
    live["last/kernel"][: rows // 2] = False
    live["hidden/kernel"][0, 4:] = False
    return network.storage.plan_from_live(network.kernels, list(live.values()))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["element", "block4"])
def test_weights_without_an_effect_make_room_for_others(group):
    model, x, y = hidden_units()
    network = network_of(model, x, y, group, sparsity=16 / 72 if group == "element" else 20 / 72)
    start = half_read(network)
    before = evaluate_plan(network, start)
    context = Context(network)
    effective = context.effective("hidden/kernel")
    if group == "element":
        # Outputs that are read, and inputs that are not silent.
        np.testing.assert_array_equal(effective[:, :4], False)
        np.testing.assert_array_equal(effective[5], False)
        assert effective[:5, 4:].all()
    else:
        assert not effective[:, :4].any()
    assert context.effective("last/kernel")[-1].all()
    plan = context.released()
    live = {path: one.operations != Operation.PRUNE for path, one in plan.kernels.items()}
    # What had no effect goes before anything that has one; the target is met, with room for more.
    assert plan.sparsity >= network.target.sparsity
    assert not live["hidden/kernel"][~effective].any() or live["hidden/kernel"][effective].all()
    assert live["last/kernel"].sum() > (start.kernels["last/kernel"].operations != 1).sum()
    after = evaluate_plan(network, plan)
    assert after.loss < before.loss
    assert {path: entry.bits for path, entry in plan.kernels.items()} == {
        path: entry.bits for path, entry in start.kernels.items()
    }


@pytest.mark.slow
def test_nothing_is_released_where_all_have_an_effect():
    model, x, y = hidden_units()
    network = network_of(model, x, y, sparsity=0.1)
    whole = [np.ones(grouping.shape, bool) for grouping in network.groupings.values()]
    whole[0][5] = False  # the silent input's
    evaluate_plan(network, network.storage.plan_from_live(network.kernels, whole))
    assert Context(network).released() is None
    shuffled = half_read(network)
    network.reset()
    for path, entry in shuffled.kernels.items():
        kept = entry.operations == Operation.PRUNE
        network.assign(path, np.where(kept, Operation.PRUNE, Operation.SHUFFLE).astype(np.uint8))
    network.finish(evaluated=False)
    assert Context(network).released() is None


@pytest.mark.slow
@pytest.mark.parametrize("search", [search_randomly, climb])
def test_searches_without_an_agent_rank_anew_within_their_evaluations(digits, search):
    model, data = digits
    network = network_of(model, data.x_train, data.y_train, sparsity=0.9)
    before, after = (1, 2) if search is climb else (3, 4)
    few, more = (search(network, rls.Reward(), evaluations) for evaluations in (before, after))
    assert (few.evaluations, more.evaluations) == (before, after)
    # The last one ranks the best before it anew.
    assert more.outcome.loss < few.outcome.loss
    live = [
        {path: np.count_nonzero(one.operations == Operation.PRUNE) for path, one in plan}
        for plan in (few.plan.kernels.items(), more.plan.kernels.items())
    ]
    assert sum(live[0].values()) == pytest.approx(sum(live[1].values()), abs=4)


@pytest.mark.slow
def test_the_plan_of_least_error_can_have_its_masks_ranked_anew(digits):
    model, data = digits
    train = (data.x_train, data.y_train)
    plain = rls.baselines.dynamic_programming(model, train, sparsity=SPARSITY)
    found = rls.baselines.dynamic_programming(
        model, train, sparsity=SPARSITY, rerank=True, validation_data=train
    )
    assert found.sparsity >= SPARSITY
    kinds = {int(one) for entry in found.kernels.values() for one in np.unique(entry.operations)}
    assert kinds == {Operation.KEEP, Operation.PRUNE}  # not quantized, as for any sparsity
    network = network_of(model, *train, sparsity=SPARSITY)
    before, after = (evaluate_plan(network, plan) for plan in (plain, found))
    assert after.loss < 0.9 * before.loss
