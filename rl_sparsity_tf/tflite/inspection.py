"""Looks into any .tflite file: what it stores, in which form, and what the kernels gain from it."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rl_sparsity_tf.console import printing
from rl_sparsity_tf.files import gzip_size
from rl_sparsity_tf.tflite.reading import FlatModel, FlatTensor, read_flat_model
from rl_sparsity_tf.tflite.xnnpack import KernelUse

# Constants of these types can be weights; others are shapes, axes and indices.
_WEIGHT_TYPES = {"float16", "float32", "float64", "int8", "uint8", "int4", "int2", "int16"}
_LONGEST_NAME = 36


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInspection:
    """One constant tensor of rank 2 or more.

    Attributes:
        subgraph: Number of the subgraph it belongs to.
        name: Its name in the file.
        shape: Its shape in TFLite's layout.
        dtype: How it is stored: "float32", "float16", "int8", "int4", ...
        elements: Number of values.
        zeros: How many of them are zero; None if they cannot be read.
        format: "dense", "CSR", "block 1x4", ...; "external" if it lies in another file.
        bytes: Its size in the file, the indices of a sparse format included.
        operators: The operators on the way from the constant to the computation.
        exploited: In plain words, what the kernel that reads it gains from its zeros and its type.
    """

    subgraph: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    zeros: int | None
    format: str
    bytes: int
    operators: tuple[str, ...]
    exploited: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortInspection:
    """An input or output of the model.

    Attributes:
        name: Its name in the file.
        shape: Its shape, -1 for open dimensions.
        dtype: Its type.
        scale: Its quantization scale; None if it is not quantized.
        zero_point: Its zero point; None if it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileInspection:
    """The result of [inspect_tflite][rl_sparsity_tf.inspect_tflite].

    Attributes:
        path: The file.
        tflite_bytes: Its size.
        gzip_bytes: Its size after gzip at level 9.
        tensors: The constants of rank 2 or more, largest first.
        other_tensors: Number of the remaining constants: biases, scales, shapes.
        other_bytes: Their size.
        bytes_by_dtype: Size of all constants by type; a buffer that several share counts once.
        elements: Number of values of the weights, i.e. of `tensors` of a float or quantized type.
        zeros: How many of them are zero.
        operators: Number of operators by name, over all subgraphs.
        operators_by_kind: Names of the operators that are "builtin", "custom" and "flex".
        inputs: The model's inputs, i.e. those of the first subgraph.
        outputs: Its outputs.
        batch_size: The batch size that the file fixes; None if it is open.
        subgraphs: Number of subgraphs.
        signatures: Names of the signatures.
    """

    path: str
    tflite_bytes: int
    gzip_bytes: int
    tensors: tuple[TensorInspection, ...]
    other_tensors: int
    other_bytes: int
    bytes_by_dtype: dict[str, int]
    elements: int
    zeros: int
    operators: dict[str, int]
    operators_by_kind: dict[str, tuple[str, ...]]
    inputs: tuple[PortInspection, ...]
    outputs: tuple[PortInspection, ...]
    batch_size: int | None
    subgraphs: int
    signatures: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights; 0 if there are none."""
        return self.zeros / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON-ready values."""
        return _plain(dataclasses.asdict(self)) | {"sparsity": self.sparsity}

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints the tensors, the operators and the totals as a table.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        sentences = list(dict.fromkeys(tensor.exploited for tensor in self.tensors))
        rows = [_HEAD, *(self._row(tensor, sentences) for tensor in self.tensors)]
        if self.other_tensors:
            text = f"{self.other_tensors} others (rank 0 and 1)"
            rows.append(("", text, "", "", "", "", f"{self.other_bytes:,}", "", ""))
        print_fn(f"{self.path}: {self.tflite_bytes:,} bytes ({self.gzip_bytes:,} after gzip)")
        for line in _table(rows):
            print_fn(line)
        for number, sentence in enumerate(sentences, 1):
            print_fn(f"[{number}] {sentence}")
        if sentences:
            print_fn("")
        print_fn(f"Zeros: {self.sparsity:.1%} of {self.elements:,} weights of rank 2 and more")
        types = (f"{dtype} {size:,}" for dtype, size in self.bytes_by_dtype.items())
        print_fn(f"Bytes of constants by type: {_joined(types)}")
        counted = (f"{name} {count}" for name, count in self.operators.items())
        print_fn(f"Operators: {_joined(counted)}")
        kinds = self.operators_by_kind
        print_fn(
            f"Kinds: {len(kinds['builtin'])} builtin; custom: {_joined(kinds['custom'])}; "
            f"flex: {_joined(kinds['flex'])}"
        )
        for title, ports in (("Input", self.inputs), ("Output", self.outputs)):
            for port in ports:
                print_fn(f"{title} {_port(port)}")
        batch = "any" if self.batch_size is None else self.batch_size
        print_fn(
            f"Batch size: {batch}; subgraphs: {self.subgraphs}; signatures: "
            f"{_joined(self.signatures)}"
        )

    def _row(self, tensor: TensorInspection, sentences: Sequence[str]) -> tuple[str, ...]:
        zeros = "?"
        if tensor.zeros is not None:
            zeros = f"{tensor.zeros:,} ({tensor.zeros / max(tensor.elements, 1):.1%})"
        return (
            str(tensor.subgraph),
            short_name(tensor.name),
            "x".join(map(str, tensor.shape)),
            tensor.dtype,
            tensor.format,
            zeros,
            f"{tensor.bytes:,}",
            " ".join(tensor.operators),
            f"[{sentences.index(tensor.exploited) + 1}]",
        )


