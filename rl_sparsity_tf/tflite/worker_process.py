"""The child process that converts, quantizes and runs .tflite files, on microcontrollers too.

Started by [conversion][rl_sparsity_tf.tflite.worker] as `python -m
rl_sparsity_tf.tflite.worker_process`, because converters and runtimes may abort the process they
run in. It reads one JSON request per line from standard input and answers with one JSON line each:

    {"id": 1, "command": "run", ...}  ->  {"id": 1, "ok": true, "result": {...}}
                                      or  {"id": 1, "ok": false, "error": "...", "message": "..."}

Arrays travel as .npz files. The process ends when standard input does.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rl_sparsity_tf.checks import fits, shape_advice
from rl_sparsity_tf.errors import did_you_mean


class InputError(ValueError):
    """The rows received are not what a file takes."""


class TflmMissingError(RuntimeError):
    """The package `tflite-micro` cannot be imported; the text says why."""


def names_in_order(
    by_name: Mapping[str, dict[str, Any]], ports: Sequence[dict[str, Any]]
) -> list[str]:
    """A signature's names in the order of the file's inputs or outputs.

    LiteRT lists a signature by the alphabet; the ports of a file that `export_tflite` wrote are in
    Keras's order.

    `by_name` is what LiteRT says of the signature's inputs (or outputs), `ports` what it says of
    the file's, in their order.
    """
    places: dict[int, list[int]] = {}
    for place, details in enumerate(ports):
        places.setdefault(int(details["index"]), []).append(place)

    def place_of(name: str) -> int:
        # A file may put out one tensor twice.
        left = places.get(int(by_name[name]["index"]))
        return left.pop(0) if left else len(ports)

    return sorted(sorted(by_name), key=place_of)


def by_names(
    inputs: Sequence[str], names: Sequence[str], arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Puts arrays that came with names into the order of the file's inputs.

    An InputError is raised if there is not one array for every input.
    """
    unknown = [name for name in names if name not in inputs]
    if unknown:
        raise InputError(
            f"inputs has {unknown[0]!r}, which is no input of the file. "
            f"{did_you_mean(unknown[0], inputs)}"
        )
    missing = [name for name in inputs if name not in names]
    if missing:
        raise InputError(
            f"inputs lacks {missing}. Expected a dict with rows for every one of {list(inputs)}, "
            f"received {list(names)}."
        )
    return [arrays[names.index(name)] for name in inputs]


def check_rows(inputs: Sequence[dict[str, Any]], arrays: Sequence[np.ndarray]) -> None:
    """Raises unless there is one array per input, of its shape and of a type that can be stored.

    LiteRT itself resizes an input without a word to whatever it is given, and computes.

    The inputs are what LiteRT says of the file's, each with its name. The InputError names the
    input, what was received and what was expected.
    """
    if len(inputs) != len(arrays):
        names = [details["name"] for details in inputs]
        raise InputError(
            f"The file has {len(inputs)} inputs {names}, received {len(arrays)}. Expected one "
            "array per input."
        )
    for details, array in zip(inputs, arrays, strict=True):
        name, dtype = details["name"], np.dtype(details["dtype"])
        sizes = details["shape_signature"][1:]
        wanted = tuple(None if size < 0 else int(size) for size in sizes)
        if array.ndim == 0 or not fits(array.shape[1:], wanted):
            axes = ["rows", *("any" if size is None else str(size) for size in wanted)]
            raise InputError(
                f"inputs has the shape {array.shape} for the file's input {name!r}. Expected "
                f"({', '.join(axes)}).{shape_advice(array.shape, wanted)}"
            )
        if array.dtype.kind == "f" and dtype.kind != "f" and not details["quantization"][0]:
            raise InputError(
                f"inputs has the type {array.dtype} for the file's input {name!r}. Expected "
                f"{dtype}: x.astype({dtype.name!r}) if these are whole numbers."
            )
        if array.dtype.kind in "iu" and dtype.kind in "iu" and not details["quantization"][0]:
            low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
            if low < limits.min or high > limits.max:
                raise InputError(
                    f"inputs has numbers from {low} to {high} for the file's input {name!r}. "
                    f"Expected {dtype}: numbers from {limits.min} to {limits.max}."
                )


