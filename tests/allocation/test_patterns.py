"""N:M patterns: in groupings, rules, plans, wrappers, and masks that learn."""

import json

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO, inputs_for, layers

import rl_sparsity_tf as rls
from rl_sparsity_tf import baselines
from rl_sparsity_tf.errors import ArgumentError, ModelError, PlanError
from rl_sparsity_tf.layers.groups import GROUPS, KINDS, PATTERNS, Grouping
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import MASKS, Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan, KernelRule
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.layers.wrapping import plan_of, wrappers_of
from rl_sparsity_tf.training.mask_training import start_gates, update_masks

KEEP, PRUNE, QUANTIZE = Operation.KEEP, Operation.PRUNE, Operation.QUANTIZE
modest = settings(max_examples=40, deadline=None)


def net(inputs=10, outputs=3, seed=0):
    """One Dense layer with random weights, compiled."""
    model = keras.Sequential([layers.Input((inputs,)), layers.Dense(outputs, name="dense")])
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    model.compile("sgd", "mse")
    return model


def plan_of_column(column, group="2:4", bits=32):
    operations = np.array(column, np.uint8)[:, None]
    return KernelPlan("dense/kernel", (len(column), 1), "io", group, bits, operations)


def keeps_pattern(live):
    """Whether every four inputs keep at most two, and the tail half rounded up."""
    return all(
        block.sum() <= -(-len(block) // 2)
        for column in live.T
        for block in np.split(column, range(4, len(column), 4))
    )


# ---------------------------------------------------------------------------- groupings


def test_patterns_are_kinds_of_their_own():
    assert PATTERNS == ("2:4",)
    assert set(KINDS) == {*GROUPS, *PATTERNS}
    assert Grouping("2:4", 10, 3).pattern == (2, 4)
    assert Grouping("2:4", 10, 3).shape == (10, 3)
    assert all(Grouping(group, 10, 3).pattern is None for group in GROUPS)


@modest
@given(st.integers(1, 14), st.integers(1, 3), st.integers(0, 2**31), st.integers(1, 6))
def test_the_largest_of_every_block_live(inputs, outputs, seed, levels):
    scores = np.random.default_rng(seed).integers(0, levels, (inputs, outputs)).astype(float)
    live = Grouping("2:4", inputs, outputs).largest(scores)
    assert live.shape == scores.shape
    for output in range(outputs):
        for start in range(0, inputs, 4):
            block, alive = scores[start : start + 4, output], live[start : start + 4, output]
            assert alive.sum() == -(-len(block) // 2)
            expected = np.zeros(len(block), bool)
            order = np.argsort(block, kind="stable")  # of equals the first go
            expected[order[len(block) // 2 :]] = True
            np.testing.assert_array_equal(alive, expected)


def test_counts_of_blocks_are_held_even_for_nan():
    grouping = Grouping("2:4", 6, 2)
    scores = np.arange(12.0).reshape(6, 2)
    scores[1] = np.nan
    counts = np.array([[1, 3], [0, 2]])
    live = grouping.largest(scores, counts)
    np.testing.assert_array_equal(grouping.in_blocks(live).sum(1), counts)
    assert live[:, 1].tolist() == [False, True, True, True, True, True]


def test_only_patterns_have_blocks_to_choose_in():
    with pytest.raises(ArgumentError, match=r"group 'block4' is no pattern.*'2:4'"):
        Grouping("block4", 8, 2).largest(np.ones((8, 2)))


def test_a_broken_pattern_is_named():
    grouping = Grouping("2:4", 7, 2)
    live = np.zeros((7, 2), bool)
    live[4:, 1] = True
    message = "Inputs 4 to 6 of output 1 keep 3 weights. Expected at most 2.*prune more of them"
    with pytest.raises(ArgumentError, match=message):
        grouping.check_pattern(live)
    grouping.check_pattern(live, whole=True)
    live[5, 1] = False
    grouping.check_pattern(live)
    live[:3, 0] = True
    with pytest.raises(ArgumentError, match="Inputs 0 to 3 of output 0 keep 3 weights"):
        grouping.check_pattern(live, whole=True)
    Grouping("element", 7, 2).check_pattern(live)


# ---------------------------------------------------------------------------- rules and plans


def test_a_rule_with_a_pattern_keeps_the_largest():
    model = net(6, 1)
    matrix = np.array([[1.0], [-4.0], [3.0], [2.0], [0.5], [-0.7]], np.float32)
    model.get_layer("dense").kernel.assign(matrix)
    rule = KernelRule("*", pattern="2:4", quantize=True, bits=4)
    entry = resolve(CompressionPlan([rule]), model).kernels["dense/kernel"]
    assert entry.group == "2:4"
    assert entry.bits == 4
    wanted = [PRUNE, QUANTIZE, QUANTIZE, PRUNE, PRUNE, QUANTIZE]
    assert entry.operations[:, 0].tolist() == wanted
    assert entry.sparsity == 0.5


def test_rules_with_patterns_survive_json():
    plan = CompressionPlan([KernelRule("*", pattern="2:4"), KernelRule("dense/kernel", 0.25)])
    text = plan.to_json()
    one, other = json.loads(text)["kernels"]
    assert one["pattern"] == "2:4"
    assert "sparsity" not in one
    assert "pattern" not in other
    assert CompressionPlan.from_json(text) == plan
    short = {"format_version": 1, "kernels": [{"path": "*", "pattern": "2:4"}]}
    assert CompressionPlan.from_dict(short).kernels["*"] == KernelRule("*", pattern="2:4")
    exact = resolve(plan, net())
    assert CompressionPlan.from_json(exact.to_json()) == exact


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KernelRule("*"), "has sparsity None. Expected a number.*or a pattern such as"),
        (lambda: KernelRule("*", pattern="2:5"), "pattern '2:5'. Expected one of '2:4'"),
        (lambda: KernelRule("*", 0.5, pattern="2:4"), "sparsity=0.5.*Expected the pattern alone"),
        (
            lambda: KernelRule("*", group="block4", pattern="2:4"),
            "group='block4'. Expected the pattern alone",
        ),
        (
            lambda: plan_of_column([KEEP, KEEP, KEEP, PRUNE]),
            "'dense/kernel' does not keep its pattern. Inputs 0 to 3 of output 0 keep 3 weights",
        ),
        (
            lambda: plan_of_column([KEEP] * 4 + [PRUNE, PRUNE, KEEP, KEEP]),
            "Inputs 0 to 3 of output 0 keep 4 weights. Expected at most 2",
        ),
        (lambda: plan_of_column([KEEP], group="2:3"), "has group '2:3'.*Did you mean '2:4'"),
    ],
)
def test_what_breaks_a_pattern_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_a_kernel_may_prune_more_or_nothing():
    assert plan_of_column([KEEP] * 5).sparsity == 0.0
    assert plan_of_column([PRUNE, KEEP, PRUNE, PRUNE, KEEP]).sparsity == 0.6
    assert plan_of_column([KEEP, KEEP, KEEP, PRUNE], group="element").sparsity == 0.25


# ---------------------------------------------------------------------------- baselines.n_m


@pytest.mark.parametrize("name", ["dense", "residual", "separable", "conv1d"])
def test_n_m_prunes_every_kernel_to_the_pattern(name):
    model = ZOO[name]()
    before = model.get_weights()
    plan = baselines.n_m(model, pattern="2:4")
    kernels = find_kernels(model)
    assert list(plan.kernels) == [kernel.path for kernel in kernels]
    wrapped = rls.wrap(model, plan)
    assert plan_of(wrapped) == plan
    small = rls.strip(wrapped)
    for kernel, new in zip(kernels, find_kernels(small), strict=True):
        live = plan.kernels[kernel.path].operations == KEEP
        assert keeps_pattern(live)
        np.testing.assert_array_equal(new.matrix(), np.where(live, kernel.matrix(), 0))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_n_m_quantizes_what_lives():
    plan = baselines.n_m(net(), None, quantize=True, bits=4)
    entry = plan.kernels["dense/kernel"]
    assert entry.bits == 4
    assert set(np.unique(entry.operations)) == {PRUNE, QUANTIZE}
    assert not (baselines.n_m(net()).kernels["dense/kernel"].operations == QUANTIZE).any()


def test_n_m_says_what_it_cannot_use():
    with pytest.raises(ArgumentError, match=r"pattern='4:8' is not known. Expected one of '2:4'"):
        baselines.n_m(net(), pattern="4:8")
    with pytest.raises(ArgumentError, match="bits=5 cannot be used"):
        baselines.n_m(net(), bits=5)
    broken = net()
    broken.get_layer("dense").kernel.assign(np.full((10, 3), np.nan))
    with pytest.raises(ModelError, match="NaN or infinite"):
        baselines.n_m(broken)


# ---------------------------------------------------------------------------- wrappers and masks


def test_a_wrapper_starts_with_everything_kept_and_holds_the_pattern():
    wrapped = rls.wrap(net(), group="2:4")
    (wrapper,) = wrappers_of(wrapped)
    assert plan_of(wrapped).sparsity == 0.0
    operations = np.zeros((10, 3), np.uint8)
    operations[[0, 1], 0] = PRUNE  # a block of its own may come first
    wrapper.assign_operations("kernel", operations)
    operations[2, 1] = PRUNE
    with pytest.raises(ArgumentError, match="Inputs 0 to 3 of output 1 keep 3 weights"):
        wrapper.assign_operations("kernel", operations)
    copy = type(wrapper).from_config(wrapper.get_config())
    assert copy.group == "2:4"
    assert copy.kernels["kernel"].group == "2:4"


@pytest.mark.parametrize("mask", MASKS)
def test_masks_follow_the_scores_within_every_block(mask):
    model = net()
    wrapped = rls.wrap(model, baselines.n_m(model), mask=mask, train_masks=True)
    (wrapper,) = wrappers_of(wrapped)
    before = wrapper.state("kernel")["mask"].numpy()
    rng = np.random.default_rng(3)
    wanted = rng.permuted(np.arange(30)).reshape(10, 3).astype(np.float32) / 10
    if mask == "hard_concrete":
        wrapper.state("kernel")["mask_logits"].assign(wanted - 1.0)
    else:
        wrapper.variable("kernel").assign(wanted)
    update_masks(wrapper)
    live = wrapper.state("kernel")["mask"].numpy() > 0
    assert (live != (before > 0)).any()
    np.testing.assert_array_equal(live, Grouping("2:4", 10, 3).largest(wanted))


def test_blocks_that_keep_fewer_go_on_keeping_fewer():
    model = net(8, 1)
    operations = np.array([[KEEP], [PRUNE], [PRUNE], [PRUNE], [PRUNE], [KEEP], [PRUNE], [KEEP]])
    plan = CompressionPlan([KernelPlan("dense/kernel", (8, 1), "io", "2:4", 32, operations)])
    wrapped = rls.wrap(model, plan, train_masks=True)
    (wrapper,) = wrappers_of(wrapped)
    wrapper.variable("kernel").assign(np.arange(1.0, 9.0)[:, None])
    update_masks(wrapper)
    live = wrapper.state("kernel")["mask"].numpy()[:, 0]
    assert live.tolist() == [0, 0, 0, 1, 0, 0, 1, 1]


def test_gates_start_by_the_distance_from_their_own_block():
    model = net(8, 1)
    weights = np.array([1, 2, 3, 4, 10, 20, 30, 40], np.float32)[:, None]
    model.get_layer("dense").kernel.assign(weights)
    wrapped = rls.wrap(model, baselines.n_m(model), mask="hard_concrete", train_masks=True)
    (wrapper,) = wrappers_of(wrapped)
    start_gates(wrapper)
    logits = wrapper.state("kernel")["mask_logits"].numpy()[:, 0]
    assert (np.sign(logits) == [-1, -1, 0, 1, -1, -1, 0, 1]).all()
    # In units of the whole kernel's magnitude, from the smallest weight of the block that lives.
    np.testing.assert_allclose(logits[:4] * 10, logits[4:], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_training_ends_in_the_pattern(mask):
    model = ZOO["residual"]()
    plan = baselines.n_m(model)
    wrapped = rls.wrap(model, plan, mask=mask, train_masks=True)
    optimizer = keras.optimizers.Adam(0.1)  # far enough for masks to change
    wrapped.compile(optimizer, "sparse_categorical_crossentropy")
    x, y = inputs_for(model, 32), np.arange(32) % 4
    wrapped.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[rls.MaskTraining(every=1)])
    learned = plan_of(wrapped)
    assert learned != plan
    assert learned.sparsity == plan.sparsity
    for kernel in find_kernels(rls.strip(wrapped)):
        assert keeps_pattern(kernel.matrix() != 0)
        assert learned.kernels[kernel.path].group == "2:4"
