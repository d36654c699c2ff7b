"""What is decided together, what it costs, and what a plan of channels means for single weights."""

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from same_outputs import assert_same, random_rows, randomize

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.budgets import KernelState
from rl_sparsity_tf.allocation.channel_budget import ChannelBudget, ChannelCost
from rl_sparsity_tf.channels.costs import ChannelCosts, count_macs
from rl_sparsity_tf.channels.graph import ChannelGraph
from rl_sparsity_tf.channels.units import UnitOperations, find_units
from rl_sparsity_tf.errors import ModelError, PlanError, TargetError
from rl_sparsity_tf.export.size_model import KernelBytes, SizeModel
from rl_sparsity_tf.layers.kernels import find_kernels

layers = keras.layers
KEEP, PRUNE, QUANTIZE = (int(op) for op in list(rls.Operation)[:3])


def residual(width=4, classes=3):
    """A residual block, a depthwise layer with two kernels per channel, a Flatten, two dense."""
    inputs = layers.Input((6, 6, 2))
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = shortcut = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(5, 3, padding="same", name="inner")(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(width, 3, padding="same", name="outer")(x)
    x = layers.ReLU()(layers.Add()([x, shortcut]))
    x = layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, name="depthwise")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(6, activation="relu", name="hidden")(x)
    outputs = layers.Dense(classes, activation="softmax", name="classes")(x)
    return randomize(keras.Model(inputs, outputs, name="residual"))


def joined():
    """Two branches side by side, read together."""
    inputs = layers.Input((5, 5, 1))
    one = layers.Conv2D(3, 3, name="one", activation="relu")(inputs)
    two = layers.Conv2D(2, 3, name="two", activation="relu")(inputs)
    x = layers.Concatenate()([one, two])
    x = layers.Conv2D(4, 1, name="reader", activation="relu")(x)
    outputs = layers.Dense(2, name="classes")(layers.GlobalAveragePooling2D()(x))
    return randomize(keras.Model(inputs, outputs, name="joined"))


def units_of(model):
    return find_units(ChannelGraph(model), find_kernels(model))


def decided(units, pruned):
    """Operations by unit: some channels pruned, the others kept."""
    result = {unit.path: np.full((1, unit.count), KEEP, np.uint8) for unit in units}
    for path, channels in pruned.items():
        result[path][0, channels] = PRUNE
    return result


def test_every_kernel_belongs_to_one_unit_and_ties_are_kept():
    units = units_of(residual())
    found = {unit.path: [member.kernel.path for member in unit.members] for unit in units}
    assert found == {
        "stem/kernel": ["stem/kernel", "outer/kernel", "depthwise/depthwise_kernel"],
        "inner/kernel": ["inner/kernel"],
        "hidden/kernel": ["hidden/kernel"],
        "classes/kernel": ["classes/kernel"],
    }
    frozen = [unit.path for unit in units if unit.frozen]
    assert frozen == ["classes/kernel"]


def test_a_units_matrix_has_a_column_per_channel_of_all_its_kernels():
    model = residual()
    (unit,) = (unit for unit in units_of(model) if unit.path == "stem/kernel")
    stem, outer = (model.get_layer(name).kernel.numpy() for name in ("stem", "outer"))
    depthwise = model.get_layer("depthwise").depthwise_kernel.numpy()
    expected = np.concatenate(
        [
            stem.reshape(-1, 4),
            outer.reshape(-1, 4),
            # Two outputs per channel: one after the other.
            depthwise.reshape(9, 4, 2)[..., 0],
            depthwise.reshape(9, 4, 2)[..., 1],
        ]
    )
    assert unit.shape == expected.shape == (18 + 45 + 18, 4)
    assert unit.size == expected.size
    np.testing.assert_array_equal(unit.matrix(), expected)


def test_units_have_the_scales_of_their_batch_normalizations():
    model = residual()
    units = {unit.path: unit for unit in units_of(model)}
    gamma = model.get_layer("norm").gamma.numpy()
    np.testing.assert_allclose(units["stem/kernel"].scale, np.abs(gamma), rtol=1e-6)
    assert units["inner/kernel"].scale is None


