"""Which tensors of a .tflite file are a Keras model's kernels, inputs and outputs.

Finds a Keras model's kernels among the tensors of a .tflite file, by content.

Names do not survive conversion reliably: kernels are transposed, reshaped, scaled by a folded batch
normalisation, merged when equal and split into gates. What survives is the pattern of values of
every output channel, up to one factor per channel; that is what is compared here.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import PlanError, did_you_mean
from rl_sparsity_tf.layers.kernels import find_kernels, rank_of, walk
from rl_sparsity_tf.tflite.editing import FileEditor
from rl_sparsity_tf.tflite.reading import FlatTensor

# A tensor at most this far from a kernel (relative to the kernel's norm) is the kernel itself, no
# batch normalisation folded in. Rounding to 4 bits moves a kernel by up to about 0.15.
_SAME = 0.2
# The axis of a dense kernel's inputs, as the axis of factors.
_BY_INPUT = (0,)
# A tensor is taken for a kernel if one factor per channel leaves at most this share of its energy
# unexplained: 4-bit rounding leaves about 0.02, an unrelated kernel of n inputs about 1 - 1/n.
_UNEXPLAINED = 0.1
# Keras keeps the gates of an LSTM (4) or GRU (3) side by side in one kernel, TFLite one by one; of
# a GRU without reset_after it keeps the recurrent kernel's first two gates together.
_GATES = ((1, 1, 1, 1), (1, 1, 1), (2, 1))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MatchedTensor:
    """A tensor of the file that holds a kernel, or one gate of it.

    Attributes:
        axes: The permutation of the kernel's axes that gives the tensor's order.
        columns: First and last + 1 index on the kernel's last axis that the tensor holds; None for
            all of them.
    """

    tensor: FlatTensor
    axes: tuple[int, ...]
    columns: tuple[int, int] | None = None

    def part(self, kernel: np.ndarray) -> np.ndarray:
        """The part of `kernel` that this tensor holds."""
        return kernel if self.columns is None else kernel[..., slice(*self.columns)]

    def values(self, kernel: np.ndarray) -> np.ndarray:
        """The tensor's real values, laid out as `part(kernel)`."""
        return _in_kernel_layout(self.tensor, self.part(kernel).shape, self.axes)


def kernel_variables(model: keras.Model) -> dict[str, tf.Variable]:
    """Lists the weights of rank >= 2 of a plain model but for biases, each variable once, by path.

    Compressible kernels have the paths that plans give them; any other weight the path of the layer
    through nested models, then its own name without its layer's ("locally_connected/kernel").
    """
    planned = {id(variable): path for path, variable in _compressible(model).items()}
    found: dict[str, tf.Variable] = {}
    seen: set[int] = set()
    # A subclassed model, walked last, may own weights that none of its layers does.
    for layer_path, layer in (*walk(model), (model.name, model)):
        for variable in layer.weights:
            if id(variable) in seen or rank_of(variable) < 2:
                continue
            seen.add(id(variable))
            own = variable.name.split(":")[0].removeprefix(f"{layer.name}/")
            # Nested models prefix the names of their weights with their own name.
            own = own.split(f"/{layer.name}/")[-1]
            if own.endswith("bias"):
                # GRU and attention layers have biases of rank 2, which converting adds together.
                continue
            path = planned.get(id(variable), f"{layer_path}/{own}")
            numbered = (f"{path}_{number}" for number in itertools.count(1))
            found[path if path not in found else next(n for n in numbered if n not in found)] = (
                variable
            )
    return found


def find_variable(model: keras.Model, path: str) -> tf.Variable:
    """Looks a kernel up by its path: layers through nested models, then attribute names.

    Paths are such as "conv/kernel" or "lstm/cell/kernel". A PlanError tells the user that the model
    has no such kernel.
    """
    known = _compressible(model) | kernel_variables(model)
    if path in known:
        return known[path]
    for layer_path, layer in walk(model):
        if path.startswith(f"{layer_path}/"):
            found: object = layer
            for attribute in path.removeprefix(f"{layer_path}/").split("/"):
                found = getattr(found, attribute, None)
            if isinstance(found, tf.Variable):
                return found
    raise PlanError(
        f"The plan names the kernel {path!r}, which model {model.name!r} does not have. "
        f"{did_you_mean(path, known)} Use the plan with the model it was made for."
    )


