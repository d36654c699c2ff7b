"""Numeric extremes: a clear error at the door, or a finite and right computation; never NaN."""

from __future__ import annotations

import re

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import strategies as st
from tiny_search import TRAIN, VALIDATION, trained, untrained
from wrong_calls import nothing_runs

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.extremes import check_loss, check_training, check_weights
from rl_sparsity_tf.data.metrics import Evaluator, choose_metric
from rl_sparsity_tf.environment.autoencoder import WeightAutoencoder
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.wrapping import wrap
from rl_sparsity_tf.training.layer_problem import LayerProblem, row_source
from rl_sparsity_tf.training.ridge import fit_depthwise, fit_masked
from rl_sparsity_tf.training.statistics import StatisticsCollector

L = keras.layers
X, Y = TRAIN
settings = hypothesis.settings(max_examples=25, deadline=None)
powers = st.integers(-120, 120)


# ------------------------------------------------------------------------------- at the door


def regression():
    model = keras.Sequential([L.Input((6,)), L.Dense(4, activation="relu"), L.Dense(1)])
    model.compile("adam", "mse")
    return model


def with_row(value, array=X, row=3):
    changed = array.copy()
    changed[row] = value
    return changed


LABELS = X[:, :1]
FINE = (X, LABELS)
ONE_LABEL, WEIGHTS = with_row(1e38, LABELS), np.full(len(X), 1e38, np.float32)
COLUMN = np.where(np.arange(6) == 2, np.float32(1e38), X)
HUGE = (VALIDATION[0] * np.float32(5e37), VALIDATION[1])
REFUSED = {
    "an input": (trained, (with_row(3e38), Y), VALIDATION, r"^train .* with row 3 \(inputs .* 3e"),
    "a column": (
        trained,
        (COLUMN, Y),
        VALIDATION,
        r"^train .*: with row \d+ \(inputs up to 1e\+38",
    ),
    "validation": (
        trained,
        TRAIN,
        HUGE,
        r"^validation_data .* \(inputs .*e\+38, .* its loss",
    ),
    "a label": (regression, (X, ONE_LABEL), FINE, r"^train .* row 3 \(.* and weights up to 1e\+38"),
    "labels": (
        regression,
        FINE,
        (X, LABELS * np.float32(1e25)),
        r"^validation_data .* labels and weights up to \d\.\d+e\+25\) its loss leaves float32",
    ),
    "integers": (regression, (X, np.full((96, 1), 2**62)), FINE, r"^train .* up to 4\.61e\+18\)"),
    "weights": (trained, (X, Y, WEIGHTS), VALIDATION, r"^train .* labels and weights up to 1e\+38"),
    "all together": (
        regression,
        FINE,
        (X, np.full((96, 1), 1.8e19, np.float32)),
        r"^validation_data .* up to 1\.8e\+19\) its loss leaves float32",
    ),
}


def enter(model, train=TRAIN, validation=VALIDATION):
    """What a search does at the door, without what it does behind."""
    data = training_data(train, model, batch_size=32)
    batches = evaluation_data(validation, model, "validation_data", batch_size=32)
    evaluate = Evaluator(model, choose_metric(model, batches[0]))
    check_loss(evaluate(batches).loss, batches, "validation_data", evaluate, model)
    check_training(model, data.large, None)


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_leaves_float32_is_refused(case):
    make, train, validation, pattern = REFUSED[case]
    with pytest.raises(rls.DataError) as caught:
        enter(make(), train, validation)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert "Expected numbers of the scale that the model was trained on: scale them" in message


def test_it_is_refused_before_anything_is_trained():
    one = rls.Compressor(trained(), rls.Target(sparsity=0.5))
    _, train, validation, pattern = REFUSED["an input"]
    with nothing_runs(), pytest.raises(rls.DataError, match=pattern):
        one.search(train, validation_data=validation, verbose=0)


FINITE = {
    "large": X * np.float32(1e15),
    "tiny": X * np.float32(1e-40),
    "zero": X * 0,
    "constant": np.ones_like(X),
    "half precision": np.full_like(X, 65504, dtype=np.float16),
    "integers": np.full(X.shape, np.iinfo(np.int64).max),
}


def test_other_extremes_are_computed_with():
    model = trained()
    for array in FINITE.values():
        enter(model, (array, Y))


