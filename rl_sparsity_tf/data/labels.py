"""Labels checked against the compiled loss and the model's outputs, before anything is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.checks import fits, shape_advice
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.layers.structure import input_specs

_KINDS = {
    "sparse_categorical_crossentropy": "sparse",
    "categorical_crossentropy": "categorical",
    "categorical_focal_crossentropy": "categorical",
    "binary_crossentropy": "binary",
    "binary_focal_crossentropy": "binary",
}
_SUM_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One output of a model, and the loss its labels are for.

    Attributes:
        name: Its name, or its key where the model returns a dict; None for the only output.
        shape: Shape of one row, None for an open axis; None as a whole if it is not known.
        loss: Name of the loss; None without one.
        kind: What the loss takes: `"sparse"`, `"categorical"`, `"binary"`, `"regression"` (the
            other losses of Keras), `"custom"` (nothing is known) or `"none"`.
        ignored: A label that the loss leaves out, if there is one.
    """

    name: str | None
    shape: tuple[int | None, ...] | None
    loss: str | None = None
    kind: str = "none"
    ignored: int | None = None

    @property
    def classes(self) -> int | None:
        """Size of the last axis, if it is known."""
        return self.shape[-1] if self.shape else None

    @property
    def words(self) -> str:
        """The output's name as part of a sentence."""
        return "" if self.name is None else f" for the output {self.name!r}"


def loss_kind(loss: Any) -> tuple[str | None, str, int | None]:
    """Tells a loss's name, kind and ignored label; see [Output][].

    Only Keras's own losses are recognised: of a function or a subclass of the user's with the
    name of one of them nothing is assumed.
    """
    if loss is None:
        return None, "none", None
    ignored = None
    if isinstance(loss, keras.losses.Loss):
        own = getattr(keras.losses, type(loss).__name__, None) is type(loss)
        function = getattr(loss, "fn", None) if own else None
        ignored = getattr(loss, "_fn_kwargs", {}).get("ignore_class") if own else None
    else:
        try:
            function = keras.losses.get(loss)
        except (ValueError, TypeError):
            function = None
    name = str(getattr(function, "__name__", None) or getattr(loss, "name", None) or loss)
    known = function is not None and getattr(keras.losses, name, None) is function
    return name, _KINDS.get(name, "regression") if known else "custom", ignored


def model_outputs(model: keras.Model, x: Any, name: str) -> tuple[Output, ...] | None:
    """Describes a built model's outputs, by tracing its call rather than running it.

    Nothing is computed, so the state of recurrent layers stays as it is, and axes that are open at
    the input are known to be open at the output. Returns the outputs in the order that Keras
    flattens them, or None where they are nested more than once. Raises `DataError` if the model
    cannot be called on the inputs.
    """
    structure = _traced(model, x, name)
    loss = getattr(model, "loss", None)
    if isinstance(structure, dict):
        names = sorted(structure)
        tensors = [structure[key] for key in names]
    elif isinstance(structure, list | tuple):
        tensors = list(structure)
        known = getattr(model, "output_names", None) or ()
        same = len(known) == len(tensors)
        names = list(known) if same else [f"output_{i + 1}" for i in range(len(tensors))]
    else:
        if isinstance(loss, list | tuple | dict):
            values = list(loss.values() if isinstance(loss, dict) else loss)
            loss = values[0] if len(values) == 1 else None
        return (_output(None, structure, loss),)
    if not all(hasattr(tensor, "shape") for tensor in tensors):
        return None
    if isinstance(loss, dict):
        losses = [loss.get(key) for key in names]
    elif isinstance(loss, list | tuple):
        losses = [*loss, *[None] * len(names)][: len(names)]
    else:
        losses = [loss] * len(names)
    described = zip(names, tensors, losses, strict=True)
    return tuple(_output(key, tensor, one) for key, tensor, one in described)


def _output(name: str | None, tensor: Any, loss: Any) -> Output:
    shape = tuple(tensor.shape)[1:] if tensor.shape.rank else None
    loss_name, kind, ignored = loss_kind(loss)
    return Output(name=name, shape=shape, loss=loss_name, kind=kind, ignored=ignored)


