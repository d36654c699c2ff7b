"""Fingerprints and descriptions of what a run is about, by which its folder is known again.

Models and functions described as JSON, so that a change of them is noticed and can be named.

Names are left out: Keras numbers them through in a process (`dense_1`, `auc_2`), so the same model
made twice has two of them. Places take their part.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.batches import TrainingData
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.layers.copying import compile_arguments
from rl_sparsity_tf.layers.structure import all_layers, graph_nodes, is_graph
from rl_sparsity_tf.search.run_directory import data_fingerprint, model_fingerprint

# Whose code is known by the versions of the libraries.
_LIBRARIES = frozenset(
    "builtins keras tf_keras tensorflow numpy tensorflow_addons rl_sparsity_tf "
    "tensorflow_model_optimization tensorflow_probability tf_agents abc typing".split()
)
# Of a config: names, and what Keras numbers through or derives when it saves.
_LEFT_OUT = frozenset({"name", "shared_object_id", "build_config", "registered_name"})
_LONGEST_TEXT, _MOST_NUMBERS, _DEEPEST = 200, 32, 24


def describe_model(model: keras.Model) -> dict[str, Any]:
    """A built model's layers with their settings and connections; not its weights.

    Example:
        >>> describe_model(model)["layers"][0]["config"]["activation"]
        'relu'
    """
    described: dict[str, Any] = {
        "class": _class_name(type(model)),
        "layers": [_layer(one) for one in model.layers],
    }
    if is_graph(model):
        if not isinstance(model, keras.Sequential):
            described["connections"] = _connections(model)
    else:
        described["code"] = _class_code(type(model))
        described["attributes"] = _attributes(model)
        own = [*model._trainable_weights, *model._non_trainable_weights]
        described["own_weights"] = [describe(np.asarray(weight)) for weight in own]
    described["losses"] = [describe(one) for one in getattr(model, "_callable_losses", ())]
    return described


def describe_compilation(model: keras.Model) -> dict[str, Any]:
    """What a model was compiled with: loss, metrics and optimizer with all their arguments."""
    config = getattr(model, "_compile_config", None)
    if config is None or getattr(model, "optimizer", None) is None:
        return {}
    outputs = {name: f"output {n}" for n, name in enumerate(model.output_names or (), 1)}
    parts = {**config.config, "optimizer": model.optimizer}

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {outputs.get(str(key), str(key)): renamed(one) for key, one in value.items()}
        return describe(value)

    return {name: renamed(value) for name, value in sorted(parts.items()) if value is not None}


def describe(value: Any, depth: int = 0) -> Any:
    """A setting as JSON: values as they are, functions by their code, objects by their settings.

    `depth` is how deep in another value it is.
    """
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    if isinstance(value, int | float | np.number):
        return value.item() if isinstance(value, np.number) else value
    if isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.hex()
        return text if len(text) <= _LONGEST_TEXT else sha256_of(text.encode())
    if depth > _DEEPEST:
        return "..."
    inner = functools.partial(describe, depth=depth + 1)
    if isinstance(value, Mapping):
        if value.get("class_name") == "__lambda__":  # by its code, see _layer
            return "function"
        return {str(k): inner(v) for k, v in value.items() if k not in _LEFT_OUT}
    if isinstance(value, tf.TensorShape):
        return None if value.rank is None else value.as_list()
    if isinstance(value, tf.DType | np.dtype):
        return str(getattr(value, "name", value))
    if hasattr(value, "_keras_history"):
        return "tensor"
    if isinstance(value, np.ndarray | tf.Variable) or tf.is_tensor(value):
        return _array(value)
    if isinstance(value, list | tuple):
        return [inner(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((inner(one) for one in value), key=repr)
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return {name: inner(part) for name, part in parts.items()}
    if inspect.isroutine(value) or isinstance(value, type) or hasattr(value, "python_function"):
        return _function(value)
    return _object(value, depth)


def _array(value: Any) -> Any:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, NotImplementedError):  # a symbolic tensor
        return "tensor"
    if array.size <= _MOST_NUMBERS and array.dtype.kind in "biuf":
        return array.tolist()
    chunks = f"{array.shape} {array.dtype}".encode(), np.ascontiguousarray(array).tobytes()
    return sha256_of(*chunks)


def _object(value: Any, depth: int) -> dict[str, Any]:
    """A loss, a schedule, an initializer, or an object of the user's."""
    kind = type(value)
    found: dict[str, Any] = {"class": _class_name(kind)}
    config = getattr(value, "get_config", None)
    if config is not None:
        try:
            found["config"] = describe(config(), depth + 1)
        except Exception:  # one that needs what is not there; attributes and code have to do
            found["config"] = None
    decay = getattr(value, "_exclude_from_weight_decay", None)  # in no optimizer's config
    if decay:
        found["exclude_from_weight_decay"] = describe(decay, depth + 1)
    if not _is_known(kind):
        found["attributes"] = _attributes(value, depth)
        found["code"] = _class_code(kind)
    return found