def match_kernels(
    kernels: Mapping[str, np.ndarray], tensors: Sequence[FlatTensor]
) -> dict[str, tuple[MatchedTensor, ...]]:
    """Finds the tensors that hold the given kernels.

    A tensor fits a kernel if its shape is one of TFLite's layouts of the kernel's shape and every
    output channel is the kernel's, up to rounding and one factor per channel (a folded batch
    normalisation; one before a dense layer with a bias gives a factor per input). Tensors equal to
    a kernel are assigned first, then those equal up to factors, the best fit first and every tensor
    once; a kernel that is left over may share a tensor that equals it, since the converter merges
    equal constants; what is left then is looked for gate by gate.

    The kernels are in Keras's layouts, the tensors those of all subgraphs. For every path there is
    one tensor as a rule, one per gate for an LSTM or GRU kernel, and none if the kernel was not
    found.

    Example:
        >>> matches = match_kernels({"conv/kernel": kernel}, read_tensors("model.tflite"))
        >>> matches["conv/kernel"][0].tensor.shape
        (8, 3, 3, 3)
    """
    constants = [tensor for tensor in tensors if _can_be_kernel(tensor)]
    found: dict[str, tuple[MatchedTensor, ...]] = dict.fromkeys(kernels, ())
    whole = _assign(kernels, constants)
    for path, match in whole.items():
        found[path] = (match,)
    used = {id(match.tensor) for match in whole.values()}
    rest = [tensor for tensor in constants if id(tensor) not in used]
    for path, kernel in kernels.items():
        if found[path]:
            continue
        for gates in _GATES:
            columns = _gate_columns(kernel.shape[-1], gates)
            parts = {str(index): kernel[..., slice(*part)] for index, part in enumerate(columns)}
            assigned = _assign(parts, rest)
            if parts and len(assigned) == len(parts):
                found[path] = tuple(
                    dataclasses.replace(assigned[str(index)], columns=part)
                    for index, part in enumerate(columns)
                )
                break
    return found


def could_hold(kernel: np.ndarray, tensor: FlatTensor) -> bool:
    """Whether a constant has a shape that TFLite could give this kernel."""
    return _can_be_kernel(tensor) and any(
        _reshapes([kernel.shape[axis] for axis in axes], tensor.shape)
        for axes, _ in _layouts(kernel.ndim)
    )


def _compressible(model: keras.Model) -> dict[str, tf.Variable]:
    """The kernels that can be compressed, by the paths that plans give them."""
    found = {}
    for kernel in find_kernels(model):
        variable = getattr(kernel, "variable", None)
        if variable is None:
            variable = getattr(kernel.layer, kernel.spec.attribute, None)
        if variable is not None:
            found[kernel.path] = variable
    return found


def _assign(
    kernels: Mapping[str, np.ndarray], tensors: Sequence[FlatTensor]
) -> dict[str, MatchedTensor]:
    fits = []
    for order, (path, kernel) in enumerate(kernels.items()):
        for position, tensor in enumerate(tensors):
            fit = _best_fit(kernel, tensor, _names(tensor, path))
            if fit is not None:
                distance, unexplained, axes = fit
                # Equal tensors compete by distance and go before those equal up to factors.
                scaled = distance > _SAME
                # Kernels of one input fit each other up to factors: then names decide.
                fit_by = round(unexplained, 6) if scaled else distance
                rank = (scaled, fit_by, not _names(tensor, path), order, position)
                fits.append((rank, path, MatchedTensor(tensor=tensor, axes=axes)))
    fits.sort(key=lambda fit: fit[0])
    assigned: dict[str, MatchedTensor] = {}
    used: set[int] = set()
    for _, path, match in fits:
        if path not in assigned and id(match.tensor) not in used:
            assigned[path] = match
            used.add(id(match.tensor))
    for (scaled, *_), path, match in fits:
        if path not in assigned and not scaled:
            assigned[path] = match
    return assigned


def _names(tensor: FlatTensor, path: str) -> bool:
    """Whether a tensor's name has that of the kernel's layer in it."""
    layer = path.split("/")[-2:][0]
    return layer in re.split(r"[/;:]", tensor.name)


def _best_fit(
    kernel: np.ndarray, tensor: FlatTensor, named: bool
) -> tuple[float, float, tuple[int, ...]] | None:
    """Returns (distance, unexplained share, axes) of the best layout that fits, or None.

    `named` is whether the tensor's name has the kernel's layer in it.
    """
    best = None
    for axes, channel_axes in _layouts(kernel.ndim):
        if not _reshapes([kernel.shape[axis] for axis in axes], tensor.shape):
            continue
        # A factor for every single weight would make anything fit.
        if channel_axes == _BY_INPUT and kernel.shape[-1] == 1 and not named:
            continue
        values = _in_kernel_layout(tensor, kernel.shape, axes)
        distance = _distance(kernel, values)
        unexplained = _unexplained(_rows(kernel, channel_axes), _rows(values, channel_axes))
        if min(distance - _SAME, unexplained - _UNEXPLAINED) > 0:
            continue
        key = (distance > _SAME, unexplained if distance > _SAME else distance)
        if best is None or key < best[0]:
            best = (key, (distance, unexplained, axes))
    return None if best is None else best[1]


def _distance(kernel: np.ndarray, values: np.ndarray) -> float:
    """Norm of the difference relative to the kernel's norm."""
    norm = float(np.linalg.norm(kernel))
    difference = float(np.linalg.norm(values - kernel))
    if norm == 0:
        return 0.0 if difference == 0 else np.inf
    return difference / norm


