"""Constraints on kernels and biases hold in what comes out, trained or fitted, and zeros stay."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tiny_search import DQN, TRAIN, VALIDATION, quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.steps import Mix
from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import KernelPlan
from rl_sparsity_tf.layers.wrapping import wrapped_kernels
from rl_sparsity_tf.training.least_squares import LeastSquares
from rl_sparsity_tf.training.preparation import prepare_for_short_recovery

L, C = keras.layers, keras.constraints


@keras.saving.register_keras_serializable()
class AtLeast(C.Constraint):
    """Moves zeros."""

    def __call__(self, w):
        return tf.maximum(w, 0.1)


@keras.saving.register_keras_serializable()
class Broken(C.Constraint):
    """Raises for whatever it is given."""

    def __call__(self, w):
        raise RuntimeError("no such thing")


NON_NEGATIVE = C.NonNeg()


def fitted_layers():
    """Every kind of kernel that is fitted, and one that is not, under constraints."""
    keras.utils.set_random_seed(1)
    positive = keras.initializers.RandomUniform(0.0, 0.4)
    conv = {"kernel_constraint": C.MaxNorm(0.8, axis=[0, 1, 2]), "bias_constraint": NON_NEGATIVE}
    separable = {
        "depthwise_constraint": C.UnitNorm(axis=[0, 1]),
        "pointwise_constraint": C.MinMaxNorm(0.5, 1.0, axis=[0, 1, 2]),
    }
    dense = {"kernel_constraint": NON_NEGATIVE, "kernel_initializer": positive}
    model = keras.Sequential(
        [
            L.Input((7, 7, 2)),
            L.Conv2D(8, 3, activation="relu", name="conv", **conv),
            L.DepthwiseConv2D(2, name="depthwise", depthwise_constraint=C.UnitNorm(axis=[0, 1])),
            L.SeparableConv2D(6, 3, activation="relu", name="separable", **separable),
            L.Flatten(name="flat"),
            L.Dense(8, name="dense", activation="relu", **dense, bias_constraint=NON_NEGATIVE),
            L.Dense(3, name="unit", kernel_constraint=C.UnitNorm()),
        ],
        name="constrained",
    )
    for weight in model.weights:  # as after training
        if weight.constraint is not None:
            weight.assign(weight.constraint(weight))
    return model


def broken(model, step=0.0):
    """Names of the weights that do not meet their constraint, to within a step of the grid."""
    names = []
    for weight in model.weights:
        if weight.constraint is None:
            continue
        value = weight.numpy()
        met = np.asarray(weight.constraint(weight))
        # A unit whose inputs are all pruned has no norm.
        alive = np.broadcast_to(np.abs(value).max(tuple(range(value.ndim - 1))) > 0, value.shape)
        tolerance = 1e-5 + step * np.abs(value).max() * (value.size**0.5 if step else 1)
        if not np.allclose(value[alive], met[alive], atol=tolerance):
            names.append(weight.name)
    return names


def planned(model, live=Operation.KEEP, density=0.5):
    rng = np.random.default_rng(3)
    entries = []
    for kernel in find_kernels(model):
        alive = rng.random(kernel.grouping("element").shape) < density
        chosen = np.where(alive, live, Operation.PRUNE).astype(np.uint8)
        entries.append(
            KernelPlan(kernel.path, kernel.shape, kernel.spec.layout, "element", 8, chosen)
        )
    return rls.CompressionPlan(entries)


def assert_zeros_stay(model, plan):
    for kernel in find_kernels(model):
        dead = plan.kernels[kernel.path].operations == Operation.PRUNE
        assert not kernel.matrix()[dead].any()


@pytest.mark.parametrize("live", [Operation.KEEP, Operation.QUANTIZE])
def test_what_least_squares_fits_meets_the_constraints(live):
    model = fitted_layers()
    assert broken(model) == []
    wrapped = rls.wrap(model)
    prepare_for_short_recovery(wrapped)
    kernels = wrapped_kernels(wrapped)
    groupings = {kernel.path: kernel.grouping("element") for kernel in kernels}
    x = np.random.default_rng(0).normal(size=(96, 7, 7, 2)).astype(np.float32)
    squares = LeastSquares(wrapped, kernels, groupings, x)
    assert len(squares.problems) == 4
    plan = planned(model, live)
    operations = {path: entry.operations for path, entry in plan.kernels.items()}
    for kernel in kernels:
        kernel.wrapper.assign_operations(kernel.spec.attribute, operations[kernel.path])

    def error():
        return float(np.mean((wrapped(x).numpy() - model(x).numpy()) ** 2))

    before = error()
    squares.recover(operations, dict.fromkeys(operations, 8))
    small = rls.strip(wrapped)
    assert broken(small, 0.0 if live == Operation.KEEP else 0.5 / 127) == []
    assert_zeros_stay(small, plan)
    assert error() < before
    # What a fit says the layer will be is what the wrapper makes of it.
    for kernel in find_kernels(small):
        if kernel.path in squares.problems:
            problem, moments = squares.problems[kernel.path], squares._moments.get(kernel.path)
            moments = problem.dense if moments is None else moments[1]
            solved = problem.solve(operations[kernel.path], 8, moments)
            np.testing.assert_allclose(kernel.matrix(), solved, atol=1e-6)


def recurrent():
    keras.utils.set_random_seed(1)
    constraints = {"kernel_constraint": C.MaxNorm(0.7), "recurrent_constraint": C.UnitNorm()}
    model = keras.Sequential(
        [
            L.Input((5, 4)),
            L.LSTM(3, name="memory", **constraints, bias_constraint=C.MaxNorm(0.5)),
            L.Dense(3, name="unit", kernel_constraint=C.UnitNorm(), activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize("shuffled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_under_masks_meets_the_constraints(shuffled):
    model = recurrent()
    plan = planned(model, Operation.SHUFFLE if shuffled else Operation.KEEP)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 5, 4)).astype(np.float32), rng.integers(0, 3, 32)
    wrapped = rls.wrap(model, plan, train_masks=not shuffled)
    callbacks = [] if shuffled else [rls.MaskTraining(every=1)]
    wrapped.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
    small = rls.strip(wrapped)
    assert broken(small) == []
    np.testing.assert_array_equal(small(x), wrapped(x))
    again = rls.strip(keras.models.clone_model(small))
    assert again.get_layer("unit").kernel.constraint is not None


def test_nothing_is_projected_where_nothing_is_pruned():
    model = fitted_layers()
    model.get_layer("unit").kernel.assign(np.ones((8, 3)))  # no unit norm
    wrapped = rls.wrap(model)
    x = np.random.default_rng(0).normal(size=(8, 7, 7, 2)).astype(np.float32)
    np.testing.assert_array_equal(wrapped(x), model(x))


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (C.RadialConstraint(), "constraint RadialConstraint, which makes other numbers"),
        (AtLeast(), "constraint AtLeast, which makes other numbers"),
        (Broken(), r"constraint Broken .* cannot be computed \(RuntimeError: no such thing\)"),
    ],
)
def test_constraints_that_pruned_weights_cannot_meet_are_refused_by_name(constraint, words):
    model = keras.Sequential(
        [
            L.Input((5, 5, 1)),
            L.Conv2D(4, 3, name="conv", kernel_constraint=constraint),
            L.Flatten(),
            L.Dense(3, name="out"),
        ]
    )
    model.compile("sgd", "mse")
    for call in (
        lambda: rls.Compressor(model, rls.Target(sparsity=0.2)),
        lambda: rls.wrap(model),
        lambda: rls.baselines.lamp(model, sparsity=0.2),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            call()
        assert "kernel 'conv/kernel'" in str(caught.value)
        assert "exclude='conv/kernel'" in str(caught.value)
    plan = rls.baselines.lamp(model, sparsity=0.2, exclude="conv")
    assert set(plan.kernels) == {"out/kernel"}
    assert rls.Compressor(model, rls.Target(sparsity=0.2), exclude="conv").selection.left


def test_a_constrained_bias_takes_up_no_constants():
    for constraint in (None, NON_NEGATIVE):
        layer = L.Dense(3, bias_constraint=constraint)
        layer.build((None, 4))
        assert bool(Mix(layer).obstacle()) == (constraint is not None)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_search_returns_a_model_that_meets_its_constraints(epochs):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            L.Input((6,)),
            L.Dense(8, activation="relu", kernel_constraint=C.MaxNorm(0.6), name="first"),
            L.Dense(3, kernel_constraint=C.NonNeg(), bias_constraint=C.NonNeg(), name="last"),
            L.Softmax(),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*TRAIN, epochs=1, verbose=0)
    assert broken(model) == []
    target = rls.Target(sparsity=0.5)
    with quick_search():
        one = rls.Compressor(model, target, agent=DQN, buckets=3, recovery="least_squares")
        result = one.search(
            TRAIN,
            validation_data=VALIDATION,
            episodes=2,
            batch_size=32,
            finetune_epochs=epochs,
            finalists=1,
            verbose=0,
        )
    assert broken(result.model, 0.5 / 127) == []
    assert_zeros_stay(result.model, result.plan)
    assert (result.model.get_layer("last").kernel.numpy() >= 0).all()
