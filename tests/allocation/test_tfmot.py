"""TFMOT's magnitude pruning as a baseline: its own masks, the target's sparsity, every error."""

import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import TRAIN, rows, trained, untrained
from toolkit import tfmot as tfmot_package

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation import tfmot as tfmot_baseline
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.tfmot import final_sparsity, prune_with_tfmot, tfmot
from rl_sparsity_tf.data.batches import training_data
from rl_sparsity_tf.errors import MissingDependencyError
from rl_sparsity_tf.layers.kernels import find_kernels, sparsity_of

pruning = tfmot_package.sparsity.keras
L = keras.layers
QUICK = {"epochs": 3, "batch_size": 32}


def pruned(plan):
    return {path: entry.operations == rls.Operation.PRUNE for path, entry in plan.kernels.items()}


def several_outputs():
    """Losses and labels by the outputs' names, a nested model, and layers TFMOT leaves alone."""
    inputs = keras.Input((6, 6, 2))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    x = L.BatchNormalization(name="norm")(x)
    x = L.Flatten()(L.DepthwiseConv2D(3, name="depthwise")(x))
    x = keras.Sequential([L.Input((16,)), L.Dense(6, name="inner")], name="block")(x)
    outputs = [L.Dense(3, name="one")(x), L.Dense(1, name="other")(x)]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"one": "mse", "other": "mae"})
    rng = np.random.default_rng(0)
    y = {"one": rng.normal(size=(24, 3)), "other": rng.normal(size=(24, 1))}
    return model, (rng.normal(size=(24, 6, 6, 2)).astype(np.float32), y)


# ---------------------------------------------------------------------------- what it does


@pytest.mark.slow
def test_the_masks_are_those_of_tfmot_by_hand():
    x, y = TRAIN
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)  # 12 steps, in this order
    plan = tfmot(trained(), batches, sparsity=0.7, epochs=70)

    # The guide: 840 steps, so that the masks are updated every 100 and the last time at 800.
    schedule = pruning.PolynomialDecay(0.5, 0.7, begin_step=0, end_step=800)
    model = pruning.prune_low_magnitude(trained(), pruning_schedule=schedule)
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy")
    model.fit(batches, epochs=70, verbose=0, callbacks=[pruning.UpdatePruningStep()])
    zeros = {k.path: k.matrix() == 0 for k in find_kernels(pruning.strip_pruning(model))}
    # 0.7 of 48 is 33.6 and of 24 is 16.8: together 51, and 50.4 are wanted.
    assert [int(zero.sum()) for zero in zeros.values()] == [34, 17]
    assert pruned(plan).keys() == zeros.keys()
    for path, mask in pruned(plan).items():
        np.testing.assert_array_equal(mask, zeros[path])
    # It is not what the dense weights would have said.
    uniform = pruned(rls.baselines.uniform(trained(), sparsity=0.7))
    assert any((mask != uniform[path]).any() for path, mask in pruned(plan).items())


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.2, 0.55, 0.9])
def test_the_plan_has_the_targets_sparsity(sparsity):
    plan = tfmot(trained(), TRAIN, sparsity=sparsity, **QUICK)
    wanted = int(np.ceil(round(sparsity * 72, 6)))
    assert wanted <= plan.count_operations()["prune"] <= wanted + 1
    shares = [entry.sparsity for entry in plan.kernels.values()]
    assert shares == pytest.approx([sparsity, sparsity], abs=0.05)  # every layer alike
    stripped = rls.strip(rls.wrap(trained(), plan))
    assert sparsity_of(stripped) >= sparsity


