"""Random search and hill climbing: targets, budgets of evaluations, determinism, errors."""

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import TRAIN, VALIDATION, quick_search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf import baselines
from rl_sparsity_tf.allocation import dynamic_programming
from rl_sparsity_tf.allocation.density_plans import PlanSpace, shares
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import SCHEDULE
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search.plan_search import climb, search_randomly

L = keras.layers
REWARD = rls.Reward()


def compressed(model, target, group="element", recovery="least_squares"):
    with quick_search():
        return CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation_data"),
            target=target,
            group=group,
            recovery=rls.Recovery(method=recovery, steps=1),
        )


@pytest.fixture(scope="module")
def network():
    """Shared: every search starts from the dense network."""
    return compressed(trained(), rls.Target(sparsity=0.7))


def pruned_weights(plan):
    return sum(entry.weights_under(Operation.PRUNE) for entry in plan.kernels.values())


SEARCHES = pytest.mark.parametrize("search", [search_randomly, climb])
PUBLIC = pytest.mark.parametrize("name", ["random_search", "hill_climbing"])


# ---------------------------------------------------------------------- searches


@pytest.mark.slow
@SEARCHES
def test_the_best_of_so_many_plans_is_found(network, search):
    seen = []

    def reward(outcome, previous):
        assert previous is None
        seen.append((REWARD(outcome, None), -outcome.loss))
        return seen[-1][0]

    found = search(network, reward, 12, seed=3)
    assert found.evaluations == len(found.history) == len(seen) == 12
    best = max(range(12), key=seen.__getitem__)
    assert found.value == seen[best][0]
    assert found.history == list(np.maximum.accumulate([value for value, _ in seen]))
    assert -found.outcome.loss == seen[best][1]
    assert pruned_weights(found.plan) == network.budget.wanted
    assert evaluate_plan(network, found.plan) == found.outcome
    assert {entry.exported_bits for entry in found.plan.kernels.values()} == {8}


@SEARCHES
def test_the_seed_decides_and_the_state_of_the_network_does_not(network, search):
    one = search(network, REWARD, 6, seed=5)
    other = search(network, REWARD, 6, seed=5)
    assert one == other
    histories = {tuple(search(network, REWARD, 14, seed=seed).history) for seed in range(4)}
    assert len(histories) > 1


@SEARCHES
def test_no_plan_is_evaluated_twice(network, search):
    plans = []

    def reward(outcome, previous):
        plans.append(network.plan)
        return 0.0

    search(network, reward, 8)
    assert len(plans) == 8
    assert all(one != other for i, one in enumerate(plans) for other in plans[:i])