def test_large_rows_are_found_wherever_they_are():
    data = tf.data.Dataset.from_tensor_slices((with_row(3e38, row=70), Y)).batch(16)
    found = training_data(data, untrained()).large
    assert found is not None
    assert found.numbers == [70]
    many = training_data((X * np.float32(1e12), Y), trained()).large
    assert many is not None
    assert len(many.numbers) == 32  # the largest are enough
    smallest = min(np.abs(row[0]).max() for row in many.rows)
    rest = np.delete(np.abs(X).max(axis=1), many.numbers) * 1e12
    assert smallest >= rest.max()


@pytest.mark.parametrize("value", [1e30, 3e38, np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_huge_weights_are_refused_by_name(value, place):
    model = trained()
    weights = model.get_weights()
    weights[place].reshape(-1)[0] = value
    model.set_weights(weights)
    holds = r"values up to \de\+3" if np.isfinite(value) else "NaN or infinite values"
    said = rf"weight 'first/\w+:0' of model 'tiny' holds {holds}.*Expected a trained model"
    one = rls.Compressor(model, rls.Target(sparsity=0.5))
    with nothing_runs(), pytest.raises(rls.ModelError, match=said):
        one.search(TRAIN, validation_data=VALIDATION, verbose=0)
    with pytest.raises(rls.ModelError, match=said):
        rls.baselines.uniform(model, sparsity=0.5)


def test_a_weight_that_is_no_number_is_not_exported(tmp_path):
    model = trained()
    model.layers[0].bias.assign_add(np.full(8, np.nan, np.float32))
    with pytest.raises(rls.ModelError, match=r"weight 'first/bias:0' .* NaN"):
        rls.export_tflite(model, tmp_path / "m.tflite", "none")


def test_a_mask_of_infinities_may_be_exported():
    model = trained()
    model.layers[0].trainable = False
    model.layers[0].bias.assign(np.full(8, -np.inf, np.float32))
    check_weights(model, exported=True)
    with pytest.raises(rls.ModelError, match="infinite"):
        check_weights(model)


def test_an_ordinary_row_without_a_loss_is_the_models_fault():
    model = untrained()
    model.compile("adam", lambda y, p: tf.math.log(-1.0 - tf.cast(y, tf.float32)))
    said = r"'tiny' has the loss nan on validation_data, because of row 0, .* are ordinary"
    with pytest.raises(rls.ModelError, match=said):
        enter(model)


# ---------------------------------------------------------------------- the fits in closed form


def problem_of(count=40, inputs=7, outputs=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, inputs)) * rng.choice([1e-3, 1.0, 1e3], inputs)
    start = rng.normal(size=(inputs, outputs))
    live = rng.random((inputs, outputs)) < 0.6
    return x, x @ start, start, live


@settings
@hypothesis.given(unit=powers, gain=powers, seed=st.integers(0, 1000), exact=st.booleans())
def test_a_fit_does_not_depend_on_units(unit, gain, seed, exact):
    x, y, start, live = problem_of(seed=seed)
    a, b = 2.0**unit, 2.0**gain
    options = {"ridge": 1e-3, "exact_survivors": 1024 if exact else 1}
    fitted = fit_masked(x.T @ x, x.T @ y, start, live, **options)
    scaled = fit_masked((a * x).T @ (a * x), (a * x).T @ (b * y), start * (b / a), live, **options)
    np.testing.assert_allclose(scaled * (a / b), fitted, rtol=1e-6, atol=1e-9)


@settings
@hypothesis.given(unit=powers, gain=powers, seed=st.integers(0, 1000))
def test_a_depthwise_fit_does_not_depend_on_units(unit, gain, seed):
    x, _, start, live = problem_of(seed=seed)
    a, b = 2.0**unit, 2.0**gain
    gram = np.stack([(x * (1 + o)).T @ (x * (1 + o)) for o in range(start.shape[1])])
    cross = np.stack([g @ w for g, w in zip(gram, start.T, strict=True)], axis=1)
    fitted = fit_depthwise(gram, cross, start, live, ridge=1e-3)
    scaled = fit_depthwise(gram * a * a, cross * a * b, start * (b / a), live, ridge=1e-3)
    np.testing.assert_allclose(scaled * (a / b), fitted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fit", ["exact", "iterative", "depthwise"])
def test_a_layer_that_is_given_nothing_but_zeros_keeps_its_weights(fit):
    _, _, start, live = problem_of()
    gram, cross = np.zeros((7, 7)), np.zeros_like(start)
    if fit == "depthwise":
        found = fit_depthwise(np.zeros((5, 7, 7)), cross, start, live, ridge=1e-3)
    else:
        survivors = 1024 if fit == "exact" else 1
        found = fit_masked(gram, cross, start, live, ridge=0.0, exact_survivors=survivors)
    np.testing.assert_allclose(found, np.where(live, start, 0.0), rtol=1e-12)


@pytest.fixture(scope="module")
def layers():
    """A convolution of every channel by itself and a dense layer, each with inputs."""
    keras.utils.set_random_seed(0)
    stack = [L.Input((4, 4, 2)), L.DepthwiseConv2D(3), L.Flatten(), L.Dense(3, name="dense")]
    model = keras.Sequential(stack)
    images = np.random.default_rng(0).normal(size=(30, 4, 4, 2)).astype(np.float32)
    given = (images, model.layers[1](model.layers[0](images)).numpy())
    kernels = find_kernels(wrap(model, rls.CompressionPlan([KernelRule("*", 0.5)])))
    return list(zip(kernels, given, strict=True))


def problems(layer, power):
    kernel, given = layer
    source = row_source(kernel.layer, kernel.spec, limit=500)
    scaled = np.ldexp(given, power).astype(np.float32)
    return LayerProblem(kernel, kernel.grouping("element"), source, scaled, ridge=1e-3)


@pytest.mark.parametrize("place", [0, 1], ids=["depthwise", "dense"])
@hypothesis.settings(settings, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(power=st.integers(-100, 100), seed=st.integers(0, 1000))
def test_what_a_layer_loses_does_not_depend_on_the_unit_of_its_inputs(layers, place, power, seed):
    rng = np.random.default_rng(seed)
    plain, scaled = (problems(layers[place], one) for one in (0, power))
    chosen = rng.choice([Operation.KEEP, Operation.PRUNE], plain.grouping.shape).astype(np.uint8)
    weights = plain.solve(chosen, 8, plain.dense)
    np.testing.assert_allclose(weights, scaled.solve(chosen, 8, scaled.dense), atol=1e-5)
    error = plain.relative_error(0.5 * weights)
    assert 0.01 < error < 10
    assert scaled.relative_error(0.5 * weights) == pytest.approx(error, rel=1e-4)
    assert scaled.energy == pytest.approx(plain.energy * 4.0**power, rel=1e-4)


def test_ordinary_inputs_are_computed_with_as_they_are(layers):
    # Digit for digit what the products in single precision give.
    plain = problems(layers[1], 0)
    rows = layers[1][1] - layers[1][1].mean(axis=0, dtype=np.float64).astype(np.float32)
    expected = (rows.T @ rows).astype(np.float64) / len(rows)
    np.testing.assert_array_equal(plain.dense.gram, expected)


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_a_layer_beyond_float32_is_named(layers, value):
    kernel, given = layers[1]
    bad = given.copy()
    bad[3] = value
    with pytest.raises(rls.DataError, match="layer 'dense' is given, or gives, values beyond"):
        problems((kernel, bad), 0)


# ------------------------------------------------------------------------- what agents look at


def test_tiny_weights_are_told_apart():
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(32, 8)).astype(np.float32)}
    tiny = {"kernel": np.ldexp(weights["kernel"], -90)}
    half = rng.random((32, 8)) < 0.5
    errors = [
        WeightAutoencoder(one, epochs=1).error("kernel", one["kernel"] * half)
        for one in (weights, tiny)
    ]
    assert errors[0] > 0.01
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_activations_whose_squares_leave_float32_have_no_nan():
    model = wrap(trained(), rls.CompressionPlan([KernelRule("*", 0.5)]))
    model.compile("adam", "sparse_categorical_crossentropy")
    batch = (tf.constant(X * np.float32(1e25)), tf.constant(Y), None)
    for found in StatisticsCollector(model)([batch]).values():
        assert not np.isnan(found.activation_variance)
        assert np.isfinite(found.gradient).all()
