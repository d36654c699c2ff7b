"""Compares a copy of a model with its original on a few rows, so that none is another model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError, one_line
from rl_sparsity_tf.layers.kernels import walk, weight_pairs
from rl_sparsity_tf.layers.structure import (
    all_layers,
    fixed_batch,
    input_specs,
    is_pruning_wrapper,
    pack_inputs,
    random_rows,
    recurrent_layers,
)
from rl_sparsity_tf.layers.wrapper import CompressionWrapper

_ROWS, _BATCH_ROWS = 2, 8
# A copy computes the same bits on the CPU, but not on a GPU that adds in another order; a copy with
# fewer channels adds up other numbers. Shares of an output's largest value.
_SHARE, _SHARE_16_BIT, _FOLDED = 1e-4, 1e-2, 10
_GIVEN = ("_user_metrics", "_user_weighted_metrics")
# Where more than that differs, the model's own sensitivity counts: how far its outputs move when
# its inputs do by a rounding error.
_ROUNDING, _ROUNDING_16_BIT, _SENSITIVITY = 1e-6, 1e-3, 10


def check_copy(model: keras.Model, copied: keras.Model, *, folded: bool = False) -> None:
    """Raises `ModelError` if a copy differs in its outputs, its own losses or what is frozen.

    Both are called once on two made-up rows, and are as they were after it. A model that is random
    at inference is not compared by values; one that raises on such rows only by what is frozen and
    by how many functions are among its losses. It is for copies to which nothing else has been done
    yet, but that weights were removed and folded in each other: `folded` allows for what that
    changes.
    """
    _check_frozen(model, copied)
    if any(is_pruning_wrapper(layer) for _, layer in walk(model)):
        return  # TFMOT's wrappers change their layers' weights whenever they are called
    theirs, rows = _first_that_works(model)
    if theirs is None:
        _check_count(model, [_functions(model), _functions(copied)], "losses given as functions")
        return
    try:
        ours = _computed(copied, rows)
    except Exception as error:
        raise ModelError(
            f"A copy of the model {model.name!r} cannot be called as the model can "
            f"({one_line(error)}). {_advice(model)}"
        ) from error
    _check_count(model, [len(theirs[1]), len(ours[1])], "losses")
    wrapped = any(isinstance(layer, CompressionWrapper) for _, layer in walk(model))
    # What regularizes a wrapped or larger kernel is not what regularizes the one made of it.
    kinds = [(0, "outputs")] if wrapped or folded else [(0, "outputs"), (1, "own losses")]
    for kind, name in kinds:
        difference = _difference(model, theirs[kind], ours[kind], folded)
        if difference is None or _is_natural(model, rows, theirs[kind], difference, kind):
            continue
        raise ModelError(
            f"The {name} of a copy of the model {model.name!r} are not those of the model: on the "
            f"same {len(tf.nest.flatten(rows)[0])} rows they differ by {difference:.3g} of their "
            f"largest value. {_advice(model)}"
        )


def check_figures(model: keras.Model, copied: keras.Model, batch: tuple[Any, Any, Any]) -> None:
    """Raises `ModelError` if a copy's loss or metrics differ from its original's on a few rows.

    The copy is compiled with the same loss and metrics, or further ones. The original's metrics,
    states and containers are as they were after it.
    """
    if model.distribute_strategy is not tf.distribute.get_strategy():
        return  # Its metrics can only be updated by its strategy's replicas.
    few = batch
    if not fixed_batch(model):
        few = tf.nest.map_structure(
            lambda part: None if part is None else part[:_BATCH_ROWS], batch
        )
    try:
        theirs = _figures(model, few)
    except Exception:  # a test_step may want a number of rows that it knows
        few = batch
        try:
            theirs = _figures(model, few)
        except Exception as error:
            raise ModelError(
                f"The loss and metrics of model {model.name!r} cannot be computed by its own "
                f"test_step ({one_line(error)}), though those of a copy can. Expected a model that "
                "model.test_on_batch(x, y) runs through; compile it again."
            ) from error
    with tf.GradientTape() as tape:
        ours = _figures(copied, few)
    read = {id(variable) for variable in tape.watched_variables()}
    foreign = [weight.name for weight in model.weights if id(weight) in read]
    if foreign:
        raise ModelError(
            f"The loss, a metric or the test_step of model {model.name!r} reads weights of the "
            f"model by itself ({', '.join(foreign)}), so that a copy's would read those of the "
            "original. Expected functions of labels and outputs; add what depends on weights with "
            "add_loss in a layer's call(), or as a regularizer."
        )
    for name, value in theirs.items():
        other, share = ours.get(name), _share(model)
        if _same(value, other, share) or not _same(value, _figures(model, few).get(name), share):
            continue
        raise ModelError(
            f"{name!r} of a copy of the model {model.name!r} is {_shown(other)} where that of the "
            f"model is {_shown(value)}, on the same {len(tf.nest.flatten(few)[0])} rows. "
            f"{_advice(model)}"
        )


# ---------------------------------------------------------------------- what is frozen, counts


def _check_frozen(model: keras.Model, copied: keras.Model) -> None:
    trained = {id(weight) for one in (model, copied) for weight in one.trainable_weights}
    other = [
        theirs.name
        for theirs, ours in weight_pairs(model, copied)
        if (id(theirs) in trained) != (id(ours) in trained)
    ]
    if other:
        raise ModelError(
            f"Weights of the model {model.name!r} are trained in a copy and not in the model, or "
            f"the other way round ({', '.join(other)}). Expected weights that are frozen by "
            f"layer.trainable = False, or by what the class describes. {_advice(model)}"
        )


def _functions(model: keras.Model) -> int:
    return sum(len(layer._callable_losses) for layer in all_layers(model))


def _check_count(model: keras.Model, counts: Sequence[int], what: str) -> None:
    theirs, ours = counts
    if theirs != ours:
        raise ModelError(
            f"The model {model.name!r} has {theirs} {what} of its own, a copy of it {ours}. "
            "Functions given to model.add_loss or layer.add_loss are in no description of a model: "
            "add the loss in a layer's call(), as a tensor (model.add_loss(tensor)), or as a "
            "regularizer."
        )


def _advice(model: keras.Model) -> str:
    return (
        "Whatever a layer's or model's class computes by must be in its weights or in its "
        f"get_config(); look at {_own_classes(model)}."
    )


def _own_classes(model: keras.Model) -> str:
    kinds = {type(layer) for layer in all_layers(model)}
    names = sorted(kind.__name__ for kind in kinds if "keras" not in kind.__module__.split(".")[0])
    return ", ".join(names) or "layers with functions in them"


# ---------------------------------------------------------------------- outputs


Computed = tuple[list[np.ndarray], list[np.ndarray]]


def _first_that_works(model: keras.Model) -> tuple[Computed | None, Any]:
    """What a model computes of random rows, or of zeros if it refuses those."""
    makers: list[Callable[[], list[np.ndarray]]] = [
        lambda: random_rows(model, input_specs(model), fixed_batch(model) or _ROWS),
        lambda: [_blank(spec.batch_shape(spec.batch or _ROWS), spec.dtype) for spec in specs],
    ]
    specs = input_specs(model)
    for make in makers:
        try:
            rows = pack_inputs(model, [tf.constant(array) for array in make()])
            return _computed(model, rows), rows
        except Exception:  # whatever a model raises on rows that it was not made for
            continue
    return None, None


def _blank(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (
        np.full(shape, "a")
        if dtype == "string"
        else np.zeros(shape, tf.as_dtype(dtype).as_numpy_dtype)
    )


def _computed(model: keras.Model, rows: Any) -> Computed:
    with as_it_was(model):
        outputs = tf.nest.flatten(model(rows, training=False), expand_composites=True)
        return [_array(one) for one in outputs], [_array(one) for one in model.losses]


def _array(tensor: Any) -> np.ndarray:
    tensor = tf.convert_to_tensor(tensor)
    return np.asarray(tf.cast(tensor, tf.float64) if tensor.dtype.is_floating else tensor)


def _difference(
    model: keras.Model, theirs: list[np.ndarray], ours: list[np.ndarray], folded: bool
) -> float | None:
    """The largest difference as a share of the largest value, if it is more than rounding."""
    share = _share(model) * (_FOLDED if folded else 1)
    if [one.shape for one in theirs] != [one.shape for one in ours]:
        return np.inf
    worst = max((_distance(a, b) for a, b in zip(theirs, ours, strict=True)), default=0.0)
    return worst if worst > share else None


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    if one.dtype.kind != "f":
        return float(not np.array_equal(one, other))
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return np.inf
    scale = max(float(np.abs(one[finite]).max(initial=0.0)), 1e-30)
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0)) / scale


def _is_natural(
    model: keras.Model, rows: Any, theirs: list[np.ndarray], difference: float, kind: int
) -> bool:
    """Whether the model differs from itself as much: at random, or from a rounding error."""
    rounding = _ROUNDING if _share(model) == _SHARE else _ROUNDING_16_BIT
    moved = tf.nest.map_structure(
        lambda part: part * (1 + rounding) if part.dtype.is_floating else part, rows
    )
    for inputs in (rows, moved):
        again = _computed(model, inputs)[kind]
        if [one.shape for one in again] != [one.shape for one in theirs]:
            return True
        spread = max((_distance(a, b) for a, b in zip(theirs, again, strict=True)), default=0.0)
        at_random = inputs is rows and spread > _share(model)
        if at_random or spread * _SENSITIVITY >= difference:
            return True
    return False


def _share(model: keras.Model) -> float:
    names = {layer.compute_dtype for layer in all_layers(model)}
    return _SHARE_16_BIT if names & {"float16", "bfloat16"} else _SHARE


# ---------------------------------------------------------------------- figures


def _figures(model: keras.Model, batch: tuple[Any, Any, Any]) -> dict[str, np.ndarray]:
    with as_it_was(model), _metrics_as_they_were(model):
        logs = model.test_step(batch)
        return {name: _array(value) for name, value in logs.items()}


def _same(one: np.ndarray, other: np.ndarray | None, share: float) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return np.allclose(other, one, 10 * share, 1e-6, equal_nan=True)


def _shown(value: np.ndarray | None) -> str:
    if value is None:
        return "missing"
    return f"{float(value):.4g}" if np.ndim(value) == 0 else f"an array of shape {value.shape}"


@contextlib.contextmanager
def _metrics_as_they_were(model: keras.Model) -> Iterator[None]:
    """Lets a model be evaluated from fresh metrics, and puts theirs back after it."""
    containers = [getattr(model, name, None) for name in ("compiled_loss", "compiled_metrics")]
    kept = [(vars(one), dict(vars(one))) for one in containers if one is not None]
    # Keras puts the names of several outputs before those of metrics.
    given = [before.get(name) for _, before in kept for name in _GIVEN]
    metrics = [one for one in tf.nest.flatten(given) if isinstance(one, keras.metrics.Metric)]
    names = [metric._name for metric in metrics]
    values = [(v, v.numpy()) for metric in model.metrics for v in metric.variables]
    try:
        model.reset_metrics()
        yield
    finally:
        model.reset_metrics()
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)
        for metric, name in zip(metrics, names, strict=True):
            metric._name = name
        for variable, value in values:
            variable.assign(value)


@contextlib.contextmanager
def as_it_was(model: keras.Model) -> Iterator[None]:
    """Lets a model be called from zero states, and puts back after it what a call changes."""
    layers = [layer for layer in recurrent_layers(model) if layer.stateful]
    states = [
        state for state in tf.nest.flatten([one.states for one in layers]) if state is not None
    ]
    # Vocabularies are among the weights without being variables.
    counted = [one for one in model.non_trainable_weights if isinstance(one, tf.Variable)]
    kept = [(variable, variable.numpy()) for variable in [*states, *counted]]
    names = ("_saved_model_inputs_spec", "_saved_model_arg_spec")
    attributes = {name: vars(model)[name] for name in names if name in vars(model)}
    for state in states:
        state.assign(tf.zeros_like(state))
    try:
        yield
    finally:
        for variable, value in kept:
            if not np.array_equal(variable.numpy(), value):
                variable.assign(value)
        vars(model).update(attributes)
        model._clear_losses()
