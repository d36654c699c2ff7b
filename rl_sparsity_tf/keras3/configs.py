"""Configurations of Keras 3 objects in tf_keras's words."""

from __future__ import annotations

import inspect
from typing import Any

import keras as keras3
import numpy as np
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.functions import activation

# Never change what is computed at inference, or are told otherwise; and zero_output_for_mask, with
# which a layer does something only where it is called with a mask (LSTM and GRU take it).
_LEFT_OUT = {
    *("build_config", "compile_config", "autocast", "use_cudnn", "flash_attention", "optional"),
    *("quantization_config", "lora_rank", "lora_alpha", "gptq_unpacked_column_size"),
    "zero_output_for_mask",
}
_RENAMED = {"LeakyReLU": {"negative_slope": "alpha"}}
_INITIALIZERS = {"OrthogonalInitializer": "Orthogonal"}
_VIA_KWARGS = {f"Global{kind}Pooling1D": ("keepdims",) for kind in ("Average", "Max")}
_BASE = {"name", "dtype", "trainable", "activity_regularizer"}


class NoCounterpartError(ModelError):
    """A part of a Keras 3 model that tf_keras has no counterpart of."""


class QuantizedError(NoCounterpartError):
    """A part whose weights are integers already: nothing to compress, so it cannot run as it is."""


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """The named parameters of a class's __init__, its bases' among them."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            named = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= {
                one.name: one
                for one in named
                if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
            }
    return found


def config_of(cls3: type, cls2: type, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a Keras 3 layer for the class of tf_keras.

    Raises `NoCounterpartError` for a setting that it does not have and that is not the default.
    """
    named3, named2 = parameters_of(cls3), parameters_of(cls2)
    result: dict[str, Any] = {}
    for key, value in config.items():
        key2 = _RENAMED.get(cls3.__name__, {}).get(key, key)
        if key == "dtype":
            result[key] = policy_name(value)
        elif key in _LEFT_OUT:
            if key in named2:
                result[key] = value
        elif key2 in named2 or key in _BASE or key in _VIA_KWARGS.get(cls2.__name__, ()):
            # An activation that tf_keras lacks, or knows under another name.
            named = isinstance(value, str) and key.endswith("activation")
            result[key2] = _named_activation(value) if named else translated(value)
        elif (
            key == "seed"
            or (key == "data_format" and value == "channels_last")
            or value is None
            or value is False
            or (key in named3 and value == named3[key].default)
        ):
            continue
        else:
            raise NoCounterpartError(f"tf_keras has no {cls3.__name__}({key}={value!r})")
    return result


def policy_name(value: Any) -> Any:
    """A dtype policy's name, of its configuration."""
    if isinstance(value, dict):
        if value.get("class_name") != "DTypePolicy":
            raise QuantizedError(f"its dtype policy is a {value.get('class_name')}")
        return value["config"]["name"]
    return value


def translated(value: Any) -> Any:
    """A value of a configuration with its nested objects, functions and policies translated."""
    if isinstance(value, list | tuple):
        return type(value)(translated(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value.get("class_name") is None:
        return {key: translated(item) for key, item in value.items()}
    kind, module = str(value["class_name"]), str(value.get("module"))
    inner: Any = value.get("config")
    if kind in ("__numpy__", "__tensor__"):
        return np.array(inner["value"], inner["dtype"])
    if kind == "SeedGenerator":
        return inner.get("seed")
    if kind.endswith("DTypePolicy") or kind == "DTypePolicyMap":
        return policy_name(value)
    if kind == "function":
        if module.startswith(("builtins", "keras")) and hasattr(keras3.activations, str(inner)):
            return _named_activation(str(inner))
        if keras3.backend.backend() != "tensorflow":
            raise NoCounterpartError(f"its function {inner!r} is none of tf_keras")
        return keras3.saving.deserialize_keras_object(value)  # the user's own function
    if hasattr(keras3.layers, kind) and module.startswith("keras"):
        return _layer(kind, inner)
    kind = _INITIALIZERS.get(kind, kind)
    if module == "keras.initializers":  # weights are copied: only the kind counts
        return _initializer(kind, inner)
    inside = translated(inner) if isinstance(inner, dict) else inner
    return {**value, "class_name": kind, "config": inside}


def _layer(kind: str, inner: dict[str, Any]) -> dict[str, Any]:
    cls2 = getattr(keras.layers, kind, None)
    if cls2 is None:
        raise NoCounterpartError(f"tf_keras has no {kind}, which is inside another layer")
    config = config_of(getattr(keras3.layers, kind), cls2, inner)
    return {
        "class_name": kind,
        "config": config,
        "module": "keras.layers",
        "registered_name": None,
    }


def _initializer(kind: str, inner: dict[str, Any]) -> Any:
    cls2 = getattr(keras.initializers, kind, None)
    if cls2 is None:
        return "zeros"
    named = parameters_of(cls2)
    config = {key: translated(value) for key, value in inner.items() if key in named}
    return {"class_name": kind, "config": config}


def _named_activation(name: str) -> Any:
    found = activation(name)
    if found is None:
        raise NoCounterpartError(
            f"the activation {name!r} is none of tf_keras, and under another backend of Keras than "
            "TensorFlow it cannot be run as it is"
        )
    return found