def _traced(model: keras.Model, x: Any, name: str) -> Any:
    specs = input_specs(model)
    if isinstance(x, dict):
        open_specs: Any = {
            spec.name: tf.TensorSpec((spec.batch, *spec.shape), _dtype(x[spec.name]))
            for spec in specs
        }
    elif isinstance(x, list | tuple):
        parts = zip(specs, x, strict=True)
        open_specs = [tf.TensorSpec((s.batch, *s.shape), _dtype(part)) for s, part in parts]
        open_specs = type(x)(open_specs)
    else:
        open_specs = tf.TensorSpec((specs[0].batch, *specs[0].shape), _dtype(x))
    # A call that needs to know every size, as some subclassed ones do, is traced with this batch's.
    closed = tf.nest.map_structure(lambda part: tf.TensorSpec(np.shape(part), _dtype(part)), x)
    function = tf.function(lambda inputs: model(inputs, training=False))
    for attempt in (open_specs, closed):
        try:
            return function.get_concrete_function(attempt).structured_outputs
        except Exception as caught:  # whatever the user's own call raises
            error = caught
    raise DataError(
        f"The model cannot be called on the inputs of {name}: {last_line(error)}. Expected inputs "
        "in the form that model.predict takes."
    ) from error


def _dtype(part: Any) -> Any:
    return tf.as_dtype(part.dtype)


