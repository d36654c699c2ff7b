"""Checks that a model repeats itself and that its .tflite file does the same; scores both."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.console import without_traces
from rl_sparsity_tf.data.batches import evaluation_data, inputs_of
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.metrics import (
    Evaluator,
    Metric,
    Score,
    choose_metric,
    search_compile_arguments,
)
from rl_sparsity_tf.errors import ModelError, VerificationError
from rl_sparsity_tf.export.matching import MatchedTensor, could_hold
from rl_sparsity_tf.export.saved_model import flat_call, reference_outputs
from rl_sparsity_tf.layers.copy_checks import as_it_was, check_figures
from rl_sparsity_tf.layers.structure import all_layers, flat_inputs, input_specs
from rl_sparsity_tf.layers.wrapping import strip
from rl_sparsity_tf.tflite.prediction import run_rows
from rl_sparsity_tf.tflite.reading import FlatTensor
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError

# Rows run one by one; each is a call of its own.
_SINGLE_ROWS = 4
# Float32 sums in another order differ by some units in the last place of the largest value, which
# an output of narrow range around a large value must be allowed.
_RANGE_FLOOR = 0.1
_FLOAT_BITS = 32
# A runtime rounds in every operator, and not where Keras does.
_MOVES = 4.0
_MOST_MOVED = 0.25
# The same call in two interpreters, which do the same sums in the same order.
_REPEATED = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a file may be from its Keras model.

    Attributes:
        difference: Largest allowed absolute difference, relative to the output's range.
        top1: Share of rows with the same largest output that is enough where `judge_difference`
            is false, among the rows whose largest two outputs differ by more than twice the
            tolerated difference (any other row may turn either way by rounding alone), or among
            all rows if there are none of those.
        judge_difference: Whether the difference has to be within its bound in any case. If not,
            an output with a top-1 may pass by that instead.
        moves: How far each output of the Keras model moves by itself, where nothing but rounding
            changes; four times as much is allowed on top, up to a quarter of the output's range.
    """

    difference: float
    top1: float
    judge_difference: bool = True
    moves: tuple[float, ...] = ()

    def bound(self, output: int, scale: float) -> float:
        """The largest allowed difference of an output whose range is `scale`."""
        moved = self.moves[output] if self.moves else 0.0
        return self.difference * scale + min(_MOVES * moved, _MOST_MOVED * scale)


TOLERANCES = {
    "none": Tolerance(difference=1e-4, top1=0.99),
    "float16": Tolerance(difference=1e-2, top1=0.99),
    "plan": Tolerance(difference=5e-2, top1=0.98),
    # 15 levels instead of 255 in a kernel.
    "plan4": Tolerance(difference=0.5, top1=0.9),
    "dynamic": Tolerance(difference=0.1, top1=0.95),
    # Calibration clips what its rows did not reach: only the ranking is promised.
    "int8": Tolerance(difference=0.25, top1=0.9, judge_difference=False),
    "int4": Tolerance(difference=0.5, top1=0.9, judge_difference=False),
}


def tolerance_for(quantization: str, compute: str, bits: int) -> Tolerance:
    """How far a file may be from Keras by default.

    `compute` says how the kernels that a plan quantizes compute, and `bits` are the fewest of a
    kernel, 32 if none is quantized.
    """
    if quantization != "plan" or compute == "weight_only" or bits == _FLOAT_BITS:
        mode = "plan4" if (quantization, bits) == ("plan", 4) else quantization
    elif compute == "static":
        mode = "int4" if bits == 4 else "int8"
    else:
        mode = "plan4" if bits == 4 else "dynamic"
    return TOLERANCES[mode]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """What was measured between a file and its Keras model.

    Attributes:
        max_abs_difference: Largest absolute difference, of the output where it is largest relative
            to its range.
        output_range: That output's largest minus smallest value in Keras.
        top1_agreement: Share of rows with the same largest output; None if no output is a matrix
            with more than one column.
    """

    max_abs_difference: float
    output_range: float
    top1_agreement: float | None