def test_a_pruned_channel_is_masked_where_it_is_made_and_where_it_is_read():
    model = residual()
    units = units_of(model)
    operations = UnitOperations(units)
    chosen = decided(units, {"stem/kernel": [1]})
    inner = operations.of("inner/kernel", chosen)  # reads the four channels at nine positions
    np.testing.assert_array_equal((inner == PRUNE).all(1), np.arange(36) % 4 == 1)
    outer = operations.of("outer/kernel", chosen)  # makes them
    np.testing.assert_array_equal((outer == PRUNE).all(0), np.arange(4) == 1)
    depthwise = operations.of("depthwise/depthwise_kernel", chosen)
    np.testing.assert_array_equal((depthwise == PRUNE).all(0), np.arange(8) // 2 == 1)
    hidden = operations.of("hidden/kernel", chosen)  # Flatten: eight channels at four positions
    np.testing.assert_array_equal((hidden == PRUNE).all(1), (np.arange(32) % 8) // 2 == 1)
    assert (operations.of("classes/kernel", chosen) == KEEP).all()
    assert set(operations.affected("stem/kernel")) == {
        "stem/kernel",
        "outer/kernel",
        "depthwise/depthwise_kernel",
        "inner/kernel",
        "hidden/kernel",
    }


@pytest.mark.slow
@pytest.mark.parametrize("make", [residual, joined])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 999))
def test_what_is_shrunk_by_a_plan_is_what_the_tied_masks_compute(make, seed):
    model, rng = make(), np.random.default_rng(seed)
    units = units_of(model)
    pruned = {
        unit.path: rng.permutation(unit.count)[: rng.integers(0, unit.count)]
        for unit in units
        if not unit.frozen
    }
    plan = UnitOperations(units).plan(decided(units, pruned))
    masked = rls.strip(rls.wrap(model, rls.tie_channels(model, plan)))
    small = rls.shrink(model, plan)
    assert_same(masked, small, rows=256)
    left = {unit.path: unit.count for unit in units_of(small)}
    for unit in units:
        assert left[unit.path] <= unit.count - len(pruned.get(unit.path, []))


def test_tied_masks_stay_out_of_use_in_fine_tuning():
    model = residual()
    units = units_of(model)
    plan = UnitOperations(units).plan(decided(units, {"stem/kernel": [0, 3], "inner/kernel": [2]}))
    wrapped = rls.wrap(model, rls.tie_channels(model, plan))
    wrapped.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    wrapped.fit(random_rows(model, 32), np.arange(32) % 3, epochs=2, verbose=0)
    trained = rls.strip(wrapped)
    # The untied plan leaves what biases and normalizations make of the channels.
    assert np.abs(trained.get_layer("norm").beta.numpy()[0]) > 0
    small = rls.shrink(trained)
    assert {unit.path: unit.count for unit in units_of(small)}["stem/kernel"] == 2
    assert_same(trained, small, rows=256)


def test_plans_of_kernels_and_of_units_say_the_same():
    model = residual()
    units = units_of(model)
    operations = UnitOperations(units)
    chosen = decided(units, {"stem/kernel": [1, 2], "hidden/kernel": [5]})
    chosen["inner/kernel"][:] = QUANTIZE
    again = operations.of_units(operations.plan(chosen))
    assert {path: value.tolist() for path, value in again.items()} == {
        path: value.tolist() for path, value in chosen.items()
    }


def channel_plan(model, pruned, group="channel"):
    entries = []
    for kernel in find_kernels(model):
        if kernel.path in pruned:
            shape = kernel.grouping(group).shape
            chosen = np.full(shape, KEEP, np.uint8)
            chosen[:, pruned[kernel.path]] = PRUNE
            entries.append(
                rls.KernelPlan(kernel.path, kernel.shape, kernel.spec.layout, group, 32, chosen)
            )
    return rls.CompressionPlan(entries)


def test_plans_that_cannot_be_tied_are_refused():
    model = residual()
    with pytest.raises(PlanError, match=r"channel 1 of 'stem/kernel', but 'outer/kernel' keeps"):
        rls.tie_channels(model, channel_plan(model, {"stem/kernel": [1]}))
    with pytest.raises(PlanError, match=r"channels of 'classes/kernel', which have to stay: .*sof"):
        rls.shrink(model, channel_plan(model, {"classes/kernel": [1]}))
    with pytest.raises(PlanError, match=r"'inner/kernel' has groups of 'element'. Expected 'chan"):
        rls.shrink(model, channel_plan(model, {"inner/kernel": [1]}, "element"))
    subclassed = type("Own", (keras.Model,), {"call": lambda self, x: self.one(x)})()
    subclassed.one = layers.Dense(2)
    subclassed(np.zeros((1, 3), np.float32))
    with pytest.raises(ModelError, match=r"tie_channels cannot follow .*subclassed"):
        rls.tie_channels(subclassed, rls.CompressionPlan([]))


# Costs.