@pytest.mark.slow
def test_the_same_seed_gives_the_same_training(monkeypatch):
    results = []

    def kept(*arguments, **options):
        results.append(prune_with_tfmot(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(tfmot_baseline, "prune_with_tfmot", kept)
    plans = [tfmot(trained(), TRAIN, sparsity=0.5, seed=seed, **QUICK) for seed in (3, 3, 4)]
    assert plans[0] == plans[1]
    first, second, other = (result.model.get_weights() for result in results)
    for one, same in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, same)
    assert any((one != another).any() for one, another in zip(first, other, strict=True))


@pytest.mark.slow
def test_survivors_are_quantized_for_bytes_or_when_asked():
    model = trained()
    data = rows(32)
    plan = tfmot(model, data, rls.Target(gzip_bytes=1010), **QUICK)
    assert plan.count_operations()["quantize"] > 0
    assert 0.5 < plan.sparsity < 0.95
    smaller = tfmot(model, data, rls.Target(gzip_bytes=990), **QUICK)
    assert smaller.sparsity > plan.sparsity
    four = tfmot(model, data, sparsity=0.5, quantize=True, bits=4, **QUICK)
    assert {entry.bits for entry in four.kernels.values()} == {4}
    assert tfmot(model, data, sparsity=0.5, **QUICK).count_operations()["keep"] == 36


@pytest.mark.slow
def test_other_layers_make_up_for_those_that_tfmot_leaves_alone():
    model, data = several_outputs()
    before = [value.copy() for value in model.get_weights()]
    config = model.to_json()
    plan = tfmot(model, data, sparsity=0.75, epochs=2, batch_size=8)
    shares = {path: entry.sparsity for path, entry in plan.kernels.items()}
    assert shares["depthwise/depthwise_kernel"] == 0
    assert all(share > 0.75 for path, share in shares.items() if "depthwise" not in path)
    assert sparsity_of(rls.strip(rls.wrap(model, plan))) == pytest.approx(0.75, abs=0.01)
    # The caller's model is as it was.
    assert model.to_json() == config
    for value, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)


