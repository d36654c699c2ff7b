"""Which tensors of a float32 .tflite file a plan wants as integers, and why some cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_sparsity_tf.export.matching import MatchedTensor
from rl_sparsity_tf.tflite.flat_model import FlatModel
from rl_sparsity_tf.tflite.recipes import operator_entry

FLOAT_BITS = 32


def quantization_entries(
    flat: FlatModel,
    matches: Mapping[str, Sequence[MatchedTensor]],
    bits: Mapping[str, int],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Resolves a plan's wishes to operators, by the tensors that hold the kernels.

    Args:
        flat: The float32 file.
        matches: For every kernel path the tensors that hold it.
        bits: Wanted bits per kernel path, 32 for float.

    Returns:
        The entries for the conversion process's `quantize`, and for every kernel that has to stay
        float the reason.
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