def verify_outputs(
    worker: ConversionWorker,
    path: str | os.PathLike[str],
    inputs: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    tolerance: Tolerance,
    batch_size: int | None = None,
) -> Agreement:
    """Runs a file with and without XNNPACK, row by row and in one batch, and compares.

    There is one array of rows per input, and `expected` are Keras's outputs for them. The result is
    the worst agreement over all runs. A VerificationError is raised if the file does not run, gives
    NaN, or differs by more than allowed.
    """
    worst: Agreement | None = None
    rows = len(inputs[0])
    # With a fixed batch size both runs would be the same one.
    sizes = [(1, min(rows, _SINGLE_ROWS)), (rows, rows)] if batch_size is None else [(rows, rows)]
    for xnnpack in (True, False):
        for batch, count in sizes:
            how = f"{'with' if xnnpack else 'without'} XNNPACK, batch size {batch_size or batch}"
            try:
                outputs = worker.run(
                    path, [array[:count] for array in inputs], batch_size=batch, xnnpack=xnnpack
                )
            except WorkerError as error:
                raise VerificationError(
                    f"The exported file does not run in LiteRT ({how}): {_one_line(error.detail)} "
                    "Choose another quantization, or quantization='none'."
                ) from error
            wanted = [array[:count] for array in expected]
            worst = _worse(worst, compare_outputs(outputs, wanted, tolerance, how))
    assert worst is not None
    return worst


def verify_calls(
    worker: ConversionWorker,
    path: str | os.PathLike[str],
    inputs: Sequence[np.ndarray],
    batch_size: int | None = None,
) -> None:
    """Checks that no call of a file depends on those before it, with and without XNNPACK.

    Two calls are made in turns, twice each, by one interpreter that is not reset, and by fresh
    ones.

    There is one array of rows per input, of which the first and the last rows are taken. A
    VerificationError is raised if a call gives something else than the same call alone.
    """
    size = batch_size or 1
    first, second = ([part[:size] for part in inputs], [part[-size:] for part in inputs])
    for xnnpack in (True, False):
        alone = [worker.run(path, one, batch_size=size, xnnpack=xnnpack) for one in (first, second)]
        rows = [np.concatenate([a, b, a, b]) for a, b in zip(first, second, strict=True)]
        outputs = worker.run(path, rows, batch_size=size, xnnpack=xnnpack, reset=False)
        for index, found in enumerate(outputs):
            wanted = np.concatenate([part[index] for part in alone] * 2)
            if not np.allclose(found, wanted, rtol=_REPEATED, atol=0.0, equal_nan=True):
                difference = float(np.max(np.abs(found.astype(np.float64) - wanted)))
                raise VerificationError(
                    f"Output {index} of the exported file depends on the calls before: the same "
                    f"rows differ by up to {difference:.3g} from what a fresh interpreter gives. "
                    "Expected a file that starts from zero at every call. Pass unroll=True, or "
                    "stateful=True if the state is to be kept."
                )


