"""Exports a Keras model as a .tflite file and checks that the file does what the model does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.checks import check_flag
from rl_sparsity_tf.data.extremes import check_weights
from rl_sparsity_tf.errors import ArgumentError, VerificationError, check_choice
from rl_sparsity_tf.export.arguments import (
    check_calibration,
    check_ids,
    check_mode,
    check_numbers,
    check_path,
    check_positive,
    file_batch_size,
    plain_model,
    planned_kernels,
    sample_rows,
)
from rl_sparsity_tf.export.matching import match_kernels, name_ports
from rl_sparsity_tf.export.recurrent import kept_states, start_at_zero, stateless, unrolled
from rl_sparsity_tf.export.report import ExportReport, tensor_reports
from rl_sparsity_tf.export.saved_model import (
    conversion_error,
    in_float32,
    own_moves,
    reference_outputs,
    write_saved_model,
)
from rl_sparsity_tf.export.sparse_inference import (
    check_sparse_inference,
    store_for_sparse_inference,
)
from rl_sparsity_tf.export.stored_weights import FORMATS, broken_chain, make_sparse, store_weights
from rl_sparsity_tf.export.verification import (
    Tolerance,
    check_repeatable,
    compare_scores,
    tolerance_for,
    verify_calls,
    verify_outputs,
    verify_zeros,
)
from rl_sparsity_tf.files import as_file, gzip_size, scratch_folder
from rl_sparsity_tf.layers.structure import input_specs
from rl_sparsity_tf.tflite.prediction import run_rows
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.recipes import Recipe, check_recipe_path, replacing_with_recipe
from rl_sparsity_tf.tflite.worker import WorkerError, shared_worker


def export_tflite(
    model: Any,
    path: str | os.PathLike[str],
    quantization: str = "plan",
    *,
    plan: Any = None,
    representative_data: Any = None,
    test_data: Any = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    batch_size: int | None = None,
    unroll: bool = False,
    stateful: bool = False,
    formats: str = "dense",
    compute: str = "weight_only",
    sparse_inference: str | None = None,
) -> ExportReport:
    """Writes a verified .tflite file that needs builtin operators only.

    The file is converted and run in a process of its own, in LiteRT with and without XNNPACK, one
    row and many at a time, and compared with the Keras model; every weight that is zero in Keras is
    looked up in the file. Only a file that passes appears at `path`. Its inputs and outputs are in
    Keras's order, and its signature has Keras's names: those of the input and output layers, the
    keys where the model takes or returns a dict, and `input_1`, ..., `output_1`, ... for a
    subclassed model without them. With `"plan"` the recipe with
    which LiteRT's quantizer makes the same integers appears beside it, `model.recipe.json`.

    Args:
        model: A built model of Keras 3 or `tf_keras`, plain or wrapped, or an object with
            attributes `model` and `plan` such as a search result. Models of a mixed precision or of
            float64 are exported, and compared, as they compute in float32.
        path: The file to write, ending in .tflite.
        quantization: `"plan"` stores the kernels that the plan quantizes as int8 or int4; `"none"`
            is float32; `"float16"` halves the weights; `"dynamic"` is the converter's dynamic range
            (int8 weights of at least 1,024 elements, activations quantized on the fly); `"int8"` is
            integers throughout, input and output included.
        plan: For `"plan"`: an object whose `kernels` maps paths to entries with `path`, `shape` and
            `exported_bits` (32, 8 or 4). By default the model's own.
        representative_data: Inputs like those the model will see: an array, a tuple with one array
            per input, a dict of arrays by name, an iterable of batches (with or without targets),
            or a function that yields batches, such as TFLite's `representative_dataset`. Needed for
            `"int8"` and `compute="static"`, which calibrate on up to 512 rows; the first 64 are
            used to check any file. Without it a file is checked on random inputs in [-1, 1].
        test_data: Data as `evaluate` takes it, `(x, y)`: the file's metric on it is reported beside
            the Keras model's, which must be compiled, and an accuracy that falls by more than the
            mode allows (1 point in float, 2 for `"plan"`, 10 for `"int8"`) is refused.
        overwrite: Whether a file at `path` may be replaced.
        tolerance: Largest allowed difference, relative to the range of the output; by default 1e-4
            for `"none"`, 1e-2 for `"float16"`, 5e-2 for `"plan"` (0.5 with int4 kernels), 0.1 for
            `"dynamic"`; for `"int8"` 0.25 where an output has no top-1, which is judged otherwise.
            On top of a default comes four times what the model moves by itself (its weights
            changed in their last place, its inputs by 1e-6), up to a quarter of the range.
        batch_size: Fixes the batch size of the file. Recurrent layers need that: by default a model
            with such layers is exported with batch size 1.
        unroll: Writes recurrent layers step by step instead of as a loop or a fused operator. The
            batch size stays open, the number of time steps has to be fixed; the file grows with it.
        stateful: Lets LSTM layers that become TFLite's fused operator keep their state from one
            call to the next, for sequences that come in pieces; `reset_all_variables()` of the
            interpreter begins a new one. By default every call starts from zero, as in Keras.
        formats: `"dense"` stores every tensor with its zeros; `"raw"` and `"gzip"` store each one
            sparse where that makes the file, or the gzipped file, smaller and the runtimes compute
            rightly with it. Sparse tensors are unpacked when the file is loaded.
        compute: How kernels that the plan quantizes compute. `"weight_only"`: in float32, restored
            when the file is loaded; `"dynamic"`: on integers, activations quantized on the fly;
            `"static"`: on integers, with ranges measured on `representative_data`. A kernel whose
            operator has no such form is stored in the plan's bits and computed in float32.
        sparse_inference: `"arm"` stores 1x1 convolutions sparse where that makes LiteRT skip their
            zeros on ARM; the file is larger where few weights are zero. Where a model does not
            qualify it is written as usual and the notes name every condition that fails, its layer
            and the rewrite that mends it. For `"none"`, and `"plan"` with `"weight_only"`. The gain
            shows on ARM only: on x86 with AVX such a file is as fast as any other.

    Returns:
        The sizes, the agreement with Keras, the tensors, and notes on what was not done as asked.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model is not a built Keras model, is random at inference, or has
            layers that no .tflite file can compute.
        PlanError: If the plan does not fit the model.
        DataError: If the representative data does not fit the model.
        FileExistsRLSparsityError: If the file exists and `overwrite` is false.
        ExportError: If the model cannot be converted.
        VerificationError: If the file does not do what the model does; nothing is written.

    Example:
        >>> report = rls.export_tflite(model, "dense.tflite", "none", overwrite=True)
        >>> report.summary()
        dense.tflite (quantization: none)
        ...
        File: 71,760 bytes (... after gzip)
        Batch size: any
        ...
    """
    check_mode(quantization, compute, representative_data)
    check_choice("formats", formats, FORMATS)
    check_sparse_inference(sparse_inference, quantization, compute)
    target = check_path(path, overwrite)
    if quantization == "plan":
        check_recipe_path(target, overwrite)
    check_numbers(tolerance, batch_size)
    for name, flag in (("unroll", unroll), ("stateful", stateful)):
        check_flag(name, flag)
    plain, plan = plain_model(model, plan)
    if quantization == "plan" and plan is None:
        raise ArgumentError(
            "quantization='plan' needs a plan, and this model brings none. Pass plan=, export the "
            "result of a search, or pass quantization='none'."
        )
    check_weights(plain, exported=True)
    if quantization == "int8":
        check_ids(plain)
    batch_size, notes = file_batch_size(plain, batch_size, unroll)
    variables, bits = planned_kernels(plain, plan)
    kernels = {name: np.asarray(variable) for name, variable in variables.items()}
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(scratch_folder())
        traced, changes = stack.enter_context(in_float32(plain))
        notes += [*changes, *stack.enter_context(stateless(traced, stateful))]
        inputs, calibration = sample_rows(traced, representative_data)
        check_repeatable(traced, inputs, batch_size)
        calibrates = quantization == "int8" or compute == "static"
        if calibrates and batch_size is not None and calibration is not None:
            check_calibration(calibration, batch_size)
        with unrolled(traced) if unroll else contextlib.nullcontext():
            rows = calibration if quantization == "int8" else None
            file = convert_traced(traced, work, batch_size, quantization, rows, stateful=stateful)
        if stateful:
            notes.append(_keeping_state(plain, file))
        recipe, smallest = None, 32
        if quantization == "plan":
            stored = store_weights(file, kernels, bits, compute, calibration)
            file, recipe, smallest = stored.file, stored.recipe, stored.bits
            notes += stored.notes
        allowed = tolerance_for(quantization, compute, smallest)
        if tolerance is not None:
            allowed = dataclasses.replace(allowed, difference=tolerance, judge_difference=True)
        finish = functools.partial(
            _finish,
            target=target,
            quantization=quantization,
            model=traced,
            kernels=kernels,
            inputs=inputs,
            allowed=allowed,
            batch_size=batch_size,
            recipe=recipe,
            strict=tolerance is not None,
            stateful=stateful,
            scored=None if test_data is None else (plain, test_data),
        )
        skipping = None
        if sparse_inference is not None:
            stored_sparse = store_for_sparse_inference(file, kernels, formats)
            skipping = stored_sparse.file
            notes += stored_sparse.notes
        if skipping is None and formats != "dense":
            notes += filter(None, [broken_chain(read_flat_model(file))])
        sparse = make_sparse(file, formats) if skipping is None else skipping
        asked = sparse_inference is not None
        if sparse is not None:
            try:
                skips = skipping is not None if asked else None
                return finish(sparse, notes=notes, sparse_inference=skips)
            except VerificationError as error:
                notes.append(
                    f"every tensor is stored dense, because the sparse file failed: {error}"
                )
        return finish(file, notes=notes, sparse_inference=False if asked else None)


def convert_traced(
    model: keras.Model,
    folder: Path,
    batch_size: int | None,
    quantization: str = "none",
    calibration: Sequence[np.ndarray] | None = None,
    *,
    stateful: bool = False,
) -> Path:
    """Converts a plain model that computes in float32 to a file in the folder; does not verify it.

    The mode `"plan"` is converted to float32; `"int8"` needs calibration data, one array of rows
    per input. The batch size None leaves the rows per call open. With `stateful`, fused recurrent
    operators keep their state between calls. An ExportError is raised if the model cannot be
    converted.
    """
    outputs = write_saved_model(model, folder / "saved_model", batch_size)
    file = folder / "model.tflite"
    mode = "none" if quantization == "plan" else quantization
    try:
        shared_worker().convert(folder / "saved_model", file, mode, calibration)
    except WorkerError as error:
        raise conversion_error(model, quantization, error) from error
    if not stateful:
        start_at_zero(file)
    name_ports(file, [spec.name for spec in input_specs(model)], outputs)
    return file


def _keeping_state(model: keras.Model, file: Path) -> str:
    """The note on a file that keeps its state; one that keeps none raises an ArgumentError."""
    if not kept_states(read_flat_model(file)):
        raise ArgumentError(
            f"stateful=True was given, but nothing in the file of model {model.name!r} keeps a "
            "state between calls. Expected LSTM layers with Keras's default activations and "
            "without an initial state, not unrolled. Leave stateful out."
        )
    return (
        "the file keeps the state of its LSTM layers between calls, as stateful=True asks for: "
        "call reset_all_variables() of the interpreter before every new sequence, as "
        "predict_tflite does before every row"
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
        inputs: An array of shape (rows, ...), a list or tuple with one per input in Keras's order,
            or a dict `{name: rows}` with Keras's names, which are the signature's; in real values:
            quantized inputs and outputs are converted.
        batch_size: Rows at a time; a file with a fixed batch size uses its own.
        xnnpack: Whether LiteRT may use its XNNPACK delegate, as it does by default.

    Returns:
        The output of shape (rows, ...), or a list of them in Keras's order.

    Raises:
        ArgumentError: If the file or the inputs cannot be used.
        ExportError: If LiteRT cannot run the file.

    Example:
        >>> outputs = rls.predict_tflite("model.tflite", x_test)
        >>> accuracy = (outputs.argmax(axis=1) == y_test).mean()
    """
    file = as_file("path", path, "the path of a .tflite file")
    if not file.is_file():
        raise ArgumentError(f"There is no file {str(path)!r}. Give the path of a .tflite file.")
    check_positive("batch_size", batch_size)
    read_flat_model(file)  # LiteRT believes what a file claims
    outputs = run_rows(file, inputs, batch_size=batch_size, xnnpack=xnnpack)
    return outputs[0] if len(outputs) == 1 else outputs


