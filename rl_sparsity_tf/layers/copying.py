"""Copies of layers and models that share nothing with the original."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError, RLSparsityError, one_line
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.signature import input_specs, is_graph, pack_inputs
from rl_sparsity_tf.layers.structure import (
    direct_sublayers,
    recurrent_layers,
    unreachable_sublayers,
)
from rl_sparsity_tf.quiet import quiet_tensorflow

Convert = Callable[[keras.layers.Layer], keras.layers.Layer]


def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Makes a layer of the same class, configuration and name, with weights of its own.

    Args:
        layer: A layer that is no Sequential or functional model.

    Raises:
        ModelError: If the class neither describes itself (`get_config`) nor can be copied.
    """
    try:
        # A class without a get_config of its own leaves name and type out; Keras warns of it.
        with quiet_tensorflow(), _policy(layer.dtype_policy):
            copied = type(layer).from_config(layer.get_config())
        copied._name = layer.name
        _copy_vocabulary(layer, copied)
        return copied
    except Exception as error:
        reason = error
    # Python's own copy, with the layer taken out of its graph, which would be copied as well.
    shelved = {name: vars(layer)[name] for name in _GRAPH_LINKS if name in vars(layer)}
    try:
        for name in shelved:
            object.__setattr__(layer, name, [])
        return copy.deepcopy(layer)
    except Exception as error:
        raise ModelError(
            f"The layer {layer.name!r} of class {type(layer).__name__} cannot be copied "
            f"({one_line(reason)}). Give its class a get_config() that returns every argument of "
            "its __init__."
        ) from error
    finally:
        for name, value in shelved.items():
            object.__setattr__(layer, name, value)


def _copy_vocabulary(source: keras.layers.Layer, destination: keras.layers.Layer) -> None:
    """Passes on what `adapt` has learnt, which is neither in the config nor in the weights."""
    words = getattr(source, "get_vocabulary", None)
    if words is not None and words(include_special_tokens=False):
        with scratch_folder() as folder:
            source.save_assets(str(folder))
            destination.load_assets(str(folder))


@contextlib.contextmanager
def _policy(policy: keras.mixed_precision.Policy) -> Iterator[None]:
    before = keras.mixed_precision.global_policy()
    # Lookup layers are integers or text, which a global policy cannot be, and their configs say so.
    if tf.as_dtype(policy.compute_dtype or "float32").is_floating:
        keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


_GRAPH_LINKS = ("_inbound_nodes_value", "_outbound_nodes_value")


def rebuild(model: keras.Model, convert: Convert) -> keras.Model:
    """Rebuilds a model with every layer converted, descending into nested models.

    Args:
        model: A built Sequential, functional or subclassed model.
        convert: Called once with every layer that is no Sequential or functional model; returns
            the layer to put in its place.

    Returns:
        A built model of the same class; its weights are not copied.

    Raises:
        ModelError: If the model or a layer cannot be rebuilt.
    """
    converted: dict[int, keras.layers.Layer] = {}

    def visit(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) not in converted:
            if is_graph(layer):
                converted[id(layer)] = keras.models.clone_model(layer, clone_function=visit)
                freeze_alike(layer, converted[id(layer)])
            else:
                with tape.stop_recording():  # copying reads the original's weights
                    converted[id(layer)] = convert(layer)
        return converted[id(layer)]

    with tf.GradientTape() as tape:
        if is_graph(model):
            rebuilt = _rebuild_graph(model, visit)
        else:
            rebuilt = _rebuild_subclassed(model, visit, tape)
    _check_tracked(model, rebuilt, tape.watched_variables())
    freeze_alike(model, rebuilt)
    return rebuilt


def freeze_alike(source: keras.layers.Layer, destination: keras.layers.Layer) -> None:
    """Freezes or thaws a layer or model as another is, without those inside it."""
    # The public property would pass the state on to them, frozen one by one as they may be.
    destination._trainable = source._trainable


