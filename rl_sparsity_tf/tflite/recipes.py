"""Recipes of LiteRT's quantizer: one entry per operator that reads a kernel of the plan.

A recipe is the quantizer's own JSON: given with the float32 file, it writes the same integers
again. [quantize_file][] runs in the conversion process; the rest needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError, FileExistsRLSparsityError
from rl_sparsity_tf.files import replacing, writing
from rl_sparsity_tf.tflite.editing import FileEditor
from rl_sparsity_tf.tflite.reading import FlatModel, FlatOperator, read_flat_model

COMPUTES = ("weight_only", "dynamic", "static")
"""How kernels that are integers compute: in float32, on activations quantized on the fly, or on
activations whose ranges are measured beforehand."""

_ACTIVATION_BITS = 8
# The quantizer has an integer GATHER too, but puts its table on a grid that is not symmetric, and
# an integer BATCH_MATMUL, but the runtimes use the first scale of its weights for all of them.
_STATIC_KERNELS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
# Operators without weights that compute on integers as well, if integers are on both sides.
_BETWEEN = (
    *("ADD", "AVERAGE_POOL_2D", "CONCATENATION", "MAX_POOL_2D", "MEAN", "PAD", "RELU", "RESHAPE"),
)

Recipe = list[dict[str, Any]]


def recipe_path(file: Path) -> Path:
    """Where the recipe of a .tflite file is written: beside it, `model.recipe.json`."""
    return file.with_suffix(".recipe.json")


def check_recipe_path(file: Path, overwrite: bool) -> None:
    """Checks that a file's recipe can be written, before any work is done for it."""
    path = recipe_path(file)
    if path.is_dir():
        raise ArgumentError(
            f"{str(path)!r}, where the recipe of {file.name!r} goes, is a folder. Choose another "
            "name."
        )
    if path.exists() and not overwrite:
        raise FileExistsRLSparsityError(
            f"{str(path)!r}, where the recipe of {file.name!r} goes, exists already. Choose "
            "another name, or pass overwrite=True."
        )


@contextlib.contextmanager
def replacing_with_recipe(file: Path, recipe: Recipe | None) -> Iterator[Path]:
    """Gives a temporary name for a .tflite file; on success it appears with its recipe.

    Without a recipe one that an earlier file has left is removed, because it would be wrong.
    """
    beside = recipe_path(file)
    new = not beside.exists()
    if recipe is None:
        with replacing(file) as temporary:
            yield temporary
        with writing(beside):
            beside.unlink(missing_ok=True)
        return
    try:
        # The inner file appears last, so a recipe without its file is what may have to go.
        with replacing(file) as temporary:
            yield temporary
            with replacing(beside) as text:
                text.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        if new:
            beside.unlink(missing_ok=True)
        raise