def _attributes(value: Any, depth: int = 0) -> dict[str, Any]:
    """The public attributes that are plain values: no variables, and nothing that Keras keeps."""
    plain = str | int | float | bool | np.number | np.ndarray
    found = {}
    for name, one in sorted(getattr(value, "__dict__", {}).items()):
        items = one if isinstance(one, list | tuple) else [one]
        public = not name.startswith("_") and name not in _KEPT_BY_KERAS
        if public and all(isinstance(item, plain) or inspect.isfunction(item) for item in items):
            found[name] = describe(one, depth + 1)
    return found


_KEPT_BY_KERAS = frozenset(
    "name built stateful history stop_training supports_masking input_spec output_names "
    "input_names inputs outputs optimizer loss compiled_loss compiled_metrics".split()
)


def _layer(layer: keras.layers.Layer) -> dict[str, Any]:
    if isinstance(layer, keras.Model):
        return describe_model(layer)
    found = _object(layer, 0)
    found["trainable"] = bool(layer.trainable)
    inner = [one for one in all_layers(layer) if isinstance(one, keras.layers.Lambda)]
    if inner:  # their configs hold compiled code with the name of its file
        found["functions"] = [_function(one.function) for one in inner]
        found["config"] = _without_code(found.get("config"))
    return found


def _without_code(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_code(one) for key, one in config.items() if key != "function"}
    return [_without_code(one) for one in config] if isinstance(config, list) else config


def _connections(model: keras.Model) -> list[Any]:
    """Which layers every call of a layer takes its inputs from, by their places."""
    places = {id(layer): place for place, layer in enumerate(model.layers)}
    nodes = set(map(id, graph_nodes(model)))
    calls = {
        id(node): [place, number]
        for layer, place in ((layer, places[id(layer)]) for layer in model.layers)
        for number, node in enumerate(n for n in layer._inbound_nodes if id(n) in nodes)
    }

    def source(tensor: Any) -> Any:
        layer, node, index = tensor._keras_history
        return [*calls.get(id(layer._inbound_nodes[node]), [-1, -1]), index]

    def argument(value: Any) -> Any:
        return source(value) if hasattr(value, "_keras_history") else describe(value)

    found = []
    for layer in model.layers:
        for node in layer._inbound_nodes:
            if id(node) in calls and not node.is_input:
                given = tf.nest.map_structure(argument, (node.call_args, node.call_kwargs))
                found.append([*calls[id(node)], describe(given)])
    for ends in (model.inputs, model.outputs):
        found.append([source(one) for one in tf.nest.flatten(ends)])
    return found


# ------------------------------------------------------------------------------ code


def _is_known(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "builtins").split(".")[0] in _LIBRARIES


def _class_name(kind: type) -> str:
    return kind.__qualname__ if _is_known(kind) else f"{kind.__qualname__} of the caller's"


def _function(function: Any) -> Any:
    function = inspect.unwrap(getattr(function, "python_function", function))
    if isinstance(function, types.MethodType):
        owner = function.__self__
        owner = owner if isinstance(owner, type) else type(owner)
        return {"of": _class_name(owner), "function": _function(function.__func__)}
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if _is_known(function) or code is None:
        return name
    return {"function": name, "code": _code_of(function)}


def _code_of(function: Any) -> str:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not set yet
            cells.append(None)
    cells = [_closed_over(cell) for cell in cells]
    defaults = describe([function.__defaults__, function.__kwdefaults__], 1)
    return sha256_of(_code(function.__code__).encode(), repr((defaults, cells)).encode())


def _closed_over(value: Any) -> Any:
    # A class closes over itself (super), and functions over one another.
    if isinstance(value, str | int | float | bool | np.ndarray | list | tuple | dict | None):
        return describe(value, _DEEPEST - 4)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _code(code: types.CodeType) -> str:
    """Compiled code without the names of files and the numbers of lines."""

    def constant(value: Any) -> str:
        if isinstance(value, types.CodeType):
            return _code(value)
        if isinstance(value, frozenset):
            return repr(sorted(map(repr, value)))
        return repr(value)

    parts = [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames)]
    return sha256_of(" ".join([*parts, *map(constant, code.co_consts)]).encode())


def _class_code(kind: type) -> str:
    """The code of a class of the user's, and of those it is made of."""
    found = []
    for one in kind.__mro__:
        if not _is_known(one):
            found += list(_members(one))
    return sha256_of("\n".join(found).encode())


def _members(kind: type) -> Iterator[str]:
    for name, member in sorted(vars(kind).items()):
        inner = getattr(member, "__func__", getattr(member, "fget", member))
        inner = getattr(inner, "python_function", inner)
        inner = inspect.unwrap(inner) if callable(inner) else inner
        if inspect.isfunction(inner):
            yield f"{name} {_code_of(inner)}"
        elif not name.startswith("__") and isinstance(member, str | int | float | bool | tuple):
            yield f"{name} {describe(member)!r}"


_ROWS = 8192


def fingerprints_of(
    model: keras.Model,
    train: Any,
    data: TrainingData,
    validation: list[Any],
    test: list[Any] | None,
) -> dict[str, Any]:
    """Fingerprints of a model's weights and its data, and descriptions of the model, by name.

    `train` has the training rows as the search was given them; a dataset is known by its pool.
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
