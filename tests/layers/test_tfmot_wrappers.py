"""Models that come from the TensorFlow Model Optimization toolkit."""

import logging

import numpy as np
import pytest
import tf_keras as keras
from toolkit import tfmot

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.wrapping import plan_of

pruning, layers = tfmot.sparsity.keras, keras.layers
ROWS = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
NOTICE = "The pruning wrappers of TFMOT are taken off"


def prune(model_or_layer):
    schedule = pruning.ConstantSparsity(0.5, 0, frequency=1)
    return pruning.prune_low_magnitude(model_or_layer, pruning_schedule=schedule)


def trained(model, x=ROWS):
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    y = np.ones((len(x), *model.output_shape[1:]), np.float32)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[pruning.UpdatePruningStep()])
    return model


def plain():
    return keras.Sequential(
        [
            layers.Input((6,)),
            layers.Dense(8, activation="relu", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="last"),
        ]
    )


def single_layers():
    inputs = keras.Input((6,))
    x = prune(layers.Dense(8, activation="relu", name="first"))(inputs)
    x = layers.Add()([x, layers.Dense(8, name="middle")(x)])
    return keras.Model(inputs, prune(layers.Dense(3, name="last"))(x))


def nested():
    block = keras.Sequential([layers.Input((6,)), layers.Dense(6, name="inner")], name="block")
    inputs = keras.Input((6,))
    return prune(keras.Model(inputs, layers.Dense(3, name="last")(block(inputs))))


MODELS = {
    "whole": (lambda: prune(plain()), ["first/kernel", "last/kernel"]),
    "single layers": (single_layers, ["first/kernel", "middle/kernel", "last/kernel"]),
    "nested": (nested, ["block/inner/kernel", "last/kernel"]),
}


def zeros(model):
    return {kernel.path: int((kernel.value() == 0).sum()) for kernel in find_kernels(model)}


def wrapper_classes(model):
    return {type(layer).__name__ for layer in model.submodules if "Prune" in type(layer).__name__}


# ---------------------------------------------------------------------------- pruned by TFMOT


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_pruned_by_tfmot_are_taken_with_their_zeros(name, caplog):
    make, paths = MODELS[name]
    model = trained(make())
    assert list(zeros(model)) == paths
    before = zeros(model)
    assert before["last/kernel"] > 0
    weights, config = [value.copy() for value in model.get_weights()], model.to_json()
    with caplog.at_level(logging.WARNING, "rl_sparsity_tf"):
        wrapped = rls.wrap(model)
    assert NOTICE in caplog.text
    for copy in (wrapped, rls.strip(wrapped), rls.strip(model)):
        assert zeros(copy) == before
        assert not wrapper_classes(copy)
        np.testing.assert_array_equal(copy(ROWS), pruning.strip_pruning(model)(ROWS))
    assert model.to_json() == config
    for value, old in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, old)


def test_plain_models_give_no_notice(caplog):
    with caplog.at_level(logging.WARNING, "rl_sparsity_tf"):
        rls.wrap(plain())
    assert not caplog.records


@pytest.mark.slow
def test_weights_that_drifted_are_masked():
    model = trained(prune(plain()))
    wrapper = model.layers[0]
    masked = wrapper.pruning_vars[0][1].numpy() == 0
    wrapper.layer.kernel.assign(np.ones((6, 8)))
    value = rls.strip(model).layers[0].kernel.numpy()
    np.testing.assert_array_equal(value == 0, masked)
    assert masked.sum() == 24


@pytest.mark.slow
def test_a_plan_prunes_further_and_trains():
    model = trained(prune(plain()))
    wrapped = rls.wrap(model, rls.CompressionPlan([KernelRule("*", 0.75)]))
    plan = plan_of(wrapped)
    wrapped.fit(ROWS, np.ones((16, 3)), verbose=0)
    stripped = rls.strip(wrapped)
    assert zeros(stripped) == {"first/kernel": 36, "last/kernel": 18}
    assert plan_of(rls.wrap(stripped, plan)) == plan


@pytest.mark.slow
def test_the_compile_state_is_kept():
    model = trained(prune(plain()))
    for copy in (rls.wrap(model), rls.strip(model)):
        assert copy.loss == "mse"
        assert copy.optimizer is not model.optimizer
        assert copy.optimizer.get_config() == model.optimizer.get_config()
        result = copy.evaluate(ROWS, np.ones((16, 3)), verbose=0, return_dict=True)
        np.testing.assert_allclose(
            list(result.values()), model.evaluate(ROWS, np.ones((16, 3)), verbose=0), rtol=1e-6
        )
        assert list(result) == ["loss", "mae"]


def test_frozen_layers_stay_frozen():
    model = prune(plain())
    model.layers[0].trainable = False
    model.compile("adam", "mse")
    for copy in (rls.wrap(model), rls.strip(model)):
        assert [layer.trainable for layer in copy.layers] == [False, True, True]


