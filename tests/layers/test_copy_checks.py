"""Copies that would be other models: carried over as they are, or refused with a reason."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tiny_search import compressor, quick_search, search
from zoo import layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.copy_checks import check_copy, check_figures

LOSS = "sparse_categorical_crossentropy"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 40)
BATCH = (tf.constant(X), tf.constant(Y), None)


def classifier(optimizer="sgd", loss=LOSS, **options):
    model = keras.Sequential(
        [layers.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3, "softmax")]
    )
    model.compile(optimizer, loss, **options)
    return model


def assert_evaluate_alike(model, x=X, y=Y, calls=(rls.wrap, rls.strip, rls.shrink)):
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    for call in calls:
        found = call(model).evaluate(x, y, verbose=0, return_dict=True)
        assert found == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------- losses of its own


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * tf.reduce_mean(x**2))
        return x


class Encoder(keras.Model):
    """Subclassed, with a loss of its own in `call`."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(8, "relu", kernel_regularizer="l2")
        self.last = layers.Dense(3, "softmax")

    def call(self, x):
        hidden = self.first(x)
        self.add_loss(tf.reduce_mean(hidden))
        return self.last(hidden)


def with_losses(kind):
    inputs = layers.Input((6,))
    dense = layers.Dense(8, "relu", activity_regularizer="l2")
    hidden = AddsLoss()(dense(inputs))
    model = keras.Model(inputs, layers.Dense(3, "softmax")(hidden))
    model.add_loss(tf.reduce_mean(hidden**2))
    if kind == "function":
        model.add_loss(lambda: tf.reduce_sum(dense.kernel**2))
    if kind == "layer function":
        dense.add_loss(lambda: tf.reduce_sum(dense.kernel**2))
    if kind == "class":
        model = Encoder()
        model(X)
    model.compile(keras.optimizers.Adam(1e-2), LOSS)
    return model


@pytest.mark.parametrize("kind", ["several", "class"])
def test_losses_of_the_models_own_are_those_of_its_copies(kind):
    model = with_losses(kind)
    assert_evaluate_alike(model)
    plain = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(Y, model(X)))
    assert model.evaluate(X, Y, verbose=0) > float(plain) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["several", "class"])
def test_a_file_is_scored_with_the_losses_of_its_model(kind, tmp_path):
    model = with_losses(kind)
    model.compile("sgd", "mse")  # has no accuracy, so that the loss is compared
    data = (X, X[:, :3])
    scores = rls.export_tflite(model, tmp_path / "m.tflite", "none", test_data=data).scores
    assert scores["metric"] == "loss"
    assert scores["keras"] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-5)
    assert scores["tflite"] == pytest.approx(scores["keras"], rel=1e-4)


@pytest.mark.parametrize("kind", ["function", "layer function"])
@pytest.mark.parametrize("call", [rls.wrap, rls.strip])
def test_functions_among_the_losses_are_refused(kind, call):
    message = r"has 4 losses of its own, a copy of it 3\. Functions given to model\.add_loss"
    with pytest.raises(rls.ModelError, match=message):
        call(with_losses(kind))


@pytest.mark.slow
def test_a_search_of_a_model_with_losses_of_its_own_ends_with_scores():
    model = with_losses("several")
    model.compile(keras.optimizers.Adam(1e-2), LOSS, metrics=["accuracy"])
    with quick_search():
        result = search(compressor(model, "random"), episodes=1, test_data=(X, Y))
    assert result.metrics["compressed"]["tflite_accuracy"] is not None