def compare_outputs(
    outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: Tolerance, how: str
) -> Agreement:
    """Compares a file's outputs with Keras's, one array per output.

    `how` says in messages how the file was run. A VerificationError is raised if a value is NaN or
    the outputs differ by more than allowed.
    """
    if [array.shape for array in outputs] != [array.shape for array in expected]:
        raise VerificationError(
            f"The exported file ({how}) gives outputs of the shapes "
            f"{[array.shape for array in outputs]}, Keras {[array.shape for array in expected]}. "
            "Export again; if it stays so, the model uses an operation that TFLite computes "
            "differently."
        )
    worst: Agreement | None = None
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        output, wanted = output.astype(np.float64), wanted.astype(np.float64)
        if not np.isfinite(wanted).all():
            raise VerificationError(
                f"The Keras model's own output {index} contains NaN or infinite values on the "
                "sample inputs, so nothing can be compared. Pass representative_data that the "
                "model was made for, or repair its weights."
            )
        if np.isnan(output).any():
            raise VerificationError(
                f"Output {index} of the exported file contains NaN ({how}), Keras's does not. "
                "Choose another quantization."
            )
        difference = float(np.max(np.abs(output - wanted), initial=0.0))
        extent = float(np.ptp(wanted)) if wanted.size else 0.0
        scale = max(extent, _RANGE_FLOOR * float(np.max(np.abs(wanted), initial=0.0)), 1e-6)
        bound = tolerance.bound(index, scale)
        close = difference <= bound
        top1, misranked = None, ""
        if wanted.ndim == 2 and wanted.shape[1] > 1:
            top1, misranked = _top1(output, wanted, tolerance, bound)
            # Within the tolerance no decided row can turn, so the difference alone decides, unless
            # the ranking is all that is promised: then either will do, since a matrix may also be
            # an autoencoder's output, several regressions or several labels.
        ranked = top1 is not None and not misranked and not tolerance.judge_difference
        if not close and not ranked:
            raise VerificationError(
                f"Output {index} of the exported file ({how}) differs from Keras by up to "
                f"{difference:.3g}, {difference / scale:.3g} of the output range {scale:.3g}"
                f"{misranked}. Expected at most {bound / scale:.3g} of it"
                f"{_or_ranked(tolerance) if misranked else ''}. Give representative_data like the "
                "data the model was trained on, choose another quantization, or pass a larger "
                "tolerance= if that is good enough."
            )
        found = Agreement(max_abs_difference=difference, output_range=scale, top1_agreement=top1)
        worst = _worse(worst, found)
    assert worst is not None
    return worst


def verify_zeros(
    kernels: Mapping[str, np.ndarray],
    matches: Mapping[str, Sequence[MatchedTensor]],
    tensors: Sequence[FlatTensor],
) -> list[str]:
    """Checks that every weight that is zero in Keras is zero in the file.

    Kernels and the tensors that hold them are by path; `tensors` are all of the file. It returns
    notes on kernels with zeros of which the file has nothing that could hold them. A
    VerificationError is raised if a zero was lost, or a kernel's zeros cannot be found although a
    tensor could hold them.
    """
    notes = []
    taken = {id(match.tensor) for held in matches.values() for match in held}
    for path, kernel in kernels.items():
        zeros = int(kernel.size - np.count_nonzero(kernel))
        if not zeros:
            continue
        if not matches[path]:
            free = [t for t in tensors if id(t) not in taken and could_hold(kernel, t)]
            if free:
                raise VerificationError(
                    f"The kernel {path!r} has {zeros} zeros in Keras, and no tensor of the "
                    f"exported file holds its values, though {free[0].name!r} has its shape: the "
                    "zeros were lost. Choose another quantization."
                )
            notes.append(
                f"{path}: not found in the file (the converter may have folded it into other "
                f"constants), so its {zeros} zeros were not checked"
            )
            continue
        lost = sum(
            int(np.count_nonzero(match.values(kernel)[match.part(kernel) == 0]))
            for match in matches[path]
        )
        if lost:
            raise VerificationError(
                f"{lost} of the {zeros} zeros of the kernel {path!r} are not zero in the exported "
                f"file (tensor {matches[path][0].tensor.name!r}). Choose another quantization."
            )
    return notes


def _top1(
    output: np.ndarray, wanted: np.ndarray, tolerance: Tolerance, bound: float
) -> tuple[float, str]:
    """Returns the share of rows with the same largest value, and what to say if it is too small."""
    same = np.argmax(output, axis=1) == np.argmax(wanted, axis=1)
    ranked = np.sort(wanted, axis=1)
    # Two outputs may each move by the tolerated difference before they change places.
    decided = ranked[:, -1] - ranked[:, -2] > 2 * bound
    rows, which = (same[decided], " that are clearly decided") if decided.any() else (same, "")
    share = float(np.mean(rows))
    if share >= tolerance.top1:
        return float(np.mean(same)), ""
    return float(np.mean(same)), (
        f", and its largest value is Keras's in {share:.1%} of the {rows.size} rows{which}"
    )