# Of the "time" command: single calls of small models are too short to be timed.
_WARM_UP_SECONDS = 0.1
_SAMPLE_SECONDS = 0.005


def warm() -> dict[str, Any]:
    """Imports what conversions need, ahead of the first one."""
    return {"tensorflow": _tensorflow().__version__}


@functools.cache
def _tensorflow() -> Any:
    """TensorFlow, whose own objects are not looked through for garbage at every conversion.

    The converter does that each time, and it took longer than the conversion of a small network.
    """
    import tensorflow as tf

    gc.freeze()
    return tf


def convert(
    saved_model: str, output: str, quantization: str, representative: str | None
) -> dict[str, Any]:
    """Converts a SavedModel's serving_default signature with builtin operators only.

    The quantization is "none", "dynamic", "float16" or "int8"; "int8" needs `representative`, an
    .npz file with one array of rows per signature input.
    """
    tf = _tensorflow()
    converter = tf.lite.TFLiteConverter.from_saved_model(
        saved_model, signature_keys=["serving_default"]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantization != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantization == "int8":
        rows = _load(str(representative))
        batch = _fixed_batch(saved_model)

        def batches() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
            count = len(next(iter(rows.values())))
            for start in range(0, count - batch + 1, batch):
                part = {name: array[start : start + batch] for name, array in rows.items()}
                yield "serving_default", part

        converter.representative_dataset = batches
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.int8
        converter.inference_output_type = tf.int8
    content = converter.convert()
    Path(output).write_bytes(content)
    return {"bytes": len(content)}


def _fixed_batch(saved_model: str) -> int:
    """The batch size that a SavedModel's signature fixes, or 1."""
    from tensorflow.core.protobuf import saved_model_pb2

    # Of the file alone: to load what it describes takes longer than many a conversion.
    content = Path(saved_model, "saved_model.pb").read_bytes()
    (graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    ports = graph.signature_def["serving_default"].inputs
    shapes = [ports[name].tensor_shape.dim for name in sorted(ports)]
    sizes = [int(shape[0].size) for shape in shapes if shape and shape[0].size >= 0]
    return sizes[0] if sizes else 1


def quantize(
    source: str,
    output: str,
    entries: list[dict[str, Any]],
    compute: str = "weight_only",
    representative: str | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Quantizes weights of a float32 file, by [quantize_file][rl_sparsity_tf.tflite.recipes].

    The file has one signature. `compute` is "weight_only", "dynamic" or "static"; "static" needs
    `representative`, an .npz file with one array of rows per signature input. A file with a fixed
    batch size uses its own.
    """
    from rl_sparsity_tf.tflite.recipes import quantize_file

    batches = None if representative is None else _batches(source, representative, batch_size)
    return quantize_file(source, output, entries, compute, batches)


def _batches(path: str, inputs: str, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Whole batches of the rows in an .npz file, for the inputs of a file's signature."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)
    fixed = _batch_of(interpreter.get_input_details()[0])
    ports = interpreter.get_input_details()
    names = names_in_order(interpreter.get_signature_runner().get_input_details(), ports)
    rows = dict(zip(names, _load(inputs).values(), strict=True))
    count, size = len(next(iter(rows.values()))), fixed or batch_size
    whole = range(0, count - (size - 1 if fixed else 0), size)
    return [{name: array[start : start + size] for name, array in rows.items()} for start in whole]


def run(
    path: str,
    inputs: str,
    outputs: str,
    batch_size: int,
    xnnpack: bool,
    reset: bool = True,
    given: list[str] | None = None,
) -> dict[str, Any]:
    """Runs a file with one signature over all rows of its inputs.

    `inputs` is an .npz file with one array of rows per signature input, in the order of the file's
    inputs or for those with the names `given`. `outputs` is the .npz file to write: `output_0`, ...
    in the order of the file's outputs. Both are in real values. A file with a fixed batch size uses
    its own. `xnnpack` says whether the default delegate (XNNPACK) may be used, `reset` whether what
    the file keeps from call to call is reset before each of them.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES

    def begin() -> tuple[Any, Any, bool, Any, Any]:
        interpreter = Interpreter(model_path=path, experimental_op_resolver_type=resolver)
        signatures = interpreter.get_signature_list()
        if len(signatures) != 1:
            raise ValueError(
                f"The file has {len(signatures)} signatures, expected one. Export it with "
                "export_tflite."
            )
        ports = interpreter.get_input_details(), interpreter.get_output_details()
        fixed = _batch_of(ports[0][0]) is not None
        if fixed:
            # Before the runner exists: with it the interpreter refuses, and state needs memory.
            interpreter.allocate_tensors()
        return interpreter, interpreter.get_signature_runner(), fixed, *ports

    interpreter, runner, fixed, ports_in, ports_out = begin()
    into, out_of = runner.get_input_details(), runner.get_output_details()
    arrays = list(_load(inputs).values())
    names = names_in_order(into, ports_in)
    if given is not None:
        arrays = by_names(names, given, arrays)
    check_rows([into[name] | {"name": name} for name in names], arrays)
    batch = _batch_of(into[names[0]]) or batch_size
    rows = len(arrays[0])
    collected: dict[str, list[np.ndarray]] = {name: [] for name in out_of}
    for start in range(0, rows, batch):
        count = min(batch, rows - start)
        fed = {}
        for name, array in zip(names, arrays, strict=True):
            part = array[start : start + count]
            if fixed and count < batch:
                part = np.concatenate([part, np.repeat(part[-1:], batch - count, axis=0)])
            fed[name] = _to_stored(part, into[name])
        if fixed and reset:
            # Fused recurrent operators, which fix the batch size, may keep their state between
            # calls; Keras starts every call afresh.
            try:
                interpreter.reset_all_variables()
            except RuntimeError:
                # LiteRT cannot reset a file that has loops beside such operators.
                interpreter, runner, *_ = begin()
        for name, value in runner(**fed).items():
            collected[name].append(_to_real(value, out_of[name])[:count])
    ordered = [np.concatenate(collected[name]) for name in names_in_order(out_of, ports_out)]
    return _save(outputs, ordered)


def plan_tflm(path: str, arena: int) -> dict[str, Any]:
    """Plans a file in an arena of so many bytes, which raises or ends the process if it is small.

    It is the arena of TensorFlow Lite for Microcontrollers, whose version is returned.
    """
    _tflm_interpreter(path, arena)
    import tflite_micro

    return {"version": str(tflite_micro.__version__)}


def run_tflm(
    path: str, arena: int, inputs: str, outputs: str, count: int, reset: bool
) -> dict[str, Any]:
    """Runs rows one by one in an arena of so many bytes.

    `inputs` is an .npz file with the rows of each of the file's inputs, as the file stores them;
    `outputs` is the .npz file to write, with `count` outputs in the file's order. `reset` says
    whether what the file keeps from call to call is reset before each of them.
    """
    interpreter = _tflm_interpreter(path, arena)
    rows = list(_load(inputs).values())
    results: list[list[np.ndarray]] = []
    for row in range(len(rows[0])):
        if reset:
            interpreter.reset()
        for index, array in enumerate(rows):
            interpreter.set_input(array[row : row + 1], index)
        interpreter.invoke()
        # Copies: the arrays look into the arena, which the next call overwrites.
        results.append([np.array(interpreter.get_output(index)) for index in range(count)])
    return _save(outputs, [np.concatenate(values) for values in zip(*results, strict=True)])


def _tflm_interpreter(path: str, arena: int) -> Any:
    try:
        from tflite_micro import runtime
    except ImportError as error:
        raise TflmMissingError(str(error)) from error
    return runtime.Interpreter.from_bytes(Path(path).read_bytes(), arena_size=arena)


def time_files(
    paths: list[str],
    index_limits: list[int],
    runs: int,
    threads: int,
    xnnpack: bool,
    batch_size: int,
) -> dict[str, Any]:
    """Times files in turns, so that what else the machine does meets all of them alike.

    The first subgraph of each file is run on random inputs, integers below the file's index limit.
    `batch_size` is the rows of the inputs that leave it open.

    It returns {"seconds": one list of `runs` samples per file}, each the mean of so many calls that
    they take about as long as the clock and the scheduler need not to matter.
    """
    calls = []
    for path, limit in zip(paths, index_limits, strict=True):
        try:
            calls.append(_prepared(path, limit, threads, xnnpack, batch_size))
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(f"{path}: {error}") from error
    counts = [_warmed_up(call) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
            for call, count, collected in zip(calls, counts, samples, strict=True):
                begin = time.perf_counter()
                for _ in range(count):
                    call()
                collected.append((time.perf_counter() - begin) / count)
    finally:
        gc.enable()
    return {"seconds": samples}


def _prepared(
    path: str, limit: int, threads: int, xnnpack: bool, batch_size: int
) -> Callable[[], None]:
    """An interpreter's invoke, its inputs filled, after one successful call."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(
        model_path=path, experimental_op_resolver_type=resolver, num_threads=threads
    )
    for details in interpreter.get_input_details():
        signature, shape = details["shape_signature"], details["shape"]
        if len(signature) and signature[0] < 0:
            interpreter.resize_tensor_input(details["index"], [batch_size, *shape[1:]])
    interpreter.allocate_tensors()
    rng = np.random.default_rng(0)
    for details in interpreter.get_input_details():
        interpreter.set_tensor(details["index"], _random_input(details, limit, rng))
    interpreter.invoke()
    return interpreter.invoke


def _random_input(details: dict[str, Any], limit: int, rng: np.random.Generator) -> np.ndarray:
    dtype, shape = np.dtype(details["dtype"]), tuple(details["shape"])
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind not in "iu":
        raise ValueError(f"there are no random inputs of type {dtype} ({details['name']})")
    if details["quantization"][0] or dtype.itemsize == 1:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    # Integers that are not quantized are mostly rows of a table, which must exist.
    return rng.integers(0, limit, shape).astype(dtype)


def _warmed_up(call: Callable[[], None]) -> int:
    """Calls until caches and clock rates have settled; returns the calls that make a sample."""
    begin, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - begin < _WARM_UP_SECONDS:
        call()
        done += 1
    mean = (time.perf_counter() - begin) / done
    return max(1, round(_SAMPLE_SECONDS / mean))


def _batch_of(details: dict[str, Any]) -> int | None:
    signature = details["shape_signature"]
    size = int(signature[0]) if len(signature) else -1
    return None if size < 0 else size


def _to_stored(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(details["dtype"])
    scale, zero_point = details["quantization"]
    if scale and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.clip(np.round(values / scale) + zero_point, limits.min, limits.max).astype(dtype)
    return values.astype(dtype)


def _to_real(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    if scale and values.dtype.kind in "iu":
        return ((values.astype(np.float32) - zero_point) * scale).astype(np.float32)
    return values


def _numbered(name: str) -> tuple[str, int]:
    # "input_10" comes after "input_2", as Keras counts, not before it.
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdigit() else (name, -1)


def _load(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in sorted(arrays.files, key=_numbered)}


def _save(path: str, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    named: dict[str, Any] = {f"output_{index}": value for index, value in enumerate(outputs)}
    np.savez(path, **named)
    return {"outputs": len(outputs)}


_COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "warm": warm,
    "convert": convert,
    "quantize": quantize,
    "run": run,
    "time": time_files,
    "plan_tflm": plan_tflm,
    "run_tflm": run_tflm,
}


def answer(line: str) -> dict[str, Any]:
    """Carries out one request line and returns the reply."""
    request = json.loads(line)
    number, command = request.pop("id"), request.pop("command")
    try:
        return {"id": number, "ok": True, "result": _COMMANDS[command](**request)}
    except Exception as error:
        # Everything must reach the parent, which turns it into an error of its own.
        return {"id": number, "ok": False, "error": type(error).__name__, "message": str(error)}


def _private_stdout() -> TextIO:
    """Keeps standard output for replies: what libraries print goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return replies


def main(folder: str) -> None:
    """Answers requests until standard input ends, and removes its temporary files then.

    They are in a folder that is the parent's as well, but the parent may have been killed; if this
    process fails, the parent looks there for the reason, and removes it.
    """
    ended = False

    def clean_up() -> None:
        if ended:
            shutil.rmtree(folder, ignore_errors=True)

    # Registered first, it runs last: after TensorFlow has removed files of its own.
    atexit.register(clean_up)
    replies = _private_stdout()
    for line in sys.stdin:
        replies.write(json.dumps(answer(line)) + "\n")
        replies.flush()
    ended = True


if __name__ == "__main__":
    main(sys.argv[1])
