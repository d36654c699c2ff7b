"""Recovery in closed form: the fits, the rows they see, and the pass that reuses what it can."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import strategies as st

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.wrapper import unwrapped
from rl_sparsity_tf.layers.wrapping import apply_plan, plan_of, wrap
from rl_sparsity_tf.training.layer_problem import row_source
from rl_sparsity_tf.training.least_squares import LeastSquares
from rl_sparsity_tf.training.preparation import prepare_for_short_recovery
from rl_sparsity_tf.training.ridge import fit_depthwise, fit_masked, round_with_feedback

L = keras.layers
settings = hypothesis.settings(max_examples=25, deadline=None)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ------------------------------------------------------------------ the solver


def one_by_one(gram, cross, start, live, ridge):
    """The definition, an output at a time."""
    strength = ridge * np.mean(np.diag(gram))
    fitted = np.zeros(start.shape)
    for output in range(start.shape[1]):
        rows = np.flatnonzero(live[:, output])
        if len(rows):
            system = gram[np.ix_(rows, rows)] + strength * np.eye(len(rows))
            wanted = cross[rows, output] + strength * start[rows, output]
            fitted[rows, output] = np.linalg.solve(system, wanted)
    return fitted


@settings
@hypothesis.given(
    inputs=st.integers(1, 14),
    outputs=st.integers(1, 9),
    density=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
    chunk=st.sampled_from([1, 800, 2**26]),
    repeated=st.booleans(),
)
def test_all_outputs_at_once_give_what_one_at_a_time_does(
    inputs, outputs, density, seed, chunk, repeated
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, inputs))
    gram, start = x.T @ x / 40, rng.normal(size=(inputs, outputs))
    cross = rng.normal(size=(inputs, outputs))
    live = rng.random((inputs, outputs)) < density
    if repeated:
        live[:, ::2] = live[:, :1]
    expected = one_by_one(gram, cross, start, live, 1e-2)
    exact = fit_masked(gram, cross, start, live, ridge=1e-2, chunk_bytes=chunk)
    np.testing.assert_allclose(exact, expected, atol=1e-9)
    assert (exact[~live] == 0).all()
    iterated = fit_masked(gram, cross, start, live, ridge=1e-2, exact_survivors=0)
    np.testing.assert_allclose(iterated, expected, atol=2e-3 * max(1.0, np.abs(expected).max()))


def test_what_the_data_does_not_show_stays_as_it_was():
    x = np.concatenate([normal(50, 2), np.zeros((50, 1))], axis=1)
    start = np.array([[1.0], [2.0], [3.0]])
    live = np.array([[True], [False], [True]])
    fitted = fit_masked(x.T @ x, x.T @ (x @ start), start, live, ridge=1e-6)
    assert fitted[2, 0] == pytest.approx(3.0)


def test_depthwise_outputs_are_fitted_on_inputs_of_their_own():
    x = normal(60, 4, 3).astype(np.float32)  # rows, positions, outputs
    start = normal(4, 3, seed=1)
    live = np.random.default_rng(2).random((4, 3)) < 0.6
    gram = np.einsum("pko,plo->okl", x, x) / 60
    cross = normal(4, 3, seed=3)
    fitted = fit_depthwise(gram, cross, start, live, ridge=1e-2)
    for output in range(3):
        alone = [a[:, output : output + 1] for a in (cross, start, live)]
        expected = one_by_one(gram[output], *alone, 1e-2)
        np.testing.assert_allclose(fitted[:, output : output + 1], expected, atol=1e-9)


# ------------------------------------------------------------------ the rows

CONVOLUTIONS = {
    "dense": (L.Dense(4), (5, 6)),
    "conv same": (L.Conv2D(3, 3, padding="same"), (6, 7, 2)),
    "conv same strided": (L.Conv2D(3, (3, 2), strides=2, padding="same"), (7, 6, 2)),
    "conv valid dilated": (L.Conv2D(3, 3, dilation_rate=2), (9, 8, 2)),
    "conv 1d causal": (L.Conv1D(3, 3, padding="causal", dilation_rate=2), (9, 2)),
    "conv 1d strided": (L.Conv1D(3, 4, strides=3, padding="same"), (10, 2)),
    "conv 3d": (L.Conv3D(2, 2, padding="same", strides=(1, 2, 1)), (3, 4, 5, 2)),
    "depthwise": (L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (5, 6, 3)),
    "depthwise strided": (L.DepthwiseConv2D((2, 3), strides=2), (6, 7, 2)),
    "depthwise 1d": (L.DepthwiseConv1D(3, padding="same", strides=2), (9, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_kernel_are_the_layers_outputs(name):
    layer, shape = CONVOLUTIONS[name]
    layer = type(layer).from_config({**layer.get_config(), "use_bias": False})
    x = normal(2, *shape).astype(np.float32)
    outputs = layer(x).numpy()
    (kernel,) = find_kernels(keras.Sequential([L.Input(shape), layer]))
    source = row_source(layer, kernel.spec, limit=10**6)
    rows, matrix = source.take(x), kernel.matrix()
    if source.depthwise:
        matrix = matrix.reshape(matrix.shape[0], rows.shape[2], -1)
        found = np.einsum("pkc,kcm->pcm", rows, matrix)
    else:
        found = rows @ matrix
    np.testing.assert_allclose(
        found.reshape(-1, outputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1]), atol=1e-5
    )
    few = row_source(layer, kernel.spec, limit=7)
    assert len(few.take(x)) == 7
    np.testing.assert_array_equal(few.take(x), few.take(x.copy()))


def test_layers_whose_rows_are_not_known_are_left_alone():
    class Own(L.Dense):
        def call(self, inputs):
            return super().call(inputs) * 2.0

    for layer, shape in (
        (Own(3), (4,)),
        (L.Conv2D(4, 3, groups=2), (6, 6, 2)),
        (L.Conv2DTranspose(3, 3), (4, 4, 2)),
        (L.TimeDistributed(L.Dense(3)), (4, 5)),
        (L.LSTM(3), (4, 5)),
    ):
        model = keras.Sequential([L.Input(shape), layer])
        for kernel in find_kernels(model):
            assert row_source(kernel.layer, kernel.spec, limit=10) is None


# ------------------------------------------------------------------ error feedback


@settings
@hypothesis.given(
    seed=st.integers(0, 10_000), inputs=st.integers(2, 90), levels=st.sampled_from([7.0, 127.0])
)
@hypothesis.example(seed=1575, inputs=9, levels=127.0)
def test_feedback_rounds_to_the_grid_and_keeps_its_scale(seed, inputs, levels):
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(200, inputs)) + rng.normal(size=(200, 1)), 0)
    gram = x.T @ x / 200
    live = rng.random((inputs, 5)) < 0.7
    weights = np.where(live, rng.normal(size=(inputs, 5)), 0.0).astype(np.float32)
    scale = (np.abs(weights).max(axis=0, keepdims=True) / np.float32(levels)).astype(np.float32)
    rounded = round_with_feedback(weights, gram, scale, levels, live, live, 0.0)
    step = np.where(scale > 0, scale, 1.0)
    np.testing.assert_allclose(rounded / step, np.rint(rounded / step), atol=1e-3)
    assert (np.abs(rounded) <= scale * levels * 1.0001).all()
    assert (rounded[~live] == 0).all()
    np.testing.assert_allclose(
        np.abs(rounded).max(axis=0), np.abs(weights).max(axis=0), rtol=1e-6
    )  # the grid that follows from the result is the same

    def error(found):
        return float(np.einsum("io,ij,jo->", found - weights, gram, found - weights))

    nearest = np.rint(weights / step) * step
    # Greedy, so now and then worse: 2.5 times at most among 20,000 draws of these.
    assert error(rounded) <= 3.0 * error(nearest) + 1e-12


def test_errors_too_small_to_matter_are_left_to_plain_rounding():
    x = normal(300, 20)
    weights, live = normal(20, 6, seed=1).astype(np.float32), np.ones((20, 6), bool)
    scale = (np.abs(weights).max(axis=0, keepdims=True) / np.float32(127)).astype(np.float32)
    nearest = np.rint(weights / scale) * scale
    rounded = round_with_feedback(weights, x.T @ x, scale, 127.0, live, live)
    np.testing.assert_allclose(rounded, nearest, rtol=1e-6)
    fed_back = round_with_feedback(weights, x.T @ x, scale, 127.0, live, live, 0.0)
    assert (fed_back != rounded).any()


def test_feedback_beats_plain_rounding_on_related_inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 40)) + 2.0 * rng.normal(size=(500, 1))
    gram = x.T @ x / 500
    weights = rng.normal(size=(40, 20)).astype(np.float32)
    scale = np.abs(weights).max(axis=0, keepdims=True) / np.float32(7)
    live = np.ones(weights.shape, bool)
    rounded = round_with_feedback(weights, gram, scale, 7.0, live, live)
    nearest = np.rint(weights / scale) * scale

    def error(found):
        return float(np.einsum("io,ij,jo->", found - weights, gram, found - weights))

    assert error(rounded) < 0.4 * error(nearest)
    own = np.repeat(gram[None], 20, axis=0)
    np.testing.assert_allclose(
        round_with_feedback(weights, own, scale, 7.0, live, live, 0.0), rounded, atol=1e-6
    )


# ------------------------------------------------------------------ whole networks


def chain():
    return keras.Sequential(
        [
            L.Input((8, 8, 2)),
            L.Conv2D(6, 3, padding="same", use_bias=False, name="conv"),
            L.BatchNormalization(name="norm"),
            L.ReLU(),
            L.DepthwiseConv2D(3, name="depthwise"),
            L.Flatten(),
            L.Dense(5, name="last"),
        ],
        name="chain",
    )


def branches():
    x = keras.Input((6, 6, 2))
    a = L.Conv2D(4, 3, padding="same", activation="relu", name="a")(x)
    b = L.Conv2D(4, 1, name="b")(x)
    y = L.Add()([a, b])
    y = L.Concatenate()([L.Conv2D(3, 3, padding="same", name="c")(y), y])
    return keras.Model(x, L.Dense(3, name="last")(L.GlobalAveragePooling2D()(y)), name="branches")


def nested():
    inner = keras.Sequential(
        [L.Input((12,)), L.Dense(8, activation="relu", name="one"), L.Dense(6, name="two")],
        name="inner",
    )
    x = keras.Input((12,))
    return keras.Model(x, L.Dense(3, name="last")(inner(x)), name="nested")


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.one = L.Dense(8, activation="relu", name="one")
        self.two = L.Dense(3, name="two")

    def call(self, inputs):
        return self.two(self.one(inputs))


def subclassed():
    model = Subclassed(name="subclassed")
    model(np.zeros((1, 12), np.float32))
    return model


def shared():
    x = keras.Input((6, 6, 2))
    one = L.Conv2D(4, 3, padding="same", activation="relu", name="one")
    pair = L.Conv2D(4, 3, padding="same", activation="relu", name="pair")
    deep = L.DepthwiseConv2D(3, padding="same", name="deep")
    y = deep(pair(deep(pair(one(x)))))
    return keras.Model(x, L.Dense(3, name="last")(L.GlobalAveragePooling2D()(y)), name="shared")


class SharedInside(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.one = L.Dense(8, activation="relu", name="one")
        self.pair = L.Dense(8, activation="relu", name="pair")
        self.two = L.Dense(3, name="two")

    def call(self, inputs):
        return self.two(self.pair(self.pair(self.one(inputs))))


def shared_inside():
    model = SharedInside(name="shared_inside")
    model(np.zeros((1, 12), np.float32))
    return model


MODELS = {
    "chain": chain,
    "branches": branches,
    "nested": nested,
    "subclassed": subclassed,
    "shared": shared,
    "shared_inside": shared_inside,
}


class Fitted:
    def __init__(self, name, group="element"):
        keras.utils.set_random_seed(5)
        self.model = MODELS[name]()
        shape = (
            (12,)
            if name in ("nested", "subclassed", "shared_inside")
            else self.model.input_shape[1:]
        )
        self.x = normal(96, *shape, seed=4).astype(np.float32)
        for layer in self.model.layers:  # statistics that fit the data, as after training
            if isinstance(layer, L.BatchNormalization):
                inner = keras.Model(self.model.inputs, layer.input)(self.x).numpy()
                layer.moving_mean.assign(inner.mean(axis=(0, 1, 2)))
                layer.moving_variance.assign(inner.var(axis=(0, 1, 2)))
        self.dense = self.model(self.x).numpy()
        self.wrapped = wrap(self.model, group=group)
        prepare_for_short_recovery(self.wrapped)
        self.kernels = find_kernels(self.wrapped)
        groupings = {kernel.path: kernel.grouping(group) for kernel in self.kernels}
        self.groupings = groupings
        self.squares = LeastSquares(self.wrapped, self.kernels, groupings, self.x, ridge=1e-5)

    def operations(self, density, seed=0, live=Operation.KEEP):
        rng = np.random.default_rng(seed)
        return {
            path: np.where(rng.random(g.shape) < density, live, Operation.PRUNE).astype(np.uint8)
            for path, g in self.groupings.items()
        }

    def assign(self, operations, bits=8):
        for kernel in self.kernels:
            kernel.wrapper.assign_operations(kernel.spec.attribute, operations[kernel.path], bits)

    def recover(self, operations, bits=8):
        self.squares.reset()
        self.assign(operations, bits)
        self.squares.recover(operations, dict.fromkeys(operations, bits))

    def error(self):
        found = self.wrapped(self.x, training=False).numpy()
        return float(np.mean((found - self.dense) ** 2) / np.var(self.dense))


@pytest.fixture(scope="module", params=MODELS)
def fitted(request):
    return Fitted(request.param)


def test_recovery_brings_the_outputs_back(fitted):
    operations = fitted.operations(0.5)
    fitted.squares.reset()
    fitted.assign(operations)
    before = fitted.error()
    fitted.recover(operations)
    assert fitted.error() < 0.7 * before
    fitted.squares.reset()
    fitted.assign(fitted.operations(1.1))
    assert fitted.error() < 1e-9


def test_nothing_pruned_means_nothing_changed(fitted):
    fitted.squares.reset()
    fitted.assign(fitted.operations(1.1))
    before = fitted.wrapped.get_weights()
    fitted.recover(fitted.operations(1.1))
    for one, other in zip(before, fitted.wrapped.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_pass_that_reuses_gives_what_a_fresh_one_gives(fitted):
    first = fitted.operations(0.6, seed=1)
    changed = {**first, "last/kernel": fitted.operations(0.4, seed=2).get("last/kernel")}
    if "last/kernel" not in first:
        changed = {**first, "two/kernel": fitted.operations(0.4, seed=2)["two/kernel"]}
    fitted.recover(first)
    once = fitted.wrapped.get_weights()
    fitted.recover(changed)
    fitted.recover(first)
    for one, other in zip(once, fitted.wrapped.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    fitted.recover(changed)
    reused = fitted.wrapped.get_weights()
    for step in fitted.squares._pass._steps:
        step.key, step.outputs = "", []
    fitted.squares._moments.clear()
    fitted.recover(changed)
    for one, other in zip(reused, fitted.wrapped.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_only_what_lies_behind_a_change_is_run_again():
    fitted = Fitted("branches")
    first = fitted.operations(0.6)
    fitted.recover(first)
    called = []
    for kernel in fitted.kernels:
        own = kernel.wrapper.call

        def call(*args, own=own, path=kernel.path, **kwargs):
            called.append(path)
            return own(*args, **kwargs)

        kernel.wrapper.call = call
    fitted.recover({**first, "c/kernel": fitted.operations(0.3, seed=3)["c/kernel"]})
    assert called == ["c/kernel", "last/kernel"]


def test_dense_layers_are_fitted_to_the_dense_networks_outputs_in_closed_form():
    fitted = Fitted("nested")
    operations = fitted.operations(1.1)
    operations["last/kernel"][:3] = Operation.PRUNE
    fitted.recover(operations)
    inner = fitted.model.get_layer("inner")(fitted.x).numpy().astype(np.float64)
    design = np.concatenate([inner[:, 3:], np.ones((96, 1))], axis=1)
    best, *_ = np.linalg.lstsq(design, fitted.dense, rcond=None)
    np.testing.assert_allclose(fitted.wrapped(fitted.x).numpy(), design @ best, atol=2e-3)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_shared_layer_is_fitted_to_all_of_its_calls(use_bias):
    x = normal(90, 3, 6, seed=2).astype(np.float32) + np.float32([[0], [2], [-1]])
    inputs = [keras.Input((6,)) for _ in range(3)]
    dense = L.Dense(4, use_bias=use_bias, bias_initializer="ones", name="pair")
    model = keras.Model(inputs, L.Add()([dense(one) for one in inputs]))
    parts = [x[:, call] for call in range(3)]
    wrapped = wrap(model, group="element")
    kernels = find_kernels(wrapped)
    squares = LeastSquares(
        wrapped, kernels, {"pair/kernel": kernels[0].grouping("element")}, parts, ridge=1e-9
    )
    live = np.random.default_rng(1).random((6, 4)) < 0.5
    operations = np.where(live, Operation.KEEP, Operation.PRUNE).astype(np.uint8)
    kernels[0].wrapper.assign_operations("kernel", operations)
    squares.recover({"pair/kernel": operations}, {"pair/kernel": 8})
    rows = np.concatenate(parts).astype(np.float64)
    wanted = rows @ dense.kernel.numpy()
    shift, mean = (rows.mean(0), wanted.mean(0)) if use_bias else (0.0, 0.0)
    found = kernels[0].wrapper.effective_kernel("kernel").numpy()
    for output in range(4):
        alive = np.flatnonzero(live[:, output])
        best = np.linalg.lstsq((rows - shift)[:, alive], (wanted - mean)[:, output], rcond=None)[0]
        np.testing.assert_allclose(found[alive, output], best, atol=1e-4)
    if use_bias:
        bias = unwrapped(kernels[0].wrapper).bias.numpy()
        np.testing.assert_allclose(bias, 1.0 + mean - shift @ found, atol=1e-4)


def test_the_output_error_is_that_of_a_forward_pass():
    fitted = Fitted("nested")
    problem = fitted.squares.problems["inner/one/kernel"]
    changed = problem.original * np.random.default_rng(1).normal(size=problem.original.shape)
    centred = fitted.x - fitted.x.mean(axis=0)
    moved = np.mean((centred @ (changed - problem.original)) ** 2)
    error = moved / np.mean((centred @ problem.original) ** 2)
    assert fitted.squares.error("inner/one/kernel", changed) == pytest.approx(
        error / (1 + error), rel=1e-4
    )
    assert fitted.squares.error("inner/one/kernel", problem.original) == 0.0
    assert fitted.squares.error("inner/one/kernel", problem.original * np.nan) == 1.0


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_kernels_are_on_the_grid_after_the_fit(bits):
    fitted = Fitted("chain")
    operations = fitted.operations(0.7, live=Operation.QUANTIZE)
    fitted.recover(operations, bits)
    for kernel in fitted.kernels:
        latent = kernel.matrix()
        live = fitted.groupings[kernel.path].expand_numpy(
            operations[kernel.path] == Operation.QUANTIZE
        )
        effective = kernel.spec.to_matrix_numpy(
            kernel.wrapper.effective_kernel(kernel.spec.attribute).numpy()
        )
        # Rounding again changes nothing: the feedback is not lost.
        np.testing.assert_allclose(effective[live], latent[live], rtol=1e-5, atol=1e-7)


def test_shuffled_groups_are_fitted_where_they_end_up():
    fitted = Fitted("nested", group="block4")
    operations = fitted.operations(1.1)
    for path in operations:
        operations[path][0] = Operation.SHUFFLE
    fitted.assign(operations)
    assert fitted.error() > 1e-2
    fitted.recover(operations)
    assert fitted.error() < 1e-4


def test_pruned_groups_keep_their_trained_weights_for_later():
    fitted = Fitted("nested")
    operations = fitted.operations(0.5)
    fitted.recover(operations)
    for kernel in fitted.kernels:
        gone = operations[kernel.path] == Operation.PRUNE
        original = fitted.squares.problems[kernel.path].original
        np.testing.assert_array_equal(kernel.matrix()[gone], original[gone])
        assert (kernel.matrix()[~gone] != original[~gone]).any()


def test_batch_norm_follows_the_compressed_activations():
    fitted = Fitted("chain")
    fitted.recover(fitted.operations(0.3))
    norm = fitted.wrapped.get_layer("norm")
    given = keras.Model(fitted.wrapped.inputs, norm.input)(fitted.x).numpy()
    np.testing.assert_allclose(norm.moving_mean, given.mean(axis=(0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(norm.moving_variance, given.var(axis=(0, 1, 2)), rtol=1e-2)
    assert norm.momentum > 0  # as it was


def test_a_small_memory_reuses_nothing_and_gives_the_same():
    one, other = Fitted("branches"), Fitted("branches")
    other.squares._pass._memory = 1
    for seed in (0, 1):
        operations = one.operations(0.5, seed=seed)
        one.recover(operations)
        other.recover(operations)
    assert not any(step.outputs for step in other.squares._pass._steps)
    for a, b in zip(one.wrapped.get_weights(), other.wrapped.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_stripping_a_recovered_network_keeps_its_function():
    fitted = Fitted("chain")
    operations = fitted.operations(0.5, live=Operation.QUANTIZE)
    fitted.recover(operations)
    stripped = rls.strip(fitted.wrapped)
    np.testing.assert_array_equal(stripped(fitted.x), fitted.wrapped(fitted.x, training=False))
    again = wrap(fitted.model, plan_of(fitted.wrapped))
    apply_plan(again, plan_of(fitted.wrapped).kernels)
    assert tf.reduce_all(tf.math.is_finite(again(fitted.x)))


def test_what_only_rounding_tells_apart_is_not_made_louder():
    """Inputs that died in the compressed network: constant, or all but zero in one channel."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(512, 4, 4, 3)).astype(np.float32)
    stack = [
        L.Input((4, 4, 3)),
        L.DepthwiseConv2D(3, use_bias=False, name="depthwise"),
        L.Flatten(),
        L.Dense(5, name="dense"),
    ]
    model = keras.Sequential(stack)
    wrapped = wrap(model)
    kernels = find_kernels(wrapped)
    cut = {kernel.path: kernel.grouping("element") for kernel in kernels}
    problems = LeastSquares(wrapped, kernels, cut, x).problems
    quiet = x * np.float32([1, 1e-6, 1])
    constant = np.float32(3) + np.float32(3e-7) * np.random.default_rng(1).normal(size=(512, 12))
    given = {"depthwise/depthwise_kernel": quiet, "dense/kernel": constant.astype(np.float32)}
    for path, inputs in given.items():
        problem = problems[path]
        operations = np.full(problem.grouping.shape, Operation.KEEP, np.uint8)
        found = problem.solve(operations, 8, problem.moments(problem.take(inputs)))
        assert np.abs(found).max() < 20 * np.abs(problem.original).max(), path
