"""Every kind of layer that can be compressed, those within layers too: what is found and done."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from toolkit import PruneRegistry
from zoo import RECURRENT_ETC, ZOO, inputs_for, layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.registry import kernel_specs
from rl_sparsity_tf.layers.wrapping import plan_of
from rl_sparsity_tf.training.mask_training import update_masks

K, P, Q, S = Operation

# path, layout, scales
# TFLite's fused LSTM has a tensor per gate, each with a scale per output as any other kernel.
LSTM = [("cell/kernel", "io", "per output"), ("cell/recurrent_kernel", "io", "per output")]
CELL = [("cell/kernel", "io", "per output"), ("cell/recurrent_kernel", "io", "per output")]
LAST = [("last/kernel", "io", "per output")]


def under(prefix, entries):
    return [(f"{prefix}/{path}", *rest) for path, *rest in entries]


def projections(prefix, output="iio"):
    heads = [
        (f"{prefix}/{name}_dense/kernel", "ioo", "per output") for name in ("query", "key", "value")
    ]
    return [*heads, (f"{prefix}/output_dense/kernel", output, "per output")]


FOUND = {
    "dense": [("dense/kernel", "io", "per output"), ("dense_1/kernel", "io", "per output")],
    "separable": [
        ("depthwise_conv2d/depthwise_kernel", "iioo", "per output"),
        ("separable_conv2d/depthwise_kernel", "iioo", "per output"),
        ("separable_conv2d/pointwise_kernel", "iiio", "per output"),
        ("dense/kernel", "io", "per output"),
    ],
    "conv1d": [
        ("conv1d/kernel", "iio", "per output"),
        ("separable_conv1d/depthwise_kernel", "ioo", "per output"),
        ("separable_conv1d/pointwise_kernel", "iio", "per output"),
        ("dense/kernel", "io", "per output"),
    ],
    "conv3d": [("conv3d/kernel", "iiiio", "per output"), ("dense/kernel", "io", "per output")],
    "transposed": [
        ("conv2d_transpose/kernel", "iioi", "per output"),
        ("dense/kernel", "io", "per output"),
    ],
    "words": [
        ("embedding/embeddings", "io", "per tensor"),
        *under("lstm", LSTM),
        *under("gru", CELL),
        *LAST,
    ],
    "simple_rnn": [
        ("simple_rnn/cell/kernel", "io", "per output"),
        ("simple_rnn/cell/recurrent_kernel", "io", "per output"),
        *LAST,
    ],
    "stacked_cells": [
        ("rnn/cell/cells/0/kernel", "io", "per output"),
        ("rnn/cell/cells/0/recurrent_kernel", "io", "per output"),
        ("rnn/cell/cells/1/kernel", "io", "per output"),
        ("rnn/cell/cells/1/recurrent_kernel", "io", "per output"),
        *LAST,
    ],
    "bidirectional": [
        *under("bidirectional/forward_layer", LSTM),
        *under("bidirectional/backward_layer", LSTM),
        *under("bidirectional_1/forward_layer", CELL),
        *under("bidirectional_1/backward_layer", CELL),
        *LAST,
    ],
    "time_distributed": [
        ("time_distributed/layer/kernel", "io", "per output"),
        ("time_distributed_1/layer/0/kernel", "io", "per output"),
        ("time_distributed_1/layer/1/kernel", "io", "per output"),
        *LAST,
    ],
    "einsum": [
        ("einsum_dense/kernel", "io", "per output"),
        ("einsum_dense_1/kernel", "ioo", "per output"),
        *LAST,
    ],
    "attention": [*projections("multi_head_attention"), *projections("multi_head_attention_1")]
    + LAST,
    "transformer": [
        ("embedding/embeddings", "io", "per tensor"),
        *projections("block/attention"),
        ("block/network/0/kernel", "io", "per output"),
        ("block/network/1/kernel", "io", "per output"),
        *LAST,
    ],
    "two_inputs": [*under("lstm", LSTM), *under("lstm_1", LSTM), *LAST],
    "conv_lstm": [
        ("conv_lstm2d/cell/kernel", "iiio", "per output"),
        ("conv_lstm2d/cell/recurrent_kernel", "iiio", "per output"),
        *LAST,
    ],
    "local": [
        ("locally_connected1d/kernel", "oio", "per output"),
        ("locally_connected1d_1/kernel", "iioo", "per output"),
        *LAST,
    ],
    "local_2d": [
        ("locally_connected2d/kernel", "oio", "per output"),
        ("locally_connected2d_1/kernel", "iiiooo", "per output"),
        *LAST,
    ],
    "volumes": [("conv3d_transpose/kernel", "iiioi", "per output"), *LAST],
    "signals": [
        ("conv1d_transpose/kernel", "ioi", "per output"),
        ("depthwise_conv1d/depthwise_kernel", "ioo", "per output"),
        *LAST,
    ],
}

# Tracing the gradients of loops takes seconds; eagerly it is the same code.
TRAINED_IN_A_GRAPH = ("simple_rnn", "transformer", "conv_lstm")

# What a pair of neighbours can be decided, as a wrapped model's plan names it.
PAIRS = [(K, K), (P, K), (K, P), (P, P), (Q, P), (Q, Q), (S, K), (S, P), (Q, S), (S, Q), (S, S)]


def mixed_plan(model, bits=8, seed=0):
    """Every operation in every kernel, but both neighbours asking to swap, which is nothing."""
    rng = np.random.default_rng(seed)
    entries = []
    for kernel in find_kernels(model):
        rows, outputs = kernel.grouping("element").shape
        chosen = rng.integers(len(PAIRS) - 1, size=((rows + 1) // 2, outputs))
        chosen.flat[:2] = PAIRS.index((Q, Q)), PAIRS.index((P, K))
        operations = np.array(PAIRS)[chosen].transpose(0, 2, 1).reshape(-1, outputs)[:rows]
        if rows % 2:  # the last has no neighbour to swap with
            operations[-1] = np.where(operations[-1] == S, K, operations[-1])
        entries.append(
            rls.KernelPlan(
                kernel.path,
                kernel.shape,
                kernel.spec.layout,
                "element",
                bits,
                operations.astype(np.uint8),
            )
        )
    return rls.CompressionPlan(entries)


def in_numpy(kernel, entry):
    """`quantize(mask * permute(W))` in closed form, for groups of one weight."""
    matrix, operations = kernel.matrix().copy(), entry.operations
    for row in range(0, len(matrix) - 1, 2):
        swap = (operations[row] == S) != (operations[row + 1] == S)
        matrix[row : row + 2, swap] = matrix[row : row + 2, swap][::-1]
    matrix[operations == P] = 0
    parts = {"per output": matrix.shape[1], "per gate": kernel.spec.gates, "per tensor": 1}
    on_grid = []
    for part in np.split(matrix, parts[kernel.spec.scales], axis=1):
        scale = np.abs(part).max() / np.float32(7 if entry.bits == 4 else 127)
        on_grid.append(np.rint(part / (scale or 1)) * np.float32(scale))
    return np.where(operations == Q, np.concatenate(on_grid, axis=1), matrix)


def assert_same_bits(one, other, rows=5):
    x = inputs_for(one, rows)
    np.testing.assert_array_equal(one(x, training=False), other(x, training=False))


@dataclasses.dataclass
class Case:
    name: str
    model: keras.Model
    plan: rls.CompressionPlan
    wrapped: keras.Model
    stripped: keras.Model


@pytest.fixture(scope="module", params=RECURRENT_ETC)
def case(request):
    """A model of one kind, wrapped and stripped once for all that looks at it."""
    keras.backend.reset_uids()
    model = RECURRENT_ETC[request.param]()
    plan = mixed_plan(model)
    wrapped = rls.wrap(model, plan)
    return Case(request.param, model, plan, wrapped, rls.strip(wrapped))


# ---------------------------------------------------------------------------- what is found


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_kernels_are_listed_with_their_views(name):
    model = {**ZOO, **RECURRENT_ETC}[name]()
    found = [(k.path, k.spec.layout, k.spec.scales) for k in find_kernels(model)]
    assert found == FOUND[name]
    for kernel in find_kernels(model):
        assert kernel.matrix().size == kernel.size > 0
        assert any(kernel.variable is weight for weight in kernel.layer.weights)


@pytest.mark.slow
def test_only_an_embedding_has_one_scale_for_all():
    scales = {k.path: k.spec.scales for k in find_kernels(RECURRENT_ETC["words"]())}
    assert scales.pop("embedding/embeddings") == "per tensor"
    assert set(scales.values()) == {"per output"}


def test_every_kind_of_the_zoo_is_described_here():
    assert set(RECURRENT_ETC) <= set(FOUND)


def test_layers_of_locally_connected_vectors_have_no_kernel_of_that_form():
    layer = layers.LocallyConnected1D(2, 3, implementation=3)
    assert kernel_specs(layer) == ()


def test_kernel_axes_follow_the_einsum_equation():
    for equation, shape, layout in [
        ("...x,xy->...y", (None, 5), "io"),
        ("abcd,cde->abe", (None, 5), "iio"),
        ("abc,dc->abd", (None, 5), "oi"),
        ("ab,b->a", (), None),
    ]:
        specs = kernel_specs(layers.EinsumDense(equation, shape))
        assert [spec.layout for spec in specs] == ([layout] if layout else []), equation


# ---------------------------------------------------------------------------- wrap and strip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simple_rnn", "stacked_cells", "two_inputs", "local", "signals"])
def test_a_copy_with_everything_kept_computes_the_same_bits(name):
    model = RECURRENT_ETC[name]()
    assert_same_bits(model, rls.wrap(model))


@pytest.mark.slow
def test_strip_computes_the_same_bits_as_the_wrapped_model(case):
    assert_same_bits(case.wrapped, case.stripped)
    x = inputs_for(case.model, 5)
    in_graphs = [model.predict_on_batch(x) for model in (case.wrapped, case.stripped)]
    np.testing.assert_array_equal(*in_graphs)


@pytest.mark.slow
def test_stripped_kernels_are_the_closed_form(case):
    for before, after in zip(find_kernels(case.model), find_kernels(case.stripped), strict=True):
        entry = case.plan.kernels[before.path]
        assert after.path == before.path
        np.testing.assert_array_equal(after.matrix(), in_numpy(before, entry), before.path)


@pytest.mark.slow
def test_the_plan_is_read_back(case):
    assert plan_of(case.wrapped) == case.plan


@pytest.mark.slow
def test_the_wrapped_model_is_saved_and_loaded(case, tmp_path):
    case.wrapped.save(tmp_path / "wrapped.keras")
    loaded = keras.models.load_model(tmp_path / "wrapped.keras")
    assert_same_bits(case.wrapped, loaded)
    assert plan_of(loaded) == case.plan


@pytest.mark.slow
def test_pruned_weights_stay_zero_in_training(case):
    wrapped = rls.wrap(case.model, case.plan)
    wrapped.run_eagerly = case.name not in TRAINED_IN_A_GRAPH
    before = {kernel.path: kernel.value() for kernel in find_kernels(wrapped)}
    x = inputs_for(case.model, 8)
    wrapped.fit(x, np.arange(8) % 3, epochs=1, verbose=0)
    for kernel in find_kernels(wrapped):
        assert not np.array_equal(kernel.value(), before[kernel.path]), kernel.path
    assert plan_of(wrapped) == case.plan
    stripped = rls.strip(wrapped)
    for kernel in find_kernels(stripped):
        pruned = case.plan.kernels[kernel.path].operations == P
        assert (kernel.matrix()[pruned] == 0).all()
    assert_same_bits(wrapped, stripped)


@pytest.mark.slow
def test_the_callers_model_is_as_it_was(case):
    again = RECURRENT_ETC[case.name]()
    for one, other in zip(case.model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(isinstance(layer, rls.CompressionWrapper) for layer in case.model.submodules)


def test_learned_masks_of_inner_kernels_follow_their_scores():
    model = RECURRENT_ETC["stacked_cells"]()
    plan = rls.CompressionPlan([KernelRule("*", 0.5)])
    wrapped = rls.wrap(model, plan, train_masks=True)
    before = plan_of(wrapped)
    wrapper = next(k.wrapper for k in find_kernels(wrapped) if k.wrapper)
    state = wrapper.state("cell/cells/0/kernel")
    state["mask_logits"].assign(np.where(state["mask"].numpy() > 0, -9.0, 9.0))
    update_masks(wrapper)
    after = plan_of(wrapped)
    path = "rnn/cell/cells/0/kernel"
    was, now = before.kernels[path].operations == P, after.kernels[path].operations == P
    np.testing.assert_array_equal(now, ~was)
    other = "rnn/cell/cells/1/kernel"
    np.testing.assert_array_equal(before.kernels[other].operations, after.kernels[other].operations)


# ---------------------------------------------------------------------------- masks of sequences


def masked_model(after):
    return keras.Sequential(
        [
            layers.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.Dense(4),
            *after,
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "after",
    [
        lambda: [layers.LSTM(3)],
        lambda: [layers.TimeDistributed(layers.Dense(3)), layers.SimpleRNN(3)],
    ],
)
def test_sequence_masks_go_through_wrappers(after):
    model = masked_model(after())
    wrapped = rls.wrap(model)
    x = np.array([[3, 5, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0], [8, 7, 6, 5, 4, 3]], np.int32)
    np.testing.assert_array_equal(wrapped(x), model(x))
    # The mask matters: without it the same numbers give something else.
    blind = keras.Sequential.from_config(model.get_config())
    blind.layers[0].mask_zero = False
    blind.layers[0].compute_mask = lambda *_: None
    blind.build((None, 6))
    blind.set_weights(model.get_weights())
    assert not np.allclose(blind(x)[:2], model(x)[:2])
    np.testing.assert_array_equal(model.layers[0].compute_mask(x), x != 0)
    np.testing.assert_array_equal(wrapped.layers[0].compute_mask(x), x != 0)


@pytest.mark.slow
def test_masks_given_by_hand_reach_the_layer():
    inputs, mask = keras.Input((6, 4)), keras.Input((6,), dtype="bool")
    model = keras.Model([inputs, mask], layers.LSTM(3)(inputs, mask=mask))
    wrapped = rls.wrap(model)
    x, given = inputs_for(model, 3)[0], np.arange(18).reshape(3, 6) % 4 != 3
    np.testing.assert_array_equal(wrapped([x, given]), model([x, given]))
    assert not np.allclose(model([x, given]), model([x, np.ones_like(given)]))


# ---------------------------------------------------------------------------- shared layers


def shared_across_nesting():
    shared = layers.Dense(5, name="shared")
    inner_input = keras.Input((5,))
    inner = keras.Model(inner_input, shared(inner_input), name="inner")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, inner(layers.ReLU()(shared(inputs))))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def test_a_layer_shared_with_a_nested_model_is_one_kernel():
    model = shared_across_nesting()
    assert [kernel.path for kernel in find_kernels(model)] == ["shared/kernel"]
    plan = rls.CompressionPlan([KernelRule("shared/kernel", 0.4)])
    wrapped = rls.wrap(model, plan)
    assert_same_bits(model, rls.wrap(model))
    assert len({id(weight) for weight in wrapped.trainable_weights}) == 2
    stripped = rls.strip(wrapped)
    assert len(stripped.trainable_weights) == 2
    assert (stripped.get_weights()[0] == 0).sum() == 10
    assert_same_bits(wrapped, stripped)


def test_both_uses_of_a_shared_layer_give_gradient():
    model = shared_across_nesting()
    wrapped = rls.wrap(model, rls.CompressionPlan([KernelRule("*", 0.4)]))
    x, y = inputs_for(model, 6), np.ones((6, 5), np.float32)
    (kernel,) = find_kernels(wrapped)
    effective = tf.Variable(kernel.wrapper.effective_kernel("kernel"))
    bias = kernel.layer.bias
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(wrapped(x) - y))
    got = tape.gradient(loss, kernel.variable)
    with tf.GradientTape() as tape:
        outputs = tf.nn.relu(x @ effective + bias) @ effective + bias
        loss = tf.reduce_mean(tf.square(outputs - y))
    mask = (effective.numpy() != 0).astype(np.float32)
    np.testing.assert_allclose(got, tape.gradient(loss, effective) * mask, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- TFMOT's registry

CONSTRUCTORS = {
    "Conv1D": (lambda: layers.Conv1D(2, 3), (9, 2)),
    "Conv2D": (lambda: layers.Conv2D(2, 3), (9, 9, 2)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(2, 3), (9, 9, 2)),
    "Conv3D": (lambda: layers.Conv3D(2, 3), (5, 5, 5, 2)),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(2, 3), (5, 5, 5, 2)),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(2, 3), (9, 2)),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(2, 3), (9, 9, 2)),
    "Dense": (lambda: layers.Dense(2), (3,)),
    "Embedding": (lambda: layers.Embedding(5, 2), (3,)),
    "LocallyConnected1D": (lambda: layers.LocallyConnected1D(2, 3), (9, 2)),
    "LocallyConnected2D": (lambda: layers.LocallyConnected2D(2, 3), (9, 9, 2)),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), (4, 5)),
    "GRU": (lambda: layers.GRU(2), (4, 3)),
    "LSTM": (lambda: layers.LSTM(2), (4, 3)),
    "RNN": (lambda: layers.RNN(layers.SimpleRNNCell(2)), (4, 3)),
    "SimpleRNN": (lambda: layers.SimpleRNN(2), (4, 3)),
    "GRUCell": (lambda cell=layers.GRUCell: cell(2), (3,)),
    "LSTMCell": (lambda cell=layers.LSTMCell: cell(2), (3,)),
    "SimpleRNNCell": (lambda cell=layers.SimpleRNNCell: cell(2), (3,)),
}


def prunable_classes():
    for kind, names in PruneRegistry._LAYERS_WEIGHTS_MAP.items():
        if names:
            yield kind, [name.replace(".", "/") for name in names]
    for kind, names in PruneRegistry._RNN_CELLS_WEIGHTS_MAP.items():
        yield kind, names
    for kind in PruneRegistry._RNN_LAYERS:
        yield kind, ["cell/kernel", "cell/recurrent_kernel"]


def test_whatever_tfmot_prunes_can_be_compressed():
    seen = set()
    for kind, names in prunable_classes():
        assert kind.__name__ in CONSTRUCTORS, f"no constructor for {kind}: add it to the table"
        make, shape = CONSTRUCTORS[kind.__name__]
        layer = kind(2) if kind.__name__.endswith("Cell") else make()
        assert type(layer) is kind
        if isinstance(layer, layers.MultiHeadAttention):
            layer(tf.zeros((1, *shape)), tf.zeros((1, *shape)))
        else:
            layer.build((None, *shape))
        specs = {spec.attribute: spec for spec in kernel_specs(layer)}
        assert set(names) <= set(specs), kind
        for attribute in names:
            wrapper = rls.CompressionWrapper(layer)
            assert specs[attribute].matrix_shape(wrapper.variable(attribute).shape)
        seen.add(kind.__name__)
    assert seen == set(CONSTRUCTORS)
