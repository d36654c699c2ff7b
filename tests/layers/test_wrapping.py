import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from zoo import ZOO, inputs_for, layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import find_kernels, sparsity_of
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.rules import uniform_plan
from rl_sparsity_tf.layers.wrapping import apply_plan, is_wrapped, plan_of, wrappers_of


def random_plan(model, group, seed=0, bits=8):
    rng = np.random.default_rng(seed)
    entries = []
    for kernel in find_kernels(model):
        grouping = kernel.grouping(group)
        operations = rng.choice(4, size=grouping.shape, p=[0.25, 0.4, 0.2, 0.15]).astype(np.uint8)
        operations[0, 0] = rls.Operation.QUANTIZE
        entries.append(
            rls.KernelPlan(kernel.path, kernel.shape, kernel.spec.layout, group, bits, operations)
        )
    return rls.CompressionPlan(entries)


def assert_same_bits(one, other):
    x = inputs_for(one, 32 + 7 + 1)
    for given in (x[:39], x[:33]):  # batches of 32 and 7, and of 32 and 1
        np.testing.assert_array_equal(
            one.predict(given, verbose=0), other.predict(given, verbose=0), err_msg="predict"
        )
    for rows in (1, 7, 32):
        np.testing.assert_array_equal(
            one(x[:rows], training=False).numpy(),
            other(x[:rows], training=False).numpy(),
            err_msg=f"eager, {rows} rows",
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_all_keep_plan_is_bit_equal_to_the_original(name):
    model = ZOO[name]()
    assert_same_bits(model, rls.wrap(model, rls.CompressionPlan()))


def test_without_a_plan_everything_is_kept():
    model = ZOO["dense"]()
    assert_same_bits(model, rls.wrap(model))


def test_operations_set_later_count_eagerly_and_in_a_trace():
    model = ZOO["dense"]()
    x, wrapped = inputs_for(model, 7), rls.wrap(model)
    traced = tf.function(lambda rows: wrapped(rows, training=False))
    np.testing.assert_array_equal(traced(x), wrapped(x, training=False))
    plan = random_plan(model, "element")
    apply_plan(wrapped, plan.kernels)
    found = wrapped(x, training=False)
    np.testing.assert_array_equal(traced(x), found)
    np.testing.assert_array_equal(rls.wrap(model, plan)(x, training=False), found)
    assert not np.array_equal(found, model(x, training=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "group"),
    [*((name, "element") for name in ZOO), ("dense", "block4"), ("separable", "block4")],
)
def test_strip_is_bit_equal_to_the_wrapped_model(name, group):
    model = ZOO[name]()
    wrapped = rls.wrap(model, random_plan(model, group))
    assert_same_bits(wrapped, rls.strip(wrapped))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "residual", "separable"])
def test_the_callers_model_is_not_modified(name):
    model = ZOO[name]()
    weights = [value.copy() for value in model.get_weights()]
    config = model.to_json()
    names = [layer.name for layer in model.layers]
    wrapped = rls.wrap(model, random_plan(model, "element"))
    x = inputs_for(model, 8)
    wrapped.fit(x, np.zeros(8, int), epochs=1, verbose=0)
    rls.strip(wrapped)
    assert model.to_json() == config
    assert [layer.name for layer in model.layers] == names
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not is_wrapped(model)


@pytest.mark.parametrize("name", ZOO)
def test_plan_is_read_back_from_the_wrapped_model(name):
    model = ZOO[name]()
    plan = random_plan(model, "element", bits=4)
    again = plan_of(rls.wrap(model, plan))
    for path, kernel in plan.kernels.items():
        other = again.kernels[path]
        assert other.bits == kernel.bits
        np.testing.assert_array_equal(other.operations == 1, kernel.operations == 1)
    twice = plan_of(rls.wrap(model, again))
    assert twice == again


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_pruned_weights_are_zero_and_stay_zero_in_training(name):
    model = ZOO[name]()
    wrapped = rls.wrap(model, uniform_plan(model, 0.6))
    before = sparsity_of(rls.strip(wrapped))
    assert before >= 0.6
    wrapped.fit(inputs_for(model, 32), np.arange(32) % 4, epochs=2, verbose=0)
    assert sparsity_of(rls.strip(wrapped)) == before