def macs_by_hand(model):
    """Multiplications of the layers above, from their shapes."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.DepthwiseConv2D):
            total += int(np.prod(layer.output_shape[1:])) * 9
        elif isinstance(layer, layers.Conv2D):
            kernel = layer.kernel.shape
            total += int(np.prod(layer.output_shape[1:])) * int(np.prod(kernel[:3]))
        elif isinstance(layer, layers.Dense):
            total += int(np.prod(layer.kernel.shape))
    return total


@pytest.mark.parametrize("make", [residual, joined])
def test_costs_of_what_lives_are_those_of_the_shrunk_model(make):
    model, rng = make(), np.random.default_rng(3)
    graph = ChannelGraph(model)
    units = find_units(graph, find_kernels(model))
    costs = ChannelCosts(model, graph, units)
    for _ in range(5):
        pruned = {
            unit.path: rng.permutation(unit.count)[: rng.integers(0, unit.count)]
            for unit in units
            if not unit.frozen
        }
        small = rls.shrink(model, UnitOperations(units).plan(decided(units, pruned)))
        live = np.array([1 - len(pruned.get(unit.path, [])) / unit.count for unit in units])
        # Nothing more is found dead than what was pruned.
        weights = sum(kernel.size for kernel in find_kernels(small))
        assert costs.weights(live) == pytest.approx(weights)
        assert costs.macs(live) == pytest.approx(macs_by_hand(small))
        assert count_macs(small) == macs_by_hand(small)


def test_costs_take_many_plans_at_once():
    model = residual()
    graph = ChannelGraph(model)
    units = find_units(graph, find_kernels(model))
    costs = ChannelCosts(model, graph, units)
    live = np.random.default_rng(0).random((3, 5, len(units)))
    together = costs.macs(live)
    assert together.shape == (3, 5)
    assert together[1, 2] == pytest.approx(float(costs.macs(live[1, 2])))


def test_bytes_fall_with_channels_and_with_integers():
    model = residual()
    graph = ChannelGraph(model)
    units = find_units(graph, find_kernels(model))
    sizes = KernelBytes(SizeModel(model), "tflite_bytes")
    bytes_of = ChannelCosts(model, graph, units).bytes(sizes)
    whole, none, every = np.ones(len(units)), np.zeros(len(units), bool), np.ones(len(units), bool)
    kernels = {kernel.path: kernel.value() for kernel in find_kernels(model)}
    assert bytes_of(whole, none) == pytest.approx(SizeModel(model).file_size(kernels, {}).raw)
    half = np.where([unit.frozen is None for unit in units], 0.5, 1.0)
    assert bytes_of(half, none) < bytes_of(whole, none)
    assert bytes_of(whole, every) < bytes_of(whole, none)


def test_multiplications_of_images_of_any_size_are_not_counted():
    model = keras.Sequential([layers.Input((None, None, 1)), layers.Conv2D(4, 3, name="open")])
    with pytest.raises(TargetError, match=r"'open' has an output of shape .*Input\(shape=\(height"):
        count_macs(model)


def test_recurrent_kernels_count_once_per_time_step():
    model = keras.Sequential([layers.Input((7, 3)), layers.LSTM(4), layers.Dense(2)])
    assert count_macs(model) == 7 * (3 * 16 + 4 * 16) + 8


# The budget.


def budget_of(model, share):
    graph = ChannelGraph(model)
    units = find_units(graph, find_kernels(model))
    costs = ChannelCosts(model, graph, units)
    limit = share * float(costs.macs(np.ones(len(units))))
    cost = ChannelCost(lambda live, _: costs.macs(live))
    return ChannelBudget(limit, cost, units, f"Target(macs={share})"), units


def test_a_budget_knows_its_even_share_and_its_floors():
    budget, units = budget_of(residual(), 0.4)
    assert 0.25 < budget.pruned_share < 0.6
    assert budget.goal == pytest.approx(0.6)
    frozen = [index for index, unit in enumerate(units) if unit.frozen]
    assert (budget.capacity[frozen] == 0).all()
    able = [index for index, unit in enumerate(units) if not unit.frozen]
    assert all(budget.capacity[i] <= units[i].size - units[i].shape[0] for i in able)


def test_a_budget_says_what_is_still_within_reach():
    budget, units = budget_of(residual(), 0.4)
    start = [KernelState(0, unit.size, False, False) for unit in units]
    assert budget.expected(start) == pytest.approx(budget.whole)
    assert budget.least(start) <= budget.limit
    kept = [KernelState(0, 0, True, False) for _ in units]
    assert budget.least(kept) == pytest.approx(budget.whole)
    assert budget.sparsity == 0
    assert budget.progress == 0
    budget.pruned[:] = budget.capacity
    assert budget.progress == 1
    assert budget.sparsity >= budget.goal


def test_a_limit_out_of_reach_is_refused_with_the_least_that_can_be():
    with pytest.raises(
        TargetError, match=r"Target\(macs=0.01\) cannot be reached: .*Expected at l"
    ):
        budget_of(residual(), 0.01)


def test_channels_go_only_as_far_as_the_network_gets_cheaper():
    """As where a layer of one channel takes longer than one of half its channels."""
    units = units_of(residual(width=8))
    cost = ChannelCost(lambda live, _: (0.2 + np.abs(live - 0.5)).sum(-1))
    budget = ChannelBudget(0.9 * 0.7 * len(units), cost, units, "Target(latency=0.9)")
    live = budget.live(budget.capacity)
    for unit, share in zip(units, live, strict=True):
        # The closest there is to a half, in whole channels.
        assert share == 1 if unit.frozen else abs(share - 0.5) <= 0.5 / unit.count
    states = [KernelState(0, unit.size, False, False) for unit in units]
    assert budget.least(states) == pytest.approx(float(cost.total(live, None)))
