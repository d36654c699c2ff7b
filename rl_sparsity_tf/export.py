"""Exports a Keras model as a .tflite file and checks that the file does what the model does."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.conversion import WorkerError, shared_worker, start_worker
from rl_sparsity_tf.errors import ArgumentError, PlanError, check_choice
from rl_sparsity_tf.export_errors import conversion_error
from rl_sparsity_tf.export_precision import in_float32
from rl_sparsity_tf.export_report import ExportReport, TensorReport, tensor_reports
from rl_sparsity_tf.files import check_new_file, replacing
from rl_sparsity_tf.flatbuffer import read_flat_model
from rl_sparsity_tf.matching import find_variable, kernel_variables, match_kernels
from rl_sparsity_tf.plan import CompressionPlan
from rl_sparsity_tf.recurrent import (
    check_unroll,
    looping_layers,
    names_of,
    stateless,
    unrolled,
)
from rl_sparsity_tf.rules import resolve
from rl_sparsity_tf.samples import collect_rows, inputs_of_embeddings, random_rows
from rl_sparsity_tf.saved_model import reference_outputs, write_saved_model
from rl_sparsity_tf.signature import input_specs
from rl_sparsity_tf.verification import TOLERANCES, Tolerance, verify_outputs, verify_zeros
from rl_sparsity_tf.weight_only import FLOAT_BITS, quantization_entries
from rl_sparsity_tf.wrapping import accepted, is_wrapped, plan_of, strip

__all__ = ["ExportReport", "TensorReport", "export_tflite", "predict_tflite", "start_worker"]

QUANTIZATIONS = ("plan", "none", "dynamic", "int8", "float16")
_CALIBRATION_ROWS = 512
_CHECKED_ROWS = 64
_RANDOM_ROWS = 32


def export_tflite(
    model: Any,
    path: str | os.PathLike[str],
    quantization: str = "plan",
    *,
    plan: Any = None,
    representative_data: Any = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    batch_size: int | None = None,
    unroll: bool = False,
) -> ExportReport:
    """Writes a verified .tflite file that needs builtin operators only.

    The file is converted and run in a process of its own, in LiteRT with and without XNNPACK, one
    row and many at a time, and compared with the Keras model; every weight that is zero in Keras is
    looked up in the file. Only a file that passes appears at `path`.

    Args:
        model: A built `tf_keras` model, plain or wrapped, or an object with attributes `model` and
            `plan` such as a search result. Models of a mixed precision or of float64 are exported,
            and compared, as they compute in float32.
        path: The file to write, ending in .tflite.
        quantization: `"plan"` stores the kernels that the plan quantizes as int8 or int4 and
            computes in float32; `"none"` is float32; `"float16"` halves the weights; `"dynamic"` is
            the converter's dynamic range (int8 weights of at least 1,024 elements, activations
            quantized on the fly); `"int8"` is integers throughout, input and output included.
        plan: For `"plan"`: an object whose `kernels` maps paths to entries with `path`, `shape` and
            `exported_bits` (32, 8 or 4). By default the model's own.
        representative_data: Inputs like those the model will see: an array, a tuple with one array
            per input, or an iterable of batches (with or without targets). Needed for `"int8"`,
            which calibrates on up to 512 rows; the first 64 are used to check any file. Without it
            a file is checked on random inputs in [-1, 1].
        overwrite: Whether a file at `path` may be replaced.
        tolerance: Largest allowed difference, relative to the range of the output; by default 1e-4
            for `"none"`, 1e-2 for `"float16"`, 5e-2 for `"plan"` (0.5 with int4 kernels), 0.1 for
            `"dynamic"`; for `"int8"` 0.25 where an output has no top-1, which is judged otherwise.
        batch_size: Fixes the batch size of the file. Recurrent layers need that: by default a model
            with such layers is exported with batch size 1.
        unroll: Writes recurrent layers step by step instead of as a loop or a fused operator. The
            batch size stays open, the number of time steps has to be fixed; the file grows with it.

    Returns:
        The sizes, the agreement with Keras, the tensors, and notes on what was not done as asked.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model is not a built Sequential or functional `tf_keras` model.
        PlanError: If the plan does not fit the model.
        DataError: If the representative data does not fit the model.
        FileExistsRLSparsityError: If the file exists and `overwrite` is false.
        ExportError: If the model cannot be converted.
        VerificationError: If the file does not do what the model does; nothing is written.

    Example:
        >>> report = export_tflite(model, "model.tflite", quantization="none")
        >>> report.summary()
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    target = _check_path(path, overwrite)
    _check_numbers(tolerance, batch_size)
    if not isinstance(unroll, bool):
        raise ArgumentError(f"unroll={unroll!r} cannot be used. Expected True or False.")
    plain, plan = _plain_model(model, plan)
    if quantization == "plan" and plan is None:
        raise ArgumentError(
            "quantization='plan' needs a plan, and this model brings none. Pass plan=, export the "
            "result of a search, or pass quantization='none'."
        )
    if quantization == "int8" and representative_data is None:
        raise ArgumentError(
            "quantization='int8' needs representative_data to find the range of every activation. "
            "Pass some hundred rows of training inputs, or choose quantization='dynamic'."
        )
    if quantization == "int8":
        _check_ids(plain)
    batch_size, notes = _batch_size(plain, batch_size, unroll)
    variables, bits = _kernels(plain, plan)
    kernels = {name: np.asarray(variable) for name, variable in variables.items()}
    worker = shared_worker()
    work = Path(tempfile.mkdtemp(prefix="rl_sparsity_"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        traced, changes = stack.enter_context(in_float32(plain))
        notes += [*changes, *stack.enter_context(stateless(traced))]
        inputs, calibration = _samples(traced, representative_data)
        if quantization == "int8" and batch_size is not None and calibration is not None:
            _check_calibration(calibration, batch_size)
        with unrolled(traced) if unroll else contextlib.nullcontext():
            write_saved_model(traced, work / "saved_model", batch_size)
            file = work / "model.tflite"
            mode = "none" if quantization == "plan" else quantization
            rows = calibration if quantization == "int8" else None
            try:
                worker.convert(work / "saved_model", file, mode, rows)
            except WorkerError as error:
                raise conversion_error(traced, quantization, error) from error
        allowed = TOLERANCES[quantization]
        if quantization == "plan":
            file, refusals, smallest = _quantize_weights(file, kernels, bits)
            notes += refusals
            allowed = TOLERANCES["plan4" if smallest == 4 else "plan"]
        if tolerance is not None:
            allowed = dataclasses.replace(allowed, difference=tolerance, judge_difference=True)
        return _finish(
            file, target, quantization, traced, kernels, inputs, allowed, notes, batch_size
        )


def predict_tflite(
    path: str | os.PathLike[str],
    inputs: Any,
    *,
    batch_size: int = 256,
    xnnpack: bool = True,
) -> np.ndarray | list[np.ndarray]:
    """Runs a .tflite file over all rows, in LiteRT, in the conversion process.

    Args:
        path: A file written by [export_tflite][].
        inputs: An array of shape (rows, ...), or a list or tuple with one per input in Keras's
            order, in real values: quantized inputs and outputs are converted.
        batch_size: Rows at a time; a file with a fixed batch size uses its own.
        xnnpack: Whether LiteRT may use its XNNPACK delegate, as it does by default.

    Returns:
        The output of shape (rows, ...), or a list of them in Keras's order.

    Raises:
        ArgumentError: If the file or the inputs cannot be used.
        ExportError: If LiteRT cannot run the file.

    Example:
        >>> accuracy = (predict_tflite("model.tflite", x_test).argmax(1) == y_test).mean()
    """
    if not Path(path).is_file():
        raise ArgumentError(f"There is no file {str(path)!r}. Give the path of a .tflite file.")
    _check_positive("batch_size", batch_size)
    given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    arrays = [np.asarray(array) for array in given]
    if not arrays or any(array.ndim == 0 or not len(array) for array in arrays):
        raise ArgumentError(
            f"inputs has the shapes {[array.shape for array in arrays]}. Expected at least one row "
            "(first axis) for every input."
        )
    if len({len(array) for array in arrays}) != 1:
        raise ArgumentError(
            f"inputs has {[len(array) for array in arrays]} rows. Expected one array per input of "
            "the model, all with the same number of rows; wrap a single input given as nested "
            "lists in numpy.array."
        )
    outputs = shared_worker().run(path, arrays, batch_size=batch_size, xnnpack=xnnpack)
    return outputs[0] if len(outputs) == 1 else outputs


def _check_path(path: str | os.PathLike[str], overwrite: bool) -> Path:
    target = check_new_file(path, overwrite)
    if target.suffix != ".tflite":
        raise ArgumentError(
            f"path={str(path)!r} ends in {target.suffix!r}. Expected a name ending in '.tflite'."
        )
    return target


def _check_numbers(tolerance: float | None, batch_size: int | None) -> None:
    if tolerance is not None and not (
        isinstance(tolerance, (int, float)) and math.isfinite(tolerance) and tolerance > 0
    ):
        raise ArgumentError(
            f"tolerance={tolerance!r} cannot be used. Expected a positive number, the largest "
            "allowed difference relative to the output's range, or None for the default."
        )
    if batch_size is not None:
        _check_positive("batch_size", batch_size)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected an integer of at least 1.")


def _plain_model(model: Any, plan: Any) -> tuple[keras.Model, Any]:
    """Unpacks a search result and strips wrappers."""
    # A Keras model may have a layer or attribute called "plan"; it is never a search result.
    if not isinstance(model, keras.Model) and hasattr(model, "model") and hasattr(model, "plan"):
        plan = model.plan if plan is None else plan
        model = model.model
    model = accepted(model)
    if isinstance(plan, CompressionPlan) and not plan.is_resolved:
        plan = resolve(plan, model)
    if not is_wrapped(model):
        return model, plan
    return strip(model), plan_of(model) if plan is None else plan


def _batch_size(
    model: keras.Model, batch_size: int | None, unroll: bool
) -> tuple[int | None, list[str]]:
    """Returns the batch size to fix, and a note if nobody asked for it."""
    if unroll:
        check_unroll(model)
    fixed = {spec.batch for spec in input_specs(model) if spec.batch is not None}
    if batch_size is not None and fixed - {batch_size}:
        raise ArgumentError(
            f"batch_size={batch_size} does not fit model {model.name!r}, whose inputs are fixed to "
            f"batches of {sorted(fixed)}. Leave batch_size out."
        )
    chosen = next(iter(fixed), batch_size)
    loops = [] if unroll else looping_layers(model)
    if chosen is not None or not loops:
        return chosen, []
    return 1, [
        f"the file takes 1 row per call, because of the recurrent layers {names_of(loops)}; "
        "batch_size= fixes another number of rows, unroll=True leaves it open"
    ]


def _samples(
    model: keras.Model, representative_data: Any
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Returns the rows to check the file on, and those to calibrate it with, if there are any."""
    specs = input_specs(model)
    if representative_data is None:
        return random_rows(model, specs, _RANDOM_ROWS), None
    calibration = collect_rows(representative_data, specs, _CALIBRATION_ROWS)
    return [array[:_CHECKED_ROWS] for array in calibration], calibration


def _check_ids(model: keras.Model) -> None:
    floats = {spec.name for spec in input_specs(model) if spec.dtype.startswith(("float", "bf"))}
    ids = sorted(floats & inputs_of_embeddings(model))
    if ids:
        raise ArgumentError(
            f"quantization='int8' rounds float inputs to 256 levels, and input {ids[0]!r} of model "
            f"{model.name!r} takes an Embedding's ids as floats. Build it with "
            "Input(..., dtype='int32'), or choose another quantization."
        )


def _check_calibration(calibration: Sequence[np.ndarray], batch_size: int) -> None:
    if len(calibration[0]) < batch_size:
        raise ArgumentError(
            f"representative_data has {len(calibration[0])} rows, fewer than one batch of "
            f"{batch_size}. Give more rows or a smaller batch_size."
        )


def _kernels(model: keras.Model, plan: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the model's kernels by path, the plan's paths first, and the bits the plan wants."""
    variables: dict[str, Any] = {}
    bits: dict[str, int] = {}
    planned: Mapping[str, Any] = {} if plan is None else plan.kernels
    for name, entry in planned.items():
        variable = find_variable(model, name)
        if tuple(variable.shape) != tuple(entry.shape):
            raise PlanError(
                f"The plan gives the kernel {name!r} the shape {tuple(entry.shape)}, the model's "
                f"has {tuple(variable.shape)}. Use the plan with the model it was made for."
            )
        variables[name] = variable
        bits[name] = int(entry.exported_bits)
    known = {id(variable) for variable in variables.values()}
    for name, variable in kernel_variables(model).items():
        if id(variable) not in known:
            variables[name] = variable
    return variables, bits


def _quantize_weights(
    file: Path, kernels: Mapping[str, np.ndarray], bits: Mapping[str, int]
) -> tuple[Path, list[str], int]:
    """Applies the plan's bits; returns the file, notes, and the fewest bits used."""
    flat = read_flat_model(file)
    matches = match_kernels(kernels, flat.tensors)
    entries, reasons = quantization_entries(flat, matches, bits)
    quantized = file.with_name("quantized.tflite")
    if entries:
        try:
            refused = shared_worker().quantize(file, quantized, entries)
        except WorkerError as error:
            if error.reason in ("died", "timeout"):
                raise
            lines = error.detail.strip().splitlines()
            why = f"the quantizer refused the file ({error.reason}: {lines[-1] if lines else ''})"
            refused = {entry["key"]: why for entry in entries}
        reasons |= refused
    notes = [
        f"{name}: stays float32 although the plan wants int{bits[name]}: {reason}"
        for name, reason in reasons.items()
    ]
    done = [entry["bits"] for entry in entries if entry["key"] not in reasons]
    return (quantized if done else file), notes, min(done, default=FLOAT_BITS)


def _finish(
    file: Path,
    target: Path,
    quantization: str,
    model: keras.Model,
    kernels: Mapping[str, np.ndarray],
    inputs: Sequence[np.ndarray],
    allowed: Tolerance,
    notes: Sequence[str],
    batch_size: int | None,
) -> ExportReport:
    """Verifies a converted file, and moves it to its place if it passes."""
    tensors = read_flat_model(file).tensors
    matches = match_kernels(kernels, tensors)
    expected = reference_outputs(model, inputs, batch_size)
    agreement = verify_outputs(shared_worker(), file, inputs, expected, allowed, batch_size)
    notes = [*notes, *verify_zeros(kernels, matches, tensors)]
    if any(tensor.variable for tensor in tensors):
        notes.append(
            "the file keeps the state of its recurrent layers between calls: call "
            "reset_all_variables() of the interpreter before every sequence, as predict_tflite does"
        )
    content = file.read_bytes()
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return ExportReport(
        path=str(target),
        quantization=quantization,
        tflite_bytes=len(content),
        gzip_bytes=len(gzip.compress(content, compresslevel=9, mtime=0)),
        max_abs_difference=agreement.max_abs_difference,
        output_range=agreement.output_range,
        top1_agreement=agreement.top1_agreement,
        tolerance=allowed.difference,
        tensors=tensor_reports(tensors, matches),
        notes=tuple(notes),
        batch_size=batch_size,
    )