def quantize_file(
    source: str,
    output: str,
    entries: Sequence[Mapping[str, Any]],
    compute: str = "weight_only",
    batches: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Quantizes weights of a float32 file; the buffers of the new file are inside its flatbuffer.

    There is one entry per tensor of a kernel: {"key", "bits", "operators": [{"name", "code",
    "scope", "subgraph"}]}. The operators are all that read the tensor, and `scope` is their output
    tensors' names, each followed by a semicolon. `compute` is one of [COMPUTES][]; kernels whose
    operators have no such form are stored with `"weight_only"`, if there is one. `"static"` needs
    batches of the signature's inputs by name.

    It returns {"refused": {key: why}, "float": {key: why}, "recipe": [...]}: the kernels that stay
    float because the quantizer has no form of their operators with such weights, those that are
    integers but compute in float32, and the recipe. Nothing is written if all are refused.
    """
    refused: dict[str, str] = {}
    in_float: dict[str, str] = {}
    chosen: list[tuple[Mapping[str, Any], str]] = []
    for entry in entries:
        way = next((way for way in (compute, "weight_only") if _has_form(entry, way)), None)
        if way is None:
            refused[entry["key"]] = _lacking(entry, compute)
            continue
        if way != compute:
            in_float[entry["key"]] = _lacking(entry, compute)
        chosen.append((entry, way))
    # A kernel that the file keeps gate by gate has several entries under one key.
    chosen = [(entry, way) for entry, way in chosen if entry["key"] not in refused]
    in_float = {key: why for key, why in in_float.items() if key not in refused}
    ranges = None
    if any(way == "static" for _, way in chosen):
        recipe = _recipe(chosen, operators_between(read_flat_model(source), _scopes(chosen)))
        try:
            ranges = _ranges(source, recipe, batches or [])
        except (ValueError, RuntimeError) as error:
            why = f"the ranges of activations could not be measured ({_first_line(error)})"
            in_float |= {entry["key"]: why for entry, way in chosen if way == "static"}
            chosen = [(entry, "weight_only") for entry, _ in chosen]
    if ranges is None:
        recipe = _recipe(chosen, [])
    if chosen:
        Path(output).write_bytes(apply_recipe(source, recipe, ranges))
    return {"refused": refused, "float": in_float, "recipe": recipe}


def apply_recipe(source: str, recipe: Recipe, ranges: Any = None) -> bytes:
    """Runs LiteRT's quantizer on a float32 file, by a recipe such as the JSON beside an export.

    Recipes with static activations need `ranges`, the quantizer's calibration result. The buffers
    of the quantized file are inside the flatbuffer.
    """
    from litert_quantizer import quantizer

    result = quantizer.Quantizer(source, recipe).quantize(
        ranges, enable_progress_bar=False, enable_progress_report=False
    )
    return FileEditor(bytes(result.quantized_model)).packed()


def operators_between(flat: FlatModel, scopes: set[str]) -> list[dict[str, Any]]:
    """Finds the operators without weights that only join operators on integers.

    Between two integer convolutions a pooling need not be float. `scopes` are those of the
    operators on integers. What is found is in the file's order, as in the entries of
    [quantize_file][].
    """
    own = [operator for operator in flat.operators if operator.subgraph == 0]
    inside = {number for number, operator in enumerate(own) if scope_of(flat, operator) in scopes}
    made = {output: number for number, operator in enumerate(own) for output in operator.outputs}
    floats = {
        tensor.index: tensor.constant
        for tensor in flat.tensors
        if tensor.subgraph == 0 and tensor.dtype == "float32"
    }
    between = {
        number
        for number, operator in enumerate(own)
        if operator.name in _BETWEEN
        and operator.kind == "builtin"
        and not any(floats.get(index, False) for index in operator.inputs)
    }
    returned = set(flat.graphs[0].outputs)

    def joins(number: int) -> bool:
        fed = [made.get(index) for index in own[number].inputs if index in floats]
        readers = [
            reader
            for reader, operator in enumerate(own)
            # Asking for a shape reads no values.
            if operator.name != "SHAPE" and set(operator.inputs) & set(own[number].outputs)
        ]
        joined = bool(fed and readers) and not returned & set(own[number].outputs)
        return joined and inside | between >= {*fed, *readers}

    while loose := {number for number in between if not joins(number)}:
        between -= loose
    return [operator_entry(flat, own[number]) for number in sorted(between)]


def scope_of(flat: FlatModel, operator: FlatOperator) -> str:
    """What the quantizer's regular expressions see of an operator: its outputs' names."""
    names = [flat.tensor(operator.subgraph, index).name for index in operator.outputs]
    return "".join(f"{name};" for name in names)


def operator_entry(flat: FlatModel, operator: FlatOperator) -> dict[str, Any]:
    """An operator as the entries of [quantize_file][] name it."""
    return {
        "name": operator.name,
        "code": getattr(schema.BuiltinOperator, operator.name, -1),
        "scope": scope_of(flat, operator),
        "subgraph": operator.subgraph,
    }


def _has_form(entry: Mapping[str, Any], way: str) -> bool:
    """Whether the quantizer's policy knows all operators of an entry with such weights."""
    from litert_quantizer import recipe_manager

    for operator in entry["operators"]:
        static = way == "static"
        if static and (operator["subgraph"] or operator["name"] not in _STATIC_KERNELS):
            return False
        try:
            _add(recipe_manager.RecipeManager(), operator, way, entry["bits"])
        except ValueError:
            return False
    return True


def _add(manager: Any, operator: Mapping[str, Any], way: str, bits: int) -> None:
    from litert_quantizer.utils import tfl_flatbuffer_utils

    name = tfl_flatbuffer_utils.TFL_OP_CODE_TO_NAME.get(operator["code"])
    if name is None:
        raise ValueError(operator["name"])
    scope = f"^{re.escape(operator['scope'])}$"
    if way == "static":
        manager.add_static_config(scope, name, _ACTIVATION_BITS, bits)
    elif way == "dynamic":
        manager.add_dynamic_config(scope, name, bits)
    else:
        manager.add_weight_only_config(scope, name, bits)


def _recipe(
    chosen: Sequence[tuple[Mapping[str, Any], str]], between: Sequence[Mapping[str, Any]]
) -> Recipe:
    from litert_quantizer import recipe_manager

    manager = recipe_manager.RecipeManager()
    for entry, way in chosen:
        for operator in entry["operators"]:
            _add(manager, operator, way, entry["bits"])
    for operator in between:
        _add(manager, operator, "static", 8)
    # The quantizer's enumerations are strings; as plain ones they are what a JSON file holds.
    recipe: Recipe = json.loads(json.dumps(manager.get_quantization_recipe()))
    return recipe


def _scopes(chosen: Sequence[tuple[Mapping[str, Any], str]]) -> set[str]:
    static = [entry for entry, way in chosen if way == "static"]
    return {operator["scope"] for entry in static for operator in entry["operators"]}


def _ranges(source: str, recipe: Recipe, batches: Sequence[Mapping[str, Any]]) -> Any:
    """The smallest and largest value of every activation over all batches."""
    from ai_edge_litert.interpreter import Interpreter
    from litert_quantizer import calibrator, recipe_manager
    from litert_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe)
    (signature,) = Interpreter(model_path=source).get_signature_list()
    modes = calibrator.CalibrationMode
    # The first mode keeps every tensor, which files with loops refuse.
    for mode in (modes.CALIBRATION_PRESERVE_ALL_TENSORS, modes.CALIBRATION_PROFILER_BASED):
        measuring = calibrator.Calibrator(
            source,
            num_threads=1,
            mode=mode,
            # The default averages over batches, which clips what only some of them reach.
            qsv_update_func=qsv_utils.min_max_update,
        )
        try:
            for batch in batches:
                # One by one: the state of recurrent operators is reset behind each call only.
                measuring.calibrate({signature: [dict(batch)]}, manager)
            return measuring.get_model_qsvs()
        except ValueError:
            if mode == modes.CALIBRATION_PROFILER_BASED:
                raise
    return None


def _lacking(entry: Mapping[str, Any], compute: str) -> str:
    names = " or ".join(sorted({operator["name"] for operator in entry["operators"]}))
    if compute == "static" and any(operator["subgraph"] for operator in entry["operators"]):
        return f"{names} is inside a loop, where no ranges can be measured"
    activations = {"weight_only": "float"}.get(compute, compute)
    return (
        f"the quantizer has no {names} with {entry['bits']}-bit weights and {activations} "
        "activations"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
