"""Carrying a model's loss, metrics and optimizer over to a copy of it."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError, one_line
from rl_sparsity_tf.layers.copying import plain_attributes
from rl_sparsity_tf.layers.kernels import weight_pairs
from rl_sparsity_tf.quiet import quiet_tensorflow

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

    Metrics and optimizers carry variables and are made anew, without state; so are losses that
    hold variables, with their state. What holds none is shared.

    Args:
        model: The model.
        copied: The copy that is to be compiled. What refers to the model, such as a method of it
            that is its loss, then refers to the copy.

    Raises:
        ModelError: If a metric, loss, optimizer or schedule cannot be copied.
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

    Args:
        model: A compiled model.
        copied: The copy that it is to train, whose variables take the place of the model's where
            some are excluded from weight decay.

    Raises:
        ModelError: If it cannot be made.
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