def _rebuild_graph(model: keras.Model, visit: Convert) -> keras.Model:
    try:
        # The model's own policy decides whether compile scales the loss.
        with _policy(model.dtype_policy):
            rebuilt = keras.models.clone_model(model, clone_function=visit)
        if not rebuilt.built or not rebuilt.inputs:
            rebuilt.build(model.input_shape)
    except RLSparsityError:
        raise
    except Exception as error:
        raise ModelError(
            f"The model {model.name!r} cannot be rebuilt layer by layer ({one_line(error)}). Let "
            "it use weights only in the layers that own them, and give each layer class a "
            "get_config() that returns every argument of its __init__."
        ) from error
    return rebuilt


def _check_tracked(model: keras.Model, rebuilt: keras.Model, read: Sequence[tf.Variable]) -> None:
    """Raises if a copy reads variables that are no weights of it: new ones, or the original's."""
    recurrent = recurrent_layers(rebuilt)
    states = tf.nest.flatten([layer.states for layer in recurrent if layer.stateful])
    # Vocabularies are among the weights without being variables.
    known = {handle for weight in [*rebuilt.weights, *states] for handle in _handles(weight)}
    hidden = [variable.name for variable in read if not known.intersection(_handles(variable))]
    if hidden:
        raise ModelError(
            f"The model {model.name!r} ({type(model).__name__}) uses weights that Keras does not "
            f"track where they are used ({', '.join(hidden)}), so a copy would not have them. Keep "
            "layers in attributes, or in lists or dicts there, and not in sets or functions; use "
            "a weight only in the layer that owns it."
        )


def _handles(variable: Any) -> list[int]:
    """What a variable is known by, however it is wrapped; one of a strategy has several."""
    parts = getattr(variable, "values", None) or [variable]
    return [id(getattr(part, "handle", None)) for part in parts]


def _rebuild_subclassed(model: keras.Model, visit: Convert, tape: tf.GradientTape) -> keras.Model:
    kind = type(model).__name__
    if unreachable_sublayers(model):
        names = [layer.name for layer in unreachable_sublayers(model)]
        raise ModelError(
            f"The layers {names} of the model {model.name!r} ({kind}) are in no attribute, list or "
            "dict of it (by text keys without '/'), so they cannot be exchanged. Keep them in "
            "attributes of the model."
        )
    try:
        # Its layers of its own making are thrown away; what they read does not matter.
        with quiet_tensorflow(), _policy(model.dtype_policy), tape.stop_recording():
            shell = type(model).from_config(model.get_config())
        shell._name = model.name
        for name, value in list(vars(model).items()):
            if name.startswith("_self_"):  # Keras's own bookkeeping
                continue
            if _holds_layers(value):
                setattr(shell, name, _converted(value, visit))
            elif name not in _keras_attributes() and _differs(value, vars(shell).get(name)):
                setattr(shell, name, copy.deepcopy(value))
        _call_once(shell, model)
    except RLSparsityError:
        raise
    except Exception as error:
        raise ModelError(
            f"The model {model.name!r} cannot be rebuilt from its class {kind} "
            f"({one_line(error)}). Give {kind} a get_config() that returns every argument of its "
            "__init__, and let its call() use its layers only by calling them; or build it with "
            "tf_keras.Model(inputs, outputs)."
        ) from error
    return shell


