"""What the tables of wrong calls share: models, data, calls, files, and what must not happen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tiny_search import TRAIN, VALIDATION, quick_search, trained, untrained
from toolkit import tfmot

import rl_sparsity_tf as rls
from rl_sparsity_tf import demo
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.search import compressor as search_module
from rl_sparsity_tf.search.loop import SearchLoop

layers = keras.layers
X, Y = TRAIN
ONE_HOT = np.eye(3, dtype=np.float32)[Y]
ALL_ONES = np.ones(len(Y), np.float32)
IMAGES = np.zeros((8, 6, 6, 1), np.float32)
LABELS = np.arange(8) % 3

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
def with_a_metric_of_its_own() -> keras.Model:
    def weird(y_true, y_pred):
        return tf.reduce_sum(y_pred)

    model = untrained()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=[weird])
    return model


def compiled_with(loss: Any, *metrics: Any) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        model = untrained()
        model.compile("adam", loss, metrics=list(metrics))
        return model

    return make


def raising(*_: Any) -> None:
    raise RuntimeError("no loss today")


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


def stopping():
    yield X
    raise OSError("the disk is gone")


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


def not_begun(**options: Any) -> Call:
    """A compressor that is refused before it is given any data."""
    return lambda files: rls.Compressor(options.pop("model", tiny)(), **options)


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


# -------------------------------------------------------------------------- what must not happen


def make_files(folder: Path) -> Path:
    """Writes models, plans, data and folders, most of them bad."""
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
    with quick_search(), nothing_runs(SearchLoop), contextlib.suppress(StartedError):
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
def nothing_runs(*owners: Any) -> Iterator[None]:
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
            (search_module, "play_final"),
            (demo, "train_base"),
        ):
            if not owners or owner in owners:
                patch.setattr(owner, name, started)
        # Started beside the search to be ready at its end; here nothing gets there.
        patch.setattr(search_module, "start_worker", lambda: None)
        yield


@contextlib.contextmanager
def untouched(found: Files) -> Iterator[Files]:
    """In the end nothing may have been trained, written, changed or removed."""
    tiny()  # trained before training is forbidden
    before, weights = tree(found), [value.tobytes() for value in tiny().get_weights()]
    with nothing_runs():
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