class OwnSteps(keras.Model):
    """Metrics that its own steps update, not those of compile."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "softmax")
        self.mean = keras.metrics.Mean(name="loss")
        self.share = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    def call(self, x):
        return self.dense(x)

    @property
    def metrics(self):
        return [self.mean, self.share]

    def test_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        outputs = self(x, training=False)
        self.mean.update_state(keras.losses.sparse_categorical_crossentropy(y, outputs))
        self.share.update_state(y, outputs)
        return {metric.name: metric.result() for metric in self.metrics}


@pytest.mark.slow
def test_a_file_is_scored_by_the_models_own_test_step(tmp_path):
    model = OwnSteps()
    model(X)
    model.compile("sgd", LOSS)
    labels = np.argmax(model(X), -1)
    scores = rls.export_tflite(model, tmp_path / "m.tflite", "none", test_data=(X, labels)).scores
    assert scores == {"metric": "accuracy", "keras": 1.0, "tflite": 1.0}


@pytest.mark.slow
def test_a_stateful_model_is_scored_in_batches_of_its_own_size(tmp_path):
    model = keras.Sequential(
        [layers.Input((4, 6), batch_size=8), layers.LSTM(3, stateful=True), layers.Dense(3)]
    )
    model.compile("sgd", "mse")
    x = np.repeat(X[:, None], 4, 1)
    model(x[:8])
    states = [state.numpy() for state in model.layers[0].states]
    report = rls.export_tflite(model, tmp_path / "m.tflite", "none", test_data=(x, X[:, :3]))
    assert np.isfinite(report.scores["tflite"])
    for state, before in zip(model.layers[0].states, states, strict=True):
        np.testing.assert_array_equal(state, before)
    for state in rls.strip(model).layers[0].states:
        assert not state.numpy().any()


# ---------------------------------------------------------------------- metrics and losses


class Confident(keras.metrics.Metric):
    """No get_config, though it has an argument."""

    def __init__(self, above=0.5, name="confident", **kwargs):
        super().__init__(name=name, **kwargs)
        self.above = above
        self.found = self.add_weight("found", initializer="zeros")
        self.rows = self.add_weight("rows", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        sure = tf.reduce_max(y_pred, -1) > self.above
        self.found.assign_add(tf.reduce_sum(tf.cast(sure, tf.float32)))
        self.rows.assign_add(tf.cast(len(y_pred), tf.float32))

    def result(self):
        return self.found / self.rows


class Required(Confident):
    def __init__(self, above, **kwargs):
        super().__init__(above, **kwargs)


class Outer(Required):
    """A metric inside a metric."""

    def __init__(self, above):
        super().__init__(above, name="outer")
        self.inner = Required(above)

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.inner.update_state(y_true, y_pred)

    def result(self):
        return self.inner.result()


@pytest.mark.slow
def test_metrics_are_copied_with_what_their_config_forgets():
    metrics = [Confident(0.1), Outer(0.1), keras.metrics.SparseTopKCategoricalAccuracy(2)]
    weighted = [keras.metrics.SparseCategoricalAccuracy(name="weighted")]
    model = classifier(metrics=["accuracy", *metrics], weighted_metrics=weighted)
    assert_evaluate_alike(model)
    before = [metric.result().numpy() for metric in metrics]
    wrapped = rls.wrap(model)
    assert not any(w is m for w in wrapped.compiled_metrics._user_metrics for m in metrics)
    wrapped.fit(X, Y, verbose=0)
    assert [metric.result().numpy() for metric in metrics] == before
    assert before[0] == before[1] == 1.0


@pytest.mark.slow
def test_metrics_of_several_outputs_keep_their_names():
    inputs = layers.Input((6,))
    hidden = layers.Dense(5, "relu")(inputs)
    heads = {"a": layers.Dense(3, "softmax", name="a"), "b": layers.Dense(1, name="b")}
    model = keras.Model(inputs, {name: head(hidden) for name, head in heads.items()})
    model.compile(
        "sgd",
        {"a": LOSS, "b": keras.losses.Huber(0.3)},
        loss_weights={"a": 1.0, "b": 0.2},
        metrics={"a": ["accuracy"], "b": [keras.metrics.MeanAbsoluteError(name="q")]},
        weighted_metrics={"b": "mse"},
    )
    y = {"a": tf.constant(Y), "b": tf.constant(X[:, :1])}
    copied = rls.strip(model)
    check_figures(model, copied, (tf.constant(X), y, None))
    assert model.metrics_names == []
    assert_evaluate_alike(model, y=y)
    assert "b_q" in model.metrics_names
    twice = rls.strip(rls.wrap(model))
    assert list(twice.evaluate(X, y, verbose=0, return_dict=True)) == model.metrics_names


class Locked(keras.metrics.Mean):
    def __init__(self):
        super().__init__(name="locked")
        self.waiting = (number for number in range(3))


def test_a_metric_that_cannot_be_copied_is_named():
    message = r"The metric 'locked' of class Locked cannot be copied \(TypeError.*Expected a metric"
    with pytest.raises(rls.ModelError, match=message):
        rls.wrap(classifier(metrics=[Locked()]))


class Counting(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.calls = tf.Variable(5.0, trainable=False)

    def call(self, y_true, y_pred):
        self.calls.assign_add(1.0)
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


def test_losses_with_variables_have_their_own_in_a_copy():
    loss, plain = Counting(), keras.losses.SparseCategoricalCrossentropy()
    wrapped = rls.wrap(classifier(loss=loss))
    wrapped.evaluate(X, Y, verbose=0)
    assert (float(loss.calls), float(wrapped.loss.calls)) == (5.0, 7.0)
    assert rls.wrap(classifier(loss=plain)).loss is plain


class Methods(Encoder):
    def own(self, y_true, y_pred):
        assert self.mine
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


def test_methods_of_the_model_become_those_of_the_copy():
    model = Methods()
    model(X)
    model.mine = True
    model.compile("sgd", model.own, metrics=[model.own])
    copied = rls.strip(model)
    assert copied.loss.__self__ is copied
    assert copied.compiled_metrics._user_metrics[0].__self__ is copied
    assert model.loss.__self__ is model


# ---------------------------------------------------------------------- optimizers


class Steps(keras.optimizers.schedules.LearningRateSchedule):
    """Not registered, and without a config."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + tf.cast(step, tf.float32))