def _holds_layers(value: Any) -> bool:
    if isinstance(value, keras.layers.Layer):
        return not isinstance(value, keras.metrics.Metric)
    if isinstance(value, Mapping):
        return any(_holds_layers(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_holds_layers(item) for item in value)


@functools.cache
def _keras_attributes() -> frozenset[str]:
    """Attributes that every model has."""
    model = keras.Model(name="bare")
    model.compile("sgd", "mse")
    return frozenset({*vars(model), "history", "name"})


def plain_attributes(source: Any, fresh: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of an object that one made of its config may lack, those of Keras left out."""
    for name, value in list(vars(source).items()):
        if not name.startswith("_self_") and _differs(value, vars(fresh).get(name)):
            yield name, value


def _differs(value: Any, fresh: Any) -> bool:
    """Whether a value may be another than the one that a copy was made with, and can be copied.

    Keras leaves arguments that it cannot describe out of a model's config, all of them if there is
    one such: a copy then has the defaults, and would silently compute something else.
    """
    if isinstance(value, types.FunctionType):
        names = ("__module__", "__qualname__")  # a function of __init__ is the copy's own
        return any(getattr(value, name) != getattr(fresh, name, None) for name in names)
    return _is_plain(value)


def _is_plain(value: Any, depth: int = 4) -> bool:
    if depth == 0:
        return False
    if isinstance(value, list | tuple):
        return all(_is_plain(item, depth) for item in value)
    if isinstance(value, Mapping):
        return all(_is_plain(item, depth) for item in value.values())
    plain = bool | int | float | complex | str | bytes | np.ndarray | np.generic | tf.DType
    if value is None or isinstance(value, plain):
        return True
    # Settings kept in an object, such as one of a dataclass.
    settings = getattr(value, "__dict__", None)
    library = type(value).__module__.partition(".")[0] in ("tensorflow", "tf_keras", "builtins")
    if not isinstance(settings, dict) or isinstance(value, type) or library:
        return False
    return all(_is_plain(item, depth - 1) for item in settings.values())


def _converted(value: Any, visit: Convert) -> Any:
    if isinstance(value, keras.layers.Layer):
        return visit(value)
    if isinstance(value, Mapping):
        return {key: _converted(item, visit) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_converted(item, visit) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _call_once(shell: keras.Model, model: keras.Model) -> None:
    """Builds a copy as its original was built: by a call on data of the same form."""
    arrays = [np.zeros(spec.batch_shape(1), spec.dtype) for spec in input_specs(model)]
    shell(pack_inputs(model, [tf.constant(array) for array in arrays]))


def copy_weights(source: keras.layers.Layer, destination: keras.layers.Layer) -> None:
    """Gives one layer the weights of another, whose copy it is, and freezes what is frozen there.

    Raises:
        ModelError: If the weights differ in number or shape, as when two layers share a variable.
    """
    if _shapes(destination) != _shapes(source):
        raise ModelError(
            f"A copy of the layer {source.name!r} of class {type(source).__name__} has other "
            f"weights ({_shapes(destination)}) than itself ({_shapes(source)}). Give its class a "
            "get_config() that returns every argument of its __init__."
        )
    destination.set_weights(source.get_weights())
    _copy_trainable(source, destination)


def copy_own_weights(source: keras.Model, destination: keras.Model) -> None:
    """Copies what a subclassed model holds beside its layers."""
    for name in ("_trainable_weights", "_non_trainable_weights"):
        ours, theirs = getattr(destination, name), getattr(source, name)
        if [tuple(weight.shape) for weight in ours] != [tuple(weight.shape) for weight in theirs]:
            raise ModelError(
                f"A copy of the model {source.name!r} has other weights of its own than itself. "
                f"Give {type(source).__name__} a get_config() that returns every argument of its "
                "__init__."
            )
        for our, their in zip(ours, theirs, strict=True):
            our.assign(their)


def _copy_trainable(source: keras.layers.Layer, destination: keras.layers.Layer) -> None:
    freeze_alike(source, destination)
    ours, theirs = direct_sublayers(destination), direct_sublayers(source)
    if len(ours) == len(theirs):
        for our, their in zip(ours, theirs, strict=True):
            _copy_trainable(their, our)


def _shapes(layer: keras.layers.Layer) -> str:
    # Vocabularies are among the weights and have no shape.
    shapes = [str(tuple(weight.shape)) for weight in layer.weights if hasattr(weight, "shape")]
    return ", ".join(shapes) or "none"