def _unexplained(kernel: np.ndarray, values: np.ndarray) -> float:
    """Share of the values' energy that no factor per channel explains, averaged over channels.

    Both arrays have the shape `(channels, inputs)`. 0 is a perfect fit up to factors, 1 none.
    Channels of `values` that are zero throughout (their batch normalisation switched them off) say
    nothing and are left out.
    """
    energy = np.sum(values**2, axis=1)
    live = energy > 0
    if not live.any():
        return 0.0 if not kernel.any() else 1.0
    values, kernel, energy = values[live], kernel[live], energy[live]
    own = np.sum(kernel**2, axis=1)
    along = np.sum(values * kernel, axis=1)
    explained = np.divide(along**2, own, out=np.zeros_like(along), where=own > 0)
    return float(np.mean(np.clip(1 - explained / energy, 0, 1)))


def _layouts(rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields (axes, channel axes): TFLite's orders of a kernel, and where factors may vary."""
    last, second = rank - 1, rank - 2
    identity = tuple(range(rank))
    if rank == 2:  # the factors of a batch normalisation before a dense layer
        yield (last, second), _BY_INPUT
    # Dense (out, in), Conv1D and Conv2D (out, kh, kw, in).
    yield (last, *identity[:-1]), (last,)
    # Embedding, constants of matrix products, Conv3D (d, h, w, in, out).
    yield identity, (last,)
    if rank >= 3:
        # Transposed convolutions: Keras (kh, kw, out, in), TFLite (out, kh, kw, in).
        yield (second, *identity[:-2], last), (second,)
        # Depthwise: Keras (kh, kw, in, multiplier), TFLite (1, kh, kw, in * multiplier).
        yield identity, (second, last)
    if rank == 3:
        # EinsumDense as a fully connected layer: (in, heads, size) becomes (heads * size, in).
        yield (1, 2, 0), (1, 2)
    if rank == 5:
        # Transposed Conv3D keeps Keras's order (d, h, w, out, in).
        yield identity, (second,)


def _reshapes(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether merging neighbouring axes and adding axes of size 1 turns `shape` into `wanted`."""
    sizes = [size for size in shape if size != 1]
    for target in (size for size in wanted if size != 1):
        product = 1
        while sizes and product < target:
            product *= sizes.pop(0)
        if product != target:
            return False
    return not sizes


def _in_kernel_layout(
    tensor: FlatTensor, shape: Sequence[int], axes: tuple[int, ...]
) -> np.ndarray:
    values = tensor.values()
    assert values is not None  # Only constants that can be read are matched.
    stored = values.astype(np.float64).reshape([shape[axis] for axis in axes])
    return np.transpose(stored, np.argsort(axes))


def _rows(kernel: np.ndarray, channel_axes: tuple[int, ...]) -> np.ndarray:
    others = tuple(axis for axis in range(kernel.ndim) if axis not in channel_axes)
    channels = int(np.prod([kernel.shape[axis] for axis in channel_axes]))
    return np.transpose(kernel, channel_axes + others).reshape(channels, -1).astype(np.float64)


def _can_be_kernel(tensor: FlatTensor) -> bool:
    # Rank 1 is a bias; integers without scales are shapes, axes and the like.
    real = tensor.quantized or tensor.dtype.startswith("float")
    return tensor.raw is not None and real and len(tensor.shape) >= 2


def _gate_columns(columns: int, gates: Sequence[int]) -> list[tuple[int, int]]:
    if columns % sum(gates):
        return []
    width = columns // sum(gates)
    ends = [width * end for end in itertools.accumulate(gates)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def name_ports(file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives a converted file's signature Keras's names, and Keras's order to its subgraph.

    The converter takes no names with capitals, spaces or letters beyond ASCII, and orders inputs
    and outputs as it likes.

    The file's signature has the inputs `input_0`, `input_1`, ... and the outputs `output_0`, ...;
    the file is rewritten.
    """
    editor = FileEditor(file.read_bytes())
    graph, signature = editor.model.subgraphs[0], editor.model.signatureDefs[0]
    given, made = _numbered(signature.inputs), _numbered(signature.outputs)
    for name, entry in zip(inputs, given, strict=True):
        # What interpreters without signatures go by; other tools give it this prefix, too.
        graph.tensors[entry.tensorIndex].name = f"serving_default_{name}:0".encode()
    for names, entries in ((inputs, given), (outputs, made)):
        for name, entry in zip(names, entries, strict=True):
            entry.name = name.encode()
    graph.inputs = np.array([entry.tensorIndex for entry in given], np.int32)
    graph.outputs = np.array([entry.tensorIndex for entry in made], np.int32)
    signature.inputs, signature.outputs = given, made
    file.write_bytes(editor.packed())


def _numbered(entries: Sequence[Any]) -> list[Any]:
    """A signature's entries by the number that their names end in: `input_10` after `input_2`."""
    return sorted(entries, key=lambda entry: int(entry.name.decode().rpartition("_")[2]))
