"""What the agent sees: bounded and finite whatever the network's figures are."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO, inputs_for

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment import autoencoder as autoencoder_module
from rl_sparsity_tf.environment.autoencoder import WeightAutoencoder
from rl_sparsity_tf.environment.features import (
    FEATURES,
    STATE_SIZE,
    BucketView,
    describe_state,
    lower_bounds,
    observe,
)
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.training.recovery import Recovery
from rl_sparsity_tf.training.statistics import KernelStatistics

# ---------------------------------------------------------------------------- the features


def test_features_have_unique_names_bounds_and_meanings():
    names = [feature.name for feature in FEATURES]
    assert len(set(names)) == len(names) == STATE_SIZE
    assert set(lower_bounds(FEATURES)) <= {-1.0, 0.0}
    assert all(feature.meaning for feature in FEATURES)
    # What the concept asks for is there.
    asked = "weight_mean weight_variance weight_entropy activation_mean activation_variance "
    asked += "activation_sparsity gradient_mean gradient_variance reconstruction_error"
    assert set(asked.split()) <= set(names)


def test_describe_state_prints_every_feature():
    lines = []
    describe_state(print_fn=lines.append)
    assert len(lines) == STATE_SIZE + 1
    assert "value" not in lines[0]
    for index, (feature, line) in enumerate(zip(FEATURES, lines[1:], strict=True)):
        assert line.split()[:2] == [str(index), feature.name]
        assert line.endswith(feature.meaning)
        assert f"[{feature.low:g}, 1]" in line


def test_describe_state_prints_the_values():
    lines = []
    state = np.linspace(-1, 1, STATE_SIZE)
    describe_state(state, lines.append)
    assert "value" in lines[0]
    for value, line in zip(state, lines[1:], strict=True):
        assert f" {value:.3f}" in line


def test_describe_state_goes_to_standard_output(capsys):
    rls.describe_state()
    assert "weight_entropy" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(3,), (1, STATE_SIZE), ()])
def test_states_of_another_size(shape):
    with pytest.raises(rls.ArgumentError, match=r"without a batch axis"):
        describe_state(np.zeros(shape))


# ---------------------------------------------------------------------------- observe


@pytest.fixture(scope="module")
def network():
    model = ZOO["separable"]()
    data = (inputs_for(model, 24), np.arange(24) % 4)
    return CompressedNetwork(
        model,
        training_data(data, model, batch_size=8),
        evaluation_data(data, model, "validation_data"),
        target=rls.Target(sparsity=0.5),
        group="block4",
        recovery=Recovery(method="none"),
    )


@pytest.fixture(autouse=True)
def _dense_again(request):
    yield
    if "network" in request.fixturenames:
        used = request.getfixturevalue("network")
        used.reset()
        used.statistics = used.dense_statistics


def view(network, path, groups=None, pressure=0.5):
    grouping = network.groupings[path]
    saliency = np.linspace(0.1, 2.0, grouping.count)
    groups = np.arange(grouping.count) if groups is None else groups
    return BucketView(1, 4, groups, saliency, pressure, 0.5)


def assert_bounded(state):
    assert state.shape == (STATE_SIZE,)
    assert state.dtype == np.float32
    assert np.isfinite(state).all()
    assert (state >= lower_bounds(FEATURES)).all()
    assert (state <= 1).all()


def as_dict(state):
    return dict(zip([feature.name for feature in FEATURES], state.tolist(), strict=True))


@pytest.mark.slow
def test_the_dense_network_looks_dense(network):
    for index, kernel in enumerate(network.kernels):
        state = observe(network, kernel.path, view(network, kernel.path))
        assert_bounded(state)
        seen = as_dict(state)
        assert seen["reconstruction_error"] == seen["pruned"] == seen["budget_progress"] == 0
        assert seen["weight_variance"] == pytest.approx(0.5)
        assert seen["activation_variance"] == pytest.approx(0.5)
        assert seen["retention"] == 1
        assert seen["target"] == 0.5
        assert seen["bucket_size"] == 1
        assert seen["kernel_depth"] == pytest.approx(index / (len(network.kernels) - 1))
        assert seen["convolution"] == (len(kernel.shape) > 2)
        assert seen["depthwise"] == ("depthwise" in kernel.path)


@pytest.mark.slow
def test_decisions_are_seen(network):
    kernel = max(network.kernels, key=lambda kernel: kernel.size)
    grouping = network.groupings[kernel.path]
    order = np.arange(grouping.count)
    third = grouping.count // 3
    network.decide(kernel.path, order[:third], rls.Operation.PRUNE)
    network.decide(kernel.path, order[third : 2 * third], rls.Operation.QUANTIZE)
    network.decide(kernel.path, order[2 * third :], rls.Operation.SHUFFLE)
    network.measure()
    state = observe(network, kernel.path, view(network, kernel.path, order[:third]))
    assert_bounded(state)
    seen = as_dict(state)
    assert seen["pruned"] + seen["quantized"] + seen["shuffled"] == pytest.approx(1)
    assert seen["pruned"] == pytest.approx(
        grouping.sizes.reshape(-1)[:third].sum() / kernel.size, abs=1e-6
    )
    assert seen["kept"] == 0
    assert 0 < seen["reconstruction_error"] < 1
    assert 0 < seen["network_error"] < seen["reconstruction_error"]
    assert 0 < seen["budget_progress"] < 1
    assert seen["weight_variance"] < 0.5


anything = st.floats(width=64)  # NaN, infinities and the largest numbers included


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_bounded_for_any_figures(network, data, seed):
    kernel = data.draw(st.sampled_from(network.kernels))
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=kernel.matrix().shape).astype(np.float32)
    gradient = gradient * np.float32(data.draw(st.sampled_from([0.0, 1e-30, 1.0, 1e18, np.inf])))
    network.statistics = {
        path: dataclasses.replace(
            statistics,
            activation_mean=data.draw(anything),
            activation_variance=data.draw(anything.map(abs)),
            activation_sparsity=data.draw(anything),
            gradient=gradient if path == kernel.path else statistics.gradient,
        )
        for path, statistics in network.dense_statistics.items()
    }
    outcome = {field.name: data.draw(anything) for field in dataclasses.fields(network.outcome)}
    network.outcome = dataclasses.replace(network.outcome, **outcome)
    network.errors[kernel.path] = data.draw(anything)
    count = network.groupings[kernel.path].count
    groups = rng.permutation(count)[: data.draw(st.integers(0, count))]
    bucket = dataclasses.replace(
        view(network, kernel.path, groups, data.draw(anything)),
        saliency=rng.choice([0.0, 1.0, 1e200, np.nan], count),
    )
    assert_bounded(observe(network, kernel.path, bucket))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e20])
def test_bounded_for_weights_gone_wrong(network, value):
    kernel = network.kernels[0]
    variable = getattr(kernel.layer, kernel.spec.attribute)
    variable.assign(np.full(kernel.shape, value, np.float32))
    network.errors[kernel.path] = network.autoencoder.error(
        kernel.path, network.effective_matrix(kernel.path)
    )
    network.outcome = network.evaluate()
    network.measure()
    assert_bounded(observe(network, kernel.path, view(network, kernel.path)))


def test_statistics_figures():
    gradient = np.array([[1.0, 3.0]])
    statistics = KernelStatistics(0.0, 1.0, 0.5, gradient)
    assert (statistics.gradient_mean, statistics.gradient_variance) == (2.0, 1.0)


def test_measured_statistics_equal_numpy(network):
    network.statistics = network._collector([network.train.batch(0), network.train.batch(1)])
    kernel = network.kernels[0]
    outputs = [
        kernel.wrapper(network.train.batch(index)[0], training=False).numpy() for index in (0, 1)
    ]
    together = np.stack(outputs)
    seen = network.statistics[kernel.path]
    assert seen.activation_mean == pytest.approx(together.mean(), rel=1e-4)
    assert seen.activation_variance == pytest.approx(together.var(), rel=1e-4)
    assert seen.activation_sparsity == pytest.approx((together == 0).mean(), rel=1e-5)
    assert 0 < seen.activation_sparsity < 1
    assert set(network.statistics) == {kernel.path for kernel in network.kernels}


# ---------------------------------------------------------------------------- the autoencoder


def originals(seed):
    rng = np.random.default_rng(seed)
    structured = np.outer(np.sin(np.arange(96) / 5), rng.normal(size=40))
    return {
        "structured": structured.astype(np.float32),
        "noise": rng.normal(0, 0.05, (50, 30)).astype(np.float32),
        "zeros": np.zeros((5, 3), np.float32),
    }


@pytest.fixture(scope="module", params=[0, 1])
def autoencoder(request):
    kernels = originals(request.param)
    return WeightAutoencoder(kernels, seed=request.param, epochs=6), kernels, request.param


def test_error_is_zero_for_the_original_and_rises_with_noise(autoencoder):
    network, kernels, seed = autoencoder
    rng = np.random.default_rng(seed + 100)
    for path in ("structured", "noise"):
        matrix = kernels[path]
        assert network.error(path, matrix) == 0
        noise = rng.normal(size=matrix.shape) * matrix.std()
        errors = [network.error(path, matrix + level * noise) for level in (0, 0.5, 1, 2, 4)]
        assert errors == sorted(errors)
        assert errors[-1] > errors[2] > 0
        assert errors[-1] < 1


def test_error_rises_as_weights_are_pruned(autoencoder):
    network, kernels, _ = autoencoder
    matrix = kernels["structured"]
    order = np.argsort(np.abs(matrix), axis=None)
    errors = []
    for share in (0.0, 0.7, 0.9, 1.0):
        pruned = matrix.copy().reshape(-1)
        pruned[order[: int(share * matrix.size)]] = 0
        errors.append(network.error("structured", pruned.reshape(matrix.shape)))
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[-1] > errors[1]


def test_error_is_bounded_for_any_weights(autoencoder):
    network, kernels, _ = autoencoder
    for path, matrix in kernels.items():
        signs = np.sign(np.sin(np.arange(matrix.size))).reshape(matrix.shape)
        for value in (0.0, 1e3, 1e30, 3e38, np.nan, np.inf):
            for weights in (np.full(matrix.shape, value), np.where(signs > 0, value, -value)):
                error = network.error(path, weights.astype(np.float32))
                assert 0 <= error <= 1
                if path == "noise" and value > 0:
                    assert error > 0.2
    assert network.error("noise", np.full((50, 30), np.nan)) == 1


def test_the_autoencoder_repeats_itself():
    """Whatever was trained before in the same process, and at the cost of one tracing for all."""
    kernels = originals(3)
    errors, traced = [], []
    for seed in (5, 6, 5):
        network = WeightAutoencoder(kernels, seed=seed, epochs=1, max_chunks=20)
        errors.append(network.error("noise", kernels["noise"] * 1.5))
        traced.append(shared_step().experimental_get_tracing_count())
    assert errors[0] == errors[2] != errors[1]
    assert traced[0] == traced[1] == traced[2]


def shared_step():
    """The training step that all autoencoders of the process share."""
    return autoencoder_module._network(tf.distribute.get_strategy())[2]


@pytest.mark.parametrize("change", ["mixed precision", "strategy"])
def test_the_autoencoder_is_the_same_under_other_settings(change):
    kernels = originals(3)
    plain = WeightAutoencoder(kernels, epochs=1)
    try:
        if change == "strategy":
            with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
                other = WeightAutoencoder(kernels, epochs=1)
        else:
            keras.mixed_precision.set_global_policy("mixed_float16")
            autoencoder_module._network.cache_clear()
            other = WeightAutoencoder(kernels, epochs=1)
    finally:
        keras.mixed_precision.set_global_policy("float32")
        autoencoder_module._network.cache_clear()
    for one, same in zip(plain._layers, other._layers, strict=True):
        np.testing.assert_array_equal(one, same)
