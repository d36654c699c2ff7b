"""Copies of layers and models that share nothing with the original, compiled as it was."""

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

from rl_sparsity_tf.console import quiet_tensorflow
from rl_sparsity_tf.errors import ModelError, RLSparsityError, one_line
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.kernels import weight_pairs
from rl_sparsity_tf.layers.structure import (
    direct_sublayers,
    input_specs,
    is_graph,
    pack_inputs,
    recurrent_layers,
    unreachable_sublayers,
)

Convert = Callable[[keras.layers.Layer], keras.layers.Layer]


def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Makes a layer of the same class, configuration and name, with weights of its own.

    The layer must be no Sequential or functional model. Raises `ModelError` if its class neither
    describes itself (`get_config`) nor can be copied.
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
    """Rebuilds a built model with every layer converted, descending into nested models.

    `convert` is called once with every layer that is no Sequential or functional model, and returns
    the layer to put in its place. The result is built; the weights are not copied. Raises
    `ModelError` if the model or a layer cannot be rebuilt.
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
            "keras.Model(inputs, outputs)."
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
    """Gives a layer the weights of another, whose copy it is, and freezes what is frozen there.

    Raises `ModelError` if they differ in number or shape, as when two layers share a variable.
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


_Schedule = keras.optimizers.schedules.LearningRateSchedule
# What is state, or names variables of the model that an optimizer trains.
_OPTIMIZER_STATE = {
    "_built",
    "_exclude_from_weight_decay",
    "_hyper",
    "_hypers_created",
    "_index_dict",
    "_is_wrapped_by_loss_scale_optimizer",
    "_iterations",
    "_slot_names",
    "_slots",
    "_variables",
    "_weights",
}


def compile_arguments(
    model: keras.Model, copied: keras.Model | None = None
) -> dict[str, Any] | None:
    """What a model was compiled with, fit for compiling a copy; None if it was not compiled.

    Metrics and optimizers carry variables and are made anew, without state; so are losses that hold
    variables, with their state. What holds none is shared. What refers to the model, such as a
    method of it that is its loss, refers to `copied` in the result. Raises `ModelError` if a
    metric, loss, optimizer or schedule cannot be copied.
    """
    config = getattr(model, "_compile_config", None)
    if config is None or getattr(model, "optimizer", None) is None:
        return None
    arguments = dict(config.config)
    arguments["optimizer"] = fresh_optimizer(model, copied)
    memo, prefixes = _memo(model, copied), _prefixes(model)
    kinds = {"loss": "loss", "metrics": "metric", "weighted_metrics": "metric"}
    for name, kind in kinds.items():
        own = functools.partial(_own, kind=kind, memo=memo)
        given = arguments.get(name)
        arguments[name] = tf.nest.map_structure(own, given)
        for theirs, ours in zip(*map(tf.nest.flatten, (given, arguments[name])), strict=True):
            if id(theirs) in prefixes:
                ours._name = ours._name.removeprefix(prefixes[id(theirs)])
    return arguments


def fresh_optimizer(model: keras.Model, copied: keras.Model | None = None) -> Any:
    """An optimizer with the settings of the model's, and no state.

    The variables of `copied`, which it is to train, take the place of the model's where some are
    excluded from weight decay. Raises `ModelError` if it cannot be made.
    """
    return tf.nest.map_structure(lambda one: _fresh(one, model, copied), model.optimizer)


def copy_compile_state(source: keras.Model, destination: keras.Model) -> None:
    """Compiles `destination` as `source` is compiled; leaves it uncompiled if that one is."""
    arguments = compile_arguments(source, destination)
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


# ---------------------------------------------------------------------- losses and metrics


def _memo(model: keras.Model, copied: keras.Model | None) -> dict[int, Any]:
    """What a deep copy puts in the place of a model that an object refers to."""
    return {id(model): model if copied is None else copied}


def _prefixes(model: keras.Model) -> dict[int, str]:
    """What Keras has put before the names of the metrics of several outputs, and will again."""
    container = getattr(model, "compiled_metrics", None)
    if container is None or not container.built or len(container._metrics) < 2:
        return {}
    return {
        id(metric): f"{output}_"
        for structure in (container._metrics, container._weighted_metrics)
        for output, metrics in zip(container._output_names, structure, strict=True)
        for metric in tf.nest.flatten(metrics)
        if metric is not None
    }


def _own(part: Any, kind: str, memo: dict[int, Any]) -> Any:
    """A copy of a metric, loss or schedule for a copy of the model."""
    if isinstance(part, keras.metrics.Metric):
        return _fresh_metric(part, memo)
    if isinstance(part, types.MethodType):
        owner = memo.get(id(part.__self__), part.__self__)
        return part if owner is part.__self__ else types.MethodType(part.__func__, owner)
    inside = list(_inside(part))
    if not any(isinstance(one, tf.Variable) or id(one) in memo for one in inside):
        return part  # it has no state that Keras would know of
    try:
        return copy.deepcopy(part, {**memo, **_shared(inside, memo)})
    except Exception as error:
        raise _cannot_be_copied(part, kind, error) from error


