"""`wrap` by a sparsity and a method, in place of a plan."""

import numpy as np
import pytest
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import sparsity_of

METHODS = ("uniform", "erk", "global_magnitude", "lamp")


def network():
    keras.utils.set_random_seed(1)
    layers = [
        keras.layers.Input((6,)),
        keras.layers.Dense(16, activation="relu", name="first"),
        keras.layers.Dense(12, activation="relu", name="middle"),
        keras.layers.Dense(3, name="last"),
    ]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_sparsity_is_short_for_the_plan_of_the_method(method):
    model = network()
    plan = getattr(rls.baselines, method)(model, sparsity=0.7)
    assert rls.plan_of(rls.wrap(model, sparsity=0.7, method=method)) == plan


def test_the_methods_differ_and_lamp_is_the_default():
    model = network()
    plans = [rls.plan_of(rls.wrap(model, sparsity=0.7, method=method)) for method in METHODS]
    assert all(one != other for i, one in enumerate(plans) for other in plans[:i])
    assert rls.plan_of(rls.wrap(model, sparsity=0.7)) == plans[-1]


def test_group_and_selection_are_those_of_the_plan():
    model = network()
    options = {"group": "block4", "exclude": "last"}
    wrapped = rls.wrap(model, sparsity=0.5, **options)
    plan = rls.plan_of(wrapped)
    assert plan == rls.baselines.lamp(model, sparsity=0.5, **options)
    assert {entry.group for entry in plan.kernels.values()} == {"block4"}
    assert set(plan.kernels) == {"first/kernel", "middle/kernel"}
    np.testing.assert_array_equal(
        rls.strip(wrapped).get_layer("last").kernel, model.get_layer("last").kernel
    )


def test_masks_learn_from_the_sparsity_down_to_it():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    y = x[:, :3] - 2 * x[:, 3:]
    wrapped = rls.wrap(network(), sparsity=0.5, method="uniform", train_masks=True)
    masks = rls.MaskTraining(every=1, gradual=True)
    wrapped.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[masks])
    assert sparsity_of(rls.strip(wrapped)) == pytest.approx(0.5, abs=1e-9)
    assert masks.frozen


def test_frozen_layers_stay_dense_and_others_make_up_for_them():
    model = network()
    model.get_layer("first").trainable = False
    small = rls.strip(rls.wrap(model, sparsity=0.5))
    assert np.all(small.get_layer("first").kernel.numpy() != 0)
    assert sparsity_of(small) == pytest.approx(0.5, abs=0.005)


def test_a_model_of_keras_3_is_taken():
    import keras as keras_3

    layers = [keras_3.layers.Input((6,)), keras_3.layers.Dense(8), keras_3.layers.Dense(3)]
    model = keras_3.Sequential(layers)
    small = rls.strip(rls.wrap(model, sparsity=0.5, method="global_magnitude"))
    assert isinstance(small, keras_3.Model)
    zeros = sum(int((np.asarray(layer.kernel) == 0).sum()) for layer in small.layers)
    assert zeros == 36
