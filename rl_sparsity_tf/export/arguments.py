"""What an export is given: its arguments checked, its model unpacked, its rows collected."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.data.calibration import collect_rows
from rl_sparsity_tf.errors import ArgumentError, PlanError, check_choice
from rl_sparsity_tf.export.matching import find_variable, kernel_variables
from rl_sparsity_tf.export.recurrent import check_unroll, looping_layers, names_of
from rl_sparsity_tf.files import check_new_file
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.layers.structure import input_specs, inputs_of_embeddings, random_rows
from rl_sparsity_tf.layers.support import check_exportable
from rl_sparsity_tf.layers.wrapping import accepted, is_wrapped, plan_of, stripped
from rl_sparsity_tf.tflite.recipes import COMPUTES

QUANTIZATIONS = ("plan", "none", "dynamic", "int8", "float16")
_CALIBRATION_ROWS = 512
_CHECKED_ROWS = 64
_RANDOM_ROWS = 32


def check_mode(quantization: str, compute: str, representative_data: Any) -> None:
    """Checks that the mode is known and has the data it needs."""
    check_choice("quantization", quantization, QUANTIZATIONS)
    check_choice("compute", compute, COMPUTES)
    if compute != "weight_only" and quantization != "plan":
        raise ArgumentError(
            f"compute={compute!r} says how the kernels that a plan quantizes compute, and "
            f"quantization={quantization!r} uses no plan. Leave compute out, or pass "
            "quantization='plan'."
        )
    for name, value in (("quantization", quantization), ("compute", compute)):
        if value in ("int8", "static") and representative_data is None:
            raise ArgumentError(
                f"{name}={value!r} needs representative_data to find the range of every "
                "activation. Pass some hundred rows of training inputs, or choose "
                f"{name}='dynamic'."
            )


def check_path(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Checks that a .tflite file can be written, before any work is done for it."""
    target = check_new_file(path, overwrite)
    if target.suffix != ".tflite":
        raise ArgumentError(
            f"path={str(path)!r} ends in {target.suffix!r}. Expected a name ending in '.tflite'."
        )
    return target


def check_numbers(tolerance: float | None, batch_size: int | None) -> None:
    """Checks the tolerance and the batch size, where they are given."""
    if tolerance is not None and not (
        isinstance(tolerance, (int, float)) and math.isfinite(tolerance) and tolerance > 0
    ):
        raise ArgumentError(
            f"tolerance={tolerance!r} cannot be used. Expected a positive number, the largest "
            "allowed difference relative to the output's range, or None for the default."
        )
    if batch_size is not None:
        check_positive("batch_size", batch_size)


def check_positive(name: str, value: object) -> None:
    """Refuses what is no integer of at least 1; `name` is what the user calls it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected an integer of at least 1.")


def plain_model(model: Any, plan: Any) -> tuple[keras.Model, Any]:
    """Unpacks a search result and strips wrappers."""
    # A Keras model may have a layer or attribute called "plan"; it is never a search result.
    if not isinstance(model, keras.Model) and hasattr(model, "model") and hasattr(model, "plan"):
        plan = model.plan if plan is None else plan
        model = model.model
    model = accepted(model)
    check_exportable(model)
    if isinstance(plan, CompressionPlan) and not plan.is_resolved:
        plan = resolve(plan, model)
    if not is_wrapped(model):
        return model, plan
    return stripped(model), plan_of(model) if plan is None else plan


def file_batch_size(
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


def sample_rows(
    model: keras.Model, representative_data: Any
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Returns the rows to check the file on, and those to calibrate it with, if there are any."""
    specs = input_specs(model)
    if representative_data is None:
        return random_rows(model, specs, _RANDOM_ROWS), None
    calibration = collect_rows(representative_data, specs, _CALIBRATION_ROWS)
    return [array[:_CHECKED_ROWS] for array in calibration], calibration


def check_ids(model: keras.Model) -> None:
    """Refuses models whose float inputs are ids, which int8 would round."""
    floats = {spec.name for spec in input_specs(model) if spec.dtype.startswith(("float", "bf"))}
    ids = sorted(floats & inputs_of_embeddings(model))
    if ids:
        raise ArgumentError(
            f"quantization='int8' rounds float inputs to 256 levels, and input {ids[0]!r} of model "
            f"{model.name!r} takes an Embedding's ids as floats. Build it with "
            "Input(..., dtype='int32'), or choose another quantization."
        )


def check_calibration(calibration: Sequence[np.ndarray], batch_size: int) -> None:
    """Checks that there is a batch to calibrate with."""
    if len(calibration[0]) < batch_size:
        raise ArgumentError(
            f"representative_data has {len(calibration[0])} rows, fewer than one batch of "
            f"{batch_size}. Give more rows or a smaller batch_size."
        )


def planned_kernels(model: keras.Model, plan: Any) -> tuple[dict[str, Any], dict[str, int]]:
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
