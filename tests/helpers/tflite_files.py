"""Small .tflite files for tests: converted from Keras, or changed table by table."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.files import sha256_of

SPARSE = tf.lite.Optimize.EXPERIMENTAL_SPARSITY
QUANTIZED = tf.lite.Optimize.DEFAULT


def with_zeros(model: keras.Model, share: float, block: int = 1) -> keras.Model:
    """Gives a model random weights; of every kernel's rows, blocks along the inputs are zero."""
    rng = np.random.default_rng(0)
    weights = []
    for values in model.get_weights():
        if values.ndim > 1:
            values = rng.normal(size=values.shape).astype(np.float32)
            used = rng.random((-(-len(values) // block), *values.shape[1:])) >= share
            values *= np.repeat(used, block, axis=0)[: len(values)]
        weights.append(values)
    model.set_weights(weights)
    return model


_CONVERTED: dict[str, bytes] = {}


def convert(model: keras.Model, path: Path, *optimizations, integer=False, types=()) -> Path:
    """Converts with the TFLite converter; `integer` asks for int8 activations too.

    A file of the same model is made once in a process.
    """
    options = str((optimizations, integer, types))
    weights = (part for w in model.get_weights() for part in (str(w.dtype).encode(), w.tobytes()))
    key = sha256_of(model.to_json().encode(), options.encode(), *weights)
    if key not in _CONVERTED:
        _CONVERTED[key] = _converted(model, optimizations, integer, types)
    path.write_bytes(_CONVERTED[key])
    return path


def _converted(model: keras.Model, optimizations, integer, types) -> bytes:
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = list(optimizations)
    converter.target_spec.supported_types = list(types)
    if integer:
        rng = np.random.default_rng(1)
        shape = (1, *model.input_shape[1:])
        converter.representative_dataset = lambda: (
            [rng.normal(size=shape).astype(np.float32)] for _ in range(4)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def tables(path: Path):
    """The schema's own objects for a file's content."""
    return schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)


def pack(model, path: Path) -> Path:
    """Writes the schema's objects as a file."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path