class Own(keras.optimizers.Optimizer):
    """Forgets its argument in its config."""

    def __init__(self, learning_rate=0.5, power=1.0, name="Own", **kwargs):
        super().__init__(name)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.power = power

    def build(self, variables):
        super().build(variables)
        self._built = True

    def update_step(self, gradient, variable):
        variable.assign_sub(gradient * self.learning_rate * self.power)


class Needy(Own):
    def __init__(self, learning_rate, power):
        super().__init__(learning_rate, power)


@pytest.mark.parametrize("kind", [keras.optimizers.Adam, keras.optimizers.legacy.Adam])
def test_schedules_need_no_config(kind):
    model = classifier(kind(Steps(0.5), epsilon=1e-3))
    model.fit(X, Y, verbose=0)
    optimizer = rls.wrap(model).optimizer
    assert type(optimizer) is kind
    rate = vars(optimizer).get("_learning_rate") or optimizer._hyper["learning_rate"]
    assert (rate.rate, optimizer.epsilon, int(optimizer.iterations)) == (0.5, 1e-3, 0)


def test_optimizers_are_copied_with_what_their_config_forgets():
    optimizer = rls.wrap(classifier(Own(0.25, 3.0))).optimizer
    assert (float(optimizer.learning_rate), optimizer.power) == (0.25, 3.0)
    fixed = keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), dynamic=False, initial_scale=8
    )
    assert rls.wrap(classifier(fixed)).optimizer.get_config() == fixed.get_config()
    older = keras.optimizers.legacy.SGD(lambda: 0.3)
    assert rls.wrap(classifier(older)).optimizer._hyper["learning_rate"]() == 0.3


def test_an_optimizer_that_cannot_be_made_anew_is_named():
    message = r"The optimizer of model 'sequential', of class Needy, cannot be made anew \(TypeErr"
    with pytest.raises(rls.ModelError, match=message):
        rls.wrap(classifier(Needy(0.1, 2.0)))


@pytest.mark.parametrize("by", ["names", "variables"])
def test_what_is_excluded_from_weight_decay_is_so_in_copies(by):
    model = classifier()
    optimizer = keras.optimizers.AdamW(weight_decay=0.5)
    if by == "names":
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    else:
        optimizer.exclude_from_weight_decay(var_list=[model.layers[0].bias, model.layers[1].bias])
    model.compile(optimizer, LOSS)
    model.fit(X, Y, verbose=0)
    for copied in (wrapped := rls.wrap(model), rls.strip(model), rls.strip(wrapped)):
        decayed = [copied.optimizer._use_weight_decay(one) for one in copied.trainable_weights]
        assert decayed == [True, False, True, False]


def test_what_compile_was_told_otherwise_is_kept():
    wrapped = rls.wrap(classifier(steps_per_execution=3, jit_compile=True))
    assert (int(wrapped._steps_per_execution), wrapped._jit_compile) == (3, True)
    assert rls.wrap(classifier(run_eagerly=True)).run_eagerly


# ---------------------------------------------------------------------- what is frozen


def nested():
    """A frozen base whose layers were thawed by themselves, and a nested model in a nested one."""
    inputs = layers.Input((6,))
    base = keras.Sequential([layers.Input((6,)), layers.Dense(8), layers.BatchNormalization()])
    base.trainable = False
    base.layers[0].trainable = True
    middle = keras.Model(inputs, layers.Dense(5)(base(inputs)))  # shares the outer one's input
    model = keras.Model(inputs, layers.Dense(3, "softmax")(middle(inputs)))
    model.compile("sgd", LOSS)
    return model


