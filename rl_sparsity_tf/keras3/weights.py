"""Weights and compile state, from Keras 3 to tf_keras and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras as keras3
import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.configs import parameters_of, policy_name, translated
from rl_sparsity_tf.keras3.graph import Conversion
from rl_sparsity_tf.keras3.parts import array_of, on_tensorflow

_log = logging.getLogger(__name__)

# Have state beside their weights, or code, which `native` has passed on already.
WITH_STATE = {
    *("Normalization", "StringLookup", "IntegerLookup", "TextVectorization", "Lambda"),
    "Discretization",
}
_STEPS = ("train_step", "compute_loss")
_NOT_OF_THE_OPTIMIZER = {"name", "learning_rate", "loss_scale_factor"}
_NOT_OF_THE_OPTIMIZER |= {"gradient_accumulation_steps"}


def copy_weights(conversion: Conversion) -> None:
    """Copies the weights of a Keras 3 model into the tf_keras model made of it."""
    for source, destination in conversion.pairs:
        if type(source).__name__ in WITH_STATE:
            continue
        values = _weights_of(source)
        wanted = [tuple(weight.shape) for weight in destination.weights]
        if [value.shape for value in values] != wanted:
            raise ModelError(
                f"The weights of the layer {source.name!r} ({type(source).__name__}) have the "
                f"shapes {[value.shape for value in values]} in Keras 3 and {wanted} in tf_keras. "
                "Expected the same: build the model with tf_keras."
            )
        destination.set_weights(values)


def _weights_of(layer: Any) -> list[np.ndarray]:
    """A layer's weights as arrays; LoRA's factors are added into the kernels."""
    merged: dict[int, Any] = {}
    left_out: set[int] = set()
    for owner in layer._flatten_layers():
        if getattr(owner, "lora_enabled", False):
            for name in ("_kernel", "_embeddings"):
                if getattr(owner, name, None) is not None:
                    merged[id(getattr(owner, name))] = getattr(owner, name[1:])
            factors = {key: value for key, value in vars(owner).items() if key.startswith("lora_")}
            left_out |= {id(value) for value in factors.values() if hasattr(value, "assign")}
    kept = [weight for weight in layer.weights if id(weight) not in left_out]
    return [array_of(merged.get(id(weight), weight)) for weight in kept]


# ---------------------------------------------------------------------- compile state


def compile_like(original: Any, model: keras.Model) -> None:
    """Compiles a tf_keras model as the Keras 3 model is compiled, if that is.

    Raises `ModelError` for a metric that tf_keras has no counterpart of. An optimizer that it has
    none of is replaced by Adam at the same rate, with a warning: fine-tuning has its own anyway.
    """
    if not original.compiled:
        return
    own = [name for name in _STEPS if _is_own(original, name)]
    if own:
        _log.warning(
            "The %s() of %s is not used while its copies are trained: what counts is the compiled "
            "loss.",
            "() and ".join(own),
            type(original).__name__,
        )
    # The objects themselves: a lambda has no configuration.
    state = original._compile_config.config
    arguments: dict[str, Any] = {"optimizer": _optimizer(original.optimizer)}
    for name, convert in (("loss", _loss), ("metrics", _metric), ("weighted_metrics", _metric)):
        if state.get(name) is not None:
            arguments[name] = _mapped(convert, state[name])
    if state.get("loss_weights") is not None:
        arguments["loss_weights"] = state["loss_weights"]
    model.compile(**arguments)


def _is_own(model: Any, name: str) -> bool:
    return not getattr(type(model), name).__module__.startswith("keras.")


def _mapped(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(convert, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(convert, item) for item in value]
    return None if value is None else convert(value)


def _loss(loss: Any) -> Any:
    if isinstance(loss, keras3.losses.Loss):
        converted = _of_the_same_name(loss, keras.losses)
        if converted is None and not on_tensorflow():
            raise _needs_tensorflow(loss)
        return _called_as_in_keras_3(loss) if converted is None else converted
    if isinstance(loss, str) and not _known(loss, keras.losses):
        if not on_tensorflow():
            raise _needs_tensorflow(loss)
        return _called_as_in_keras_3(keras3.losses.get(loss))
    return _function(loss)


def _metric(metric: Any) -> Any:
    if isinstance(metric, str) and metric not in ("accuracy", "acc", "crossentropy", "ce"):
        if _known(metric, keras.metrics):
            return metric
        metric = keras3.metrics.get(metric)
    if isinstance(metric, keras3.metrics.Metric):
        converted = _of_the_same_name(metric, keras.metrics)
        if converted is None:
            raise _no_counterpart("metric", metric)
        return converted
    return _function(metric)


def _known(name: str, module: Any) -> bool:
    try:
        return callable(module.get(name))
    except ValueError:
        return False


def _function(value: Any) -> Any:
    """A function of Keras's own by its name; the user's, which computes with TensorFlow here."""
    if isinstance(value, str) or not callable(value):
        return value
    own = str(getattr(value, "__module__", "")).startswith("keras.")
    if own and hasattr(value, "__name__"):
        return value.__name__
    if not on_tensorflow():
        raise _needs_tensorflow(value)
    return _called_as_in_keras_3(value)


def _called_as_in_keras_3(function: Any) -> Any:
    """A loss or metric function that gets class numbers as Keras 3 passes them, with one axis.

    tf_keras gives them a second one, of size 1, to match the outputs.
    """

    def call(y: Any, predicted: Any) -> Any:
        if y.shape.rank == predicted.shape.rank and y.shape[-1] == 1 != predicted.shape[-1]:
            y = tf.squeeze(y, -1)
        return function(y, predicted)

    # Scores are shown under it.
    call.__name__ = str(getattr(function, "__name__", None) or getattr(function, "name", "loss"))
    return call


def _of_the_same_name(thing: Any, module: Any) -> Any:
    """A loss or metric of tf_keras with the settings of one of Keras's own, or None."""
    cls2 = getattr(module, type(thing).__name__, None)
    if cls2 is None or not type(thing).__module__.startswith("keras."):
        return None
    named, named3 = parameters_of(cls2), parameters_of(type(thing))
    settings = {}
    for key, value in thing.get_config().items():
        if key == "dtype":
            if issubclass(cls2, keras.metrics.Metric):
                settings[key] = policy_name(value)
        elif key in named:
            settings[key] = translated(value)
        elif value is not None and not (key in named3 and value == named3[key].default):
            return None
    if settings.get("reduction", "auto") not in ("auto", "none", "sum", "sum_over_batch_size"):
        return None
    return cls2(**settings)