def _or_ranked(tolerance: Tolerance) -> str:
    return (
        ""
        if tolerance.judge_difference
        else f", or the same largest value in {tolerance.top1:.1%} of the rows"
    )


def _worse(first: Agreement | None, second: Agreement) -> Agreement:
    if first is None:
        return second
    top1 = [a.top1_agreement for a in (first, second) if a.top1_agreement is not None]
    worst = max(first, second, key=lambda a: a.max_abs_difference / a.output_range)
    return dataclasses.replace(worst, top1_agreement=min(top1, default=None))


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "it gave no reason."


_BATCH_SIZE = 256


def score_model(model: keras.Model, batches: list[Batch], metric: Metric) -> Score:
    """Scores a plain model; it is compiled for the search's metric on a copy."""
    return score_on_all(model, [batches], metric)[0]


def score_on_all(model: keras.Model, sets: Sequence[list[Batch]], metric: Metric) -> list[Score]:
    """Scores a plain model on several sets of batches, with one copy that is traced once."""
    judge = _judge(model)
    for batches in sets:
        check_figures(model, judge, batches[0])
    evaluator = Evaluator(judge, metric)
    return [evaluator(batches) for batches in sets]


def score_tflite(path: Path, model: keras.Model, batches: list[Batch], metric: Metric) -> Score:
    """Scores a .tflite file with the loss and metrics that a Keras model is compiled with.

    The file computes outputs only: losses that the model adds by itself (regularizers, `add_loss`)
    are those of the Keras model on the same rows.
    """
    inputs = flat_inputs(model, inputs_of(batches))
    outputs = run_rows(path, inputs, batch_size=_BATCH_SIZE, xnnpack=True)
    judge = _judge(model)
    judge.reset_metrics()
    logs: dict[str, Any] = {}
    start = 0
    for x, y, weights in batches:
        rows = len(tf.nest.flatten(x)[0])
        part = [tf.constant(output[start : start + rows]) for output in outputs]
        logs = _step(judge, (x, y, weights), part)
        start += rows
    loss = float(logs["loss"])
    return Score(metric=float(logs.get(metric.name, loss)), loss=loss)