@SEARCHES
def test_searches_end_when_there_is_nothing_new(search):
    # One kernel of six groups: a sparsity leaves one plan, and what its masks become.
    model = keras.Sequential([L.Input((6,)), L.Dense(3, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    found = search(compressed(model, rls.Target(sparsity=0.5)), REWARD, 50)
    assert found.evaluations <= 1 + len(SCHEDULE)
    assert pruned_weights(found.plan) == 9


@pytest.mark.slow
@SEARCHES
def test_other_recoveries_are_trained(search):
    network = compressed(trained(), rls.Target(sparsity=0.7), recovery="finetune")
    calls = []
    train_steps = network.train_steps
    network.train_steps = lambda steps: (calls.append(steps), train_steps(steps))
    found = search(network, REWARD, 3, steps=5)
    assert calls == [5] * 6  # three plans of two kernels
    assert found.evaluations == 3
    assert search(network, REWARD, 3, steps=5) == found


def test_climbing_starts_from_lamp_and_keeps_improvements(network):
    found = climb(network, REWARD, 1)
    assert found.plan == baselines.lamp(trained(), sparsity=0.7, quantize=True)
    longer = climb(network, REWARD, 15)
    assert longer.history[0] == found.value
    assert longer.value >= found.value
    assert longer.history == sorted(longer.history)


def test_climbing_starts_from_a_given_plan(network):
    start = dynamic_programming.propose(network)
    found = climb(network, REWARD, 1, start=start)
    assert found.plan == start
    # A plan that is too dense is pruned further: what it pruned stays pruned.
    dense = baselines.erk(trained(), sparsity=0.3)
    found = climb(network, REWARD, 1, start=dense)
    assert pruned_weights(found.plan) == network.budget.wanted
    for path, entry in dense.kernels.items():
        gone = found.plan.kernels[path].operations == Operation.PRUNE
        assert gone[entry.operations == Operation.PRUNE].all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_step_moves_weights_from_one_kernel_to_another(network, seed, first, last):
    space = PlanSpace(network, quantize=True)
    before = np.array([first, last])
    after = space.step(before, np.random.default_rng(seed))
    assert space.totals.tolist() == [48, 24]
    assert (after * space.totals).sum() == pytest.approx((before * space.totals).sum())
    assert (after > 0).all()
    assert (after <= 1 + 1e-12).all()
    assert (after >= before / 2 - 1e-12).all()


def test_random_densities_spread_around_the_uniform_one(network):
    space = PlanSpace(network, quantize=True)
    rng = np.random.default_rng(0)
    ratios = np.exp(rng.uniform(-2, 2, (200, 2)))
    found = np.array([shares(space.live(space.scores(one))) for one in ratios])
    assert (found @ space.totals == 72 - network.budget.wanted).all()
    # In proportion to what was drawn, up to a group of 24 and of 48.
    free = (found < 1).all(axis=1)
    wanted = ratios * ((72 - network.budget.wanted) / (ratios @ space.totals))[:, None]
    np.testing.assert_allclose(found[free], wanted[free], atol=1.01 / 24)
    assert (found[:, 0] < 0.2).any()
    assert (found[:, 0] > 0.3).any()


# ---------------------------------------------------------------------- bytes


@pytest.fixture(scope="module")
def sized():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([L.Input((6,)), L.Dense(300, activation="relu"), L.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return compressed(model, rls.Target(tflite_bytes=4000))


@pytest.mark.slow
@SEARCHES
def test_sizes_are_met_and_used(sized, search):
    found = search(sized, REWARD, 4)
    state = evaluate_plan(sized, found.plan)
    assert state == found.outcome
    used = sized.budget.fixed + sized.budget.kernel_bytes(sized.states())
    assert 0.98 * sized.budget.limit < used <= sized.budget.limit
    start = climb(sized, REWARD, 2, start=found.plan)
    assert start.evaluations == 2


@SEARCHES
def test_a_size_that_floats_cannot_meet_is_refused(sized, search, monkeypatch):
    floats = sized.budget.fixed + sum(costs.cost(1.0, False) for costs in sized.budget.costs)
    monkeypatch.setattr(sized.budget, "limit", floats - 1)
    text = r"The file would have about .* bytes .* Expected a larger target, or quantize=True"
    with pytest.raises(rls.TargetError, match=text):
        search(sized, REWARD, 2, quantize=False)


def test_kernels_are_integers_where_that_is_smaller(sized):
    # 300 outputs have a scale each; a few weights are smaller as floats.
    space = PlanSpace(sized, quantize=True)
    sparse = [np.arange(1800).reshape(6, 300) < 10, np.arange(900).reshape(300, 3) < 200]
    assert list(space.bits(sparse).values()) == [32, 8]
    dense = [np.ones((6, 300), bool), np.ones((300, 3), bool)]
    assert list(space.bits(dense).values()) == [8, 8]
    assert list(PlanSpace(sized, quantize=False).bits(dense).values()) == [32, 32]


# ---------------------------------------------------------------------- for users


@pytest.mark.slow
@PUBLIC
def test_users_get_a_plan_that_meets_the_target(name):
    model = trained()
    before = [weight.copy() for weight in model.get_weights()]
    options = {"sparsity": 0.5, "validation_data": VALIDATION, "evaluations": 3, "seed": 2}
    with quick_search():
        plan = getattr(baselines, name)(model, TRAIN, group="block4", **options)
        again = plan
        if name == "random_search":
            again = baselines.random_search(model, TRAIN, group="block4", **options)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert plan == again
    assert 36 <= pruned_weights(plan) < 40
    assert {entry.group for entry in plan.kernels.values()} == {"block4"}
    # A sparsity leaves what lives as it is, as with the other baselines.
    assert {entry.exported_bits for entry in plan.kernels.values()} == {32}
    rls.strip(rls.wrap(model, plan))


def test_users_may_begin_anywhere_with_another_reward_and_recovery():
    model = trained()
    start = baselines.uniform(model, sparsity=0.5)
    with quick_search():
        plan = baselines.hill_climbing(
            model,
            TRAIN,
            rls.Target(sparsity=0.5),
            validation_data=VALIDATION,
            evaluations=3,
            reward=lambda outcome, previous: 0.0,
            recovery="none",
            start=rls.CompressionPlan.from_json(start.to_json()),
        )
    # Nothing is worth more than the start, but by its loss.
    assert pruned_weights(plan) == 36


# ---------------------------------------------------------------------- wrong calls


@PUBLIC
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"data": None}, rls.DataError, r"was given no data, which plans recover on"),
        ({"validation_data": None}, rls.DataError, r"was given no validation_data, which plans ar"),
        ({"evaluations": 0}, rls.ArgumentError, "evaluations=0 cannot be used. Expected a whole"),
        ({"evaluations": True}, rls.ArgumentError, "evaluations=True cannot be used"),
        ({"seed": -1}, rls.ArgumentError, "seed=-1 cannot be used.* at least 0"),
        ({"reward": rls.Reward}, rls.ArgumentError, r"reward=<class .* Expected rls.Reward\("),
        ({"reward": 1.0}, rls.ArgumentError, "reward=1.0 cannot be used"),
        ({"recovery": "prayer"}, rls.ArgumentError, r"Recovery\(method\)='prayer' is not known"),
        ({"sparsity": None}, rls.ArgumentError, "Expected exactly one of them"),
        ({"sparsity": 0.99}, rls.TargetError, "Expected a sparsity of at most 0.972"),
    ],
)
def test_wrong_arguments_are_refused(name, options, error, text):
    arguments = {"data": TRAIN, "sparsity": 0.5, "validation_data": VALIDATION, **options}
    with pytest.raises(error, match=text) as caught, quick_search():
        getattr(baselines, name)(trained(), **arguments)
    if error is rls.DataError:
        assert str(caught.value).startswith(name)


def test_starts_that_do_not_fit_are_refused():
    model = trained()
    options = {"sparsity": 0.5, "validation_data": VALIDATION}
    with pytest.raises(rls.ArgumentError, match=r"start='lamp' is a str. Expected a Compression"):
        baselines.hill_climbing(model, TRAIN, start="lamp", **options)
    channels = baselines.uniform(model, sparsity=0.5, group="channel")
    with pytest.raises(rls.PlanError, match=r"has groups of 'channel' for .*groups of 'element'"):
        baselines.hill_climbing(model, TRAIN, start=channels, **options)
    half = rls.CompressionPlan([next(iter(baselines.lamp(model, sparsity=0.5).kernels.values()))])
    with pytest.raises(rls.PlanError, match=r"start has no entry for the kernel 'last/kernel'"):
        baselines.hill_climbing(model, TRAIN, start=half, **options)


# ---------------------------------------------------------------------- ranked anew


def test_ranking_anew_says_what_it_needs():
    def planned(model=None, **options):
        model = trained() if model is None else model
        return baselines.dynamic_programming(model, TRAIN, sparsity=0.5, rerank=True, **options)

    with pytest.raises(rls.DataError, match=r"rerank=True\) was given no validation_data"):
        planned()
    with pytest.raises(rls.ArgumentError, match=r"does not go with bits=4 and group='element'"):
        planned(bits=4, validation_data=VALIDATION)
    with pytest.raises(rls.ArgumentError, match=r"does not go with bits=8 and group='channel'"):
        planned(group="channel", validation_data=VALIDATION)
    with pytest.raises(rls.ArgumentError, match=r"rerank='yes' cannot be used"):
        baselines.dynamic_programming(trained(), TRAIN, sparsity=0.5, rerank="yes")

    class OwnStep(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    given = keras.Input((6,))
    own = OwnStep(given, L.Dense(3, activation="softmax")(L.Dense(8, activation="relu")(given)))
    own.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    with quick_search(), pytest.raises(rls.ArgumentError, match=r"a training step of its own"):
        planned(own, validation_data=VALIDATION)