@pytest.mark.slow
def test_kernels_of_recurrent_layers_are_pruned_as_tfmot_does():
    model = keras.Sequential([L.Input((4, 3)), L.LSTM(4, name="lstm"), L.Dense(2, name="last")])
    model.compile("sgd", "mse")
    data = (np.ones((8, 4, 3), np.float32), np.ones((8, 2), np.float32))
    plan = tfmot(model, data, sparsity=0.5, epochs=4, batch_size=4)
    assert [*plan.kernels] == ["lstm/cell/kernel", "lstm/cell/recurrent_kernel", "last/kernel"]
    assert [e.sparsity for e in plan.kernels.values()] == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_the_trained_model_is_plain_and_compiled_as_the_original():
    model = trained()
    request = PlanRequest.of(model, sparsity=0.6)
    train = training_data(TRAIN, model, batch_size=32)
    result = prune_with_tfmot(request, train, epochs=20)
    assert [type(layer).__name__ for layer in result.model.layers] == ["Dense", "Dense"]
    assert result.pruned == 44
    assert sparsity_of(result.model) == pytest.approx(44 / 72)
    assert result.model.optimizer.get_config() == model.optimizer.get_config()
    assert result.model.evaluate(*rows(60, 1), verbose=0)[1] > 0.6
    # More than the target asks for, as when a file turned out too large.
    assert prune_with_tfmot(request, train, epochs=1, pruned=60).plan.sparsity == 60 / 72


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.floats(0, 1))
def test_the_final_sparsity_is_the_least_that_prunes_enough(sizes, share):
    wanted = int(share * (sum(sizes) - len(sizes)))

    def by_tfmot(sparsity):
        left = [tf.round(tf.cast(size, tf.float32) * (1 - np.float32(sparsity))) for size in sizes]
        return sum(sizes) - sum(max(1, int(one)) for one in left)

    found = final_sparsity(sizes, wanted)
    assert 0 <= found < 1
    assert by_tfmot(found) >= wanted
    assert found == 0 or by_tfmot(max(0.0, found - 1e-5)) <= by_tfmot(found)
    if found > 1e-6 and wanted:
        assert by_tfmot(found - 1e-6) < wanted or by_tfmot(found) == by_tfmot(found - 1e-6)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs=0 cannot be used\. Expected a whole number of at least 1"),
        ({"batch_size": 2.5}, r"batch_size=2\.5 cannot be used"),
        ({"seed": -1}, r"seed=-1 cannot be used\. Expected a whole number of at least 0"),
        ({"quantize": "int8"}, r"quantize='int8' cannot be used"),
        ({"sparsity": None}, r"Expected exactly one of them"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(rls.ArgumentError, match=message):
        tfmot(trained(), TRAIN, **{"sparsity": 0.5, **options})


def test_data_is_needed_and_checked():
    with pytest.raises(rls.DataError, match=r"tfmot was given no data, which it trains on\. Pass"):
        tfmot(trained(), None, sparsity=0.5)
    with pytest.raises(rls.DataError, match=r"train has inputs of shape \(5,\) per row"):
        tfmot(trained(), (TRAIN[0][:, :5], TRAIN[1]), sparsity=0.5)


def test_models_that_tfmot_cannot_prune_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

        def get_config(self):
            return {}

    own = Own()
    own(TRAIN[0])
    own.compile("sgd", "mse")
    data = (TRAIN[0], np.zeros((96, 3), np.float32))
    with pytest.raises(rls.ModelError, match=r"is a Own, and TFMOT prunes Sequential and funct"):
        tfmot(own, data, sparsity=0.5)

    inputs = keras.Input((6,))
    around = keras.Model(inputs, L.Dense(3)(own(inputs)))
    around.compile("sgd", "mse")
    with pytest.raises(rls.ModelError, match=r"TFMOT cannot prune the model .*Subclassed models"):
        tfmot(around, data, sparsity=0.2, **QUICK)

    depthwise = keras.Sequential([L.Input((5, 5, 2)), L.DepthwiseConv2D(3), L.Flatten()])
    depthwise.compile("sgd", "mse")
    shaped = (np.zeros((4, 5, 5, 2)), np.zeros((4, 18)))
    with pytest.raises(rls.ModelError, match=r"TFMOT can prune none of the kernels \['depthwise_"):
        tfmot(depthwise, shaped, sparsity=0.5)

    bare = keras.models.clone_model(untrained())
    with pytest.raises(rls.ModelError, match="not compiled with a loss"):
        tfmot(bare, TRAIN, sparsity=0.5)


@pytest.mark.slow
def test_targets_beyond_the_layers_that_tfmot_prunes_are_refused():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([L.Input((5, 5, 8)), L.DepthwiseConv2D(3), L.Flatten(), L.Dense(1)])
    model.compile("sgd", "mse")
    data = (np.zeros((4, 5, 5, 8)), np.zeros((4, 1)))
    with pytest.raises(rls.TargetError, match=r"^116 weights .* can prune have only 71 to give"):
        tfmot(model, data, sparsity=0.8, **QUICK)
    # A size that only the depthwise layer's zeros can reach.
    with pytest.raises(
        rls.TargetError, match=r"only 71 to give\. Expected a lower sparsity or a l"
    ):
        tfmot(model, data, rls.Target(gzip_bytes=990), **QUICK)
    with pytest.raises(rls.TargetError, match="cannot be reached: with every kernel pruned"):
        tfmot(model, data, rls.Target(gzip_bytes=100), **QUICK)


def test_a_training_that_ends_in_nan_is_said():
    x, y = rows(32)
    model = trained()
    request = PlanRequest.of(model, sparsity=0.5)
    train = training_data((x, y), model, batch_size=8)
    with pytest.raises(rls.ModelError, match="holds NaN or infinite values"):
        prune_with_tfmot(request, train, epochs=2, learning_rate=float("nan"))


def test_without_tfmot_it_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("tensorflow_model_optimization")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(MissingDependencyError, match=r"could not be imported .* pip install tens"):
        tfmot(trained(), TRAIN, sparsity=0.5)
    assert not hasattr(tfmot_baseline, "pruning")  # imported only when it is called