@pytest.mark.slow
def test_stripped_models_load_without_this_package(tmp_path):
    model = ZOO["separable"]()
    stripped = rls.strip(rls.wrap(model, random_plan(model, "block4")))
    x = inputs_for(model, 7)
    np.savez(tmp_path / "x.npz", x=x, y=stripped.predict(x, verbose=0))
    stripped.save(tmp_path / "model.keras")
    stripped.save(tmp_path / "model.h5")
    script = (
        "import sys, numpy as np, tf_keras\n"
        "data = np.load('x.npz')\n"
        "for name in ('model.keras', 'model.h5'):\n"
        "    y = tf_keras.models.load_model(name).predict(data['x'], verbose=0)\n"
        "    np.testing.assert_array_equal(y, data['y'])\n"
        "assert 'rl_sparsity_tf' not in sys.modules\n"
    )
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("train_masks", [False, True])
def test_wrapped_models_can_be_saved_and_loaded(tmp_path, suffix, train_masks):
    model = ZOO["residual"]()
    wrapped = rls.wrap(model, random_plan(model, "block4"), train_masks=train_masks)
    wrapped.save(tmp_path / f"wrapped.{suffix}")
    loaded = keras.models.load_model(tmp_path / f"wrapped.{suffix}")
    assert_same_bits(wrapped, loaded)
    assert plan_of(loaded) == plan_of(wrapped)


def test_wrapper_config_holds_every_constructor_argument():
    import inspect

    wrapper = rls.CompressionWrapper(
        layers.Dense(3), group="block4", mask="hard_concrete", train_masks=True
    )
    names = set(inspect.signature(rls.CompressionWrapper.__init__).parameters) - {"self", "kwargs"}
    config = wrapper.get_config()
    assert names <= set(config)
    again = rls.CompressionWrapper.from_config(config)
    assert again.get_config() == config


def test_wrapped_model_is_compiled_like_the_original():
    model = ZOO["dense"]()
    model.compile(
        keras.optimizers.SGD(0.03, momentum=0.5),
        keras.losses.SparseCategoricalCrossentropy(),
        metrics=[keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
    )
    wrapped = rls.wrap(model)
    assert wrapped.optimizer is not model.optimizer
    assert wrapped.optimizer.get_config() == model.optimizer.get_config()
    x, y = inputs_for(model, 16), np.arange(16) % 5
    assert wrapped.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    assert wrapped.metrics_names == ["loss", "top2"]


def test_frozen_layers_stay_frozen():
    model = ZOO["residual"]()
    model.layers[1].trainable = False
    model.layers[2].trainable = False
    model.compile("adam", "sparse_categorical_crossentropy")
    stripped = rls.strip(rls.wrap(model))
    assert [layer.trainable for layer in stripped.layers] == [
        layer.trainable for layer in model.layers
    ]


def test_shared_layers_are_wrapped_once():
    model = ZOO["nested"]()
    assert len(wrappers_of(rls.wrap(model))) == 4
    paths = [kernel.path for kernel in find_kernels(model)]
    assert len(set(paths)) == len(paths) == 4
    assert "block/shared_name/kernel" in paths


def test_custom_layers_through_register_layer():
    @keras.saving.register_keras_serializable("tests")
    class Scale(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight("table", (shape[-1], 6))

        def call(self, x):
            return x @ self.table

    model = keras.Sequential([layers.Input((5,)), Scale(), layers.Dense(2)])
    before = len(find_kernels(model))
    rls.register_layer(Scale, table="io")
    assert len(find_kernels(model)) == before + 1
    wrapped = rls.wrap(model, rls.CompressionPlan([KernelRule("scale/table", 0.5)]))
    assert (rls.strip(wrapped).layers[0].table.numpy() == 0).sum() == 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rls.wrap("model"), "Expected a tf_keras model"),
        (lambda: rls.wrap(keras.Sequential([layers.Dense(3)])), "is not built"),
        (lambda: rls.wrap(ZOO["dense"](), group="blok4"), "Did you mean 'block4'"),
        (lambda: rls.wrap(ZOO["dense"](), mask="ste"), "mask='ste' is not known"),
        (lambda: rls.wrap(ZOO["dense"](), plan={}), "plan is a dict"),
        (lambda: rls.wrap(rls.wrap(ZOO["dense"]())), "wrapped already"),
        (lambda: rls.register_layer("Dense", kernel="io"), "Expected a subclass"),
        (lambda: rls.register_layer(layers.Dense), "names no kernel"),
        (lambda: rls.register_layer(layers.Dense, kernel="xy"), "layout='xy'"),
        (lambda: rls.CompressionWrapper(layers.ReLU()), "has no compressible kernel"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(rls.RLSparsityError, match=message):
        call()


def test_subclassed_models_that_were_never_called_are_refused_by_name():
    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(rls.ModelError, match=r"Model 'mine' is not built.*Call it once on data"):
        rls.wrap(Mine())
