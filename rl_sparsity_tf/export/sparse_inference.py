"""Files whose 1x1 convolutions skip their zeros on ARM, and what keeps a model from that.

XNNPACK, LiteRT's delegate, has kernels that skip zero weights. It uses them on ARM (and on x86
without AVX) for the 1x1 convolutions of a cluster that meets the conditions in
[sparse_cluster][rl_sparsity_tf.tflite.xnnpack], if a tensor is stored sparse. Here those tensors
are stored sparse; for every condition that fails, the layer is named and the rewrite that mends it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.export.matching import match_kernels
from rl_sparsity_tf.tflite.reading import FlatModel, FlatOperator, read_flat_model
from rl_sparsity_tf.tflite.sparse_storage import choose_formats, sparsify_file, why_dense
from rl_sparsity_tf.tflite.xnnpack import END, START, Failure, SparseClusters

SPARSE_INFERENCES = ("arm",)

_SEPARABLE = "inside the cluster use DepthwiseConv2D and a 1x1 convolution instead"
# What is wrong, as sparse_cluster words it -> how to mend it. The first that matches counts.
_REWRITES = (
    (
        r"^CONV_2D \S+ reads 1 channels",
        "the first convolution must read 3: repeat the grey channel with Concatenate()([x, x, x])",
    ),
    (r"^CONV_2D \S+ reads \d+ channels", "the first convolution must read 3"),
    (
        r"^CONV_2D 3x3 is not padded",
        "padding='same' with stride 2 pads asymmetrically: use ZeroPadding2D(1) and "
        "padding='valid'",
    ),
    (
        r"^DEPTHWISE_CONV_2D (\d)x\d is not padded by (\d)",
        r"use ZeroPadding2D(\2) and padding='valid'; 'same' pads symmetrically with stride 1 only",
    ),
    (r"^CONV_2D 3x3 has stride", f"use strides=2 if it is the first; {_SEPARABLE}"),
    (r"^CONV_2D 1x1 has stride", "use strides=1 and stride the depthwise convolution before it"),
    (r"^CONV_2D 1x1 is padded", "use no ZeroPadding2D in front of a 1x1 convolution"),
    (r"^DEPTHWISE_CONV_2D \S+ has stride", "use strides of 1 or 2"),
    (r"^DEPTHWISE_CONV_2D \S+ has no", "use kernels of 3x3 or 5x5"),
    (r"depth multiplier", "use depth_multiplier=1 and widen with a 1x1 convolution"),
    (r"is dilated|^BATCH_TO_SPACE_ND|^SPACE_TO_BATCH_ND", "use dilation_rate=1"),
    (r"is grouped", "use groups=1"),
    (r"^CONV_2D \S+ has no", f"use 3x3 with strides=2 if it is the first; {_SEPARABLE}"),
    (r"only be its first", _SEPARABLE),
    (r"^MEAN is not over", "use GlobalAveragePooling2D"),
    (r"POOL_2D has no", "let the depthwise convolution before it have strides=2"),
    (r"^CONCATENATION has no", "use Add"),
    (r"are not float32", "store them as float32 or, with a plan, as int8"),
    (
        r"has no channels-first form|works on tensors of rank|does not compute in float32",
        "move it before the first convolution or behind the global average pooling",
    ),
)
_START_WITH = (
    "let it start with ZeroPadding2D(1) and Conv2D(..., 3, strides=2, padding='valid') on 3 "
    "channels"
)
_END_WITH = "end it in GlobalAveragePooling2D"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseInference:
    """What was done so that zeros are skipped.

    Attributes:
        file: A file beside the one given in which they are; None if no convolution qualifies.
        notes: Every condition that fails, with its layer and the rewrite that mends it.
    """

    file: Path | None
    notes: tuple[str, ...]


def check_sparse_inference(sparse_inference: object, quantization: str, compute: str) -> None:
    """Checks that the mode has weights that can be skipped.

    An ArgumentError is raised if it has not, or the choice is not known.
    """
    if sparse_inference is None:
        return
    check_choice("sparse_inference", sparse_inference, SPARSE_INFERENCES)
    if quantization not in ("none", "plan") or compute != "weight_only":
        given = f"quantization={quantization!r}"
        if quantization == "plan":
            given = f"compute={compute!r}"
        raise ArgumentError(
            f"sparse_inference={sparse_inference!r} cannot be used with {given}: only kernels that "
            "compute in float32 skip zeros. Pass quantization='none', or 'plan' with "
            "compute='weight_only'."
        )


def store_for_sparse_inference(
    file: Path, kernels: Mapping[str, np.ndarray], formats: str
) -> SparseInference:
    """Stores the 1x1 convolutions sparse that will then skip their zeros.

    The file has float32 or weight-only int8 weights. The layers are named from the Keras kernels by
    path. `formats` says how the other tensors are stored: `"dense"`, or by what is to be small.
    """
    flat = read_flat_model(file)
    clusters = SparseClusters(flat)
    names = _layer_names(flat, kernels)
    pointwise = [operator for operator in flat.operators if clusters.pointwise(operator)]
    if not pointwise:
        return SparseInference(
            file=None,
            notes=(
                _note("the model has no 1x1 convolution, and only those skip zeros", _SEPARABLE),
            ),
        )
    chosen: dict[tuple[int, int], str] = {}
    notes: dict[str, None] = {}
    for operator in pointwise:
        reasons = _reasons(flat, clusters, operator, names)
        notes |= dict.fromkeys(reasons)
        tensor = clusters.weights(operator)
        if not reasons and tensor is not None:
            chosen[tensor.subgraph, tensor.index] = "csr"
    start = clusters.broken()
    if chosen and start is not None:
        # Their sparse tensors would switch on the wrong results of the other chain.
        held = _note(
            f"XNNPACK would compute the chain that starts at {names[id(start)]} wrongly: it does "
            "not reach a global average pooling",
            "do what the other notes say, or let that convolution have padding='same'",
        )
        notes[held] = None
        chosen = {}
    if not chosen:
        return SparseInference(file=None, notes=tuple(notes))
    others = {} if formats == "dense" else choose_formats(flat, formats)
    output = file.with_name("sparse_inference.tflite")
    sparsify_file(file, output, others | chosen)
    return SparseInference(file=output, notes=tuple(notes))


def _reasons(
    flat: FlatModel, clusters: SparseClusters, operator: FlatOperator, names: Mapping[int, str]
) -> list[str]:
    """Why a 1x1 convolution cannot skip zeros, with all that is in its cluster's way."""
    cluster, failures = clusters.cluster(operator)
    reasons = [_explained(failure, names) for failure in failures]
    if reasons:
        return reasons
    zeros, elements = clusters.zeros(cluster)
    # In the file's order, so that every convolution of a cluster says the same.
    found = {id(member) for member in cluster if clusters.pointwise(member)}
    members = [member for member in flat.operators if id(member) in found]
    if 3 * zeros <= 2 * elements:
        shares = ", ".join(
            f"{names[id(member)]} {tensor.zeros or 0:,} of {tensor.elements:,}"
            for member in members
            for tensor in [clusters.weights(member)]
            if tensor is not None
        )
        return [
            _note(
                f"only {zeros / max(elements, 1):.1%} zeros in the cluster's 1x1 convolutions, "
                f"more than 66.7 % are needed ({shares})",
                "prune them further",
            )
        ]
    tensor = clusters.weights(operator)
    obstacle = None if tensor is None else why_dense(flat, tensor)
    if obstacle is None:
        return []
    return [
        _note(
            f"{names[id(operator)]} stays dense: {obstacle}",
            "share its kernel with no other kind of layer",
        )
    ]


