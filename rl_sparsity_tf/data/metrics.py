"""What the search tries to keep: the model's own metric on validation data."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.labels import last_line, loss_kind
from rl_sparsity_tf.errors import (
    ArgumentError,
    DataError,
    ModelError,
    RLSparsityError,
    did_you_mean,
)
from rl_sparsity_tf.layers.copying import compile_arguments

_HIGHER = (
    "acc auc precision recall f1 f2 fbeta iou dice top cosine r2 kappa sensitivity specificity "
    "correlation hit map ndcg psnr ssim bleu"
).split()
_LOWER = (
    "loss error mse mae mape msle rmse perplexity entropy hinge divergence poisson logcosh "
    "deviance distance squared absolute"
).split()


@dataclasses.dataclass(frozen=True)
class Score:
    """A model's figures on one data set: the metric that the search keeps, the compiled loss."""

    metric: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Metric:
    """The metric that the search keeps.

    Its name is that in the model's logs, e.g. `"accuracy"`; `"loss"` for a model without one.
    """

    name: str
    higher_is_better: bool

    @property
    def is_accuracy(self) -> bool:
        """Whether the figure may be called an accuracy."""
        return self.name.endswith(("accuracy", "acc"))

    def retention(self, value: float, dense: float) -> float:
        """How much of the dense model's figure is left, in [0, 1]."""
        if not (value == value and abs(value) < float("inf")):
            return 0.0
        if self.higher_is_better:
            ratio = value / dense if dense > 0 else float(value >= dense)
        else:
            ratio = dense / value if value > 0 else 1.0
        return min(1.0, max(0.0, ratio))

    def margin(self, value: float, rows: int) -> float:
        """What figures near a value may differ by without saying anything.

        An accuracy is a count of rows: its standard error, sqrt(p (1 - p) / rows). Of other metrics
        0.
        """
        if not self.is_accuracy or rows < 1 or not 0.0 <= value <= 1.0:
            return 0.0
        return math.sqrt(value * (1.0 - value) / rows)

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is the better figure."""
        return one > other if self.higher_is_better else one < other

    def estimated(self, dense: Score, error: float) -> Score:
        """A guess from how far the outputs of the layers move: only differences mean anything.

        `error` is the mean output error of the layers, in [0, 1].
        """
        left = max(1.0 - error, 1e-6)
        falls = self.higher_is_better == (dense.metric >= 0)
        return Score(dense.metric * left if falls else dense.metric / left, dense.loss / left)

    def to_dict(self) -> dict[str, Any]:
        """The metric as metrics.json names it."""
        return {"name": self.name, "higher_is_better": self.higher_is_better}


def search_compile_arguments(model: keras.Model, learning_rate: float) -> dict[str, Any]:
    """What the search compiles its copies with: the user's loss and metrics, and Adam.

    A classifier without a metric gets its accuracy. Raises `ModelError` if the model is not
    compiled with a loss, or by a name that is not known, or in the scope of a
    `tf.distribute.Strategy`.
    """
    if tf.distribute.has_strategy():
        raise ModelError(
            f"Model {model.name!r} is to be trained or scored inside the scope() of a "
            f"{type(tf.distribute.get_strategy()).__name__}, and the package does that in one "
            "process on one device. Call it outside the scope; the model may have been made in it."
        )
    arguments = compile_arguments(model)
    if arguments is None or not arguments.get("loss"):
        raise ModelError(
            f"Model {model.name!r} is not compiled with a loss, so neither training nor "
            "validation is possible. Call model.compile(optimizer, loss, metrics) first."
        )
    _check_names(model, "loss", arguments["loss"])
    _check_names(model, "metric", [arguments.get("metrics"), arguments.get("weighted_metrics")])
    arguments["optimizer"] = keras.optimizers.Adam(learning_rate)
    arguments["run_eagerly"] = False
    if not arguments.get("metrics") and not arguments.get("weighted_metrics"):
        accuracy = _accuracy_for(arguments["loss"])
        if accuracy is not None:
            arguments["metrics"] = [accuracy]
    return arguments


def _check_names(model: keras.Model, kind: str, parts: Any) -> None:
    """Raises for a name that Keras does not know, which it would only see in training."""
    module = keras.losses if kind == "loss" else keras.metrics
    short = ["accuracy", "acc", "crossentropy", "ce"] if kind == "metric" else []
    for name in tf.nest.flatten(parts):
        if not isinstance(name, str) or name in short:
            continue
        try:
            if callable(module.get(name)):
                continue
        except ValueError:
            pass
        known = [*short, *(other for other in dir(module) if other.islower() and other[0] != "_")]
        # Only misspellings: a half-remembered name is closer to that of another one.
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ModelError(
            f"Model {model.name!r} is compiled with the {kind} {name!r}, which Keras does not "
            f"know. Expected the name of one of Keras's own, or a function.{hint}"
        )


def _accuracy_for(loss: Any) -> Any:
    if isinstance(loss, list | tuple | dict):
        return None
    name = str(getattr(loss, "name", None) or getattr(loss, "__name__", None) or loss).lower()
    name = name.replace("_", "")
    if "crossentropy" not in name:
        return None
    from_logits = getattr(loss, "from_logits", None)
    if from_logits is None:
        from_logits = getattr(loss, "_fn_kwargs", {}).get("from_logits", False)
    if "binary" in name and from_logits:
        return keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)
    return "accuracy"


def choose_metric(
    model: keras.Model, batch: Batch, wanted: str | tuple[str, str] | None = None
) -> Metric:
    """Chooses the metric among those a model is compiled with, and its direction.

    `wanted` is a metric's name, or its name and `"max"` or `"min"`. By default it is the first
    metric, and the loss where there is no metric, where the model has several outputs (the loss
    covers all of them), and where binary labels are shares rather than 0 or 1 (an autoencoder's
    pixels), which an accuracy counts as wrong. The model's `test_step` is tried on `batch`.

    Raises `ArgumentError` if the name is not known or its direction cannot be told from it,
    `DataError` if the model cannot be evaluated on the batch, and `ModelError` if its loss or
    metrics raise.
    """
    try:
        names = list(model.test_step(batch))
    except RLSparsityError:
        raise
    except (ValueError, TypeError, tf.errors.OpError) as error:
        raise DataError(
            f"The model's loss and metrics cannot be computed on the data: {last_line(error)}. "
            "Expected labels in the form that the compiled loss takes (integers for sparse "
            "losses, one-hot or float rows otherwise)."
        ) from error
    except Exception as error:  # whatever a loss or metric of the user's raises
        raised, kind = last_line(error), type(error).__name__
        raised = raised if raised.startswith(kind) else f"{kind}: {raised}"
        raise ModelError(
            f"The loss and metrics of model {model.name!r} cannot be computed: {raised}. "
            "Expected functions that model.test_on_batch(x, y) runs through."
        ) from error
    finally:
        model.reset_metrics()
    if "loss" not in names:
        raise ModelError(
            f"The test_step of {type(model).__name__} returns {names} and no 'loss', which plans "
            "are compared by. Let it return the loss under that name, as Keras's own does."
        )
    if isinstance(wanted, list):
        raise ArgumentError(f"metric={wanted!r} is a list. Expected {_as_metric(wanted)}.")
    figures = [name for name in names if name != "loss" and not name.endswith("_loss")]
    direction = None
    if isinstance(wanted, tuple) and len(wanted) == 2:
        wanted, direction = wanted
        if direction not in ("max", "min"):
            raise ArgumentError(
                f"metric=({wanted!r}, {direction!r}) has no known direction. Expected 'max' or "
                "'min'."
            )
    if wanted is not None and not (isinstance(wanted, str) and wanted in names):
        raise ArgumentError(
            f"metric={wanted!r} is not among the model's metrics. {did_you_mean(wanted, names)}"
        )
    accuracy = bool(figures) and "acc" in figures[0]
    if wanted is None and (
        _has_several_outputs(model) or (accuracy and _has_soft_binary_labels(model, batch))
    ):
        figures = []
    name = str(wanted) if wanted is not None else (figures[0] if figures else "loss")
    if direction is not None:
        return Metric(name, direction == "max")
    text = name.lower()
    lower = any(word in text for word in _LOWER)
    if lower or any(word in text for word in _HIGHER):
        return Metric(name, not lower)
    raise ArgumentError(
        f"Whether a higher {name!r} is better cannot be told from its name. Pass "
        f"metric=({name!r}, 'max') or metric=({name!r}, 'min')."
    )


def _as_metric(names: list[Any]) -> str:
    one = f"metric={names[0]!r}" if names else "one name"
    return f"metric={tuple(names)!r}" if len(names) == 2 and names[1] in ("max", "min") else one


def _has_several_outputs(model: keras.Model) -> bool:
    # Keras keeps a loss per output beside the total only if there are several.
    losses = getattr(model, "compiled_loss", None)
    return losses is not None and len(losses.metrics) > 1


def _has_soft_binary_labels(model: keras.Model, batch: Batch) -> bool:
    labels = batch[1]
    if loss_kind(model.loss)[1] != "binary" or not hasattr(labels, "dtype"):
        return False
    values = np.asarray(labels)
    return bool((values != np.round(values)).any())


class Evaluator:
    """Computes a compiled model's metric and loss on cached batches, without retracing."""

    def __init__(self, model: keras.Model, metric: Metric):
        self.model = model
        self.metric = metric
        self.function = tf.function(lambda x, y, weights: model.test_step((x, y, weights)))

    def __call__(self, batches: list[Batch]) -> Score:
        """The score over all batches together, whatever was evaluated before."""
        self.model.reset_metrics()
        logs: dict[str, tf.Tensor] = {}
        for batch in batches:
            logs = self.function(*batch)
        loss, value = float(logs["loss"]), float(logs[self.metric.name])
        return Score(metric=value, loss=loss)
