"""Which weights of a converted file become integers or sparse, and storing them so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_sparsity_tf.export.matching import MatchedTensor, match_kernels
from rl_sparsity_tf.files import gzip_size
from rl_sparsity_tf.tflite.integer_storage import (
    IntegerForm,
    integer_form,
    same_tensor,
    store_dequantized,
)
from rl_sparsity_tf.tflite.reading import FlatModel, FlatTensor, read_flat_model
from rl_sparsity_tf.tflite.recipes import Recipe, operator_entry
from rl_sparsity_tf.tflite.sparse_storage import choose_formats, is_native, sparsify_file
from rl_sparsity_tf.tflite.worker import WorkerError, save_inputs, shared_worker
from rl_sparsity_tf.tflite.xnnpack import SparseClusters

FLOAT_BITS = 32


def quantization_entries(
    flat: FlatModel,
    matches: Mapping[str, Sequence[MatchedTensor]],
    bits: Mapping[str, int],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Resolves a plan's wishes to operators of a float32 file, by the tensors that hold kernels.

    Matches and bits are by kernel path; 32 bits are float. It returns the entries for the
    conversion process's `quantize`, and for every kernel that has to stay float the reason.
    """
    entries: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    owners: dict[tuple[int, int], list[str]] = {}
    for path, held in matches.items():
        for match in held:
            owners.setdefault((match.tensor.subgraph, match.tensor.index), []).append(path)
    done: set[tuple[int, int]] = set()
    for path, wanted in bits.items():
        if wanted == FLOAT_BITS:
            continue
        if not matches[path]:
            reasons[path] = "its values were not found in the file"
            continue
        for match in matches[path]:
            key = (match.tensor.subgraph, match.tensor.index)
            sharing = [other for other in owners[key] if bits.get(other, FLOAT_BITS) != wanted]
            if sharing:
                reasons[path] = (
                    f"the file stores it in one tensor with {sharing[0]!r}, an equal kernel that "
                    "the plan wants in another precision"
                )
                continue
            if key in done:
                continue
            done.add(key)
            operators = [operator_entry(flat, reader) for reader in flat.consumers(match.tensor)]
            entries.append({"key": path, "bits": wanted, "operators": operators})
    return entries, reasons


