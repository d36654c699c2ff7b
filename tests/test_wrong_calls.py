"""Wrong calls in one table: each is refused in words, before anything is trained or written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tiny_search import TRAIN, VALIDATION, quick_autoencoder, trained, untrained

import rl_sparsity_tf as rls
from rl_sparsity_tf import demo
from rl_sparsity_tf import search as search_module
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import FileExistsRLSparsityError
from rl_sparsity_tf.kernel_rule import KernelRule
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.search_loop import SearchLoop

layers = keras.layers
X, Y = TRAIN
ONE_HOT = np.eye(3, dtype=np.float32)[Y]
ALL_ONES = np.ones(len(Y), np.float32)

# ------------------------------------------------------------------------------ what is called


@dataclasses.dataclass(frozen=True)
class Files:
    """Files that some calls are pointed at; `place` is a fresh folder that calls may write to."""

    shared: Path
    place: Path

    def __truediv__(self, name: str) -> Path:
        return self.shared / name


Call = Callable[[Files], Any]


@functools.cache
def tiny() -> keras.Model:
    return trained()


@functools.cache
def tiny_with(loss: Any) -> keras.Model:
    model = untrained()
    model.compile("adam", loss)
    return model


@functools.cache
def images() -> keras.Model:
    stack = [layers.Input((6, 6, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)]
    model = keras.Sequential(stack)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@functools.cache
def two_inputs(outputs: int = 1) -> keras.Model:
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right")
    joined = layers.Concatenate()([left, right])
    ends = [layers.Dense(3, "softmax", name=f"end_{i + 1}")(joined) for i in range(outputs)]
    model = keras.Model([left, right], ends if outputs > 1 else ends[0])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@functools.cache
def stateful() -> keras.Model:
    steps = layers.Input((5, 3), batch_size=8)
    model = keras.Sequential([steps, layers.LSTM(4, stateful=True), layers.Dense(3, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def nothing_to_compress() -> keras.Model:
    model = keras.Sequential([layers.Input((6, 6, 1)), layers.MaxPooling2D(), layers.Flatten()])
    model.compile("adam", "mse")
    return model


class Table(layers.Layer):
    """A layer that nobody registered, with most of its model's weights."""

    def build(self, shape):
        self.table = self.add_weight(name="table", shape=(shape[-1], 100))

    def call(self, x):
        return x + tf.reduce_sum(self.table, axis=1)