@pytest.mark.parametrize("call", [rls.wrap, rls.strip, rls.shrink])
def test_a_frozen_base_stays_frozen(call):
    model = nested()
    assert len(call(model).trainable_weights) == len(model.trainable_weights) == 4
    model.trainable = False
    copied = call(model)
    assert not copied.trainable_weights
    copied.trainable = True
    assert len(copied.trainable_weights) == 8


def test_a_base_that_shrinks_stays_frozen():
    model = nested()
    kernel, bias = model.layers[1].layers[2].get_weights()
    kernel[:, 2], bias[2] = 0, 0
    model.layers[1].layers[2].set_weights([kernel, bias])
    small = rls.shrink(model)
    assert small.count_params() < model.count_params()
    assert len(small.trainable_weights) == 4


# ---------------------------------------------------------------------- the check


class Forgetful(layers.Layer):
    """Its config forgets how it computes and whether it learns."""

    def __init__(self, factor=1.0, fixed=False, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.fixed = factor, fixed

    def build(self, shape):
        self.scale = self.add_weight("scale", (shape[-1],), trainable=not self.fixed)

    def call(self, x):
        if self.factor < 0:
            raise ValueError("negative")
        return x * self.factor + self.scale

    def get_config(self):
        return super().get_config()


class Raising(Forgetful):
    def __init__(self, factor=-1.0, **kwargs):
        super().__init__(factor, **kwargs)

    def compute_output_shape(self, shape):
        return shape


def forgetful(**options):
    return keras.Sequential([layers.Input((6,)), Forgetful(**options), layers.Dense(3)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 3.0}, r"The outputs of a copy.*on the same 2 rows they differ by.*Forgetful"),
        ({"fixed": True}, r"trained in a copy and not in the model.*\(.*scale.*trainable = False"),
    ],
)
@pytest.mark.parametrize("call", [rls.wrap, rls.strip, rls.shrink])
def test_copies_that_compute_or_learn_otherwise_are_refused(options, message, call):
    with pytest.raises(rls.ModelError, match=message):
        call(forgetful(**options))


def test_a_copy_that_cannot_be_called_is_refused():
    model, copied = forgetful(), rls.strip(forgetful())
    copied.layers[0].factor = -1.0
    with pytest.raises(rls.ModelError, match=r"cannot be called as the model can \(ValueError"):
        check_copy(model, copied)


def test_a_model_that_refuses_made_up_rows_is_compared_by_its_functions():
    model, copied = forgetful(), rls.strip(forgetful())
    model.layers[0].factor = -1.0
    check_copy(model, copied)
    model.layers[0].add_loss(lambda: 1.0)
    with pytest.raises(rls.ModelError, match="has 1 losses given as functions of its own"):
        check_copy(model, copied)


def test_models_that_are_random_at_inference_are_not_compared_by_values():
    inputs = layers.Input((6,))
    hidden = layers.Dropout(0.5)(layers.Dense(8)(inputs), training=True)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(hidden))
    model.compile("sgd", LOSS)
    for call in (rls.wrap, rls.strip, rls.shrink):
        check_figures(model, call(model), BATCH)


def test_text_and_ids_are_made_up():
    lookup = layers.StringLookup(vocabulary=["a", "b"])
    stack = [layers.Input((3,), dtype="string"), lookup, layers.Embedding(4, 2), layers.Flatten()]
    model = keras.Sequential([*stack, layers.Dense(2)])
    check_copy(model, rls.strip(model))
    other = rls.strip(model)
    other.layers[-1].bias.assign([1.0, 2.0])
    with pytest.raises(rls.ModelError, match="outputs of a copy"):
        check_copy(model, other)