FORMATS = ("dense", "raw", "gzip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """A file in which the kernels have a plan's bits.

    Attributes:
        notes: What was not done as asked, and why.
        bits: The fewest bits used.
        recipe: The recipe with which LiteRT's quantizer makes the file from the float32 one; None
            if it has quantized nothing.
    """

    file: Path
    notes: list[str]
    bits: int
    recipe: Recipe | None


def store_weights(
    file: Path,
    kernels: Mapping[str, np.ndarray],
    bits: Mapping[str, int],
    compute: str = "weight_only",
    calibration: Sequence[np.ndarray] | None = None,
) -> StoredWeights:
    """Applies a plan's bits to a float32 file; what is made of it is written beside it.

    Kernels and bits are by path; 32 bits are float. `compute` is `"weight_only"`, `"dynamic"` or
    `"static"`, which needs calibration data, one array of rows per input.
    """
    flat = read_flat_model(file)
    matches = match_kernels(kernels, flat.tensors)
    entries, reasons = quantization_entries(flat, matches, bits)
    result: dict[str, Any] = {"refused": {}, "float": {}, "recipe": []}
    quantized = file.with_name("quantized.tflite")
    if entries:
        result = _quantize(file, quantized, entries, compute, calibration)
    made = quantized if result["recipe"] else file
    wanted, added = _restorable(made, matches, bits, result["refused"])
    if wanted:
        integers = file.with_name("integers.tflite")
        store_dequantized(made, integers, wanted)
        made = integers
    reasons |= {key: why for key, why in result["refused"].items() if key not in added}
    notes = [
        f"{name}: stays float32 although the plan wants int{bits[name]}: {reason}"
        for name, reason in reasons.items()
    ]
    in_float = dict(result["float"])
    if compute != "weight_only":
        # Fetching rows of a table is no computation.
        scaled = [path for path, forms in added.items() if forms[0].axis is not None]
        in_float |= {path: result["refused"][path] for path in scaled}
    notes += [
        f"{name}: stored as int{bits[name]}, computed in float32: {reason}"
        for name, reason in in_float.items()
    ]
    if added:
        notes.append(
            f"the integers of {', '.join(map(repr, added))} are restored by operators that no "
            "recipe of LiteRT's quantizer describes"
        )
    done = [entry["bits"] for entry in entries if entry["key"] not in reasons]
    return StoredWeights(
        file=made,
        notes=notes,
        bits=min(done, default=FLOAT_BITS),
        recipe=result["recipe"] or None,
    )


def make_sparse(file: Path, formats: str) -> Path | None:
    """Stores tensors sparse where that is smaller; returns a file beside the one given, or None.

    `formats` says what is to be small: `"raw"`, the file, or `"gzip"`, the gzipped file; with
    `"dense"` nothing is done. None means that no file is smaller. See [broken_chain][] for files
    that only tensors without DENSIFY may become sparse in.
    """
    if formats == "dense":
        return None
    flat = read_flat_model(file)
    chosen = choose_formats(flat, formats)
    if broken_chain(flat):
        chosen = {
            (tensor.subgraph, tensor.index): kind
            for tensor in flat.tensors
            for kind in [chosen.get((tensor.subgraph, tensor.index), "dense")]
            if kind != "dense" and is_native(flat, tensor, kind)
        }
    if set(chosen.values()) <= {"dense"}:
        return None
    smaller = file.with_name("sparse.tflite")
    sparsify_file(file, smaller, chosen)
    return smaller if _size(smaller, formats) < _size(file, formats) else None


def broken_chain(flat: FlatModel) -> str | None:
    """Says, for a note, why nothing of a file may need DENSIFY, if that is so.

    `flat` is the file before anything is stored sparse.
    """
    start = SparseClusters(flat).broken()
    if start is None:
        return None
    name = flat.tensor(start.subgraph, start.outputs[0]).name.split(";")[0]
    return (
        "tensors that would need DENSIFY are stored dense, because with one in the file XNNPACK "
        f"computes wrongly on ARM: at {name!r} it turns to channels-first order for its sparse "
        "kernels, and an operator on the way to a global average pooling cannot follow"
    )


def _quantize(
    file: Path,
    output: Path,
    entries: list[dict[str, Any]],
    compute: str,
    calibration: Sequence[np.ndarray] | None,
) -> dict[str, Any]:
    """Asks the quantizer; what it fails at counts as refused."""
    rows = None
    if calibration is not None and compute == "static":
        rows = str(file.with_name("calibration.npz"))
        save_inputs(rows, calibration)
    try:
        return shared_worker().request(
            "quantize",
            source=str(file),
            output=str(output),
            entries=entries,
            compute=compute,
            representative=rows,
        )
    except WorkerError as error:
        if error.reason in ("died", "timeout"):
            raise
        lines = error.detail.strip().splitlines()
        why = f"the quantizer refused the file ({error.reason}: {lines[-1] if lines else ''})"
        return {"refused": {entry["key"]: why for entry in entries}, "float": {}, "recipe": []}


def _restorable(
    file: Path,
    matches: Mapping[str, Sequence[MatchedTensor]],
    bits: Mapping[str, int],
    refused: Mapping[str, str],
) -> tuple[list[tuple[FlatTensor, IntegerForm]], dict[str, list[IntegerForm]]]:
    """The tensors of refused kernels that can be integers all the same, and whose they are."""
    if not refused:
        return [], {}
    flat = read_flat_model(file)
    wanted: dict[tuple[int, int], tuple[FlatTensor, IntegerForm]] = {}
    added: dict[str, list[IntegerForm]] = {}
    for path in refused:
        forms = []
        for match in matches[path]:
            tensor = same_tensor(flat, match.tensor)
            form = None if tensor is None else integer_form(flat, tensor, bits[path])
            if tensor is not None and form is not None:
                forms.append((tensor, form))
        if len(forms) == len(matches[path]):
            wanted |= {(tensor.subgraph, tensor.index): (tensor, form) for tensor, form in forms}
            added[path] = [form for _, form in forms]
    return list(wanted.values()), added


def _size(file: Path, formats: str) -> int:
    content = file.read_bytes()
    return len(content) if formats == "raw" else gzip_size(content)
