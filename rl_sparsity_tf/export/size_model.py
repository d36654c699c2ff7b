"""How large the file of a plan will be, raw and gzipped, without converting it.

One conversion of the dense network tells what everything but the kernels costs, and one more per
kernel what it costs to store it as integers; a kernel's own bytes follow from its values, in the
layout and type that TFLite stores them in.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.export.arguments import file_batch_size
from rl_sparsity_tf.export.export import convert_traced
from rl_sparsity_tf.export.matching import MatchedTensor, match_kernels
from rl_sparsity_tf.export.recurrent import stateless
from rl_sparsity_tf.export.saved_model import in_float32
from rl_sparsity_tf.export.stored_weights import FORMATS, make_sparse, store_weights
from rl_sparsity_tf.files import gzip_size, scratch_folder
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.kernel_spec import has_int4
from rl_sparsity_tf.layers.kernels import Kernel, find_kernels
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelRule
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.layers.wrapping import apply_plan, strip, wrap
from rl_sparsity_tf.tflite.integer_storage import pack_integers
from rl_sparsity_tf.tflite.reading import FlatModel, FlatTensor, read_flat_model
from rl_sparsity_tf.tflite.sparse_storage import saved_bytes, smallest_format

_LEVEL = 9
# Enough zeros for every tensor of some size to become sparse.
_PRUNED = 0.9
_MEASURED = 0.7


@dataclasses.dataclass(frozen=True)
class FileSize:
    """Bytes of a .tflite file.

    Attributes:
        raw: As it lies in flash.
        gzip: Compressed, as it is downloaded.
    """

    raw: float
    gzip: float

    def __add__(self, other: FileSize) -> FileSize:
        return FileSize(self.raw + other.raw, self.gzip + other.gzip)

    def __sub__(self, other: FileSize) -> FileSize:
        return FileSize(self.raw - other.raw, self.gzip - other.gzip)

    def scaled(self, factor: float) -> FileSize:
        """Both figures times a factor."""
        return FileSize(self.raw * factor, self.gzip * factor)


class SizeModel:
    """Predicts the size of the files that `quantization="plan"` writes.

    Args:
        model: The dense model, built.
        formats: How tensors may be stored: `"dense"`, or sparse where that makes the file
            (`"raw"`) or the gzipped file (`"gzip"`) smaller, as `export_tflite` has it.
        compressed: Whether gzipped bytes are wanted, which take nearly all of the time; else all
            of them are NaN.

    Raises:
        ArgumentError: If the formats are not known.
        ExportError: If the model cannot be converted.

    Example:
        >>> sizes = rls.SizeModel(model, formats="raw")
        >>> sizes.plan_size(plan).raw < sizes.file_size({}, bits={}).raw
        True
        >>> sizes.file_size({}, bits={"hidden/kernel": 8}).raw < sizes.file_size({}, bits={}).raw
        True
    """

    @takes_keras_3
    def __init__(self, model: keras.Model, formats: str = "dense", *, compressed: bool = True):
        self._model, self._compressed = model, compressed
        self._formats = check_choice("formats", formats, FORMATS)
        self._kernels = {kernel.path: kernel for kernel in find_kernels(model)}
        # Measured with some weights pruned, as they will be: what is compressed beside dense
        # kernels costs more.
        sparse = formats != "dense"
        # With the states of all plans that follow: one more wrapping takes as long as a conversion.
        wrapped = wrap(model, self._all_alike(_PRUNED, quantize=sparse))
        measured = self._pruned(wrapped, _MEASURED)
        values = {kernel.path: kernel.value() for kernel in find_kernels(measured)}
        with scratch_folder() as folder:
            plain = convert_weights(measured, folder)
            flat = read_flat_model(plain)
            self._parts = match_kernels(values, flat.tensors)
            # Where each kernel's tensors are, as floats and as integers.
            self._places = {(path, False): (flat, parts) for path, parts in self._parts.items()}
            # Equal kernels share one tensor: it is paid for once.
            self._shared = _duplicates(self._parts)
            self._factors = {
                path: _folded_factors(kernel, values[path], self._parts[path])
                for path, kernel in self._kernels.items()
            }
            self._each_more = FileSize(0, 0)
            self._each_sparse = {False: FileSize(0, 0), True: FileSize(0, 0)}
            self._base = self._size_of(plain)
            self._extra = dict.fromkeys(self._kernels, FileSize(0, 0))
            self._base -= sum(
                (self.kernel_size(path, value, 32, "dense") for path, value in values.items()),
                FileSize(0, 0),
            )
            integers = [
                path
                for path, kernel in self._kernels.items()
                if kernel.spec.exports_int8 and self._parts[path] and path not in self._shared
            ]
            for path in integers:
                self._extra[path] = self._beside_integers(plain, [path], values)
            # What all together cost differs a little: an operator's code is paid for once.
            if len(integers) > 1:
                rest = self._beside_integers(plain, integers, values)
                self._each_more = rest.scaled(1 / (len(integers) - 1))
        if sparse:
            for quantize in (False, True):
                self._adjust_sparse(self._pruned(wrapped, _PRUNED, quantize), quantize)

    def _all_alike(self, sparsity: float, quantize: bool = False) -> CompressionPlan:
        """The same sparsity in every kernel, in frozen ones, too."""
        return CompressionPlan(
            KernelRule(path, sparsity, quantize=quantize) for path in self._kernels
        )

    def _pruned(self, wrapped: keras.Model, sparsity: float, quantize: bool = False) -> keras.Model:
        """The plain model with every kernel pruned alike."""
        plan = resolve(self._all_alike(sparsity, quantize), self._model)
        apply_plan(wrapped, plan.kernels)
        return strip(wrapped)

    def _beside_integers(
        self, plain: Path, paths: Sequence[str], values: Mapping[str, np.ndarray]
    ) -> FileSize:
        """What kernels as int8 cost beside what is known: scales, names, an operator."""
        bits = dict.fromkeys(paths, 8)
        file = store_weights(plain, values, bits).file
        flat = read_flat_model(file)
        for path, parts in match_kernels(values, flat.tensors).items():
            if path in paths:
                self._places.setdefault((path, True), (flat, parts))
        return self._size_of(file) - self.file_size(values, bits, "dense")

    def _adjust_sparse(self, pruned: keras.Model, quantize: bool) -> None:
        """Converts the network with most weights pruned, to learn what a sparse tensor costs."""
        values = {kernel.path: kernel.value() for kernel in find_kernels(pruned)}
        bits = {
            path: 8 if quantize and kernel.spec.exports_int8 else 32
            for path, kernel in self._kernels.items()
        }
        with scratch_folder() as folder:
            plain = convert_weights(pruned, folder)
            file = store_weights(plain, values, bits).file
            sparse = make_sparse(file, self._formats)
            if sparse is None:
                return
            tensors = read_flat_model(sparse).tensors
            count = sum(tensor.sparse and _is_integer(tensor) == quantize for tensor in tensors)
            rest = self._size_of(sparse) - self.file_size(values, bits)
        if count:
            self._each_sparse[quantize] = rest.scaled(1 / count)

    def _size_of(self, file: Path) -> FileSize:
        content = file.read_bytes()
        return FileSize(len(content), gzip_size(content) if self._compressed else math.nan)

    def kernel_size(
        self,
        path: str,
        value: np.ndarray,
        bits: int = 32,
        formats: str | None = None,
        *,
        compressed: bool = True,
    ) -> FileSize:
        """What a kernel adds to the file.

        Args:
            path: The kernel's path.
            value: Its values, as Keras has them; zeros count where they compress.
            bits: 32, 8 or 4.
            formats: Other formats than the size model's.
            compressed: Whether the gzipped bytes are wanted; else they are NaN, as they are where
                the size model knows none.

        Raises:
            ArgumentError: If the model has no such kernel.
        """
        if path not in self._kernels:
            raise ArgumentError(
                f"The model has no kernel {path!r}. Expected one of {list(self._kernels)}."
            )
        if path in self._shared:
            return FileSize(0, 0)
        if bits == 4 and not has_int4(self._kernels[path].spec.kind):
            bits = 32  # the quantizer has no such form: the values stay floats on the grid
        compressed = compressed and self._compressed
        total = self._extra[path] if bits < 32 else FileSize(0, 0)
        if bits == 32 and self._factors[path] is not None:
            value = value * self._factors[path]
        formats = formats or self._formats
        # Four-bit weights have no sparse format, so that any place will do for them.
        flat, parts = self._places.get((path, bits < 32), self._places[path, False])
        for part in parts:
            array = _stored(self._kernels[path], part, value, bits)
            tensor = dataclasses.replace(part.tensor, raw=array)
            gzipped = len(zlib.compress(array.tobytes(), _LEVEL)) if compressed else math.nan
            total += FileSize(array.nbytes, gzipped)
            if formats != "dense" and bits != 4:
                total -= self._saved(flat, tensor, formats, compressed)
        return total

    def _saved(
        self, flat: FlatModel, tensor: FlatTensor, formats: str, compressed: bool
    ) -> FileSize:
        """What the format that the exporter would choose saves."""
        chosen = smallest_format(flat, [tensor], formats)
        if chosen == "dense":
            return FileSize(0, 0)
        raw = saved_bytes(flat, tensor, chosen, "raw")
        gzipped = saved_bytes(flat, tensor, chosen, "gzip") if compressed else math.nan
        return FileSize(raw, gzipped) - self._each_sparse[_is_integer(tensor)]

    @takes_keras_3
    def plan_size(self, plan: CompressionPlan, model: keras.Model | None = None) -> FileSize:
        """The size of the file of a plan.

        Args:
            plan: The plan, or rules.
            model: The compressed model, whose weights are in the file; by default the dense
                model's own, with the plan applied.

        Raises:
            PlanError: If the plan does not fit the model.
        """
        plan = resolve(plan, self._model)
        stripped = strip(wrap(self._model, plan)) if model is None else model
        values = {kernel.path: kernel.value() for kernel in find_kernels(stripped)}
        return self.file_size(
            values, {path: entry.exported_bits for path, entry in plan.kernels.items()}
        )

    def file_size(
        self,
        values: Mapping[str, np.ndarray],
        bits: Mapping[str, int],
        formats: str | None = None,
    ) -> FileSize:
        """The size of the whole file.

        Args:
            values: Kernel values by path; the others are as in the model.
            bits: Bits by path, 32 where nothing is said.
            formats: Other formats than the size model's.
        """
        total, integers = self._base, 0
        for path, kernel in self._kernels.items():
            value = values[path] if path in values else kernel.value()
            total += self.kernel_size(path, value, bits.get(path, 32), formats)
            integers += bits.get(path, 32) < 32 and path not in self._shared
        return total + self._each_more.scaled(max(0, integers - 1))


@dataclasses.dataclass(frozen=True)
class KernelBytes:
    """The bytes that a kind of target counts, by a size model of the dense model.

    They are gzipped for a `kind` of `"gzip_bytes"`, and raw for others.
    """

    sizes: SizeModel
    kind: str

    def kernel(self, path: str, value: np.ndarray, bits: int = 32) -> float:
        """What a kernel adds to the file, see [SizeModel.kernel_size][]."""
        compressed = self.kind == "gzip_bytes"
        return self._of(self.sizes.kernel_size(path, value, bits, compressed=compressed))

    def file(self, values: Mapping[str, np.ndarray], bits: Mapping[str, int]) -> float:
        """The whole file, see [SizeModel.file_size][]."""
        return self._of(self.sizes.file_size(values, bits))

    def _of(self, size: FileSize) -> float:
        return float(size.gzip if self.kind == "gzip_bytes" else size.raw)


def _stored(kernel: Kernel, part: MatchedTensor, value: np.ndarray, bits: int) -> np.ndarray:
    """A tensor's values as TFLite stores them: its layout and type, two 4-bit values a byte."""
    if bits == 32:
        return _laid_out(part, value).astype(np.float32)
    levels = 127 if bits == 8 else 7
    matrix = kernel.spec.to_matrix_numpy(value).astype(np.float64)
    scale = np.abs(matrix).max(axis=0, keepdims=True) / levels
    integers = np.rint(matrix / np.where(scale > 0, scale, 1.0)).astype(np.int8)
    laid_out = _laid_out(part, kernel.spec.from_matrix_numpy(integers, value.shape))
    return laid_out if bits == 8 else pack_integers(laid_out, bits)