def _fresh_metric(metric: keras.metrics.Metric, memo: dict[int, Any]) -> keras.metrics.Metric:
    """A metric of the same class and attributes, with variables of its own, and no state.

    Not by its config, which says nothing of what its class forgets to describe; Python's own copy
    of a Keras metric is made of the config, too.
    """
    try:
        fresh = _copied_metric(metric, dict(memo))
        with quiet_tensorflow():
            fresh.reset_state()
    except Exception as error:
        raise _cannot_be_copied(metric, "metric", error) from error
    return fresh


def _copied_metric(metric: keras.metrics.Metric, memo: dict[int, Any]) -> keras.metrics.Metric:
    kind: Any = type(metric)
    fresh = kind.__new__(kind)
    bound = {name: vars(fresh)[name] for name in ("update_state", "result")}
    # The last result, maybe of a graph, and Keras's count of what its attributes hold.
    dropped = {*bound, "_call_result", "_obj_reference_counts_dict"}
    state = {name: value for name, value in metric.__getstate__().items() if name not in dropped}
    inside = list(_inside(metric))
    memo.update(_shared(inside, memo))
    for one in inside:
        if isinstance(one, tf.Variable):
            memo[id(one)] = _like(one)
        elif isinstance(one, keras.metrics.Metric) and id(one) not in memo:
            memo[id(one)] = _copied_metric(one, memo)
        elif tf.is_symbolic_tensor(one):
            memo[id(one)] = None  # left behind by a graph
    fresh.__setstate__({**copy.deepcopy(state, memo), **bound})
    return fresh


def _like(variable: tf.Variable) -> tf.Variable:
    """A variable in the present distribution strategy, which Python's own copies do not change."""
    return tf.Variable(
        variable.read_value(),
        trainable=variable.trainable,
        name=variable.name.partition(":")[0],
        dtype=variable.dtype,
        synchronization=variable.synchronization,
        aggregation=variable.aggregation,
    )


def _shared(inside: list[Any], memo: dict[int, Any]) -> dict[int, Any]:
    """What a copy of an object shares with it: layers that only compute, and foreign methods."""
    shared = {}
    for one in inside:
        is_layer = isinstance(one, keras.layers.Layer) and not isinstance(one, keras.metrics.Metric)
        foreign = isinstance(one, types.MethodType) and id(one.__self__) not in memo
        if id(one) not in memo and (is_layer or foreign):
            shared[id(one)] = one
    return shared


def _inside(part: Any) -> Iterator[Any]:
    """What the attributes of an object hold, directly or in lists and dicts."""
    for value in vars(part).values() if hasattr(part, "__dict__") else ():
        yield from _entries(value)


def _entries(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _entries(one)
    else:
        yield value


def _cannot_be_copied(part: Any, kind: str, error: Exception) -> ModelError:
    return ModelError(
        f"The {kind} {getattr(part, 'name', None) or type(part).__name__!r} of class "
        f"{type(part).__name__} cannot be copied ({one_line(error)}), and a copy of the model "
        f"needs one of its own. Expected a {kind} that holds numbers, text, functions and "
        "variables only."
    )


# ---------------------------------------------------------------------- optimizers


def _fresh(optimizer: Any, model: keras.Model, copied: keras.Model | None) -> Any:
    if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        return keras.mixed_precision.LossScaleOptimizer(
            _fresh(optimizer.inner_optimizer, model, copied),
            dynamic=optimizer.dynamic,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
        )
    memo = _memo(model, copied)
    try:
        config, functions = _config(optimizer)
        for name, function in functions.items():
            config[name] = _own(function, "learning-rate schedule", memo)
        fresh = type(optimizer).from_config(config)
        # What its class forgets to describe.
        for name, value in plain_attributes(optimizer, fresh):
            if name not in _OPTIMIZER_STATE:
                setattr(fresh, name, copy.deepcopy(value))
        rate = getattr(optimizer, "_learning_rate", None)
        if isinstance(rate, tf.Variable):
            fresh.learning_rate = rate.numpy()
        elif isinstance(rate, _Schedule) and not isinstance(fresh._learning_rate, _Schedule):
            raise TypeError("its learning-rate schedule is lost")
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"The optimizer of model {model.name!r}, of class {type(optimizer).__name__}, cannot "
            f"be made anew ({one_line(error)}), and a copy needs one of its own. Give its class a "
            "get_config() that returns every argument of its __init__, or compile the model with "
            "one of Keras's own."
        ) from error
    if copied is not None and hasattr(optimizer, "_exclude_from_weight_decay"):
        fresh._exclude_from_weight_decay = [
            fresh._var_key(ours)
            for theirs, ours in weight_pairs(model, copied)
            if not optimizer._use_weight_decay(theirs)
        ]
    return fresh


def _config(optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """An optimizer's config, and the functions and schedules, which need not have a config."""
    shell = copy.copy(optimizer)
    hyper = vars(optimizer).get("_hyper")  # of Keras's older optimizers
    if hyper is None:
        rate = vars(optimizer).get("_learning_rate")
        functions = {"learning_rate": rate} if isinstance(rate, _Schedule) else {}
        vars(shell).update({f"_{name}": 0.0 for name in functions})
    else:
        functions = {
            name: value
            for name, value in hyper.items()
            if callable(value) and not isinstance(value, tf.Variable)
        }
        vars(shell)["_hyper"] = {**hyper, **dict.fromkeys(functions, 0.0)}
    return shell.get_config(), functions
