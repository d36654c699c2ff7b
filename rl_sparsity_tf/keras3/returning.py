"""The way back: a clone of the user's Keras 3 model with the weights of a tf_keras model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import keras as keras3
import tf_keras as keras
from keras.src.models.functional import Functional as Functional3

from rl_sparsity_tf.errors import ModelError, RLSparsityError, one_line
from rl_sparsity_tf.keras3.graph import Conversion
from rl_sparsity_tf.keras3.parts import Keras3Part
from rl_sparsity_tf.keras3.weights import WITH_STATE, compile_back

# What of a configuration is narrower where channels were removed.
_WIDTHS = {
    *("units", "filters", "output_dim", "input_dim", "groups", "num_heads", "key_dim", "value_dim"),
    *("output_shape", "target_shape", "depth_multiplier"),
}


def as_keras_3(model: keras.Model, conversion: Conversion) -> Any:
    """The Keras 3 model that a conversion came from, with another tf_keras model's weights.

    That model has the layers of the converted one, each as wide or narrower. The user's own model
    is not changed. Raises `ModelError` if it cannot be copied.
    """
    try:
        returned = _clone(model, conversion)
    except RLSparsityError:
        raise
    except Exception as error:
        raise ModelError(
            f"The Keras 3 model {conversion.original.name!r} cannot be copied ({one_line(error)}), "
            "so the result could not be handed back as one. Expected classes whose get_config() "
            "returns every argument of their __init__."
        ) from error
    compile_back(returned, conversion.original)
    return returned


def _clone(model: keras.Model, conversion: Conversion) -> Any:
    original = conversion.original
    theirs = dict(_layers_of(model))
    places = {id(made): path for path, made in _layers_of(conversion.model)}
    found = {
        id(ours): theirs.get(places.get(id(made), ""))
        for ours, made in [*conversion.pairs, *conversion.parts]
    }

    def clone(layer: Any) -> Any:
        if type(layer).__name__ in WITH_STATE:
            return _copied_with_state(layer)
        config, other = layer.get_config(), found.get(id(layer))
        if other is not None and not isinstance(other, Keras3Part):
            narrow = other.get_config()
            widths = {key for key in _WIDTHS & set(config) if config[key] is not None}
            config.update({key: narrow[key] for key in widths & set(narrow)})
            # LoRA's factors have been added to the kernels.
            config = {key: value for key, value in config.items() if not key.startswith("lora_")}
        copied = type(layer).from_config(config)
        if isinstance(layer, keras3.layers.Layer):
            copied.trainable = layer.trainable
        return copied

    if isinstance(original, keras3.Sequential | Functional3):
        compiled, original.compiled = original.compiled, False  # a lambda as loss has no config
        try:
            returned = keras3.models.clone_model(original, clone_function=clone)
        finally:
            original.compiled = compiled
    else:
        returned = type(original).from_config(original.get_config())
        returned.build_from_config(original.get_build_config())
    returned.trainable = returned.trainable and original.trainable
    _set_all(original, returned, found)
    return returned


def _set_all(layer: Any, copied: Any, found: dict[int, Any]) -> None:
    """Sets the weights of the layers inside a layer's clone.

    A layer that was converted has those of the layers inside it, such as a Bidirectional.
    """
    for inner, its_copy in _matched(layer, copied):
        if its_copy is inner or not its_copy.weights or type(inner).__name__ in WITH_STATE:
            continue
        other = found.get(id(inner))
        if other is not None:
            _set_weights(inner, its_copy, other)
        elif _inner(inner):
            _set_all(inner, its_copy, found)
        else:
            its_copy.set_weights(inner.get_weights())  # what no output depends on


def _set_weights(layer: Any, copied: Any, other: Any) -> None:
    if isinstance(other, Keras3Part):
        copied.set_weights(other.part.get_weights())
        return
    values, wanted = other.get_weights(), [tuple(weight.shape) for weight in copied.weights]
    if [value.shape for value in values] != wanted:
        raise ModelError(
            f"The layer {layer.name!r} ({type(layer).__name__}) would be handed back with weights "
            f"of the shapes {[value.shape for value in values]}, and its copy has {wanted}. "
            "Expected a subclassed model to keep its channels: choose another target."
        )
    copied.set_weights(values)


def _copied_with_state(layer: Any) -> Any:
    if type(layer) is keras3.layers.Lambda:
        config = layer.get_config()
        return keras3.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=config.get("dtype"),
        )
    try:
        return copy.deepcopy(layer)
    except Exception:
        return layer  # with a function of the user's that cannot be written; nothing changes it


def _inner(layer: Any) -> list[Any]:
    return [inner for inner in layer._layers if inner.weights]


def _matched(layer: Any, copied: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of a layer's inner layers and its clone's: by name, or in order where names differ."""
    ours, theirs = _inner(layer), _inner(copied)
    named = {inner.name: inner for inner in theirs}
    if all(inner.name in named for inner in ours):
        theirs = [named[inner.name] for inner in ours]
    yield from zip(ours, theirs, strict=True)


def _layers_of(model: keras.Model, path: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers_of(layer, f"{path}/{layer.name}")
        else:
            yield f"{path}/{layer.name}", layer