def _laid_out(part: MatchedTensor, value: np.ndarray) -> np.ndarray:
    stored = np.transpose(part.part(value), part.axes)
    return np.ascontiguousarray(stored).reshape(part.tensor.shape)


def _is_integer(tensor: FlatTensor) -> bool:
    return tensor.dtype == "int8"


def _folded_factors(
    kernel: Kernel, value: np.ndarray, parts: tuple[MatchedTensor, ...]
) -> np.ndarray | None:
    """The factor per output that a folded batch norm has multiplied a kernel with.

    It makes round weights, such as freshly drawn ones, harder to compress.
    """
    if len(parts) != 1 or parts[0].columns is not None:
        return None
    matrix = kernel.spec.to_matrix_numpy(value).astype(np.float64)
    folded = kernel.spec.to_matrix_numpy(parts[0].values(value))
    own = np.sum(matrix**2, axis=0, keepdims=True)
    factors = np.sum(matrix * folded, axis=0, keepdims=True) / np.where(own > 0, own, 1.0)
    if np.allclose(factors, 1.0, rtol=0, atol=1e-6):
        return None
    return kernel.spec.from_matrix_numpy(np.broadcast_to(factors, matrix.shape), value.shape)


def _duplicates(parts: Mapping[str, tuple[MatchedTensor, ...]]) -> set[str]:
    owners: dict[tuple[int, int], str] = {}
    shared = set()
    for path, held in parts.items():
        for part in held:
            key = (part.tensor.subgraph, part.tensor.index)
            if owners.setdefault(key, path) != path:
                shared.add(path)
    return shared


def convert_weights(model: keras.Model, folder: Path) -> Path:
    """Converts a built, plain model to a float32 file in the folder, without verifying it.

    An ExportError is raised if the model cannot be converted.
    """
    batch_size, _ = file_batch_size(model, None, unroll=False)
    with in_float32(model) as (traced, _), stateless(traced):
        return convert_traced(traced, folder, batch_size)
