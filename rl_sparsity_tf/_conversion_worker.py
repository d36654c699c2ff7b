"""The child process that converts, quantizes and runs .tflite files.

Started by [conversion][rl_sparsity_tf.conversion] as `python -m rl_sparsity_tf._conversion_worker`,
because converters and runtimes may abort the process they run in. It reads one JSON request per
line from standard input and answers with one JSON line each:

    {"id": 1, "command": "run", ...}  ->  {"id": 1, "ok": true, "result": {...}}
                                      or  {"id": 1, "ok": false, "error": "...", "message": "..."}

Arrays travel as .npz files. The process ends when standard input does.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np


def warm() -> dict[str, Any]:
    """Imports what conversions need, ahead of the first one."""
    import tensorflow as tf

    return {"tensorflow": tf.__version__}


def convert(
    saved_model: str, output: str, quantization: str, representative: str | None
) -> dict[str, Any]:
    """Converts a SavedModel's serving_default signature with builtin operators only.

    Args:
        saved_model: Folder of the SavedModel.
        output: The .tflite file to write.
        quantization: "none", "dynamic", "float16" or "int8".
        representative: For "int8", an .npz file with one array of rows per signature input.
    """
    import tensorflow as tf

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
    import tensorflow as tf

    signature = tf.saved_model.load(saved_model).signatures["serving_default"]
    specs = signature.structured_input_signature[1].values()
    sizes = [spec.shape[0] for spec in specs if spec.shape.rank and spec.shape[0] is not None]
    return int(sizes[0]) if sizes else 1


def quantize(source: str, output: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantizes weights of a float32 file, activations staying float (weight-only).

    Args:
        source: A float32 .tflite file.
        output: The file to write, its buffers inside the flatbuffer.
        entries: One per kernel: {"key", "bits", "operators": [{"code", "scope"}]}, the operators
            being all that read the kernel's tensor, `scope` their output tensors' names, each
            followed by a semicolon.

    Returns:
        {"refused": {key: why}}: the kernels that stay float because the quantizer has no form of
        their operators with such weights. Nothing is written if that is all of them.
    """
    from litert_quantizer import quantizer
    from litert_quantizer.utils import tfl_flatbuffer_utils

    from rl_sparsity_tf.flatbuffer import inline_buffers

    refused: dict[str, str] = {}
    recipe = quantizer.Quantizer(source)
    for entry in entries:
        known = {}
        for operator in entry["operators"]:
            name = tfl_flatbuffer_utils.TFL_OP_CODE_TO_NAME.get(operator["code"])
            try:
                if name is None:
                    raise ValueError(operator["name"])
                # A scope that no operator has: asks the quantizer's policy, changes nothing.
                probe = quantizer.Quantizer(source)
                probe.add_weight_only_config("^$", name, num_bits=entry["bits"])
            except ValueError:
                refused[entry["key"]] = (
                    f"the quantizer has no {operator['name']} with {entry['bits']}-bit weights and "
                    "float activations"
                )
                break
            known[operator["scope"]] = name
        else:
            for scope, name in known.items():
                recipe.add_weight_only_config(f"^{re.escape(scope)}$", name, num_bits=entry["bits"])
    # A kernel that the file keeps gate by gate has several entries under one key.
    if len(refused) < len({entry["key"] for entry in entries}):
        result = recipe.quantize(enable_progress_bar=False, enable_progress_report=False)
        Path(output).write_bytes(inline_buffers(bytes(result.quantized_model)))
    return {"refused": refused}


def run(path: str, inputs: str, outputs: str, batch_size: int, xnnpack: bool) -> dict[str, Any]:
    """Runs a file over all rows of its inputs.

    Args:
        path: The .tflite file, with one signature.
        inputs: An .npz file with one array of rows per signature input, in real values.
        outputs: The .npz file to write: `output_0`, ... in the order of the signature's outputs by
            number (or by name), in real values.
        batch_size: Rows at a time; a file with a fixed batch size uses its own.
        xnnpack: Whether the default delegate (XNNPACK) may be used.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES

    def begin() -> tuple[Any, Any, bool]:
        interpreter = Interpreter(model_path=path, experimental_op_resolver_type=resolver)
        signatures = interpreter.get_signature_list()
        if len(signatures) != 1:
            raise ValueError(
                f"The file has {len(signatures)} signatures, expected one. Export it with "
                "export_tflite."
            )
        fixed = _batch_of(interpreter.get_input_details()[0]) is not None
        if fixed:
            # Before the runner exists: with it the interpreter refuses, and state needs memory.
            interpreter.allocate_tensors()
        return interpreter, interpreter.get_signature_runner(), fixed

    interpreter, runner, fixed = begin()
    into, out_of = runner.get_input_details(), runner.get_output_details()
    arrays = list(_load(inputs).values())
    names = sorted(into, key=_numbered)
    if len(names) != len(arrays):
        raise ValueError(f"The file has {len(names)} inputs {names}, received {len(arrays)}.")
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
        if fixed:
            # Fused recurrent operators, which fix the batch size, keep their state between calls;
            # Keras starts every call afresh.
            try:
                interpreter.reset_all_variables()
            except RuntimeError:
                # LiteRT cannot reset a file that has loops beside such operators.
                interpreter, runner, _ = begin()
        for name, value in runner(**fed).items():
            collected[name].append(_to_real(value, out_of[name])[:count])
    ordered = [np.concatenate(collected[name]) for name in sorted(collected, key=_numbered)]
    named: dict[str, Any] = {f"output_{index}": value for index, value in enumerate(ordered)}
    np.savez(outputs, **named)
    return {"outputs": len(ordered)}


def _batch_of(details: dict[str, Any]) -> int | None:
    signature = details["shape_signature"]
    size = int(signature[0]) if len(signature) else -1
    return None if size < 0 else size


def _to_stored(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(details["dtype"])
    scale, zero_point = details["quantization"]
    if scale and dtype.kind in "iu" and values.dtype.kind == "f":
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


_COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "warm": warm,
    "convert": convert,
    "quantize": quantize,
    "run": run,
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


def main() -> None:
    """Answers requests until standard input ends."""
    replies = _private_stdout()
    for line in sys.stdin:
        replies.write(json.dumps(answer(line)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
