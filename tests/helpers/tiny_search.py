"""What the tests of the search share: a tiny trained network, its data, and a quick search."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation import size_budget
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment import network as network_module
from rl_sparsity_tf.environment.autoencoder import WeightAutoencoder
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.export.size_model import SizeModel
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.search import compressor as search_module
from rl_sparsity_tf.search import early_files
from rl_sparsity_tf.search.finishing import Figures
from rl_sparsity_tf.search.run_files import read_arrays, write_arrays

DQN = rls.DQN(hidden_layers=(8,), train_steps=4, batch_size=8)
PPO = rls.PPO(hidden_layers=(8,), num_epochs=2)
SPARSITY = 0.6


@contextlib.contextmanager
def quick_search() -> Iterator[None]:
    """The autoencoder is trained for one pass instead of twelve, and a dense model is exported,
    and measured for the size model, once.

    Everything else is what users run.
    """
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(WeightAutoencoder, epochs=1)
        patch.setattr(network_module, "WeightAutoencoder", quick)
        for name in ("export_and_score", "export_dense_int8"):
            patch.setattr(early_files, name, once_per_model(getattr(early_files, name)))
        patch.setattr(size_budget, "SizeModel", _size_model)
        yield


_EXPORTED: dict[str, Any] = {}


def once_per_model(export: Callable[..., Any]) -> Callable[..., Any]:
    """What a search says of the dense model, kept for searches of the same model and data."""
    if hasattr(export, "real"):
        return export

    def kept(model: keras.Model, *arguments: Any) -> Any:
        (figures,) = [one for one in arguments if isinstance(one, Figures)]
        data = tf.nest.flatten([figures.test, figures.representative(model)])
        arrays = [np.asarray(one) for one in (*model.get_weights(), *data) if one is not None]
        others = [one for one in arguments if one is not figures]
        words = (export.__name__, model.to_json(), str(figures.metric), str(others))
        texts = [word.encode() for word in (*words, str([one.shape for one in arrays]))]
        key = sha256_of(*texts, *(np.ascontiguousarray(one).tobytes() for one in arrays))
        if key not in _EXPORTED:
            _EXPORTED[key] = export(model, *arguments)
        return _EXPORTED[key]

    kept.real = export  # type: ignore[attr-defined]
    return kept


_SIZE_MODELS: dict[str, SizeModel] = {}


def _size_model(model: keras.Model, *arguments: Any, **options: Any) -> SizeModel:
    """A size model, which takes three conversions, made once of the same model."""
    words = (model.to_json(), str((arguments, options)))
    weights = (np.ascontiguousarray(one).tobytes() for one in model.get_weights())
    key = sha256_of(*(word.encode() for word in words), *weights)
    if key not in _SIZE_MODELS:
        _SIZE_MODELS[key] = SizeModel(model, *arguments, **options)
    made = copy.copy(_SIZE_MODELS[key])
    made._model = model
    made._kernels = {kernel.path: kernel for kernel in find_kernels(model)}
    return made


class StoppedError(Exception):
    """Raised in place of the final fine-tuning, or in the middle of an episode."""


def stop(*_: Any, **__: Any) -> None:
    raise StoppedError


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that a small network separates well."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    x[np.arange(count), y] += 2.5
    return x, y


TRAIN, VALIDATION, TEST = rows(96, 0), rows(60, 1), rows(50, 2)


@functools.cache
def _weights() -> list[np.ndarray]:
    keras.utils.set_random_seed(11)
    model = untrained()
    model.fit(*rows(600, 3), epochs=6, batch_size=32, verbose=0)
    return model.get_weights()


def untrained() -> keras.Model:
    """Kernels of 6 x 8 and 8 x 3: 72 weights."""
    model = keras.Sequential(
        [
            keras.layers.Input((6,), name="given"),
            keras.layers.Dense(8, activation="relu", name="first"),
            keras.layers.Dense(3, activation="softmax", name="last"),
        ],
        name="tiny",
    )
    model.compile(
        keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


@functools.cache
def _stepped() -> list[np.ndarray]:
    model = untrained()
    # By hand: Keras's own step is traced, which takes longer than many a test.
    model.optimizer.apply_gradients((tf.ones_like(w), w) for w in model.trainable_weights)
    return [variable.numpy() for variable in model.optimizer.variables]


def trained() -> keras.Model:
    """The same trained model every time, its optimizer having taken a step."""
    model, stepped = untrained(), _stepped()
    model.optimizer.build(model.trainable_weights)
    for variable, value in zip(model.optimizer.variables, stepped, strict=True):
        variable.assign(value)
    model.set_weights(_weights())
    return model


def compressor(model: keras.Model, agent: Any = DQN, **options: Any) -> rls.Compressor:
    """A compressor whose searches take few steps."""
    options.setdefault("target", rls.Target(sparsity=SPARSITY))
    options.setdefault("recovery", rls.Recovery(method="finetune", steps=1))
    options.setdefault("buckets", 3)
    if options["target"].tflite_bytes:  # the choice of a storage takes several networks
        options.setdefault("group", "element")
    return rls.Compressor(model, agent=agent, **options)


def search(one: rls.Compressor, **options: Any) -> rls.Result:
    """A search on the tiny data."""
    arguments = {
        "train": TRAIN,
        "validation_data": VALIDATION,
        "episodes": 4,
        "batch_size": 32,
        "finetune_epochs": 2,
        "finalists": 1,
        "verbose": 0,
        **options,
    }
    return one.search(arguments.pop("train"), **arguments)


def episodes_of(one: rls.Compressor, **options: Any) -> list[dict[str, Any]]:
    """A search's journal, without the final fine-tuning where only the episodes are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "play_final", stop)
        with pytest.raises(StoppedError):
            search(one, **options)
    return journal_of(Path(str(one.directory)))