def _no_counterpart(kind: str, thing: Any) -> ModelError:
    return ModelError(
        f"The model is compiled with the {kind} {getattr(thing, 'name', thing)!r} "
        f"({type(thing).__name__}), which tf_keras has no counterpart of. Expected a {kind} of "
        f"Keras's own that both have, or a function of tensors: compile the model with another "
        f"{kind}."
    )


def _needs_tensorflow(thing: Any) -> ModelError:
    named = getattr(thing, "__name__", None) or getattr(thing, "name", thing)
    return ModelError(
        f"The model is compiled with {named!r}, which tf_keras has no counterpart of, so it would "
        f"run as it is. That needs Keras 3 on TensorFlow; KERAS_BACKEND is "
        f"{keras3.backend.backend()}. Expected a loss and metrics that both have: compile the "
        "model with others, or set KERAS_BACKEND=tensorflow."
    )


def _optimizer(optimizer: Any) -> Any:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of mixed precision
    settings = optimizer.get_config()
    cls2 = getattr(keras.optimizers, type(optimizer).__name__, None)
    rate = float(array_of(optimizer.learning_rate))
    if cls2 is None:
        _log.warning(
            "tf_keras has no optimizer %s: the model is taken with Adam at its learning rate %g.",
            type(optimizer).__name__,
            rate,
        )
        return keras.optimizers.Adam(rate)
    named = parameters_of(cls2)
    kept = {k: v for k, v in settings.items() if k in named and k not in _NOT_OF_THE_OPTIMIZER}
    schedule = settings.get("learning_rate")
    if isinstance(schedule, dict):
        found = getattr(keras.optimizers.schedules, str(schedule.get("class_name")), None)
        if found is not None:
            return cls2(learning_rate=found(**schedule["config"]), **kept)
    return cls2(learning_rate=rate, **kept)


def compile_back(model: Any, original: Any) -> None:
    """Compiles a Keras 3 model as another is, with an optimizer and metrics of its own."""
    if not original.compiled:
        return
    state = dict(original._compile_config.config)
    state["optimizer"] = _fresh(original.optimizer)
    for name in ("metrics", "weighted_metrics"):
        if state.get(name) is not None:
            state[name] = _mapped(
                lambda one: _fresh(one) if isinstance(one, keras3.metrics.Metric) else one,
                state[name],
            )
    model.compile(**state)


def _fresh(thing: Any) -> Any:
    return type(thing).from_config(thing.get_config())
