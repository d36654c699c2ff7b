"""Fingerprints of what a run is about, by which its folder is known again."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.batches import TrainingData
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.layers.compile_state import compile_arguments
from rl_sparsity_tf.search.descriptions import describe_compilation, describe_model
from rl_sparsity_tf.search.run_directory import data_fingerprint, model_fingerprint

_ROWS = 8192


def fingerprints_of(
    model: keras.Model,
    train: Any,
    data: TrainingData,
    validation: list[Any],
    test: list[Any] | None,
) -> dict[str, Any]:
    """Fingerprints of a model's weights and its data, and descriptions of the model, by name.

    Args:
        model: The model.
        train: Training rows as the search was given them; a dataset is known by its pool.
        data: The training data made of them.
        validation: Validation batches.
        test: Test batches, if there are any.
    """
    compiled = compile_arguments(model) or {}
    rows = None if isinstance(train, tf.data.Dataset) else tf.nest.flatten(train)
    # The name of the loss and the sample of the rows are what runs of format 1 know.
    every = {"rows": data_fingerprint([train])} if rows and len(rows[0]) > _ROWS else {}
    return {
        "model": model_fingerprint(model),
        "frozen_layers": _frozen(model),
        "loss": name_of(compiled.get("loss")),
        "train": data_fingerprint(
            data.pool if isinstance(train, tf.data.Dataset) else _evenly(train)
        ),
        "validation_data": data_fingerprint(validation),
        "test_data": data_fingerprint(test or []),
        **every,
        "architecture": describe_model(model),
        "compiled": describe_compilation(model),
    }


def _frozen(model: keras.Model) -> str:
    """Which weights are not trained, whatever they are called."""
    fixed = {id(weight) for weight in model.non_trainable_weights}
    return sha256_of(bytes(id(weight) in fixed for weight in model.weights))


def name_of(value: Any) -> str:
    """What a function, class or object goes by in a manifest."""
    name = getattr(value, "__qualname__", None) or getattr(value, "name", None)
    return str(name or (value if isinstance(value, str) else type(value).__qualname__))


def _evenly(arrays: Batch) -> Batch:
    """Rows for a fingerprint: unlike the pool's, they do not depend on the seed."""
    count = len(tf.nest.flatten(arrays)[0])
    rows = np.linspace(0, count - 1, min(count, _ROWS)).astype(int)
    x, y, weights = tf.nest.map_structure(lambda a: None if a is None else a[rows], arrays)
    return x, y, weights