def interrupt(one: rls.Compressor, after: int, **options: Any) -> None:
    """Starts a search and raises in the middle of an episode, after so many decisions."""
    taken = 0
    step = LayerEnvironment._step

    def stopping(self: LayerEnvironment, action: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > after:
            raise StoppedError
        return step(self, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerEnvironment, "_step", stopping)
        with pytest.raises(StoppedError):
            search(one, **options)


def journal_of(folder: Path) -> list[dict[str, Any]]:
    """A run's journal, without its lines' checksums."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "checksum"} for line in lines]


def strip_seals(folder: Path) -> None:
    """Turns a run into what the version before checksums wrote."""
    manifest = json.loads((folder / "manifest.json").read_text())
    seal = manifest.pop("id")
    manifest["format_version"] = 1
    for name in ("batch_size", "latency_table"):
        manifest["arguments"].pop(name, None)
    for name in ("architecture", "compiled"):
        manifest["fingerprints"].pop(name, None)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    entries = journal_of(folder)
    (folder / "journal.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    # A kill leaves what it was about to give a checkpoint's name, under a hidden one of its own.
    for path in (folder / "checkpoints").glob("[!.]*.npz"):
        write_arrays(path, read_arrays(path, f"{seal} {path.stem}"), None)


def figures_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without the clock."""
    return [{key: value for key, value in e.items() if key != "seconds"} for e in history]


def wide_rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes among 60 inputs."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 60)).astype(np.float32)
    x[np.arange(count), y] += 4
    return x, y


WIDE_TRAIN, WIDE_VALIDATION = wide_rows(128, 0), wide_rows(60, 1)


@functools.cache
def wide() -> keras.Model:
    """A model large enough for its file to shrink: 17.7 kB in float32, 6.6 kB as int8."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    stack = [layers.Dense(64, activation="relu"), layers.Dense(3, activation="softmax")]
    model = keras.Sequential([layers.Input((60,)), *stack], name="sizes")
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    model.fit(*wide_rows(600, 5), epochs=8, verbose=0)
    return model


def wide_network(
    target: rls.Target, group: str = "element", method: str = "least_squares"
) -> network_module.CompressedNetwork:
    """The network that a search of the model above plays on."""
    model = wide()
    return network_module.CompressedNetwork(
        model,
        training_data(WIDE_TRAIN, model, batch_size=32),
        evaluation_data(WIDE_VALIDATION, model, "validation_data"),
        target=target,
        group=group,
        recovery=rls.Recovery(method=method),
    )
