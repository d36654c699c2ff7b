"""Any settings of the layers that are compressed convert, and come back the same."""

import keras as keras3
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras_3_layers import BY_RANK, FLAT, IMAGE, SEQUENCE, Case

from rl_sparsity_tf.keras3.door import admitted, handed_back, origin_of

layers = keras3.layers
pytestmark = pytest.mark.slow

some = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
ACTIVATIONS = st.sampled_from(
    ["linear", "relu", "silu", "gelu", "hard_sigmoid", "softplus", "leaky_relu", "celu", "tanh"]
)
BOOLEANS = st.booleans()


def sizes(rank, most=3):
    """One number for all axes, or one for each."""
    return st.integers(1, most) | st.tuples(*[st.integers(1, most)] * rank)


def options(draw, **strategies):
    return {name: draw(strategy) for name, strategy in strategies.items()}


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["Conv", "SeparableConv", "DepthwiseConv", "Transpose"]))
    if rank == 3 and kind in ("SeparableConv", "DepthwiseConv"):
        kind = "Conv"
    chosen = options(
        draw,
        kernel_size=sizes(rank),
        padding=st.sampled_from(["valid", "same"]),
        activation=ACTIVATIONS,
        use_bias=BOOLEANS,
    )
    if kind == "Transpose":
        chosen |= options(draw, filters=st.integers(1, 6), strides=sizes(rank, 2))
        return Case(f"Conv{rank}DTranspose", BY_RANK[rank], chosen)
    # TensorFlow has no strides and dilation in one, and depthwise no strides that differ.
    if draw(BOOLEANS):
        chosen["dilation_rate"] = draw(st.integers(1, 2))
    else:
        chosen["strides"] = draw(st.integers(1, 3) if kind != "Conv" else sizes(rank))
    if kind != "DepthwiseConv":
        chosen["filters"] = 2 * draw(st.integers(1, 4))
    if kind == "Conv":
        chosen["groups"] = draw(st.sampled_from([1, 2])) if rank < 3 else 1
        if rank == 1 and draw(BOOLEANS):
            chosen["padding"] = "causal"
    else:
        chosen["depth_multiplier"] = draw(st.integers(1, 3))
    return Case(f"{kind}{rank}D", BY_RANK[rank], chosen)


@st.composite
def dense_layers(draw):
    chosen = options(
        draw,
        units=st.integers(1, 9),
        activation=ACTIVATIONS,
        use_bias=BOOLEANS,
        kernel_regularizer=st.sampled_from([None, "l1", "l2"]),
        kernel_constraint=st.sampled_from([None, "non_neg", "max_norm"]),
        dtype=st.sampled_from(["float32", "float64"]),
    )
    return Case("Dense", draw(st.sampled_from([FLAT, SEQUENCE, IMAGE])), chosen)


@st.composite
def normalizations(draw):
    kind = draw(st.sampled_from(["BatchNormalization", "LayerNormalization", "GroupNormalization"]))
    chosen = options(draw, epsilon=st.floats(1e-5, 0.1), center=BOOLEANS, scale=BOOLEANS)
    if kind == "GroupNormalization":
        chosen["groups"] = draw(st.sampled_from([-1, 1, 2, 4]))
    elif kind == "LayerNormalization":
        chosen["axis"] = draw(st.sampled_from([-1, [2, 3], [1, 2, 3]]))
    else:
        chosen |= options(draw, axis=st.sampled_from([-1, 1, 2, 3]), momentum=st.floats(0, 1))
    return Case(kind, IMAGE, chosen)


@st.composite
def poolings(draw):
    rank = draw(st.integers(1, 3))
    kind = f"{draw(st.sampled_from(['Average', 'Max']))}Pooling{rank}D"
    if draw(BOOLEANS):
        return Case(f"Global{kind}", BY_RANK[rank], options(draw, keepdims=BOOLEANS))
    chosen = options(
        draw,
        pool_size=sizes(rank),
        strides=st.none() | sizes(rank),
        padding=st.sampled_from(["valid", "same"]),
    )
    return Case(kind, BY_RANK[rank], chosen)


@st.composite
def recurrent_layers(draw):
    kind = draw(st.sampled_from(["LSTM", "GRU", "SimpleRNN"]))
    chosen = options(
        draw,
        units=st.integers(1, 5),
        activation=st.sampled_from(["tanh", "relu", "softsign"]),
        use_bias=BOOLEANS,
        return_sequences=BOOLEANS,
        unroll=BOOLEANS,
        dropout=st.sampled_from([0.0, 0.3]),
    )
    if kind != "SimpleRNN":
        gates = st.sampled_from(["sigmoid", "hard_sigmoid"])
        chosen["recurrent_activation"] = draw(gates)
    if kind == "GRU":
        chosen["reset_after"] = draw(BOOLEANS)
    both = draw(BOOLEANS)
    chosen["go_backwards"] = not both and draw(BOOLEANS)
    merged = draw(st.sampled_from(["concat", "sum", "mul", "ave"]))
    masked = draw(BOOLEANS)

    def call(layer, x):
        if both:
            layer = layers.Bidirectional(layer, merge_mode=merged)
        return layer(layers.Embedding(9, 4, mask_zero=masked)(x))

    return Case(kind, (6,), chosen, call, ids=9)


def check(case):
    model, x = case.build()
    made = admitted(model)
    assert not origin_of(made).notes
    back = handed_back(made, origin_of(made))
    configs = [[one.get_config() for one in both.layers[1:]] for both in (model, back)]
    assert configs[0] == configs[1]
    for a, b in zip(model.get_weights(), back.get_weights(), strict=True):
        np.testing.assert_array_equal(b, a)
    expected = np.asarray(model(tf.constant(x), training=False))
    np.testing.assert_array_equal(np.asarray(back(tf.constant(x), training=False)), expected)
    allowed = 2e-5 * max(np.ptp(expected), np.abs(expected).max(), 1.0)
    np.testing.assert_allclose(made(x, training=False), expected, rtol=0, atol=allowed)


@some
@given(convolutions())
def test_convolutions_of_any_settings(case):
    check(case)


@some
@given(dense_layers())
def test_dense_layers_of_any_settings(case):
    check(case)


@some
@given(normalizations())
def test_normalizations_of_any_settings(case):
    check(case)


@some
@given(poolings())
def test_poolings_of_any_settings(case):
    check(case)


@some
@given(recurrent_layers())
def test_recurrent_layers_of_any_settings(case):
    check(case)
