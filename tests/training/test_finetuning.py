"""Fine-tuning: what a teacher adds, and layers that train as the integers they become."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.metrics import Evaluator, Metric, Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.layers.kernels import find_kernels, walk
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan, KernelRule
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.layers.wrapping import wrappers_of
from rl_sparsity_tf.search.finishing import Figures, finish
from rl_sparsity_tf.training.distillation import distilled
from rl_sparsity_tf.training.mask_training import (
    FineTuning,
    FreshStatistics,
    _BestEpoch,
    clear_pruned,
    finetune,
)

layers, losses = keras.layers, keras.losses
LOSS = Metric("loss", False)
HALF = CompressionPlan([KernelRule("*", 0.5)])


def network(loss, units=4, activation=None, seed=0, regularizer=None, **compile_arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            layers.Input((6,)),
            layers.Dense(8, activation="relu", kernel_regularizer=regularizer),
            layers.Dense(units, activation=activation),
        ]
    )
    model.compile("sgd", loss, **compile_arguments)
    return model


def rows(count=16, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)


def loss_of_one_step(student, teacher, share, x, y, weights=None):
    """The loss whose gradient a step follows: by a step of SGD at rate 1 on every bias."""
    before = student.get_weights()
    columns = (x, y) if weights is None else (x, y, weights)
    data = tf.data.Dataset.from_tensors(columns)
    with distilled(student, teacher, share, [(tf.constant(x), None, None)]):
        student.optimizer.learning_rate = 1.0
        student.fit(data, verbose=0)
    after = student.get_weights()
    student.set_weights(before)
    return [old - new for old, new in zip(before, after, strict=True)]


def gradients(student, function):
    with tf.GradientTape() as tape:
        loss = function()
    found = tape.gradient(loss, student.trainable_variables)
    return [np.asarray(tf.convert_to_tensor(each)) for each in found]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


IDS = np.arange(16) % 4
ONE_HOT = np.eye(4, dtype=np.float32)[IDS]
SHARES = np.random.default_rng(5).uniform(size=(16, 4)).astype(np.float32)
REAL = np.random.default_rng(6).normal(size=(16, 4)).astype(np.float32)


def crossentropy(t, s):
    return -tf.reduce_mean(tf.reduce_sum(t * tf.math.log(s), -1))


def binary(t, s):
    return -tf.reduce_mean(t * tf.math.log(s) + (1 - t) * tf.math.log(1 - s))


def own_error(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 3, -1)


# loss, activation, labels, the distance computed by hand from the teacher's and model's outputs
DISTANCES = {
    "sparse, logits": (
        losses.SparseCategoricalCrossentropy(from_logits=True),
        None,
        IDS,
        lambda t, s: crossentropy(softmax(t), tf.nn.softmax(s)),
    ),
    "sparse by name": ("sparse_categorical_crossentropy", "softmax", IDS, crossentropy),
    "categorical, logits": (
        losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        None,
        ONE_HOT,
        lambda t, s: crossentropy(softmax(t), tf.nn.softmax(s)),
    ),
    "categorical": (losses.CategoricalCrossentropy(), "softmax", ONE_HOT, crossentropy),
    "binary, logits": (
        losses.BinaryCrossentropy(from_logits=True),
        None,
        SHARES,
        lambda t, s: binary(sigmoid(t), tf.sigmoid(s)),
    ),
    "binary by name": ("binary_crossentropy", "sigmoid", SHARES, binary),
    "mse": ("mse", None, REAL, lambda t, s: tf.reduce_mean((t - s) ** 2)),
    "mae": (losses.MeanAbsoluteError(), None, REAL, lambda t, s: tf.reduce_mean(tf.abs(t - s))),
    "summed": (
        losses.MeanSquaredError(reduction="sum"),
        None,
        REAL,
        lambda t, s: tf.reduce_sum(tf.reduce_mean((t - s) ** 2, -1)),
    ),
    "own": (own_error, None, REAL, lambda t, s: tf.reduce_mean((t - s) ** 2) / t.var(0).mean()),
    "hinge": ("hinge", None, REAL, lambda t, s: tf.reduce_mean((t - s) ** 2) / t.var(0).mean()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DISTANCES)
def test_the_loss_is_shared_between_labels_and_teacher(case):
    loss, activation, y, by_hand = DISTANCES[case]
    student = network(loss, activation=activation, regularizer=keras.regularizers.L2(0.1))
    teacher = network(loss, activation=activation, seed=1)
    x = rows()
    outputs = teacher.predict(x, verbose=0).astype(np.float64).astype(np.float32)

    def expected():
        own = student(x, training=True)
        return 0.7 * student.compute_loss(x, tf.constant(y), own, None) + 0.3 * by_hand(
            outputs, own
        )

    wanted = gradients(student, expected)
    found = loss_of_one_step(student, teacher, 0.3, x, y)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def two_outputs(seed, as_dict=False, **compile_arguments):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="relu")(inputs)
    kind = layers.Dense(4, activation="softmax", name="kind")(x)
    size = layers.Dense(1, name="size")(x)
    model = keras.Model(inputs, {"size": size, "kind": kind} if as_dict else [kind, size])
    model.compile("sgd", **compile_arguments)
    return model


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_several_outputs_with_loss_weights_and_sample_weights(as_dict, weighted):
    settings = {
        "loss": {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        "loss_weights": {"kind": 2.0, "size": 0.5},
    }
    student = two_outputs(0, as_dict, **settings)
    teacher = two_outputs(1, as_dict, **settings)
    x, y = rows(), {"kind": IDS, "size": REAL[:, :1]}
    tensors = {name: tf.constant(labels) for name, labels in y.items()}
    weights, w = None, tf.ones(16)
    if weighted:
        w = tf.linspace(0.0, 2.0, 16)
        weights = {"kind": w, "size": w}
    wanted = teacher(x)
    kind, size = (wanted["kind"], wanted["size"]) if as_dict else wanted

    def expected():
        own = student(x, training=True)
        k, s = (own["kind"], own["size"]) if as_dict else own
        far = 2.0 * tf.reduce_mean(-w * tf.reduce_sum(kind * tf.math.log(k), -1))
        far += 0.5 * tf.reduce_mean(w * (size - s)[:, 0] ** 2)
        return 0.4 * student.compute_loss(x, tensors, own, weights) + 0.6 * far

    by_hand = gradients(student, expected)
    found = loss_of_one_step(student, teacher, 0.6, x, y, weights)
    for one, other in zip(found, by_hand, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def test_an_output_without_a_loss_is_left_out():
    settings = {"loss": {"kind": "sparse_categorical_crossentropy"}}
    student, teacher = two_outputs(0, **settings), two_outputs(1, **settings)
    moved = loss_of_one_step(student, teacher, 1.0, rows(), {"kind": IDS})
    names = [variable.name for variable in student.weights]
    for name, step in zip(names, moved, strict=True):
        assert (np.abs(step).max() > 0) == (not name.startswith("size")), name


def test_masked_steps_and_ignored_labels_are_left_out():
    def build(seed):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential(
            [layers.Input((5, 2)), layers.Masking(), layers.Dense(3, name="out")]
        )
        loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
        model.compile("sgd", loss)
        return model

    student, teacher = build(0), build(1)
    x = np.random.default_rng(2).normal(size=(4, 5, 2)).astype(np.float32)
    y = np.zeros((4, 5), np.int64)
    x[:, 3:], y[:, 2] = 0.0, -1
    weights = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    found = loss_of_one_step(student, teacher, 1.0, x, y, weights)
    # The same from the steps that count, alone: rows 0, 2 and 3, steps 0 and 1. As Keras does in
    # its own losses, the sum is divided by the 4 x 3 steps that are not masked.
    rest = x[[0, 2, 3], :2].reshape(-1, 2)
    target = tf.nn.softmax(teacher.layers[-1](rest))

    def expected():
        own = tf.nn.log_softmax(student.layers[-1](rest))
        return -tf.reduce_sum(target * own) / 12

    for one, other in zip(found, gradients(student, expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_student_follows_its_teacher_where_the_labels_say_nothing():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    teacher, x = network(loss, seed=1), rows(64)
    y = np.random.default_rng(3).integers(0, 4, 64)
    taught = teacher.predict(x, verbose=0).argmax(-1)
    agreement = {}
    for share in (0.0, 0.9):
        student = network(loss, seed=2)
        data = training_data((x, y), student, batch_size=16)
        validation = evaluation_data((x, taught), student, "validation_data")
        wrapped = rls.wrap(student, HALF, train_masks=True)
        finetune(
            wrapped,
            data,
            validation,
            LOSS,
            epochs=25,
            learning_rate=0.02,
            teacher=teacher,
            distillation=share,
        )
        agreement[share] = (wrapped.predict(x, verbose=0).argmax(-1) == taught).mean()
    assert agreement[0.9] > 0.85
    assert agreement[0.0] < 0.7


class Traces(keras.callbacks.Callback):
    def on_train_end(self, logs=None):
        self.count = self.model.train_function.experimental_get_tracing_count()
        self.steps = int(self.model.optimizer.iterations)


def recurrent(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            layers.Input((3, 6), batch_size=8),
            layers.LSTM(4, stateful=True),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def everything(model):
    states = [s.numpy() for s in model.layers[0].states] if model.layers[0].name == "lstm" else []
    return [weight.numpy() for weight in model.weights] + states


def images(seed=0):
    return network("mse", seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "shape", "batch"), [(recurrent, (3, 6), 8), (images, (6,), 9)])
def test_the_teacher_is_not_changed_and_the_step_is_traced_no_more(build, shape, batch):
    teacher = build()
    x = np.random.default_rng(0).normal(size=(24, *shape)).astype(np.float32)
    y = np.zeros(24, np.int64) if build is recurrent else np.zeros((24, 4), np.float32)
    if build is recurrent:
        teacher(x[:8])  # its state is no longer zero
    data = training_data((x, y), teacher, batch_size=batch)
    validation = evaluation_data((x, y), teacher, "validation_data", batch_size=8)
    before, flags = everything(teacher), [layer.trainable for _, layer in walk(teacher)]
    traces = {}
    for share in (0.0, 0.5):
        wrapped = rls.wrap(teacher, HALF, train_masks=True)
        note = traces[share] = Traces()
        finetune(
            wrapped,
            data,
            validation,
            LOSS,
            epochs=2,
            callbacks=[note],
            teacher=teacher,
            distillation=share,
        )
        assert note.steps == 6  # batches of 9, 9 and 6 rows, or of 8
    # Keras itself traces twice: once to make the optimizer's variables.
    assert traces[0.5].count == traces[0.0].count <= 2
    for one, other in zip(before, everything(teacher), strict=True):
        np.testing.assert_array_equal(one, other)
    assert flags == [layer.trainable for _, layer in walk(teacher)]
    assert not {id(w) for w in wrapped.weights} & {id(w) for w in teacher.weights}


def test_nothing_is_left_on_the_student_even_after_an_error():
    student, teacher = network("mse"), network("mse", seed=1)
    batches = [(tf.constant(rows()), None, None)]
    own = student.train_step

    def fail():
        with distilled(student, teacher, 0.5, batches):
            assert student.train_step != own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert student.train_step == own
    assert "train_step" not in vars(student)


@keras.saving.register_keras_serializable("tests")
class OwnStep(keras.Model):
    calls = 0

    def train_step(self, data):
        OwnStep.calls += 1
        return super().train_step(data)


def test_a_model_with_its_own_train_step_keeps_it(caplog):
    inputs = keras.Input((6,))
    student = OwnStep(inputs, layers.Dense(4)(inputs))
    student.compile("sgd", "mse")
    OwnStep.calls = 0
    x = rows()
    with caplog.at_level(logging.INFO, "rl_sparsity_tf"):
        moved = loss_of_one_step(student, network("mse", seed=1), 0.5, x, REAL)
    assert "OwnStep has a train_step of its own, which is kept" in caplog.text
    assert OwnStep.calls
    wanted = gradients(
        student, lambda: student.compute_loss(x, tf.constant(REAL), student(x), None)
    )
    np.testing.assert_allclose(moved[0], wanted[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half", float("nan"), None])
def test_wrong_shares(share):
    message = r"distillation=.* cannot be used\. Expected a share from 0 to 1\."
    with (
        pytest.raises(rls.ArgumentError, match=message),
        distilled(network("mse"), None, share, []),
    ):
        pass


def test_wrong_teachers():
    batches = [(tf.constant(rows()), None, None)]
    message = r"teacher is a str\. Expected a tf_keras model, for example the one that was wrapped"
    with pytest.raises(rls.ArgumentError, match=message):
        distilled(network("mse"), "dense", 0.5, batches).__enter__()
    message = r"The teacher's outputs are \(3,\) per row, the model's \(4,\)\. Expected a teacher "
    with pytest.raises(rls.ArgumentError, match=message):
        distilled(network("mse"), network("mse", 3), 0.5, batches).__enter__()


# ---------------------------------------------------------------------------- integer layers


def test_a_layer_that_becomes_integers_trains_as_integers():
    model = network("mse")
    plan = CompressionPlan([KernelRule("*", 0.5, quantize=True, bits=4)])
    wrapped = rls.wrap(model, plan, train_masks=True)
    for wrapper in wrappers_of(wrapped):
        trained = wrapper.effective_kernel("kernel", training=True).numpy()
        np.testing.assert_array_equal(trained, wrapper.effective_kernel("kernel").numpy())
        scale = np.abs(trained).max(0) / 7
        integers = trained / np.where(scale > 0, scale, 1)
        np.testing.assert_allclose(integers, np.round(integers), atol=1e-4)
        latent = wrapper.layer.kernel.numpy()
        assert (latent[trained != 0] != trained[trained != 0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_stripped_model_has_the_trained_loss_to_the_bit(bits):
    model, x = network("mse"), rows(64)
    y = np.random.default_rng(3).normal(size=(64, 4)).astype(np.float32)
    wrapped = rls.wrap(
        model, CompressionPlan([KernelRule("*", 0.5, quantize=True, bits=bits)]), train_masks=True
    )
    data = training_data((x, y), model, batch_size=16)
    validation = evaluation_data((x, y), model, "validation_data")
    score = finetune(wrapped, data, validation, LOSS, epochs=5, teacher=model)
    stripped = rls.strip(wrapped)
    assert stripped.evaluate(x, y, batch_size=1024, verbose=0) == score.loss


@pytest.mark.slow
def test_training_on_the_grid_beats_rounding_afterwards_at_4_bits():
    x = rows(256)
    y = network("mse", seed=4).predict(x, verbose=0)
    found = {}
    for quantize in (True, False):
        model = network("mse", seed=4)
        plan = CompressionPlan([KernelRule("*", 0.0, quantize=quantize, bits=4)])
        wrapped = rls.wrap(model, plan)
        data = training_data((x, y), model, batch_size=64)
        validation = evaluation_data((x, y), model, "validation_data")
        finetune(wrapped, data, validation, LOSS, epochs=30, learning_rate=0.005)
        stripped = rls.strip(wrapped)
        if not quantize:
            after = CompressionPlan([KernelRule("*", 0.0, quantize=True, bits=4)])
            stripped = rls.strip(rls.wrap(stripped, after))
        found[quantize] = stripped.evaluate(x, y, verbose=0)
    assert found[True] < 0.8 * found[False]


@pytest.mark.slow
def test_what_was_there_before_a_training_that_diverges_is_kept(caplog):
    model, x = network("mse", metrics=["mae"]), rows(64)
    y = model.predict(x, verbose=0)
    data = training_data((x, y), model, batch_size=16)
    validation = evaluation_data((x, y), model, "validation_data")
    for rate, last in ((50.0, r"\d"), (1e38, "nan|inf")):
        wrapped = rls.wrap(model, HALF, train_masks=True)
        before, found = wrapped.get_weights(), [] if rate == 50.0 else None
        arguments = (wrapped, data, validation, Metric("mae", False))
        score = finetune(*arguments, epochs=2, learning_rate=rate, warnings=found)
        assert score == finetune(*arguments, epochs=0)
        said = [record.getMessage() for record in caplog.records] if found is None else found
        assert len(said) == 1
        assert re.search(rf"worse on the validation data \(loss .* -> ({last})", said[0])
        for one, other in zip(wrapped.get_weights(), before, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_training_that_fails_is_tried_again_more_slowly():
    model, x = network("mse", metrics=["mae"]), rows(64)
    y = model.predict(x, verbose=0)
    wrapped = rls.wrap(model, HALF, train_masks=True)
    validation = evaluation_data((x, y), model, "validation_data")
    arguments = (wrapped, training_data((x, y), model, batch_size=16), validation)
    before = finetune(*arguments, Metric("mae", False), epochs=0)
    rates, found = [], []

    class Rates(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))
            frozen = [v for v in self.model.weights if "mask_frozen" in v.name]
            assert frozen
            assert not any(float(v) for v in frozen)

    options = {"learning_rate": 0.5, "callbacks": [Rates()], "warnings": found}
    score = finetune(*arguments, Metric("mae", False), epochs=4, **options)
    np.testing.assert_allclose(rates, [0.5, 0.05])
    assert score.metric < before.metric
    assert found == []


NAN = float("nan")
ALIKE = (0.89, 0.91)


@pytest.mark.parametrize(
    ("name", "after", "worse"),
    [
        ("accuracy", (0.89, 1.0), False),  # within 0.03, the standard error of 100 rows
        ("accuracy", (0.89, 3.0), True),
        ("accuracy", (0.91, 3.0), True),
        ("accuracy", (0.86, 1.0), True),
        ("accuracy", (0.94, 3.0), False),
        ("accuracy", (0.94, NAN), True),
        ("auc", (0.89, 1.0), True),
        ("auc", (0.91, 3.0), False),
    ],
)
def test_a_training_is_worse_beyond_the_standard_error(name, after, worse):
    evaluator = SimpleNamespace(metric=Metric(name, True), model=None)
    rows = [((np.zeros((60, 1)),), None), ((np.zeros((40, 1)),), None)]
    keeper = _BestEpoch(evaluator, rows, None, None)
    assert keeper._worse(Score(*after), Score(0.9, 2.0)) == worse
    assert keeper._alike(Score(*after), Score(0.9, 2.0)) == (
        name == "accuracy" and after[0] in ALIKE
    )
    assert not keeper._worse(Score(*after), Score(NAN, NAN))


@pytest.mark.parametrize("group", ["element", "block4"])
def test_what_is_pruned_is_cleared_and_the_network_stays(group):
    model, x = network("mse", units=6), rows(16)
    rng = np.random.default_rng(0)
    kernel = find_kernels(model)[0]
    choice = rng.integers(0, 4, kernel.grouping(group).shape).astype(np.uint8)
    entry = KernelPlan(kernel.path, kernel.shape, kernel.spec.layout, group, 8, choice)
    wrapped = rls.wrap(model, CompressionPlan([entry]), train_masks=True)
    before, (wrapper,) = wrapped(x).numpy(), wrappers_of(wrapped)
    assert np.count_nonzero(wrapper.variable("kernel")) == kernel.size
    clear_pruned(wrapped)
    np.testing.assert_array_equal(wrapped(x), before)
    live = kernel.grouping(group).expand_numpy(choice != Operation.PRUNE)
    assert np.count_nonzero(wrapper.variable("kernel")) == np.count_nonzero(live)
    fixed = rls.wrap(model, CompressionPlan([entry]))
    clear_pruned(fixed)
    assert np.count_nonzero(wrappers_of(fixed)[0].variable("kernel")) == kernel.size


def test_batch_norm_statistics_are_those_of_the_rows():
    model = keras.Sequential(
        [layers.Input((5,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(2)]
    )
    frozen = layers.BatchNormalization(trainable=False)
    model = keras.Sequential([*model.layers, layers.Dropout(0.5), frozen])
    model.build((None, 5))
    x = np.random.default_rng(0).normal(2.0, 3.0, (64, 5)).astype(np.float32)
    batches = [(x[start : start + 16], None) for start in range(0, 64, 16)]
    before = model.get_weights()
    FreshStatistics(model, batches).renew()
    norm, seen = model.layers[1], model.layers[0](x).numpy()
    np.testing.assert_allclose(norm.moving_mean, seen.mean(0), rtol=1e-4)
    inside = np.mean([seen[start : start + 16].var(0) for start in range(0, 64, 16)], axis=0)
    np.testing.assert_allclose(norm.moving_variance, inside, rtol=1e-4)
    assert norm.momentum == layers.BatchNormalization().momentum
    changed = {id(norm.moving_mean), id(norm.moving_variance)}
    for variable, value in zip(model.weights, before, strict=True):
        if id(variable) not in changed:
            np.testing.assert_array_equal(variable, value)


@pytest.mark.slow
def test_no_better_statistics_are_left_out_after_a_short_training():
    stack = [layers.Input((5,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(stack)
    x = np.random.default_rng(0).normal(4.0, 3.0, (64, 5)).astype(np.float32)
    y = x.sum(1, keepdims=True)
    model.compile("sgd", "mse")
    validation = evaluation_data((x, y), model, "validation_data")
    wrapped = rls.wrap(model, HALF, train_masks=True)
    data = training_data((x, y), model, batch_size=16)
    score = finetune(wrapped, data, validation, LOSS, epochs=20)
    evaluator = Evaluator(wrapped, LOSS)
    assert evaluator(validation) == score
    FreshStatistics(wrapped, data.pool).renew()
    assert evaluator(validation).loss > score.loss - 1e-5


# ---------------------------------------------------------------------------- finish


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["straight_through", "hard_concrete"])
def test_finish_with_either_mask_holds_the_plan_and_learns_from_the_model(mask, monkeypatch):
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model, x = network(loss, metrics=["accuracy"]), rows(96)
    y = model.predict(x, verbose=0).argmax(-1)
    plan = resolve(CompressionPlan([KernelRule("*", 0.6, quantize=True)]), model)
    weights = {path: layer.get_weights() for path, layer in walk(model)}
    outcome = Outcome(**dict.fromkeys(Outcome.__dataclass_fields__, 0.0))
    candidate = Candidate(plan, weights, outcome, 0.0, 0, "hand")
    validation = evaluation_data((x, y), model, "validation_data")
    figures = Figures(
        train=training_data((x, y), model, batch_size=16),
        validation=validation,
        test=None,
        metric=Metric("accuracy", True),
    )
    seen = []
    import rl_sparsity_tf.training.mask_training as module

    def note(student, teacher, share, batches):
        masks = {wrapper.mask for wrapper in wrappers_of(student)}
        seen.append((masks, teacher, share))
        return distilled(student, teacher, share, batches)

    monkeypatch.setattr(module, "distilled", note)
    finished = finish(
        model,
        candidate,
        figures,
        training=FineTuning(epochs=4, mask=mask, distillation=0.25),
        quantization="plan",
    )
    assert seen
    assert all(one == ({mask}, model, 0.25) for one in seen)
    for path, entry in finished.plan.kernels.items():
        assert (entry.operations == rls.Operation.PRUNE).sum() == (
            plan.kernels[path].operations == rls.Operation.PRUNE
        ).sum()
