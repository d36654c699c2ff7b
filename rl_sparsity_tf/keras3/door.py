"""Where Keras 3 models come in and go out; Keras 3 itself is imported only once there is one.

A converted model carries where it came from, for whoever hands it back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import tf_keras as keras

from rl_sparsity_tf._compat import is_keras_3
from rl_sparsity_tf.errors import ModelError, one_line

if TYPE_CHECKING:
    from rl_sparsity_tf.keras3.graph import Conversion

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")

_ORIGIN = "_keras_3_origin"
_ROWS = 4
# Sizes that an axis is given which the model leaves open: networks for images need some pixels.
_OPEN_AXES = (16, 64, 224)
# Largest difference from the original, relative to the range of its outputs.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2
# A model may amplify rounding: as much as it changes by itself, and some, when its input is moved
# by two units in the last place.
_NUDGE, _AMPLIFIED = 2.0**-22, 20.0


def is_keras_3_model(thing: object) -> bool:
    """Whether something is a model of Keras 3."""
    module = sys.modules.get("keras")
    return is_keras_3(module) and isinstance(thing, getattr(module, "Model", ()))


def origin_of(model: object) -> Conversion | None:
    """The conversion that a tf_keras model came from, if it was a Keras 3 model."""
    return getattr(model, _ORIGIN, None)


def give_origin(model: keras.Model, origin: Conversion | None) -> None:
    """Remembers where a tf_keras model came from."""
    # Past Keras, which would track the layers in it.
    object.__setattr__(model, _ORIGIN, origin)


def admitted(model: Any) -> Any:
    """A tf_keras model equal to a Keras 3 model; anything else as it is.

    Raises `ModelError` if it cannot be converted, or does not compute the same afterwards.
    """
    if not is_keras_3_model(model):
        return model
    from rl_sparsity_tf.keras3.graph import Conversion
    from rl_sparsity_tf.keras3.weights import compile_like, copy_weights

    conversion = Conversion(model)
    copy_weights(conversion)
    compile_like(model, conversion.model)
    give_origin(conversion.model, conversion)
    _compare_on_made_rows(model, conversion.model, "converted to tf_keras")
    return conversion.model


def handed_back(model: keras.Model, origin: Conversion | None) -> Any:
    """A tf_keras model as Keras 3 if it came in as one, else as it is.

    Raises `ModelError` if it cannot be, or does not compute the same afterwards.
    """
    if origin is None:
        return model
    from rl_sparsity_tf.keras3.returning import as_keras_3

    returned = as_keras_3(model, origin)
    _compare_on_made_rows(returned, model, "handed back as Keras 3")
    return returned


def takes_keras_3(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets a function of tf_keras models take Keras 3 models in their place."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        named: dict[str, Any] = {key: admitted(one) for key, one in kwargs.items()}
        given: list[Any] = [admitted(one) for one in args]
        return function(*given, **named)

    return call


def returns_keras_3(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets a function that makes a model of a `model` return Keras 3 where it is given that."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        given = args[0] if args else kwargs.get("model")
        if not is_keras_3_model(given):
            return function(*args, **kwargs)
        model = admitted(given)
        others: dict[str, Any] = {key: one for key, one in kwargs.items() if key != "model"}
        rest: Sequence[Any] = args[1:]
        return handed_back(function(model, *rest, **others), origin_of(model))

    return call


def check_return(model: keras.Model) -> None:
    """Raises `ModelError` if a model that came in as Keras 3 could not be handed back as it is."""
    handed_back(model, origin_of(model))


def compare(model: keras.Model, inputs: Sequence[Any]) -> None:
    """Raises `ModelError` unless a converted model computes on rows what its original does.

    `inputs` has an array for every input of the model. Other models pass.
    """
    origin = origin_of(model)
    if origin is not None:
        _compare(origin.original, model, list(inputs), "converted to tf_keras")


def _compare_on_made_rows(model3: Any, model2: keras.Model, what: str) -> None:
    reason: Exception | None = None
    for size in _OPEN_AXES:
        x = _made_rows(model3, size)
        try:
            with _states_kept(model3):
                _outputs(model3, x)
        except Exception as error:  # of the original: these rows are none that it takes
            reason = error
            continue
        _compare(model3, model2, x, what)
        return
    _log.warning(
        "The model %r could not be compared with what it became: it takes none of the rows made "
        "for that (%s).",
        model3.name,
        one_line(reason) if reason else "",
    )


def _made_rows(model: Any, size: int) -> list[np.ndarray]:
    """Rows for every input of a Keras 3 model."""
    import keras as keras3

    generator = np.random.default_rng(0)

    def made(spec: Any) -> np.ndarray:
        first = _ROWS if spec.shape[0] is None else spec.shape[0]
        shape = (first, *(size if axis is None else axis for axis in spec.shape[1:]))
        dtype = str(spec.dtype)
        if dtype == "string":
            return np.full(shape, "a")
        if dtype.startswith(("float", "bfloat")):
            return generator.standard_normal(shape).astype(np.float32)
        return generator.integers(0, 2, shape).astype(dtype)  # ids that every vocabulary has

    return [made(spec) for spec in keras3.tree.flatten(_inputs_of(model))]


def _inputs_of(model: Any) -> Any:
    import keras as keras3

    graph = getattr(model, "_functional", None) or model
    if hasattr(graph, "_inputs_struct"):
        return graph._inputs_struct
    config = model.get_build_config() or {}
    shape = config.get("input_shape") or next(iter(config["shapes_dict"].values()))
    if isinstance(shape, dict):
        return {k: keras3.KerasTensor((None, *one[1:])) for k, one in shape.items()}
    if isinstance(shape[0], list | tuple):
        return [keras3.KerasTensor((None, *one[1:])) for one in shape]
    return keras3.KerasTensor((None, *shape[1:]))


def _outputs(model: Any, x: list[Any]) -> list[np.ndarray]:
    import keras as keras3
    import tensorflow as tf

    if isinstance(model, keras.Model):
        tensors = [tf.convert_to_tensor(one) for one in x]
        outputs = model(tensors if len(tensors) > 1 else tensors[0], training=False)
        return [one.numpy().astype(np.float64) for one in tf.nest.flatten(outputs)]
    tensors = [keras3.ops.convert_to_tensor(one) for one in x]
    outputs = model(keras3.tree.pack_sequence_as(_inputs_of(model), tensors), training=False)
    return [
        np.asarray(keras3.ops.convert_to_numpy(one)).astype(np.float64)
        for one in keras3.tree.flatten(outputs)
    ]


@contextlib.contextmanager
def _states_kept(model: Any) -> Iterator[None]:
    """Leaves the states of a Keras 3 model, of recurrent layers and random generators, alone."""
    import keras as keras3

    learned = {id(variable) for variable in model.trainable_variables}
    states = [variable for variable in model.variables if id(variable) not in learned]
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            states += keras3.tree.flatten(layer.states or [])
    values = [np.array(variable) for variable in states]
    try:
        yield
    finally:
        for variable, value in zip(states, values, strict=True):
            variable.assign(value)


def _compare(model3: Any, model2: keras.Model, x: list[Any], what: str) -> None:
    def nudged(part: Any) -> Any:
        floating = np.asarray(part).dtype.kind == "f"
        return (np.asarray(part) * (1 + _NUDGE)).astype(np.float32) if floating else part

    with _states_kept(model3):
        expected = _outputs(model3, x)
    with _states_kept(model3):
        moved = _outputs(model3, [nudged(part) for part in x])
    got = _outputs(model2, x)
    if any(getattr(layer, "stateful", False) for layer in model2.layers):
        model2.reset_states()
    half = any(
        "16" in str(getattr(layer, "compute_dtype", "")) for layer in model3._flatten_layers()
    )
    for index, (a, b, c) in enumerate(zip(expected, got, moved, strict=True)):
        if a.shape != b.shape:
            raise ModelError(
                f"The Keras 3 model {model3.name!r}, {what}, gives output {index} the shape "
                f"{b.shape} in place of {a.shape}. Expected equal outputs: build the model with "
                "tf_keras."
            )
        if not a.size:
            continue
        scale = max(float(np.ptp(a)), float(np.abs(a).max()), 1e-6)
        own = float(np.abs(a - c).max()) / scale
        allowed = max(_HALF_TOLERANCE if half else _TOLERANCE, _AMPLIFIED * own)
        difference = float(np.abs(a - b).max()) / scale
        if not difference <= allowed and not np.array_equal(a, b, equal_nan=True):
            raise ModelError(
                f"The Keras 3 model {model3.name!r}, {what}, computes something else: its output "
                f"{index} differs by {difference:.3g} of its range. Expected {allowed:.3g} at most "
                "(rounding, and what the model makes of it): build the model with tf_keras."
            )