def counting():
    """Counts its calls in a weight."""

    class Counts(layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight("calls", (), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            return x

    return keras.Sequential([layers.Input((6,)), Counts(name="counts"), layers.Dense(3)])


def test_the_models_are_as_they_were_after_a_check():
    model = counting()
    model.compile("sgd", "mse", metrics=["mae"])
    copied = rls.strip(model)
    assert [float(one.layers[0].calls) for one in (model, copied)] == [0.0, 0.0]
    check_figures(model, copied, (tf.constant(X), tf.constant(X[:, :3]), None))
    assert model.metrics_names == []
    first = model.evaluate(X, X[:, :3], verbose=0)
    check_figures(model, copied, (tf.constant(X), tf.constant(X[:, :3]) + 1, None))
    assert [metric.result().numpy() for metric in model.metrics] == first


class Hiding(OwnSteps):
    """Its loss depends on an object that a copy does not get."""

    def __init__(self, function=None):
        super().__init__()
        self.function = function or tf.identity
        self.by = {1: lambda x: 2 * x} if function else {1: tf.identity}

    def test_step(self, data):
        logs = super().test_step(data)
        return {**logs, "loss": self.by[1](logs["loss"])}


def test_figures_that_differ_are_refused_before_a_search():
    model = Hiding(tf.sigmoid)
    model(X)
    model.compile("sgd", LOSS)
    with pytest.raises(rls.ModelError, match=r"'loss' of a copy.* is .* where that of the model"):
        search(compressor(model, "random"))
    other = rls.strip(model)
    other.test_step = lambda data: {"loss": tf.constant(0.0)}
    with pytest.raises(rls.ModelError, match=r"'accuracy' of a copy of the model .* is missing"):
        check_figures(own_steps(), other, BATCH)


def own_steps():
    model = OwnSteps()
    model(X)
    model.compile("sgd", LOSS)
    model.test_step = lambda data: {"accuracy": tf.constant(0.0)}
    return model


def test_losses_that_read_the_models_weights_are_refused():
    model = classifier()
    kernel = model.layers[0].kernel

    def loss(y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred) + tf.norm(kernel)

    model.compile("sgd", loss)
    with pytest.raises(rls.ModelError, match=r"reads weights of the model by itself \(dense/kern"):
        check_figures(model, rls.strip(model), BATCH)


def test_a_test_step_that_only_copies_run_through_is_refused():
    model = classifier()
    copied = rls.strip(model)
    model.test_step = lambda data: data.missing
    with pytest.raises(rls.ModelError, match=r"by its own test_step \(AttributeError"):
        check_figures(model, copied, BATCH)


def test_settings_kept_in_an_object_reach_the_copy():
    class Settings:
        def __init__(self, power=1.0):
            self.power = {"of": [power]}

    class Configured(keras.Model):
        def __init__(self, settings=None):
            super().__init__()
            self.settings = settings or Settings()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x) * self.settings.power["of"][0]

    model = Configured(Settings(3.0))
    model(X)
    copied = rls.strip(model)
    np.testing.assert_array_equal(copied(X), model(X))
    assert copied.settings is not model.settings


# ---------------------------------------------------------------------- strategies

STRATEGY = """
import numpy as np, tensorflow as tf, tf_keras as keras, rl_sparsity_tf as rls
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
x, y = np.random.default_rng(0).normal(size=(32, 6)).astype("float32"), np.arange(32) % 3
stack = [keras.layers.Input((6,)), keras.layers.Dense(8), keras.layers.BatchNormalization()]
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = keras.Sequential([*stack, keras.layers.Dense(3, "softmax")])
    top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")
    model.compile(keras.optimizers.Adam(0.1), "sparse_categorical_crossentropy", [top])
model.fit(x, y, verbose=0)
expected = model.evaluate(x, y, verbose=0)
plan, target = rls.baselines.lamp(model, sparsity=0.5), rls.Target(sparsity=0.5)
for inside in (True, False):
    def within():
        return strategy.scope() if inside else tf.init_scope()
    for call in (rls.wrap, rls.strip, rls.shrink):
        with within():
            copied = call(model)
        # Every replica has its own moving statistics, of which a copy has the mean.
        np.testing.assert_allclose(copied.evaluate(x, y, verbose=0)[0], expected[0], rtol=1e-3)
        assert (copied.distribute_strategy is strategy) == inside
    with within():
        wrapped = rls.wrap(model, plan)
    wrapped.fit(x, y, verbose=0, epochs=2)
    with within():
        stripped = rls.strip(wrapped)
        rls.export_tflite(stripped, f"{inside}.tflite", "none")
    np.testing.assert_allclose(
        stripped.evaluate(x, y, verbose=0)[0], wrapped.evaluate(x, y, verbose=0)[0], rtol=1e-3
    )
    assert (stripped.layers[0].kernel.numpy() == 0).any()
with strategy.scope():
    for call in (
        lambda: rls.export_tflite(model, "scored.tflite", "none", test_data=(x, y)),
        lambda: rls.Compressor(model, target=target).search((x, y), validation_data=(x, y)),
    ):
        try:
            call()
        except rls.ModelError as error:
            assert "inside the scope() of a MirroredStrategy" in str(error), error
        else:
            raise AssertionError
print("done")
"""


@pytest.mark.slow
def test_models_of_a_strategy_are_copied_in_and_out_of_its_scope(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STRATEGY], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
