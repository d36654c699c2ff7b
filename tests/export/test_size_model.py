"""The size model against real conversions: raw within 1 %, gzipped within 5 %."""

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.export.size_model import SizeModel, convert_weights
from rl_sparsity_tf.export.stored_weights import FORMATS, make_sparse, store_weights
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelRule
from rl_sparsity_tf.layers.rules import resolve

L = keras.layers
PLANS = 3


def dense():
    return keras.Sequential(
        [L.Input((100,)), L.Dense(120, "relu"), L.Dense(60, "relu"), L.Dense(10)]
    )


def convolutional():
    return keras.Sequential(
        [
            L.Input((12, 12, 1)),
            L.Conv2D(16, 3, padding="same", activation="relu"),
            L.Conv2D(32, 3, activation="relu"),
            L.MaxPooling2D(),
            L.Flatten(),
            L.Dense(64, activation="relu"),
            L.Dense(10),
        ]
    )


def residual():
    x = inputs = keras.Input((16, 16, 3))
    for channels in (16, 32):
        x = L.Conv2D(channels, 3, strides=2, padding="same", use_bias=False)(x)
        x = L.ReLU()(L.BatchNormalization()(x))
        y = L.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = L.ReLU()(L.Add()([x, L.BatchNormalization()(y)]))
    return keras.Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def separable():
    inputs = keras.Input((16, 16, 3))
    x = L.Conv2D(16, 3, strides=2, activation="relu")(inputs)
    for channels in (48, 96, 128):
        x = L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = L.ReLU()(L.BatchNormalization()(x))
        x = L.Conv2D(channels, 1, use_bias=False)(x)
        x = L.ReLU()(L.BatchNormalization()(x))
    return keras.Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def recurrent():
    return keras.Sequential([L.Input((8, 16)), L.GRU(96), L.Dense(64, "relu"), L.Dense(10)])


NETWORKS = {
    network.__name__: network for network in (dense, convolutional, residual, separable, recurrent)
}


def trained_like(network, seed):
    """Weights without the round mantissas of an initialiser, and batch norms that fold."""
    keras.utils.set_random_seed(seed)
    model = NETWORKS[network]()
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        values = [w + rng.normal(0, 0.02, w.shape) for w in layer.get_weights()]
        if isinstance(layer, L.BatchNormalization):
            values = [np.abs(value) + 0.3 for value in values]
        layer.set_weights(values)
    return model


def random_plan(model, rng):
    rules = []
    for kernel in find_kernels(model):
        sparsity = float(rng.choice([0.0, 0.5, 0.8, 0.95]))
        quantize = bool(kernel.spec.exports_int8 and rng.random() < 0.7)
        bits = int(rng.choice([8, 8, 4]))
        group = str(rng.choice(["element", "block4"]))
        rules.append(KernelRule(kernel.path, sparsity, group=group, quantize=quantize, bits=bits))
    return resolve(CompressionPlan(rules), model)


def real_size(model, plan, formats):
    """What the exporter writes for a plan, without verifying it."""
    stripped = rls.strip(rls.wrap(model, plan))
    values = {kernel.path: kernel.value() for kernel in find_kernels(stripped)}
    bits = {path: entry.exported_bits for path, entry in plan.kernels.items()}
    with tempfile.TemporaryDirectory() as folder:
        plain = convert_weights(stripped, Path(folder))
        file = store_weights(plain, values, bits).file
        content = (make_sparse(file, formats) or file).read_bytes()
    return values, bits, len(content), len(gzip.compress(content, 9, mtime=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "formats"),  # both leave dense what is smaller so
    [(name, ("raw", "gzip")[place % 2]) for place, name in enumerate(NETWORKS)],
)
def test_sizes_are_predicted(network, formats):
    seed = 10 * list(NETWORKS).index(network) + FORMATS.index(formats)
    rng = np.random.default_rng(seed)
    model = trained_like(network, seed)
    sizes = SizeModel(model, formats)
    for _ in range(PLANS):
        values, bits, raw, compressed = real_size(model, random_plan(model, rng), formats)
        predicted = sizes.file_size(values, bits)
        assert predicted.raw == pytest.approx(raw, rel=0.01)
        assert predicted.gzip == pytest.approx(compressed, rel=0.05)


@pytest.mark.slow
def test_the_dense_files_are_predicted_to_the_byte():
    model = trained_like("dense", 1)
    sizes = SizeModel(model)
    plan = resolve(CompressionPlan([KernelRule("*", 0.0)]), model)
    values, bits, raw, compressed = real_size(model, plan, "dense")
    predicted = sizes.file_size(values, bits)
    assert (predicted.raw, predicted.gzip) == (raw, pytest.approx(compressed, rel=0.005))
    plan = resolve(CompressionPlan([KernelRule("*", 0.0, quantize=True)]), model)
    values, bits, raw, _ = real_size(model, plan, "dense")
    assert sizes.file_size(values, bits).raw == pytest.approx(raw, abs=32)


def test_equal_kernels_are_paid_for_once():
    shared = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    model = keras.Sequential([L.Input((40,)), L.Dense(40, "relu"), L.Dense(40)])
    model.set_weights([shared, np.zeros(40), shared, np.zeros(40)])
    sizes = SizeModel(model)
    first, second = (kernel.path for kernel in find_kernels(model))
    assert sizes.kernel_size(first, shared).raw == shared.nbytes
    assert sizes.kernel_size(second, shared).raw == 0


def test_wrong_names_are_refused():
    model = trained_like("dense", 0)
    with pytest.raises(rls.ArgumentError, match=r"no kernel 'x/kernel'\. Expected one of \['dense"):
        SizeModel(model).kernel_size("x/kernel", np.zeros((1, 1)))
    with pytest.raises(rls.ArgumentError, match="formats='sparse' is not known"):
        SizeModel(model, "sparse")


@pytest.mark.slow
def test_the_size_of_a_plan_and_of_the_model_that_came_of_it():
    model = trained_like("dense", 2)
    sizes = rls.SizeModel(model)
    rules = CompressionPlan([KernelRule("*", 0.8, quantize=True)])
    values, bits, raw, compressed = real_size(model, resolve(rules, model), "dense")
    predicted = sizes.plan_size(rules)
    assert predicted == sizes.file_size(values, bits)
    assert predicted.raw == pytest.approx(raw, rel=0.01)
    assert predicted.gzip == pytest.approx(compressed, rel=0.05)
    assert sizes.plan_size(rules, rls.strip(rls.wrap(model, rules))) == predicted
    assert sizes.plan_size(rules, model).gzip > 2 * predicted.gzip  # without its zeros


@pytest.mark.slow
def test_without_gzipped_bytes_the_raw_ones_are_the_same(monkeypatch):
    model = convolutional()
    plan = CompressionPlan([KernelRule("*", 0.8, quantize=True)])
    both = SizeModel(model, "raw").plan_size(plan)
    for name in ("gzip_size", "zlib"):
        monkeypatch.setattr(f"rl_sparsity_tf.export.size_model.{name}", None)  # fails if it is used
    raw = SizeModel(model, "raw", compressed=False).plan_size(plan)
    assert raw.raw == both.raw
    assert np.isnan(raw.gzip)