_HEAD = ("Graph", "Tensor", "Shape", "Type", "Format", "Zeros", "Bytes", "Read by", "Kernel")
_RIGHT = {"Zeros", "Bytes"}


def inspect_tflite(path: str | os.PathLike[str]) -> FileInspection:
    """Describes any .tflite file, also one that this package did not write.

    Args:
        path: The file.

    Returns:
        Per constant tensor its type, format, zeros, size and what the kernels will exploit; and the
        totals, operators, inputs and outputs of the file.

    Raises:
        ArgumentError: If the file does not exist or is no .tflite file.
        ExportError: If it is damaged.

    Example:
        >>> inspection = rls.inspect_tflite("model.tflite")
        >>> inspection.summary()
        model.tflite: ... bytes (... after gzip)
        ...
        Zeros: 90...% of 17,168 weights of rank 2 and more
        ...
        >>> inspection.tensors[0].exploited
        '...zeros are multiplied like any number'
    """
    model = read_flat_model(path)
    content = Path(path).read_bytes()
    kernel_use = KernelUse(model)
    constants = [tensor for tensor in model.tensors if tensor.constant]
    tensors = [_inspect(tensor, kernel_use) for tensor in constants if len(tensor.shape) >= 2]
    tensors.sort(key=lambda tensor: -tensor.bytes)
    others = [tensor for tensor in constants if len(tensor.shape) < 2]
    weights = [
        tensor
        for tensor in tensors
        if tensor.dtype in _WEIGHT_TYPES and tensor.zeros is not None and tensor.elements
    ]
    graph = model.graphs[0] if model.graphs else None
    inputs = _ports(model, graph.inputs if graph else ())
    return FileInspection(
        path=str(path),
        tflite_bytes=len(content),
        gzip_bytes=gzip_size(content),
        tensors=tuple(tensors),
        other_tensors=len(others),
        other_bytes=sum(_stored_once(others).values()),
        bytes_by_dtype=_stored_once(constants),
        elements=sum(tensor.elements for tensor in weights),
        zeros=sum(tensor.zeros or 0 for tensor in weights),
        operators=_counted(operator.name for operator in model.operators),
        operators_by_kind={
            kind: tuple(sorted({op.name for op in model.operators if op.kind == kind}))
            for kind in ("builtin", "custom", "flex")
        },
        inputs=inputs,
        outputs=_ports(model, graph.outputs if graph else ()),
        batch_size=_batch_size(inputs),
        subgraphs=len(model.graphs),
        signatures=model.signatures,
    )


def short_name(name: str) -> str:
    """The telling end of a tensor's name: its first alternative, without leading scopes.

    Example:
        >>> short_name("model_1/block_3/conv/Conv2D;model_1/block_3/bn/FusedBatchNormV3")
        'model_1/block_3/conv/Conv2D'
    """
    first = name.split(";")[0] or "(no name)"
    while len(first) > _LONGEST_NAME and "/" in first:
        first = first.partition("/")[2]
    return first if len(first) <= _LONGEST_NAME else "..." + first[3 - _LONGEST_NAME :]


def _inspect(tensor: FlatTensor, kernel_use: KernelUse) -> TensorInspection:
    return TensorInspection(
        subgraph=tensor.subgraph,
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        elements=tensor.elements,
        zeros=tensor.zeros,
        format=tensor.format,
        bytes=tensor.stored_bytes + tensor.index_bytes,
        operators=kernel_use.operators(tensor),
        exploited=kernel_use.sentence(tensor),
    )


def _stored_once(tensors: Iterable[FlatTensor]) -> dict[str, int]:
    sizes: collections.Counter[str] = collections.Counter()
    seen = set()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.index_bytes
        if tensor.buffer not in seen:
            sizes[tensor.dtype] += tensor.stored_bytes
        seen.add(tensor.buffer)
    return dict(sizes.most_common())


def _counted(names: Iterable[str]) -> dict[str, int]:
    counts = collections.Counter(names)
    return {name: counts[name] for name in sorted(counts, key=lambda name: (-counts[name], name))}


def _ports(model: FlatModel, indices: Iterable[int]) -> tuple[PortInspection, ...]:
    ports = []
    for index in indices:
        tensor = model.tensor(0, index)
        ports.append(
            PortInspection(
                name=tensor.name,
                shape=tensor.signature or tensor.shape,
                dtype=tensor.dtype,
                scale=float(tensor.scales[0]) if tensor.quantized else None,
                zero_point=int(tensor.zero_points[0]) if tensor.quantized else None,
            )
        )
    return tuple(ports)


def _batch_size(inputs: Sequence[PortInspection]) -> int | None:
    first = next((port.shape[0] for port in inputs if port.shape), -1)
    return None if first < 0 else first


def _port(port: PortInspection) -> str:
    shape = "x".join("?" if size < 0 else str(size) for size in port.shape)
    text = f"{port.name}: {port.dtype} {shape or 'scalar'}"
    if port.scale is not None:
        text += f", (value - {port.zero_point}) * {port.scale:.6g}"
    return text


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [rule]
    for number, row in enumerate(rows):
        cells = (
            cell.rjust(width) if title in _RIGHT else cell.ljust(width)
            for cell, width, title in zip(row, widths, _HEAD, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append(rule)
    return [*lines, rule]


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(texts) or "none"


def _plain(value: Any) -> Any:
    """Turns tuples into lists, as JSON does."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