def last_line(error: BaseException) -> str:
    """The last line of an error's message, without TensorFlow's additions."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Call arguments received", "•"))]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def per_output(
    values: Any, outputs: tuple[Output, ...], name: str, what: str, *, shared: bool = False
) -> list[Any]:
    """Sorts labels or weights, an array or a list, tuple or dict of them, to their outputs.

    Returns one entry per output; None for those that a dict leaves out. `what` is what errors call
    the values, in the plural. With `shared`, one array may be for all outputs. Raises `DataError`
    if there are too many or too few of them.
    """
    names = [output.name for output in outputs]
    if isinstance(values, dict):
        if names == [None] and len(values) == 1:
            return list(values.values())
        unknown = sorted(set(values) - {key for key in names if key is not None})
        if unknown:
            raise DataError(
                f"{name} has {what} for {unknown}; the model's outputs are "
                f"{names if names != [None] else 'one, without a name'}. Expected "
                f"{'a dict with these names' if names != [None] else 'an array'}."
            )
        return [values.get(key) for key in names]
    if isinstance(values, list | tuple):
        if len(values) != len(outputs):
            raise DataError(
                f"{name} has {len(values)} arrays of {what}; the model has {len(outputs)} "
                f"output{'s' if len(outputs) > 1 else ''}. Expected one array per output; rows "
                "that are a list of arrays become one array with np.stack."
            )
        return list(values)
    if len(outputs) > 1 and not shared:
        raise DataError(
            f"{name} has one array of {what}; the model has {len(outputs)} outputs. Expected a "
            f"dict with the names {names}, or a list in that order."
        )
    return [values] * len(outputs)


def check_labels(y: np.ndarray | None, output: Output, name: str, first_row: int = 0) -> None:
    """Raises `DataError` unless labels are what an output's loss takes.

    The error names the label and its row, counted from `first_row`, or both shapes.
    """
    if output.kind in ("none", "custom") or (not output.shape and output.kind == "sparse"):
        return
    if y is None:
        raise DataError(
            f"{name} has no labels{output.words}, whose loss is {output.loss}. Expected an array "
            "of them; to leave the output out, compile the model without a loss for it."
        )
    if output.shape is None:
        return
    check = {"sparse": _sparse, "categorical": _categorical, "binary": _binary}
    check.get(output.kind, _regression)(_Labels(y, output, name, first_row))


@dataclasses.dataclass(frozen=True)
class _Labels:
    y: np.ndarray
    output: Output
    name: str
    first_row: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.y.shape[1:]

    @property
    def wanted(self) -> tuple[int | None, ...]:
        assert self.output.shape is not None
        return self.output.shape

    @property
    def is_ids(self) -> bool:
        """Whether there is one number where the output has a row of classes."""
        ids = self.wanted[:-1]
        return fits(self.shape, ids) or fits(self.shape, (*ids, 1))

    def refuse_shape(self, expected: str) -> None:
        raise DataError(
            f"{self.name} has labels of shape {self.shape} per row{self.output.words}; the "
            f"model's output has {self.wanted} per row and its loss is {self.output.loss}. "
            f"{expected}"
        )

    def refuse(self, wrong: np.ndarray, expected: str) -> None:
        """Raises if there is a wrong label, naming the first one."""
        if not wrong.any():
            return
        place = np.argwhere(wrong)[0]
        rows = np.unique(np.nonzero(wrong)[0]).size
        others = f" (and wrong ones in {rows - 1} more rows)" if rows > 1 else ""
        classes = (
            ""
            if self.output.kind != "sparse"
            else (
                f"; the model's output has {self.output.classes} class"
                f"{'es' if self.output.classes != 1 else ''}"
            )
        )
        raise DataError(
            f"{self.name} has the label {self.y[tuple(place)]:.6g}{self.output.words} in row "
            f"{self.first_row + int(place[0])}{others}{classes}. {expected}"
        )


def _fits_up_to_last(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    # Keras adds or removes a last axis of 1; it broadcasts everything else without a word.
    if fits(shape, wanted) or fits((*shape, 1), wanted):
        return True
    return shape[-1:] == (1,) and fits(shape[:-1], wanted)


def _sparse(labels: _Labels) -> None:
    classes = labels.output.classes
    if not labels.is_ids:
        hint = "Expected one integer per row."
        if len(labels.wanted) > 1:
            hint = f"Expected integers of shape {labels.wanted[:-1]} per row."
        if fits(labels.shape, labels.wanted):
            hint = "These look one-hot: use the loss categorical_crossentropy, or y.argmax(-1)."
        labels.refuse_shape(hint)
    if classes is None:
        expected = "Expected integers of at least 0."
    elif classes == 1:
        expected = (
            "Expected only 0, as a single class has no other. For two classes in one sigmoid "
            "unit use the loss binary_crossentropy."
        )
    else:
        expected = f"Expected integers from 0 to {classes - 1}."
    y = labels.y
    wrong = y < 0
    if y.dtype.kind == "f":
        wrong |= y != np.floor(y)
    if classes is not None:
        wrong |= y >= classes
    if labels.output.ignored is not None:
        wrong &= y != labels.output.ignored
    labels.refuse(wrong, expected)


def _categorical(labels: _Labels) -> None:
    if not fits(labels.shape, labels.wanted):
        hint = f"Expected one-hot rows of shape {labels.wanted}."
        if labels.is_ids:
            hint = (
                "For integer labels use the loss sparse_categorical_crossentropy, or "
                "tf_keras.utils.to_categorical(y)."
            )
        labels.refuse_shape(hint)
    labels.refuse(labels.y < 0, "Expected one-hot rows or probabilities, which are at least 0.")
    sums = labels.y.sum(-1, dtype=np.float64)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if len(labels.wanted) > 1:
        wrong &= sums != 0  # steps or pixels that are left out
    if wrong.any():
        place = np.argwhere(wrong)[0]
        raise DataError(
            f"{labels.name} has labels{labels.output.words} in row "
            f"{labels.first_row + int(place[0])} that sum to {sums[tuple(place)]:.6g}; the loss is "
            f"{labels.output.loss}. Expected one-hot rows or probabilities, which sum to 1. For "
            "several labels per row use sigmoid outputs and the loss binary_crossentropy."
        )


def _binary(labels: _Labels) -> None:
    if not _fits_up_to_last(labels.shape, labels.wanted):
        hint = f"Expected labels of shape {labels.wanted} per row."
        if labels.is_ids:
            hint = (
                "For one class per row use softmax outputs and the loss "
                "sparse_categorical_crossentropy; for several, one column of 0 and 1 per label."
            )
        elif labels.shape == (2,) and labels.wanted == (1,):
            hint = "Expected the label of the second class alone: y[:, 1]."
        labels.refuse_shape(hint)
    wrong = (labels.y < 0) | (labels.y > 1) if labels.y.dtype != bool else np.zeros(1, bool)
    hint = "Expected values from 0 to 1"
    if wrong.any():
        low, high = float(labels.y.min()), float(labels.y.max())
        if (low, high) == (-1, 1):
            hint += ": (y + 1) / 2"
        elif low >= 0 and high in (2, 255):
            hint += ": y - 1 for labels 1 and 2" if high == 2 else ": y / 255 for pixels"
    labels.refuse(wrong, f"{hint}; the loss is {labels.output.loss}.")


def _regression(labels: _Labels) -> None:
    if not _fits_up_to_last(labels.shape, labels.wanted):
        hint = f"Expected labels of shape {labels.wanted} per row"
        if labels.shape in ((), (1,)):
            hint += "; one number per row would be compared with every output"
        labels.refuse_shape(f"{hint}.{shape_advice(labels.y.shape, labels.wanted, 'y')}")
