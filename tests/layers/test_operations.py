"""Properties of the four operations on grouped kernels, for every kind of group."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers import operations as ops
from rl_sparsity_tf.layers.groups import GROUPS, Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.registry import _REGISTRY, kernel_spec, register_layer

modest = settings(max_examples=30, deadline=None)

# Up to 37 inputs: two full blocks of 16 and a ragged tail, and nothing that divides evenly.
groupings = st.builds(Grouping, st.sampled_from(GROUPS), st.integers(1, 37), st.integers(1, 3))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@st.composite
def kernels(draw):
    """A grouping, a kernel with all values distinct, and one operation per group."""
    grouping = draw(groupings)
    seed = draw(st.integers(0, 2**31))
    matrix = normal(seed, grouping.inputs, grouping.outputs)
    operations = draw(hnp.arrays(np.uint8, grouping.shape, elements=st.integers(0, 3)))
    return grouping, matrix, operations


@st.composite
def float_kernels(draw):
    """A grouping and a kernel of awkward magnitudes, with zeros and equal values."""
    grouping = draw(groupings)
    # Subnormal scales are flushed to zero by TensorFlow's threads, not by NumPy.
    positive = st.floats(2.0**-60, 2.0**60, width=32)
    elements = st.one_of(st.just(0.0), positive, positive.map(lambda value: -value))
    matrix = draw(hnp.arrays(np.float32, (grouping.inputs, grouping.outputs), elements=elements))
    return grouping, matrix


def blocks(grouping, matrix):
    """Contents of every group, `[row][output]`, by slicing only."""
    return [
        [
            matrix[row * grouping.block : (row + 1) * grouping.block, output]
            for output in range(grouping.outputs)
        ]
        for row in range(grouping.rows)
    ]


# ---------------------------------------------------------------------------- grouping


@modest
@given(groupings, st.integers(0, 2**31))
def test_grouping_agrees_with_slicing_and_numpy_with_tensorflow(grouping, seed):
    matrix = normal(seed, grouping.inputs, grouping.outputs).astype(np.float64)
    grid = normal(seed + 1, *grouping.shape)
    expected = np.array([[part.sum() for part in row] for row in blocks(grouping, matrix)])
    np.testing.assert_allclose(grouping.reduce_sum(tf.constant(matrix)), expected, rtol=1e-12)
    np.testing.assert_allclose(grouping.sum_numpy(matrix), expected, rtol=1e-12)
    expanded = grouping.expand_numpy(grid)
    assert expanded.shape == matrix.shape
    for row, row_blocks in enumerate(blocks(grouping, expanded)):
        for output, part in enumerate(row_blocks):
            assert (part == grid[row, output]).all()
    tensor = grouping.expand(tf.constant(grid))
    np.testing.assert_array_equal(np.broadcast_to(tensor.numpy(), matrix.shape), expanded)


@modest
@given(groupings)
def test_sizes_count_every_weight_once(grouping):
    sizes = [[part.size for part in row] for row in blocks(grouping, grouping_zeros(grouping))]
    np.testing.assert_array_equal(grouping.sizes, sizes)
    assert grouping.sizes.sum() == grouping.inputs * grouping.outputs
    assert grouping.count == grouping.sizes.size
    with pytest.raises(ValueError, match="read-only"):
        grouping.sizes[0, 0] = 1


def grouping_zeros(grouping):
    return np.zeros((grouping.inputs, grouping.outputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blok4", 3, 3), "group='blok4' is not known.*Did you mean 'block4'"),
        (("element", 0, 3), "0 inputs and 3 outputs has no weights"),
        (("element", 3, 0), "Expected at least one of each"),
    ],
)
def test_wrong_groupings(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Grouping(*arguments)


# ---------------------------------------------------------------------------- shuffle


@modest
@given(kernels())
def test_swap_is_a_permutation_and_its_own_inverse(kernel):
    grouping, matrix, operations = kernel
    swaps = ops.swaps_of(operations, grouping)
    once = ops.permute(tf.constant(matrix), tf.constant(swaps), grouping).numpy()
    for output in range(grouping.outputs):  # weights never change their output unit
        np.testing.assert_array_equal(np.sort(once[:, output]), np.sort(matrix[:, output]))
    twice = ops.permute(tf.constant(once), tf.constant(swaps), grouping).numpy()
    np.testing.assert_array_equal(twice, matrix)


@modest
@given(kernels())
def test_neighbours_swap_exactly_when_one_of_them_asks(kernel):
    grouping, matrix, operations = kernel
    swaps = ops.swaps_of(operations, grouping)
    after = blocks(grouping, ops.permute(tf.constant(matrix), tf.constant(swaps), grouping).numpy())
    before = blocks(grouping, matrix)
    asks = operations == Operation.SHUFFLE
    for output in range(grouping.outputs):
        for row in range(grouping.rows):
            neighbour = row ^ 1
            # A ragged tail or an odd last group has no neighbour of its own size.
            paired = neighbour < grouping.rows and (
                before[row][output].size == before[neighbour][output].size == grouping.block
            )
            moves = paired and asks[row, output] != asks[neighbour, output]
            source = neighbour if moves else row
            np.testing.assert_array_equal(after[row][output], before[source][output])


def test_the_ragged_tail_and_the_odd_last_group_stay():
    matrix = tf.range(14.0)[:, tf.newaxis]
    odd = Grouping("block4", 12, 1)  # three full blocks: the last has no neighbour
    tail = Grouping("block4", 7, 1)  # a full block and a shorter one
    shuffle = np.full((3, 1), Operation.SHUFFLE)
    shuffle[0] = Operation.KEEP
    swapped = ops.permute(matrix[:12], ops.swaps_of(shuffle, odd), odd).numpy()[:, 0]
    np.testing.assert_array_equal(swapped, [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11])
    stayed = ops.permute(matrix[:7], ops.swaps_of(shuffle[:2], tail), tail)
    np.testing.assert_array_equal(stayed.numpy(), matrix[:7])


@modest
@given(kernels())
def test_gradients_follow_the_weights_through_the_swap(kernel):
    grouping, matrix, operations = kernel
    swaps = tf.constant(ops.swaps_of(operations, grouping))
    weights, upstream = tf.constant(matrix), tf.constant(normal(1, *matrix.shape))
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = tf.reduce_sum(upstream * ops.permute(weights, swaps, grouping))
    gradient = tape.gradient(loss, weights)
    np.testing.assert_array_equal(gradient, ops.permute(upstream, swaps, grouping))


# ---------------------------------------------------------------------------- prune


@modest
@given(kernels())
def test_masked_groups_are_exactly_zero_and_the_others_untouched(kernel):
    grouping, matrix, operations = kernel
    mask = (operations != Operation.PRUNE).astype(np.float32)
    masked = ops.mask_weights(matrix, mask, grouping).numpy()
    through = ops.mask_weights_straight_through(
        tf.constant(matrix), mask, tf.zeros(grouping.shape), grouping
    ).numpy()
    lives = grouping.expand_numpy(mask) > 0
    assert (masked[~lives] == 0).all()
    np.testing.assert_array_equal(masked[lives], matrix[lives])
    np.testing.assert_array_equal(through, masked)


@modest
@given(kernels(), st.integers(0, 2**31))
def test_straight_through_gradient_is_the_closed_form(kernel, seed):
    grouping, matrix, operations = kernel
    mask = tf.constant(operations != Operation.PRUNE, tf.float32)
    weights, logits = tf.constant(matrix), tf.constant(normal(seed, *grouping.shape))
    upstream = normal(seed + 1, *matrix.shape)
    with tf.GradientTape() as tape:
        tape.watch([weights, logits])
        masked = ops.mask_weights_straight_through(weights, mask, logits, grouping)
        loss = tf.reduce_sum(masked * upstream)
    by_weights, by_logits = tape.gradient(loss, [weights, logits])
    np.testing.assert_array_equal(by_weights, upstream)  # dense: pruned weights get it too
    expected = grouping.sum_numpy(matrix.astype(np.float64) * upstream)
    np.testing.assert_allclose(by_logits, expected, rtol=1e-4, atol=1e-5)


@modest
@given(kernels())
def test_fixed_masks_stop_the_gradient_of_pruned_weights(kernel):
    grouping, matrix, operations = kernel
    mask = tf.constant(operations != Operation.PRUNE, tf.float32)
    weights, upstream = tf.constant(matrix), normal(3, *matrix.shape)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = tf.reduce_sum(ops.mask_weights(weights, mask, grouping) * upstream)
    lives = grouping.expand_numpy(mask.numpy()) > 0
    np.testing.assert_array_equal(tape.gradient(loss, weights), np.where(lives, upstream, 0))


# ---------------------------------------------------------------------------- quantize


def tflite_reference(matrix, levels=127, per_output=True):
    """TFLite's symmetric scheme in NumPy's float32: `(integers, scales)`."""
    scale = np.abs(matrix).max(axis=0 if per_output else None, keepdims=True) / np.float32(levels)
    safe = np.where(scale > 0, scale, np.float32(1))
    integers = np.clip(np.rint(matrix / safe), -levels, levels)
    assert integers.dtype == safe.dtype == np.float32
    return integers, safe


def everywhere(grouping):
    return tf.ones(grouping.shape, tf.bool)


@modest
@given(float_kernels(), st.sampled_from([127, 7]), st.booleans())
def test_quantize_is_the_numpy_reference_bit_for_bit(kernel, levels, per_output):
    grouping, matrix = kernel
    level = tf.constant(float(levels))
    got = ops.quantize(matrix, everywhere(grouping), level, grouping, per_output).numpy()
    integers, scale = tflite_reference(matrix, levels, per_output)
    np.testing.assert_array_equal(got, integers * scale)
    on_grid = got / scale
    assert np.abs(on_grid).max() <= levels * (1 + 1e-6)
    np.testing.assert_allclose(on_grid, np.rint(on_grid), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(float_kernels(), st.sampled_from([127, 7]), st.booleans(), st.integers(0, 2**31))
def test_quantize_is_idempotent_bit_for_bit(kernel, levels, per_output, seed):
    # It holds although scale * 127 need not be the maximum it came from: dividing by 127 again
    # rounds to the same scale. Also where only some groups are on the grid.
    grouping, matrix = kernel
    level = tf.constant(float(levels))
    chosen = tf.constant(np.random.default_rng(seed).random(grouping.shape) < 0.7)
    once = ops.quantize(matrix, chosen, level, grouping, per_output)
    twice = ops.quantize(once, chosen, level, grouping, per_output)
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("levels", [127, 7])
def test_quantize_is_idempotent_for_every_mantissa_of_a_sample(levels):
    # The largest weight of a column decides its scale; 2**15 mantissas across three binades.
    largest = np.float32(1) + np.arange(2**15, dtype=np.float32) * np.float32(7 / 2**15)
    matrix = np.stack([largest, largest * np.float32(0.37)])
    grouping = Grouping("element", *matrix.shape)
    level = tf.constant(float(levels))
    once = ops.quantize(matrix, everywhere(grouping), level, grouping)
    twice = ops.quantize(once, everywhere(grouping), level, grouping)
    np.testing.assert_array_equal(once, twice)


@modest
@given(float_kernels(), st.sampled_from([127.0, 7.0]), st.booleans())
def test_quantize_keeps_the_order_and_the_sign(kernel, levels, per_output):
    grouping, matrix = kernel
    got = ops.quantize(
        matrix, everywhere(grouping), tf.constant(levels), grouping, per_output
    ).numpy()
    for output in range(grouping.outputs):
        order = np.argsort(matrix[:, output], kind="stable")
        assert (np.diff(got[order, output]) >= 0).all()
    assert (got * np.sign(matrix) >= 0).all()
    _, scale = tflite_reference(matrix, int(levels), per_output)
    assert (np.abs(got - matrix) <= scale * 0.50001).all()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(float_kernels(), st.sampled_from([127.0, 7.0]), st.booleans())
def test_quantize_gives_the_same_bits_eagerly_and_in_a_graph(kernel, levels, per_output):
    grouping, matrix = kernel
    level, chosen = tf.Variable(levels), everywhere(grouping)

    @tf.function
    def in_a_graph(weights):
        return ops.quantize(weights, chosen, level, grouping, per_output)

    eagerly = ops.quantize(tf.constant(matrix), chosen, level, grouping, per_output)
    np.testing.assert_array_equal(in_a_graph(tf.constant(matrix)), eagerly)


@modest
@given(kernels())
def test_only_chosen_groups_are_rounded(kernel):
    grouping, matrix, operations = kernel
    chosen = operations == Operation.QUANTIZE
    level = tf.constant(127.0)
    got = ops.quantize(matrix, tf.constant(chosen), level, grouping).numpy()
    everything = ops.quantize(matrix, everywhere(grouping), level, grouping).numpy()
    np.testing.assert_array_equal(got, np.where(grouping.expand_numpy(chosen), everything, matrix))


def test_zero_channels_stay_zero_and_are_finite():
    grouping = Grouping("element", 6, 3)
    matrix = normal(0, 6, 3)
    matrix[:, 1] = 0
    for kernel in (matrix, np.zeros_like(matrix)):
        got = ops.quantize(kernel, everywhere(grouping), tf.constant(127.0), grouping).numpy()
        assert np.isfinite(got).all()
        assert (got[:, 1] == 0).all()
    scale = ops.grid_scale(matrix, tf.constant(127.0)).numpy()
    assert scale.shape == (1, 3)
    assert scale[0, 1] == 0


def test_per_tensor_scale_is_one_for_all_outputs():
    grouping = Grouping("element", 4, 2)
    matrix = np.array([[127.0, 0.4], [1.0, 0.6], [-2.0, 1.5], [3.0, -1.0]], np.float32)
    level = tf.constant(127.0)
    assert ops.grid_scale(matrix, level, per_output=False).numpy().tolist() == [[1.0]]
    got = ops.quantize(matrix, everywhere(grouping), level, grouping, per_output=False).numpy()
    np.testing.assert_array_equal(got, [[127, 0], [1, 1], [-2, 2], [3, -1]])
    per_output = ops.quantize(matrix, everywhere(grouping), level, grouping).numpy()
    np.testing.assert_allclose(per_output[:, 1], matrix[:, 1], atol=1.5 / 254)


@modest
@given(kernels())
def test_quantize_passes_gradients_straight_through(kernel):
    grouping, matrix, operations = kernel
    weights, upstream = tf.constant(matrix), normal(5, *matrix.shape)
    chosen = tf.constant(operations == Operation.QUANTIZE)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        rounded = ops.quantize(weights, chosen, tf.constant(7.0), grouping)
        loss = tf.reduce_sum(rounded * upstream)
    np.testing.assert_array_equal(tape.gradient(loss, weights), upstream)


# ---------------------------------------------------------------------------- gates


def test_every_gate_has_the_scale_of_its_largest_weight():
    # Three gates of two outputs each; the largest weights are 127, 12.7 and 1.27.
    matrix = np.array([[127, 1, 0.5, -12.7, 1.27, 0], [-3, 2, 1.04, 3, 0.014, -0.016]], np.float32)
    level, grouping = tf.constant(127.0), Grouping("element", 2, 6)
    scale = ops.grid_scale(matrix, level, per_output=False, gates=3).numpy()
    largest = np.array([127, 127, 12.7, 12.7, 1.27, 1.27], np.float32)
    np.testing.assert_array_equal(scale, [largest / np.float32(127)])
    got = ops.quantize(matrix, everywhere(grouping), level, grouping, False, 3).numpy()
    integers = [[127, 1, 5, -127, 127, 0], [-3, 2, 10, 30, 1, -2]]
    np.testing.assert_array_equal(got, np.array(integers, np.float32) * scale)


def test_a_gate_of_zeros_stays_zero_and_leaves_the_others_alone():
    matrix = np.array([[0, 0, 1, 0.3]], np.float32)
    grouping, level = Grouping("element", 1, 4), tf.constant(7.0)
    scale = ops.grid_scale(matrix, level, per_output=False, gates=2).numpy()
    assert scale[0, :2].tolist() == [0, 0]
    got = ops.quantize(matrix, everywhere(grouping), level, grouping, False, 2).numpy()
    np.testing.assert_array_equal(got, np.float32([[0, 0, 7, 2]]) * scale[0, 2])


def test_with_a_scale_per_output_gates_change_nothing():
    matrix, level = normal(0, 5, 8), tf.constant(127.0)
    np.testing.assert_array_equal(
        ops.grid_scale(matrix, level, per_output=True, gates=4), ops.grid_scale(matrix, level)
    )


@st.composite
def gated_kernels(draw):
    """A kernel of several gates whose magnitudes differ widely, some of them all zero."""
    gates, units = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    grouping = Grouping(draw(st.sampled_from(GROUPS)), draw(st.integers(1, 37)), gates * units)
    matrix = normal(draw(st.integers(0, 2**31)), grouping.inputs, grouping.outputs)
    sizes = draw(st.lists(st.sampled_from([0, 1e-6, 0.7, 1, 3e4]), min_size=gates, max_size=gates))
    chosen = draw(hnp.arrays(bool, grouping.shape))
    return gates, grouping, matrix * np.repeat(np.float32(sizes), units), chosen


@modest
@given(gated_kernels(), st.sampled_from([127.0, 7.0]))
def test_gates_are_quantized_as_tensors_of_their_own(kernel, levels):
    gates, grouping, matrix, chosen = kernel
    level = tf.constant(levels)
    got = ops.quantize(matrix, tf.constant(chosen), level, grouping, False, gates).numpy()
    units = grouping.outputs // gates
    own = Grouping(grouping.group, grouping.inputs, units)
    for gate in range(gates):
        part = slice(gate * units, (gate + 1) * units)
        alone = ops.quantize(
            matrix[:, part], tf.constant(chosen[:, part]), level, own, per_output=False
        )
        np.testing.assert_array_equal(got[:, part], alone)


@modest
@given(gated_kernels(), st.sampled_from([127.0, 7.0]))
def test_gates_keep_bits_and_gradients(kernel, levels):
    gates, grouping, matrix, chosen = kernel
    level, weights = tf.Variable(levels), tf.constant(matrix)

    @tf.function
    def in_a_graph(value):
        return ops.quantize(value, tf.constant(chosen), level, grouping, False, gates)

    with tf.GradientTape() as tape:
        tape.watch(weights)
        eagerly = ops.quantize(weights, tf.constant(chosen), level, grouping, False, gates)
        loss = tf.reduce_sum(eagerly * matrix)
    np.testing.assert_array_equal(in_a_graph(weights), eagerly)
    np.testing.assert_array_equal(tape.gradient(loss, weights), matrix)


# ---------------------------------------------------------------------------- layouts

REGISTERED = [specs for specs in _REGISTRY.values() if not callable(specs)]
# Those that a layer's configuration decides on, and some that nobody has yet, are given here.
LAYOUTS = sorted(
    {spec.layout for specs in REGISTERED for spec in specs}
    | {"oi", "oioi", "ioo", "iioo", "oio", "iiiooo"}
)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_matrix_views_are_inverse_and_numpy_agrees(layout, data):
    shape = tuple(
        data.draw(st.lists(st.integers(1, 4), min_size=len(layout), max_size=len(layout)))
    )
    spec, kernel = KernelSpec("kernel", layout), normal(0, *shape)
    matrix = spec.to_matrix_numpy(kernel)
    assert matrix.shape == spec.matrix_shape(shape)
    np.testing.assert_array_equal(spec.to_matrix(tf.constant(kernel)).numpy(), matrix)
    np.testing.assert_array_equal(spec.from_matrix_numpy(matrix, shape), kernel)
    np.testing.assert_array_equal(spec.from_matrix(tf.constant(matrix), shape).numpy(), kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_column_holds_the_weights_of_one_output_unit(layout):
    shape = tuple(range(2, 2 + len(layout)))
    numbers = np.indices(shape)
    spec = KernelSpec("kernel", layout)
    for axis, letter in enumerate(layout):
        matrix = spec.to_matrix_numpy(numbers[axis])
        direction = 0 if letter == "o" else 1  # constant along the inputs, or along the outputs
        assert (np.diff(matrix, axis=direction) == 0).all()


@pytest.mark.parametrize("layout", ["", "x", "iii", "io x"])
def test_wrong_layouts(layout):
    with pytest.raises(ArgumentError, match="Expected one letter per axis"):
        KernelSpec("kernel", layout)


def test_a_kernel_of_another_rank_is_refused():
    with pytest.raises(ArgumentError, match=r"shape \(2, 3, 4\).*describes 2 axes"):
        KernelSpec("kernel", "io").matrix_shape((2, 3, 4))


def test_unknown_kernels_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"no compressible kernel 'bias'.*\['kernel'\]"):
        kernel_spec(keras.layers.Dense(3), "bias")
    with pytest.raises(ArgumentError, match="the class itself, not an instance"):
        register_layer(keras.layers.Dense(3), kernel="io")
