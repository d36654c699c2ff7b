"""Carrying a model's loss, metrics and optimizer over to a copy of it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError


def compile_arguments(model: keras.Model) -> dict[str, Any] | None:
    """What a model was compiled with, fit for compiling a copy; None if it was not compiled.

    Losses are stateless and shared; metrics and optimizers carry variables and are made anew.
    """
    config = getattr(model, "_compile_config", None)
    if config is None or getattr(model, "optimizer", None) is None:
        return None
    arguments = dict(config.config)
    arguments["optimizer"] = fresh_optimizer(model)
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = tf.nest.map_structure(_fresh_metric, arguments.get(name))
    return arguments


def fresh_optimizer(model: keras.Model) -> keras.optimizers.Optimizer:
    """An optimizer with the settings of the model's, and no state."""
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", None)  # LossScaleOptimizer wraps it again
    optimizer = inner if inner is not None else optimizer
    return optimizer.__class__.from_config(optimizer.get_config())


def copy_compile_state(source: keras.Model, destination: keras.Model) -> None:
    """Compiles `destination` as `source` is compiled; leaves it uncompiled if that one is."""
    arguments = compile_arguments(source)
    if arguments is None:
        return
    try:
        destination.compile(**arguments)
    except TypeError as error:
        # A class whose compile() takes other arguments than Keras's.
        raise ModelError(
            f"The compile() of {type(source).__name__} does not take Keras's arguments "
            f"({str(error).strip().splitlines()[0]}), so a copy cannot be compiled as the model "
            "is. Let it take optimizer, loss and metrics, or give the model uncompiled."
        ) from error


def _fresh_metric(metric: Any) -> Any:
    if isinstance(metric, keras.metrics.Metric):
        return metric.__class__.from_config(metric.get_config())
    return metric