@pytest.mark.slow
def test_the_method_that_tfmot_adds_does_not_change_the_scales():
    def make():
        return keras.Sequential(
            [
                layers.Input((5,)),
                layers.Embedding(9, 4),
                layers.LSTM(3, return_sequences=True),
                layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]),
            ]
        )

    keras.backend.clear_session()
    expected = [(kernel.path, kernel.spec) for kernel in find_kernels(make())]
    keras.backend.clear_session()
    assert [(kernel.path, kernel.spec) for kernel in find_kernels(prune(make()))] == expected


def test_pruned_layers_of_a_subclassed_model():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = keras.Sequential(
                [layers.Input((6,)), prune(layers.Dense(4, name="inner"))], name="encoder"
            )
            self.last = prune(layers.Dense(3, name="last"))

        def call(self, x, training=False):
            return self.last(self.encoder(x, training=training), training=training)

    model = Mine()
    model.build((None, 6))
    model.last.pruning_vars[0][1].assign(np.eye(4, 3))
    stripped = rls.strip(rls.wrap(model))
    assert type(stripped) is Mine
    assert zeros(stripped) == {"encoder/inner/kernel": 0, "last/kernel": 9}
    assert not wrapper_classes(stripped)


def test_a_search_takes_a_pruned_model():
    model = trained(prune(plain()))
    compressor = rls.Compressor(model, target=rls.Target(sparsity=0.7))
    assert not wrapper_classes(rls.strip(compressor.model))


# ---------------------------------------------------------------------------- its interface


@keras.saving.register_keras_serializable("tests")
class Prunable(layers.Layer, pruning.PrunableLayer):
    """Two tables, of which one may be pruned, and a bias that is offered in vain."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.table = self.add_weight("table", (shape[-1], self.units))
        self.kept = self.add_weight("kept", (shape[-1], self.units))
        self.bias = self.add_weight("bias", (self.units,))
        self.dense = layers.Dense(self.units)
        self.dense.build(shape)

    def call(self, x):
        return x @ self.table + x @ self.kept + self.bias + self.dense(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}

    def get_prunable_weights(self):
        return [self.table, self.bias]


@pytest.mark.parametrize("pruned", [False, True])
def test_prunable_layers_offer_their_weights(pruned):
    model = keras.Sequential([layers.Input((6,)), Prunable(4), layers.Dense(2, name="last")])
    if pruned:
        model = trained(prune(model))
    paths = ["prunable/table", "prunable/dense/kernel", "last/kernel"]
    assert [kernel.path for kernel in find_kernels(model)] == paths
    assert find_kernels(model)[0].spec.layout == "io"
    wrapped = rls.wrap(model, rls.CompressionPlan([KernelRule("prunable/*", 0.5)]))
    stripped = rls.strip(wrapped)
    np.testing.assert_array_equal(wrapped(ROWS), stripped(ROWS))
    assert type(stripped.layers[0]) is Prunable
    assert zeros(stripped)["prunable/table"] == zeros(stripped)["prunable/dense/kernel"] == 12
    assert np.count_nonzero(stripped.layers[0].kept) == 24


# ---------------------------------------------------------------------------- what is refused


def clustered(model):
    start = tfmot.clustering.keras.CentroidInitialization.LINEAR
    return tfmot.clustering.keras.cluster_weights(model, 2, start)


REFUSED = {
    "quantized": (
        lambda model: tfmot.quantization.keras.quantize_model(model),
        "prepared for quantization-aware training.*Give the model as it was before quantize_model",
    ),
    "annotated": (
        lambda model: tfmot.quantization.keras.quantize_annotate_model(model),
        r"QuantizeAnnotate\)\. Give the model as it was before quantize_model",
    ),
    "clustered": (clustered, r"is clustered by TFMOT.*strip_clustering\(model\) first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_wrappers_of_tfmot_are_refused_with_advice(name):
    change, message = REFUSED[name]
    model = change(keras.Sequential([layers.Input((6,)), layers.Dense(4), layers.Dense(2)]))
    model.compile("adam", "mse")
    calls = (
        rls.wrap,
        rls.strip,
        rls.describe_support,
        lambda model: rls.Compressor(model, target=rls.Target(sparsity=0.5)),
    )
    for call in calls:
        with pytest.raises(rls.ModelError, match=message):
            call(model)


def test_models_are_taken_once_the_clusters_are_stripped():
    model = clustered(keras.Sequential([layers.Input((6,)), layers.Dense(4)]))
    stripped = tfmot.clustering.keras.strip_clustering(model)
    assert len(find_kernels(rls.wrap(stripped))) == 1


def test_wrappers_within_layers_are_refused_too():
    annotate = tfmot.quantization.keras.quantize_annotate_layer
    step = layers.TimeDistributed(annotate(layers.Dense(3)))
    model = keras.Sequential([layers.Input((4, 6)), step])
    with pytest.raises(rls.ModelError, match="prepared for quantization-aware training"):
        rls.wrap(model)