def _step(judge: keras.Model, batch: Batch, outputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The model's own `test_step`, of which its call gives the outputs of a file."""
    call = judge.call

    def replaced(*arguments: Any, **options: Any) -> Any:
        # Keras's own adds losses. The file lists its outputs; the model arranges them.
        return tf.nest.pack_sequence_as(call(*arguments, **options), outputs)

    vars(judge)["call"] = replaced  # below Keras's attribute tracking
    try:
        return judge.test_step(batch)
    finally:
        del vars(judge)["call"]


def compare_scores(
    path: Path, model: keras.Model, test_data: Any, lost: float
) -> dict[str, float | str]:
    """Scores a file and its Keras model, which must be compiled, on the same data.

    The data is as `evaluate` takes it, and `lost` is how much of an accuracy the file may lose. It
    returns `{"metric": its name, "keras": the model's figure, "tflite": the file's}`. A ModelError
    is raised if the model is not compiled, a DataError if the data does not fit it, and a
    VerificationError if the file loses more of an accuracy than is allowed.
    """
    batches = evaluation_data(test_data, model, "test_data")
    judge = _judge(model)
    metric = choose_metric(judge, batches[0])
    check_figures(model, judge, batches[0])
    ours = Evaluator(judge, metric)(batches).metric
    theirs = score_tflite(path, model, batches, metric).metric
    if metric.is_accuracy and theirs < ours - lost:
        raise VerificationError(
            f"The exported file has {metric.name} {theirs:.4f} on test_data, the Keras model "
            f"{ours:.4f}. Expected at most {lost:g} less. Give representative_data like the data "
            "the model was trained on, or choose another quantization."
        )
    return {"metric": metric.name, "keras": ours, "tflite": theirs}


def _judge(model: keras.Model) -> keras.Model:
    """A copy that computes the loss and the metrics as the search does."""
    search_compile_arguments(model, 1e-3)  # says in words what is missing
    judge = strip(model)
    judge.compile(**search_compile_arguments(judge, 1e-3))
    return judge


_ROWS = 8
# Sums in another order move an output by some units in the last place, more in a sensitive network;
# noise is larger. Where the graph draws random numbers, less is needed to tell.
_LIMIT, _LIMIT_IF_DRAWN = 1e-3, 1e-6
_RANDOM = re.compile(r"Random|TruncatedNormal|Multinomial|Stateful(Standard|Uniform)|Rng|PyFunc")


def check_repeatable(model: keras.Model, x: Any, batch_size: int | None = None) -> None:
    """Raises if a model's outputs differ from call to call, although it is not training.

    The inputs are as the model takes them, or a list of one array per input; the batch size is the
    rows per call where the model or its file fixes them. The model's weights and states end as they
    began. The ModelError names the layer, if its operators can be told apart.
    """
    fixed = batch_size or next((spec.batch for spec in input_specs(model) if spec.batch), None)
    rows = [np.asarray(array)[: fixed or _ROWS] for array in flat_inputs(model, x)]
    with without_traces():
        first, second = (_called(model, rows, fixed) for _ in range(2))
        differs = max(map(_difference, first, second), default=0.0)
        if differs <= _LIMIT_IF_DRAWN:
            return
        with as_it_was(model):
            layers = _random_layers(model, rows, fixed)
    if differs <= _LIMIT and not layers:
        return
    named = [f"{layer.name!r} ({type(layer).__name__})" for layer in layers]
    which = f"its layer {named[0]} draws random numbers" if named else "something in it is random"
    if len(named) > 1:
        which = f"its layers {', '.join(named)} draw random numbers"
    raise ModelError(
        f"Model {model.name!r} is random at inference: {which}, and two calls on the same rows "
        f"with training=False differ by {differs:.2g} of the output's size. Expected a model that "
        "repeats itself, since its file is compared with it: build it without that (Dropout and "
        "noise without training=True) and copy the weights with set_weights."
    )


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference by the largest value."""
    same = np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    if same or not first.size:
        return 0.0
    one, other = (np.nan_to_num(array.astype(np.float64)) for array in (first, second))
    return float(np.abs(one - other).max() / (np.abs(one).max() or 1.0))


def _called(
    model: keras.Model, rows: Sequence[np.ndarray], batch_size: int | None
) -> list[np.ndarray]:
    with as_it_was(model):  # states and counts begin alike at both calls
        return reference_outputs(model, rows, batch_size)


def _random_layers(
    model: keras.Model, rows: Sequence[np.ndarray], batch_size: int | None
) -> list[keras.layers.Layer]:
    """The layers in whose scopes the model's graph draws random numbers."""
    flat = flat_call(model)
    specs = [tf.TensorSpec([batch_size, *array.shape[1:]], array.dtype) for array in rows]
    function = tf.function(lambda *inputs: flat(inputs))
    graph = function.get_concrete_function(*specs).graph.as_graph_def()
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    drawn = [node.name for node in nodes if _RANDOM.search(node.op)]
    by_name = {layer.name: layer for layer in all_layers(model) if layer is not model}
    found = {}
    for scopes in (name.split("/") for name in drawn):
        inside = [by_name[scope] for scope in scopes if scope in by_name]
        if inside:
            found[id(inside[-1])] = inside[-1]
    return list(found.values())