def _on_moves(
    moves: Sequence[float], expected: Sequence[np.ndarray], error: VerificationError
) -> str:
    """The note on a model that moves by itself."""
    pairs = zip(moves, expected, strict=True)
    share = max(moved / max(float(np.ptp(wanted)), 1e-30) for moved, wanted in pairs)
    return (
        f"the model is sensitive: changing its weights in their last place, or its inputs by 1e-6, "
        f"moves its outputs by {share:.2g} of their range, and the file may differ from it by four "
        f"times as much. Without that: {error}"
    )


def _finish(
    file: Path,
    *,
    target: Path,
    quantization: str,
    model: keras.Model,
    kernels: Mapping[str, np.ndarray],
    inputs: Sequence[np.ndarray],
    allowed: Tolerance,
    notes: Sequence[str],
    batch_size: int | None,
    recipe: Recipe | None,
    strict: bool,
    stateful: bool,
    sparse_inference: bool | None,
    scored: tuple[keras.Model, Any] | None,
) -> ExportReport:
    """Verifies a converted file, and moves it to its place if it passes."""
    flat = read_flat_model(file)
    tensors = flat.tensors
    matches = match_kernels(kernels, tensors)
    expected = reference_outputs(model, inputs, batch_size)
    try:
        agreement = verify_outputs(shared_worker(), file, inputs, expected, allowed, batch_size)
    except VerificationError as error:
        if strict:
            raise
        # Only now: most models are not sensitive, and need not be run again.
        moves = own_moves(model, inputs, expected, batch_size)
        allowed = dataclasses.replace(allowed, moves=tuple(moves))
        try:
            agreement = verify_outputs(shared_worker(), file, inputs, expected, allowed, batch_size)
        except VerificationError as again:
            raise again from error
        notes = [*notes, _on_moves(moves, expected, error)]
    if any(tensor.variable for tensor in tensors) and not stateful:
        verify_calls(shared_worker(), file, inputs, batch_size)
    notes = [*notes, *verify_zeros(kernels, matches, tensors)]
    scores = None if scored is None else compare_scores(file, *scored, 1.0 - allowed.top1)
    content = file.read_bytes()
    with replacing_with_recipe(target, recipe) as temporary:
        temporary.write_bytes(content)
    return ExportReport(
        path=str(target),
        quantization=quantization,
        tflite_bytes=len(content),
        gzip_bytes=gzip_size(content),
        max_abs_difference=agreement.max_abs_difference,
        output_range=agreement.output_range,
        top1_agreement=agreement.top1_agreement,
        tolerance=allowed.difference,
        tensors=tensor_reports(tensors, matches, flat),
        notes=tuple(notes),
        batch_size=batch_size,
        recipe=recipe,
        scores=scores,
        sparse_inference=sparse_inference,
    )