def _explained(failure: Failure, names: Mapping[int, str]) -> str:
    if failure.operator is None:
        where = {START: ("the cluster has no start", _START_WITH), END: ("", _END_WITH)}
        said, rewrite = where[failure.side]
        return _note(said or "the cluster has no end in a global average pooling", rewrite)
    for pattern, rewrite in _REWRITES:
        found = re.search(pattern, failure.reason)
        if found:
            return _note(f"{names[id(failure.operator)]}: {failure.reason}", found.expand(rewrite))
    return _note(f"{names[id(failure.operator)]}: {failure.reason}", "replace it")


def _note(reason: str, rewrite: str) -> str:
    return f"sparse inference on ARM: no, because {reason}. To mend it: {rewrite}"


def _layer_names(flat: FlatModel, kernels: Mapping[str, np.ndarray]) -> dict[int, str]:
    """What the user calls the layer of each operator, by the operator's identity."""
    clusters = SparseClusters(flat)
    layers = {
        (match.tensor.subgraph, match.tensor.index): path.rpartition("/")[0]
        for path, matches in match_kernels(kernels, flat.tensors).items()
        for match in matches
    }
    tensors = {(tensor.subgraph, tensor.index): tensor for tensor in flat.tensors}
    names = {}
    for operator in flat.operators:
        weights = None
        if operator.name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            weights = clusters.weights(operator)
        layer = None if weights is None else layers.get((weights.subgraph, weights.index))
        output = tensors[operator.subgraph, operator.outputs[0]].name
        names[id(operator)] = layer or _scope(output, set(layers.values())) or operator.name
    return names


def _scope(name: str, layers: Collection[str]) -> str:
    """The layer in a tensor's name, such as "gate" in "model/gate/Sigmoid;model/mul/Mul"."""
    scopes = name.split(";")[0].split("/")[:-1]
    return next((scope for scope in scopes if scope in layers), scopes[-1] if scopes else "")