def mostly_skipped() -> keras.Model:
    model = keras.Sequential([layers.Input((6,)), Table(), layers.Dense(3, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


class Hidden(keras.Model):
    """Its layer is where nobody can exchange it."""

    def __init__(self):
        super().__init__()
        self.parts = {layers.Dense(3, name="hidden")}

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def hidden() -> keras.Model:
    model = Hidden()
    model.compile("adam", "mse")
    model(X[:1])
    return model


class Transposed(layers.Layer):
    """The decoder of a tied autoencoder."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def call(self, x):
        return tf.matmul(x, self.other.kernel, transpose_b=True)


def tied() -> keras.Model:
    inputs = keras.Input((6,))
    encoder = layers.Dense(4, name="encoder")
    model = keras.Model(inputs, Transposed(encoder)(encoder(inputs)), name="tied")
    model.compile("adam", "mse")
    return model


def diverged() -> keras.Model:
    model = untrained()
    model.set_weights([value * np.nan for value in model.get_weights()])
    return model


def keras_3() -> Any:
    import keras as keras_of_today

    return keras_of_today.Sequential(
        [keras_of_today.layers.Input((6,)), keras_of_today.layers.Dense(3)]
    )


def quantization_aware() -> keras.Model:
    return tfmot.quantization.keras.quantize_model(untrained())


def clustered() -> keras.Model:
    start = tfmot.clustering.keras.CentroidInitialization.LINEAR
    return tfmot.clustering.keras.cluster_weights(untrained(), 2, start)


def batches(*columns: Any, size: int = 16) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(columns).batch(size)


def with_one(array: np.ndarray, value: float, row: int = -1) -> np.ndarray:
    """A copy with one value changed, by default in the last row."""
    changed = array.astype(np.result_type(array, type(value)))
    changed.reshape(len(array), -1)[row, 0] = value
    return changed


class Rows(keras.utils.Sequence):
    def __init__(self, length: int = 0):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise KeyError(f"no batch {index} in the store")


def generator():
    yield X, Y


def failing() -> tf.data.Dataset:
    def read():
        yield X, Y
        raise OSError("the disk is gone")

    signature = (tf.TensorSpec((None, 6), tf.float32), tf.TensorSpec((None,), tf.int64))
    return tf.data.Dataset.from_generator(read, output_signature=signature)


def compressed(make: Callable[[], Any]) -> Call:
    """The call that hands in a model; what needs data to be seen is seen when the search starts."""

    def call(files: Files) -> None:
        data = (X, X) if make is tied else (X, ONE_HOT) if make is hidden else TRAIN
        if make is nothing_to_compress:
            data = (np.zeros((8, 6, 6, 1), np.float32), np.zeros((8, 9), np.float32))
        one = rls.Compressor(make(), directory=files.place / "run")
        one.search(data, validation_data=data, verbose=0)

    return call


def option(**options: Any) -> Call:
    """An option of the compressor; some are known to be wrong when the search starts."""

    def call(files: Files) -> None:
        options.setdefault("directory", files.place / "run")
        rls.Compressor(tiny(), **options).search(TRAIN, validation_data=VALIDATION, verbose=0)

    return call


def searched(model: Callable[[], keras.Model] = tiny, **arguments: Any) -> Call:
    """A search whose arguments are right but for those given; functions are called for theirs."""

    def call(files: Files) -> None:
        given = {"train": TRAIN, "validation_data": VALIDATION, "verbose": 0, **arguments}
        given = {k: v() if callable(v) and v is not generator else v for k, v in given.items()}
        target = rls.Target(sparsity=0.5)
        rls.Compressor(model(), target, directory=files.place / "run").search(**given)

    return call


def targeted(sparsity: float, model: Callable[[], keras.Model] = tiny, **options: Any) -> Call:
    def call(files: Files) -> None:
        target = rls.Target(sparsity=sparsity)
        one = rls.Compressor(model(), target, directory=files.place / "run", **options)
        one.search(TRAIN, validation_data=VALIDATION, verbose=0)

    return call


def in_folder(name: str, **arguments: Any) -> Call:
    """A search in one of the folders that are there already."""

    def call(files: Files) -> None:
        options = {"seed": 3, "agent": "random", "directory": files / name, **arguments}
        one = rls.Compressor(tiny(), rls.Target(sparsity=0.5), **options)
        one.search(TRAIN, validation_data=VALIDATION, verbose=0)

    return call


def exported(name: str = "m.tflite", quantization: str = "none", **options: Any) -> Call:
    def call(files: Files) -> None:
        model = options.pop("model", tiny)()
        rls.export_tflite(model, files.place / name, quantization, **options)

    return call


def wrapped_with(plan: Any, **options: Any) -> Call:
    return lambda files: rls.wrap(tiny(), plan, **options)


def read_plan(name: str) -> Call:
    return lambda files: rls.CompressionPlan.load(files / name)


def loaded(name: str) -> Call:
    return lambda files: rls.load_model(files / name)


def plan_of_another() -> rls.CompressionPlan:
    operations = np.zeros((9, 9), np.uint8)
    return rls.CompressionPlan(
        [rls.KernelPlan("first/kernel", (9, 9), "io", "element", 32, operations)]
    )


MODELS = {
    "a path": (
        compressed(lambda: "model.keras"),
        rls.ModelError,
        r"Received str .*Expected a tf_keras model.*load_model\('model\.keras'\)",
    ),
    "a TFLite file": (
        compressed(lambda: Path("model.tflite")),
        rls.ModelError,
        r"Received PosixPath.*Expected a tf_keras model.*\.tflite file cannot be turned back",
    ),
    "None": (compressed(lambda: None), rls.ModelError, r"Received NoneType.*Expected a tf_keras"),
    "a layer": (
        compressed(lambda: layers.Dense(3)),
        rls.ModelError,
        r"Received Dense .*Expected a tf_keras model.*Sequential\(\[Input\(shape\), layer\]\)",
    ),
    "a class": (
        compressed(lambda: Hidden),
        rls.ModelError,
        r"Received the class Hidden.*Expected a tf_keras model.*Hidden\(\.\.\.\)",
    ),
    "a list": (compressed(lambda: [tiny()]), rls.ModelError, r"Received list.*Expected a tf_keras"),
    "Keras 3": (
        compressed(keras_3),
        rls.ModelError,
        r"Received Sequential from module 'keras.*This is a Keras 3 object: build or load",
    ),
    "not built": (
        compressed(lambda: keras.Sequential([layers.Dense(3)])),
        rls.ModelError,
        r"is not built: its input shape is unknown\. Call it once on data, call model\.build",
    ),
    "not compiled": (
        compressed(lambda: keras.models.clone_model(untrained())),
        rls.ModelError,
        r"'tiny' is not compiled with a loss.*Call model\.compile\(optimizer, loss, metrics\)",
    ),
    "nothing to compress": (
        compressed(nothing_to_compress),
        rls.ModelError,
        r"has no layer that can be compressed\. Expected at least one.*describe_support\(model\)",
    ),
    "NaN weights": (
        compressed(diverged),
        rls.ModelError,
        r"weight 'first/kernel:0' of model 'tiny' holds NaN .*Expected a trained model: train it",
    ),
    "wrapped": (
        compressed(lambda: rls.wrap(tiny())),
        rls.ModelError,
        r"'tiny' is wrapped already\. Call rl_sparsity_tf\.strip\(model\) first",
    ),
    "wrapped twice": (
        lambda files: rls.wrap(rls.wrap(tiny())),
        rls.ModelError,
        r"'tiny' is wrapped already\. Call rl_sparsity_tf\.strip\(model\) first",
    ),
    "quantization-aware": (
        compressed(quantization_aware),
        rls.ModelError,
        r"prepared for quantization-aware training.*Give the model as it was before quantize_model",
    ),
    "clustered": (
        compressed(clustered),
        rls.ModelError,
        r"is clustered by TFMOT.*strip_clustering\(model\) first",
    ),
    "hidden layers": (
        compressed(hidden),
        rls.ModelError,
        r"uses weights that Keras does not track.*Keep its layers in attributes",
    ),
    "tied weights": (
        compressed(tied),
        rls.ModelError,
        r"'tied' share weights with each other .*Share the whole layer instead: call one layer",
    ),
    "strip a text": (lambda files: rls.strip("m"), rls.ModelError, r"Received str.*Expected a tf_"),
    "describe nothing": (
        lambda files: rls.describe_support(None),
        rls.ModelError,
        r"Received NoneType.*Expected a tf_keras model",
    ),
    "register an instance": (
        lambda files: rls.register_layer(layers.Dense(3), kernel="io"),
        rls.ArgumentError,
        r"register_layer received <.*Expected a subclass.*the class itself, not an instance",
    ),
}

IMAGES = np.zeros((8, 6, 6, 1), np.float32)
LABELS = np.arange(8) % 3
DATA = {
    "no channel axis": (
        searched(images, train=(IMAGES[..., 0], LABELS)),
        r"train has inputs of shape \(6, 6\) per row; the model takes \(6, 6, 1\)\..*x\[\.\.\., ",
    ),
    "no batch axis": (
        searched(images, train=(IMAGES[0], LABELS[:6])),
        r"train has inputs of shape \(6, 1\) per row; the model takes \(6, 6, 1\)\. The batch axis",
    ),
    "too few features": (
        searched(validation_data=(X[:, :5], Y)),
        r"validation_data has inputs of shape \(5,\) per row; the model takes \(6,\)\.",
    ),
    "one input of two": (
        searched(two_inputs, train=(X[:, :3], Y)),
        r"train has 1 inputs; the model takes 2: \['left', 'right'\]\. Pass them as a list or a d",
    ),
    "two inputs for one": (
        searched(train=([X, X], Y)),
        r"train has 2 inputs; the model takes 1.*one array with np\.stack",
    ),
    "a dict of other inputs": (
        searched(two_inputs, train=({"left": X[:, :3], "rihgt": X[:, 3:]}, Y)),
        r"train lacks the inputs \['right'\]\. Expected a dict with \['left', 'right'\], received",
    ),
    "one label array for two outputs": (
        searched(functools.partial(two_inputs, 2), train=((X[:, :3], X[:, 3:]), Y)),
        r"train has one array of labels; the model has 2 outputs\. Expected a dict with the names",
    ),
    "labels of another output": (
        searched(functools.partial(two_inputs, 2), train=((X[:, :3], X[:, 3:]), {"end_3": Y})),
        r"train has labels for \['end_3'\].*Expected a dict with these names",
    ),
    "x and y swapped": (searched(train=(Y, X)), r"x and y look swapped\. Expected \(x, y\)"),
    "NaN in x": (
        searched(train=(with_one(X, np.nan), Y)),
        r"train holds 1 values that are NaN or infinite\. Expected finite numbers: remove or",
    ),
    "infinity in validation": (
        searched(validation_data=(with_one(X, np.inf), Y)),
        r"validation_data holds 1 values that are NaN or infinite\. Expected finite numbers: rem",
    ),
    "NaN in the test's y": (
        searched(test_data=(X, with_one(Y, np.nan))),
        r"test_data holds 1 values that are NaN or infinite\. Expected finite numbers: remove",
    ),
    "NaN in sample weights": (
        searched(train=(X, Y, with_one(ALL_ONES, np.nan))),
        r"train holds 1 values that are NaN or infinite\. Expected finite numbers: remove or",
    ),
    "NaN in a dataset": (
        searched(train=lambda: batches(with_one(X, np.nan), Y)),
        r"train holds values that are NaN or infinite\. Expected finite numbers: filter or replace",
    ),
    "NaN in a dataset's weights": (
        searched(validation_data=lambda: batches(X, Y, with_one(ALL_ONES, np.nan))),
        r"validation_data holds values that are NaN or infinite\. Expected finite numbers: filter",
    ),
    "negative sample weight": (
        searched(train=(X, Y, with_one(ALL_ONES, -1.0))),
        r"train has the sample weight -1 in row 95\. Expected numbers of at least 0",
    ),
    "sample weights per class": (
        searched(train=(X, Y, np.ones((96, 3)))),
        r"train has sample weights of shape \(3,\) per row\. Expected one number per row\..*class_",
    ),
    "class too large": (
        searched(train=(X, with_one(Y, 3))),
        r"train has the label 3 in row 95; the model's output has 3 classes\. Expected .* 0 to 2",
    ),
    "class too large in a later batch": (
        searched(validation_data=lambda: batches(X, with_one(Y, 7, row=50))),
        r"validation_data has the label 7 in row 50; .* 3 classes\. Expected integers from 0 to 2",
    ),
    "labels from 1": (
        searched(train=(X, Y + 1), validation_data=(X, Y + 1)),
        r"train has the label 3 in row \d+ \(and wrong ones in \d+ more rows\).*from 0 to 2",
    ),
    "negative class": (
        searched(test_data=(X, with_one(Y, -1))),
        r"test_data has the label -1 in row 95; the model's output has 3 classes\. Expected",
    ),
    "fraction of a class": (
        searched(train=(X, with_one(Y, 0.5))),
        r"train has the label 0\.5 in row 95; .*Expected integers from 0 to 2",
    ),
    "one-hot for a sparse loss": (
        searched(train=(X, ONE_HOT)),
        r"labels of shape \(3,\) per row; .*loss categorical_crossentropy, or y\.argmax\(-1\)",
    ),
    "integers for a one-hot loss": (
        searched(functools.partial(tiny_with, "categorical_crossentropy")),
        r"train has labels of shape \(\) per row; .*sparse_categorical_crossentropy, or tf_keras",
    ),
    "one number for three outputs": (
        searched(functools.partial(tiny_with, "mse"), train=(X, Y[:, None] * 1.0)),
        r"train has labels of shape \(1,\) per row; .*would be compared with every output",
    ),
    "fewer labels than rows": (
        searched(train=(X, Y[:90])),
        r"train has arrays of \[90, 96\] rows\. Expected as many labels",
    ),
    "x of objects": (
        searched(train=(X.astype(object), Y)),
        r"train holds ndarray that is no array of numbers.*Expected \(x, y\) or",
    ),
    "x of text": (
        searched(train=(X.astype(str), Y)),
        r"train holds ndarray that is no array of numbers.*Expected \(x, y\) or",
    ),
    "y of text": (
        searched(train=(X, np.array(["cat", "dog", "owl"])[Y])),
        r"train has labels that are text, such as .*'\w+'.*\. Expected numbers.*np\.unique",
    ),
    "no data": (searched(train=None), r"train is a NoneType\. Expected \(x, y\) or"),
    "a path for data": (searched(train="data.npz"), r"train is a str\. Expected \(x, y\) or"),
    "x alone": (searched(train=X), r"train is a ndarray\. Expected \(x, y\) or"),
    "a list": (searched(train=[X, Y]), r"train is a list of 2\. Expected \(x, y\) or"),
    "no validation": (
        searched(validation_data=None),
        r"There is no validation_data.*Pass validation_data=\(x, y\)",
    ),
    "a share for validation": (
        searched(validation_data=0.2),
        r"validation_data is the number 0\.2; .*Expected \(x, y\).*split the rows yourself",
    ),
    "validation without labels": (
        searched(validation_data=X),
        r"validation_data is a ndarray\. Expected \(x, y\) or",
    ),
    "empty validation": (
        searched(validation_data=(X[:0], Y[:0])),
        r"validation_data is empty\. Expected at least one row",
    ),
    "empty dataset": (
        searched(validation_data=lambda: batches(X, Y).take(0)),
        r"validation_data is empty\. Expected at least one batch",
    ),
    "endless validation": (
        searched(validation_data=lambda: batches(X, Y).repeat()),
        r"validation_data is an infinite dataset\. Expected a finite one: .*\.take\(batches\)",
    ),
    "dataset without batches": (
        searched(train=lambda: tf.data.Dataset.from_tensor_slices((X, Y))),
        r"train has inputs of shape \(\) per row; .*\.batch\(32\) on a dataset",
    ),
    "dataset of dicts": (
        searched(train=lambda: tf.data.Dataset.from_tensor_slices({"x": X, "y": Y}).batch(8)),
        r"train is a dataset of dicts with the keys \['x', 'y'\]\. Expected .*as_supervised=True",
    ),
    "a generator": (
        searched(train=lambda: generator()),
        r"train is a generator, which can be read only once\. Expected .*from_generator",
    ),
    "a generator function": (
        searched(train=generator),
        r"train is a function, which can be read only once\. Expected .*from_generator",
    ),
    "a dataset that raises": (
        searched(train=failing),
        r"train could not be read: batch 1 raises OSError: the disk is gone\. Expected a dataset",
    ),
    "an empty Sequence": (
        searched(train=lambda: Rows()),
        r"train is empty\. Expected at least one batch",
    ),
    "a Sequence that raises": (
        searched(validation_data=lambda: Rows(2)),
        r"validation_data could not be read: batch 0 raises KeyError: .*Expected a Sequence that",
    ),
    "too few rows for a fixed batch": (
        searched(stateful, train=(np.zeros((5, 5, 3), np.float32), np.zeros(5, int))),
        r"train has 5 rows; the model takes exactly 8 per call\. Expected at least that many",
    ),
    "a remainder of a fixed batch": (
        searched(
            stateful,
            train=(np.zeros((16, 5, 3), np.float32), np.zeros(16, int)),
            validation_data=(np.zeros((12, 5, 3), np.float32), np.zeros(12, int)),
        ),
        r"validation_data has 12 rows; the model takes exactly 8 per call\. .*leave out 4 rows",
    ),
}


def number(name: str, value: Any) -> tuple[Call, str]:
    return searched(**{name: value}), rf"{name}={value!r} cannot be used\. Expected a whole number"


ARGUMENTS = {
    **{
        f"a target of {value!r}": (
            lambda files, value=value: rls.Target(sparsity=value),
            rf"Target\(sparsity={value!r}\) cannot be met\. Expected a number above 0 and below 1",
        )
        for value in (0, 1, 1.5, -0.5, float("nan"), "0.9", None, True)
    },
    "an empty target": (
        lambda files: rls.Target(),
        r"Target\(\) cannot be met\. Expected a number .* for example Target\(sparsity=0\.9\)",
    ),
    "a number as the target": (
        option(target=0.9),
        r"target=0\.9 is a float\. Expected a Target, for example rls\.Target\(sparsity=0\.9\)",
    ),
    "agent dqm": (option(agent="dqm"), r"agent='dqm' is not known\. Expected .*Did you mean 'dqn'"),
    "agent PPO2": (option(agent="PPO2"), r"agent='PPO2' is not known\. Expected one of 'dqn', 'pp"),
    "agent object": (option(agent=object()), r"agent=<object.*expected 'dqn', 'ppo', 'random' or"),
    "agent class": (option(agent=rls.PPO), r"agent=PPO is a class; expected .*Write PPO\(\)"),
    "agent None": (option(agent=None), r"agent=None is a NoneType; expected 'dqn', 'ppo'"),
    "learning rate": (
        lambda files: rls.DQN(learning_rate=0),
        r"DQN\(learning_rate=0\): expected a number above 0 and at most 1, for instance",
    ),
    "layer widths": (
        lambda files: rls.PPO(hidden_layers=()),
        r"PPO\(hidden_layers=\(\)\): expected a sequence .*for instance hidden_layers=\(64, 64\)",
    ),
    "group": (option(group="elemnt"), r"group='elemnt' is not known\. .*Did you mean 'element'"),
    "group None": (option(group=None), r"group=None is not known\. Expected one of 'element'"),
    "recovery": (
        option(recovery="finetune"),
        r"recovery='finetune' is a str\. Expected a Recovery, for example Recovery\(method=",
    ),
    "recovery's method": (
        lambda files: rls.Recovery(method="fine-tune"),
        r"Recovery\(method\)='fine-tune' is not known\. .*Did you mean 'finetune'",
    ),
    "reward": (
        option(reward=1.0),
        r"reward=1\.0 cannot be called\. Expected rls\.Reward\(\.\.\.\)",
    ),
    "reward's weights": (
        lambda files: rls.Reward(accuracy=-1),
        r"Reward\(accuracy=-1\) cannot be used\. Expected a finite number of at least 0",
    ),
    "metric": (
        option(metric="acuracy"),
        r"metric='acuracy' is not among the model's metrics\. .*Did you mean 'accuracy'",
    ),
    "metric's direction": (
        option(metric=("accuracy", "up")),
        r"metric=\('accuracy', 'up'\) has no known direction\. Expected 'max' or 'min'",
    ),
    "metric as a number": (
        option(metric=3),
        r"metric=3 is not among the model's metrics\. Expected",
    ),
    "metric as one too few": (
        option(metric=("accuracy",)),
        r"metric=\('accuracy',\) is not among the model's metrics\. Expected",
    ),
    "buckets": (option(buckets=0), r"buckets=0 cannot be used\. Expected a whole number of at lea"),
    **{
        f"seed {seed!r}": (option(seed=seed), rf"seed={seed!r} cannot be used\. Expected a whole")
        for seed in (-1, 1.5, True, None, "0")
    },
    **{f"episodes {value!r}": number("episodes", value) for value in (0, -1, 2.5, "three", None)},
    "batch_size": number("batch_size", 0),
    "finetune_epochs": number("finetune_epochs", -1),
    "validation_rows": number("validation_rows", 0),
    "quantization": (
        searched(quantization="int9"),
        r"quantization='int9' is not known\. Expected one of 'plan', .*Did you mean 'int8'",
    ),
    "verbose": (searched(verbose=7), r"verbose=7 is not known\. Expected 0, 1 or 2"),
    "class_weight list": (
        searched(class_weight=[1, 2, 3]),
        r"class_weight=\[1, 2, 3\] is a list\. Expected a dict.*dict\(enumerate\(weights\)\)",
    ),
    "class_weight balanced": (
        searched(class_weight="balanced"),
        r"class_weight='balanced' is a str\. Expected a dict with a number for every class",
    ),
    "class_weight gap": (
        searched(class_weight={0: 1, 2: 1}),
        r"class_weight has the keys \[0, 2\]\. Expected the classes 0, 1, 2, \.\.\. without a gap",
    ),
    "class_weight NaN": (
        searched(class_weight={0: 1, 1: float("nan"), 2: 1}),
        r"class_weight\[1\]=nan cannot be used\. Expected a finite number of at least 0",
    ),
    "class_weight of two classes": (
        searched(class_weight={0: 1, 1: 1}),
        r"class_weight has 2 classes; the model has 3\. Expected the keys 0 to 2",
    ),
    "class_weight for two outputs": (
        searched(
            functools.partial(two_inputs, 2),
            train=((X[:, :3], X[:, 3:]), (Y, Y)),
            class_weight={0: 1, 1: 1, 2: 1},
        ),
        r"class_weight was given for a model with several outputs\. Expected a model with one; ",
    ),
    "unroll": (
        searched(unroll="yes"),
        r"unroll='yes' cannot be used\. Expected True or False",
    ),
    "unroll nothing": (searched(unroll=True), r"unroll=True.*recurrent"),
    "masks": (
        wrapped_with(None, mask="hardconcrete"),
        r"mask='hardconcrete' is not known\. .*Did you mean 'hard_concrete'",
    ),
    "mask training": (
        lambda files: rls.MaskTraining(every=0),
        r"every=0 cannot be used\. Expected an integer above 0",
    ),
}

TARGETS = {
    "most weights skipped": (
        targeted(0.9, mostly_skipped),
        r"sparsity of 0\.9 needs 557 of 618 .* only 17 can be: .*Expected a .* at most 0\.027",
    ),
    "groups too large": (
        targeted(0.9, group="channel"),
        r"sparsity of 0\.9 needs 65 of 72 .* only 58 can be: .*one group.*at most 0\.8055",
    ),
    "everything": (targeted(0.999), r"needs 72 of 72 .* only 70 can be.*at most 0\.9722"),
}

FOLDERS = {
    "a file": (
        in_folder("text.txt"),
        rls.ArgumentError,
        r"text\.txt' is a file\. Expected a folder to write to",
    ),
    "no parent": (
        in_folder("nowhere/run"),
        rls.ArgumentError,
        r"nowhere' does not exist\. Create it first, or choose another place for 'run'",
    ),
    "a number": (
        in_folder("", directory=3),
        rls.ArgumentError,
        r"directory=3 is a int\. Expected the path of a folder to write to",
    ),
    "foreign": (
        in_folder("foreign"),
        FileExistsRLSparsityError,
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
    "finished": (
        in_folder("finished"),
        FileExistsRLSparsityError,
        r"finished' holds a finished run\. Choose another folder, or pass overwrite=True",
    ),
    "another run": (
        in_folder("unfinished", buckets=4),
        FileExistsRLSparsityError,
        r"holds an unfinished run that differs in buckets \(8, now 4\)\. Call with the same argum",
    ),
    "a damaged run": (
        in_folder("damaged"),
        rls.RLSparsityError,
        r"manifest in .* cannot be read .*Choose another folder, or pass overwrite=True",
    ),
}

PLANS = {
    "of another model": (
        wrapped_with(plan_of_another()),
        r"kernel 'first/kernel' has shape \(9, 9\) .*the model's has \(6, 8\) .*Use a plan made",
    ),
    "of an unknown kernel": (
        wrapped_with(rls.CompressionPlan([KernelRule("frist/kernel", 0.5)])),
        r"names the kernel 'frist/kernel', .*Expected one of .*Did you mean 'first/kernel'",
    ),
    "of no kernel": (
        wrapped_with(rls.CompressionPlan([KernelRule("conv*/kernel", 0.5)])),
        r"rule for 'conv\*/kernel' matches no kernel\. The model has \['first/kernel', 'last/ker",
    ),
    "a dict": (
        wrapped_with({"kernels": []}),
        r"plan is a dict\. Expected a CompressionPlan, for ex",
    ),
    "a path": (
        wrapped_with("plan.json"),
        r"plan is a str\. Expected a CompressionPlan, for example",
    ),
    "a list of dicts": (
        lambda files: rls.CompressionPlan([{"path": "first/kernel"}]),
        r"was given \{'path': .*\}\. Expected KernelPlan and KernelRule objects; .*from_dict reads",
    ),
    "too sparse": (
        lambda files: KernelRule("*", 1.0),
        r"has sparsity 1\.0\. Expected a number of at least 0 and below 1",
    ),
    "truncated": (
        read_plan("truncated.json"),
        r"The plan is not valid JSON \(line \d, .*Mend that place, or write the plan again",
    ),
    "another version": (
        read_plan("version.json"),
        r"has format_version 99\. Expected 1; a newer version of this package may read it",
    ),
    "text": (
        read_plan("text.txt"),
        r"is not valid JSON \(line 1, .*write the plan again with plan",
    ),
    "another document": (
        read_plan("list.json"),
        r"is not a compression plan\. Expected an object with format_version and kernels, received",
    ),
    "a binary file": (
        read_plan("model.tflite"),
        r"cannot be read \(.*\)\. Expected a JSON file written by plan\.save",
    ),
    "missing": (read_plan("nothing.json"), r"nothing\.json' cannot be read .*Expected a JSON file"),
}

EXPORTS = {
    "another ending": (
        exported("m.lite"),
        rls.ArgumentError,
        r"m\.lite' ends in '\.lite'\. Expected a name ending in '\.tflite'",
    ),
    "existing file": (
        lambda files: rls.export_tflite(tiny(), files / "text.tflite", "none"),
        FileExistsRLSparsityError,
        r"text\.tflite' exists already\. Choose another name, or pass overwrite=True",
    ),
    "no folder": (
        exported("no/m.tflite"),
        rls.ArgumentError,
        r"does not exist\. Create it first, or choose another place for 'm\.tflite'",
    ),
    "quantization": (
        exported(quantization="int4"),
        rls.ArgumentError,
        r"quantization='int4' is not known\. Expected one of 'plan'",
    ),
    "no plan": (
        exported(quantization="plan"),
        rls.ArgumentError,
        r"quantization='plan' needs a plan, .*Pass plan=, .*or pass quantization='none'",
    ),
    "plan of another model": (
        exported(quantization="plan", plan=plan_of_another()),
        rls.PlanError,
        r"kernel 'first/kernel' the shape \(9, 9\), the model's has \(6, 8\)\. Use the plan with",
    ),
    "no representative data": (
        exported(quantization="int8"),
        rls.ArgumentError,
        r"'int8' needs representative_data .*Pass some hundred rows of training inputs, or choose",
    ),
    "representative data of a wrong shape": (
        exported(quantization="int8", representative_data=X[:, :5]),
        rls.DataError,
        r"data received is .*\(96, 5\); the model's inputs are 'given' \(None, 6\).*Expected an a",
    ),
    "representative data with NaN": (
        exported(quantization="int8", representative_data=with_one(X, np.nan)),
        rls.DataError,
        r"representative_data for input 'given' contains NaN or infinite values\. Expected finite",
    ),
    "representative data without rows": (
        exported(quantization="int8", representative_data=X[:0]),
        rls.DataError,
        r"representative_data has no rows\. Give at least one row of inputs",
    ),
    "tolerance": (
        exported(tolerance=-1),
        rls.ArgumentError,
        r"tolerance=-1 cannot be used\. Expected a positive number.*or None for the default",
    ),
    "batch size": (
        exported(batch_size=0),
        rls.ArgumentError,
        r"batch_size=0 cannot be used\. Expected an integer of at least 1",
    ),
    "another batch size": (
        exported(model=stateful, batch_size=4),
        rls.ArgumentError,
        r"batch_size=4 does not fit model .* fixed to batches of \[8\]\. Leave batch_size out",
    ),
    "unroll without a loop": (
        exported(unroll=True),
        rls.ArgumentError,
        r"unroll=True .*recurrent",
    ),
    "a path for the model": (
        exported(model=lambda: "model.keras"),
        rls.ModelError,
        r"Received str .*Expected a tf_keras model",
    ),
    "predict with a missing file": (
        lambda files: rls.predict_tflite(files / "nothing.tflite", X),
        rls.ArgumentError,
        r"There is no file .*nothing\.tflite'\. Give the path of a \.tflite file",
    ),
    "predict without rows": (
        lambda files: rls.predict_tflite(files / "text.tflite", X[:0]),
        rls.ArgumentError,
        r"inputs has the shapes \[\(0, 6\)\]\. Expected at least one row",
    ),
    "predict with uneven rows": (
        lambda files: rls.predict_tflite(files / "text.tflite", [X, X[:3]]),
        rls.ArgumentError,
        r"inputs has \[96, 3\] rows\. Expected one array per input of the model, all with the same",
    ),
    "predict with a batch size of 0": (
        lambda files: rls.predict_tflite(files / "text.tflite", X, batch_size=0),
        rls.ArgumentError,
        r"batch_size=0 cannot be used\. Expected an integer of at least 1",
    ),
}

# The runtime that can tell is in a process of its own, which takes some seconds to start.
RUNTIME = {
    "predict with text": (
        lambda files: rls.predict_tflite(files / "text.tflite", X),
        rls.ExportError,
        r"run failed: .*is not a valid Flatbuffer",
    ),
    "predict with too many inputs": (
        lambda files: rls.predict_tflite(files / "real.tflite", [X, X]),
        rls.RLSparsityError,
        r"The file has 1 inputs \['input_0'\], received 2",
    ),
}

SAVED = {
    "missing": (
        loaded("nothing.keras"),
        r"There is no file or folder .*Expected a \.keras or \.h5",
    ),
    "truncated": (
        loaded("truncated.keras"),
        r"is truncated: .*its end is missing\. Expected a \.k",
    ),
    "empty": (loaded("empty.keras"), r"empty\.keras' is empty\. Expected a \.keras or \.h5 file"),
    "text": (loaded("text.keras"), r"is damaged or mislabelled: .*Expected a \.keras or \.h5 file"),
    "weights": (
        loaded("weights.h5"),
        r"holds weights but no model\. Build the model in code, call model\.load_weights",
    ),
    "Keras 3": (
        loaded("keras_3.keras"),
        r"was written by Keras 3\.\S+\. Expected a model of Keras 2.*Save it again from Keras 2",
    ),
    "a module": (
        loaded("module"),
        r"can be run but not rebuilt: .*tf\.saved_model\.save\(\).*Save it again from Keras 2",
    ),
    "an export": (
        loaded("exported"),
        r"can be run but not rebuilt: .*model\.export\(\).*Save it again from Keras 2",
    ),
    "a foreign folder": (
        loaded("foreign"),
        r"foreign' is no SavedModel: it has no saved_model\.pb\. Expected a \.keras",
    ),
    "a Lambda": (
        loaded("lambda.keras"),
        r"was not opened: its layer 'twice' is a Lambda, .*Expected .*pass trusted=True",
    ),
    "TFLite": (
        loaded("model.tflite"),
        r"seems to be a TFLite file, which cannot be turned back.*Expected a \.keras",
    ),
}

PATHS = {
    "of no plan": (
        lambda files: rls.CompressionPlan.load(None),
        r"path=None is a NoneType\. Expected the path of a JSON file written by plan\.save",
    ),
    "of no model": (
        lambda files: rls.load_model(None),
        r"path=None is a NoneType\. Expected .*\.keras or \.h5 file",
    ),
    "of no export": (
        lambda files: rls.export_tflite(tiny(), None, "none"),
        r"path=None is a NoneType\. Expected the name of a file to write",
    ),
}

CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    **{f"model: {name}": entry for name, entry in MODELS.items()},
    **{f"data: {name}": (call, rls.DataError, text) for name, (call, text) in DATA.items()},
    **{f"argument: {n}": (call, rls.ArgumentError, text) for n, (call, text) in ARGUMENTS.items()},
    **{f"target: {name}": (call, rls.TargetError, text) for name, (call, text) in TARGETS.items()},
    **{f"folder: {name}": entry for name, entry in FOLDERS.items()},
    **{f"plan: {name}": (call, rls.PlanError, text) for name, (call, text) in PLANS.items()},
    **{f"path: {name}": (call, rls.ArgumentError, text) for name, (call, text) in PATHS.items()},
    **{f"export: {name}": entry for name, entry in EXPORTS.items()},
    **{f"file: {name}": (call, rls.ModelError, text) for name, (call, text) in SAVED.items()},
}

# -------------------------------------------------------------------------- what must not happen


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Models, plans, data and folders, most of them bad."""
    folder = tmp_path_factory.mktemp("shared")
    model = tiny()
    model.save(folder / "good.keras")
    keras.models.clone_model(model).save(folder / "uncompiled.keras")
    (folder / "truncated.keras").write_bytes((folder / "good.keras").read_bytes()[:2000])
    (folder / "empty.keras").write_bytes(b"")
    model.save_weights(folder / "weights.h5")
    keras_3().save(folder / "keras_3.keras")
    model.export(folder / "exported")
    tf.saved_model.save(tf.Module(), folder / "module")
    twice = layers.Lambda(lambda x: 2 * x, name="twice")
    keras.Sequential([layers.Input((6,)), twice]).save(folder / "lambda.keras")
    (folder / "model.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3\xff\xfe")
    for name in ("text.txt", "text.keras", "text.tflite"):
        (folder / name).write_text("hello")
    plan = rls.CompressionPlan([KernelRule("*", 0.5)]).to_json()
    (folder / "truncated.json").write_text(plan[: len(plan) // 2])
    (folder / "version.json").write_text(plan.replace('version": 1', 'version": 99'))
    (folder / "list.json").write_text("[1, 2, 3]")
    arrays = dict(zip(("x_train", "y_train"), TRAIN, strict=True))
    arrays |= dict(zip(("x_validation", "y_validation"), VALIDATION, strict=True))
    np.savez(folder / "data.npz", **arrays)
    np.savez(folder / "no_y.npz", **{k: v for k, v in arrays.items() if k != "y_train"})
    np.savez(folder / "objects.npz", **{**arrays, "x_train": np.array([{"a": 1}] * 96)})
    np.savez(folder / "classes.npz", **{**arrays, "y_train": with_one(Y, 3)})
    (folder / "truncated.npz").write_bytes((folder / "data.npz").read_bytes()[:1000])
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("years of work")
    with quick_autoencoder(), _nothing_runs(SearchLoop), contextlib.suppress(StartedError):
        in_folder("unfinished")(Files(folder, folder))
    for name in ("finished", "damaged"):
        (folder / name).mkdir()
        manifest = (folder / "unfinished" / "manifest.json").read_text()
        (folder / name / "manifest.json").write_text(manifest)
    (folder / "finished" / "metrics.json").write_text(json.dumps({"format_version": 1}))
    (folder / "damaged" / "manifest.json").write_text("{")
    return folder


class StartedError(Exception):
    """Something was trained, or searched, or converted."""


@contextlib.contextmanager
def _nothing_runs(*owners: type):
    """Forbids training, searching and fine-tuning, or only what the given classes do of it."""

    def started(*_: Any, **__: Any) -> None:
        raise StartedError("work was begun before the call was refused")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (SearchLoop, "run"),
            (CompressedNetwork, "train_steps"),
            (keras.Model, "fit"),
            (keras.Model, "train_step"),
            (keras.Model, "train_on_batch"),
            (search_module, "finish"),
            (demo, "train_base"),
        ):
            if not owners or owner in owners:
                patch.setattr(owner, name, started)
        # Started beside the search to be ready at its end; here nothing gets there.
        patch.setattr(search_module, "start_worker", lambda: None)
        yield


@pytest.fixture
def files(shared, tmp_path):
    """The files; in the end nothing may have been trained, written, changed or removed."""
    tiny()  # trained before training is forbidden
    found = Files(shared, tmp_path)
    before, weights = tree(found), [value.tobytes() for value in tiny().get_weights()]
    with _nothing_runs():
        yield found
    assert tree(found) == before
    assert [value.tobytes() for value in tiny().get_weights()] == weights


def tree(files: Files) -> dict[str, bytes | None]:
    paths = [path for folder in (files.shared, files.place) for path in folder.rglob("*")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def assert_refused(call: Call, files: Files, error: type[Exception], pattern: str) -> None:
    with pytest.raises(rls.RLSparsityError, match=rf"(?s){pattern}") as caught:
        call(files)
    assert isinstance(caught.value, error)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused_before_any_work(case, files):
    call, error, pattern = CALLS[case]
    assert_refused(call, files, error, pattern)


# ------------------------------------------------------------------------------ the command line


def compress(model: str = "good.keras", data: str | None = "data.npz", more: str = "") -> str:
    """A command; {} is the folder of the shared files, {place} one to write to."""
    given = f"--data {{}}/{data} " if data else ""
    return f"compress {{}}/{model} {given}--output {{place}}/run {more}"


COMMANDS = {
    "none": ("", r"arguments are required: command"),
    "unknown": ("compres", r"invalid choice: 'compres' \(choose from .*compress"),
    "unknown option": (compress(more="--agnet dqn"), r"unrecognized arguments: --agnet dqn"),
    "missing model": (compress("nothing.keras"), r"no file or folder .*Expected a \.keras or \.h5"),
    "truncated model": (compress("truncated.keras"), r"is truncated: .*Expected a \.keras or \.h5"),
    "TFLite model": (
        compress("model.tflite"),
        r"seems to be a TFLite file, which cannot be turned",
    ),
    "Keras 3 model": (
        compress("keras_3.keras"),
        r"written by Keras 3\..*Save it again from Keras 2",
    ),
    "Lambda": (compress("lambda.keras"), r"is a Lambda, .*If you trust .*--trusted"),
    "no data": (compress(data=None), r"one of the arguments --data --dataset is required"),
    "missing data": (
        compress(data="no.npz"),
        r"no\.npz' does not exist\. Expected a complete file",
    ),
    "data twice": (
        compress(more="--dataset digits"),
        r"--dataset: not allowed with argument --data",
    ),
    "unknown dataset": (
        compress(data=None, more="--dataset fashion_mnst"),
        r"'fashion_mnst' is neither 'digits', nor .*Did you mean 'fashion_mnist'\?",
    ),
    "demo of an unknown dataset": ("demo --dataset digit", r"'digit' is neither 'digits', nor"),
    "data without labels": (
        compress(data="no_y.npz"),
        r"missing: \['y_train'\]\. Expected \['x_tr",
    ),
    "data with objects": (
        compress(data="objects.npz"),
        r"holds Python objects in 'x_train', which are never unpickled\. Expected numbers",
    ),
    "truncated data": (compress(data="truncated.npz"), r"is truncated: .*Expected a complete file"),
    "no .npz": (compress(data="text.txt"), r"is not a \.npz file\. Expected a complete file"),
    "label out of range": (
        compress(data="classes.npz"),
        r"has the label 3 in row 95; .*3 classes\. Expected integers from 0 to 2",
    ),
    "agent": (compress(more="--agent dqm"), r"--agent: invalid choice: 'dqm' \(choose from .*dqn"),
    "group": (
        compress(more="--group nope"),
        r"--group: invalid choice: 'nope' \(choose from .*ele",
    ),
    "no episode": (compress(more="--episodes 0"), r"episodes=0 cannot be used\. Expected a whole"),
    "episodes in words": (compress(more="--episodes three"), r"invalid int value: 'three'"),
    "target": (
        compress(more="--target-sparsity 1.5"),
        r"Target\(sparsity=1\.5\) cannot be met\. Expected a number above 0 and below 1",
    ),
    "seed": (compress(more="--seed -1"), r"seed=-1 cannot be used\. Expected a whole number"),
    "foreign folder": (
        compress(more="--output {}/foreign"),
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
    "foreign folder, overwriting": (
        compress(more="--output {}/foreign --overwrite"),
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
    "finished run": (
        compress(more="--output {}/finished"),
        r"holds a finished run\. Choose another folder, or pass --overwrite",
    ),
    "uncompiled": (
        compress("uncompiled.keras"),
        r"is saved without a loss.*Pass --loss, for example --loss sparse_categorical_crossentropy",
    ),
    "unknown loss": (
        compress("uncompiled.keras", more="--loss sparse_crossentropy"),
        r"--loss sparse_crossentropy is not known\. Expected .*mean 'sparse_categorical_crossentropy'",
    ),
    "loss of other labels": (
        compress("uncompiled.keras", more="--loss categorical_crossentropy"),
        r"train has labels of shape \(\) per row; .*use the loss sparse_categorical_crossentropy",
    ),
    "demo: target": (
        "demo --target-sparsity 0",
        r"Target\(sparsity=0\.0\) cannot be met\. Expected",
    ),
    "demo: no episode": ("demo --episodes 0", r"episodes=0 cannot be used\. Expected a whole"),
    "demo: epochs": ("demo --finetune-epochs -1", r"finetune_epochs=-1 cannot be used\. Expected"),
    "demo: seed": ("demo --seed -1", r"seed=-1 cannot be used\. Expected a whole number"),
    "demo: memory": (
        "demo --dataset mnist --memory-limit-mb 0",
        r"memory_limit_mb=0\.0 cannot be used\. Expected",
    ),
    "demo: finished run": (
        "demo --output {}/finished",
        r"finished' holds a finished run\. Choose another folder\.$",
    ),
    "demo: foreign folder": (
        "demo --output {}/foreign",
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_refused_in_one_line(case, files, capfd):
    command, pattern = COMMANDS[case]
    arguments = [
        part.replace("{place}", str(files.place)).replace("{}", str(files.shared))
        for part in command.split()
    ]
    capfd.readouterr()
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    printed = capfd.readouterr()
    assert code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("rl-sparsity")
    assert re.search(pattern, line), line


# ---------------------------------------------------------------------------- files at run time


@pytest.fixture(scope="module")
def exported_file(shared) -> None:
    rls.export_tflite(tiny(), shared / "real.tflite", "none")


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNTIME)
def test_a_file_that_cannot_be_run_is_refused(case, exported_file, files):
    call, error, pattern = RUNTIME[case]
    assert_refused(call, files, error, pattern)
