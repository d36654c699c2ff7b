"""What an export wrote and how close it is to the Keras model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl_sparsity_tf.console import printing
from rl_sparsity_tf.export.matching import MatchedTensor
from rl_sparsity_tf.tflite.reading import FlatModel, FlatTensor
from rl_sparsity_tf.tflite.xnnpack import KernelUse


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One constant tensor of an exported file.

    Attributes:
        name: The tensor's name in the file.
        kernel: Path of the Keras kernel it holds, or None.
        shape: Its shape in TFLite's layout.
        dtype: How it is stored: "float32", "float16", "int8", "int4", ...
        elements: Number of values.
        zeros: How many of them are zero; None if they cannot be read.
        bytes: Stored size, the indices of a sparse format included.
        format: "dense", "CSR", "block 1x4", ...
        exploited: In plain words, what the kernel that reads it gains from its zeros and its type;
            empty if the operators were not looked at.
    """

    name: str
    kernel: str | None
    shape: tuple[int, ...]
    dtype: str
    elements: int
    zeros: int | None
    bytes: int
    format: str = "dense"
    exploited: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The result of [export_tflite][rl_sparsity_tf.export_tflite].

    Attributes:
        path: The file.
        quantization: The mode it was exported in.
        tflite_bytes: Size of the file.
        gzip_bytes: Its size after gzip at level 9.
        max_abs_difference: Largest absolute difference to Keras's outputs on the sample inputs,
            with and without XNNPACK, over batch sizes.
        output_range: Largest minus smallest value of that output in Keras (at least a tenth of
            its largest magnitude).
        top1_agreement: Share of sample rows with the same largest output; None for regression.
        tolerance: Largest difference that was allowed, relative to `output_range`. In mode "int8"
            it binds only outputs without a top-1, unless it was passed by the caller.
        tensors: The constants of the file, largest first.
        notes: What was not done as asked, and why.
        batch_size: The batch size the file is fixed to; None if it is open.
        recipe: The recipe with which LiteRT's quantizer makes the file's integers from the float32
            file; None if it has quantized nothing. The file beside it holds the same.
        scores: On the test data given, the metric's name and the figures of Keras and of the file.
        sparse_inference: Whether 1x1 convolutions of the file skip their zeros on ARM; None if
            that was not asked for. The notes say what is in the way of others.

    Example:
        >>> report = rls.export_tflite(model, "half.tflite", "float16")
        >>> report.max_abs_difference <= report.tolerance * report.output_range
        True
    """

    path: str
    quantization: str
    tflite_bytes: int
    gzip_bytes: int
    max_abs_difference: float
    output_range: float
    top1_agreement: float | None
    tolerance: float
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...]
    batch_size: int | None
    recipe: list[dict[str, Any]] | None = None
    scores: dict[str, float | str] | None = None
    sparse_inference: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        values = dataclasses.asdict(self)
        for tensor in values["tensors"]:
            tensor["shape"] = list(tensor["shape"])
        return values | {"tensors": list(values["tensors"]), "notes": list(self.notes)}

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints the kernels' tensors, the sizes and the agreement as a table.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        kernels = [tensor for tensor in self.tensors if tensor.kernel is not None]
        sentences = list(dict.fromkeys(tensor.exploited for tensor in kernels if tensor.exploited))
        rows: list[tuple[str, ...]] = [
            ("Kernel", "Tensor shape", "Type", "Format", "Zeros", "Bytes", "Note")
        ]
        for tensor in kernels:
            zeros = "?" if tensor.zeros is None else f"{tensor.zeros / tensor.elements:.1%}"
            shape = "x".join(map(str, tensor.shape))
            note = f"[{sentences.index(tensor.exploited) + 1}]" if tensor.exploited else ""
            rows.append(
                (
                    *(str(tensor.kernel), shape, tensor.dtype, tensor.format),
                    *(zeros, f"{tensor.bytes:,}", note),
                )
            )
        if not sentences:
            rows = [row[:-1] for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        print_fn(f"{self.path} (quantization: {self.quantization})")
        print_fn(rule)
        for number, row in enumerate(rows):
            left = (cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True))
            right = (cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True))
            print_fn("  ".join([*left, *right]).rstrip())
            if number == 0:
                print_fn(rule)
        print_fn(rule)
        for number, sentence in enumerate(sentences, 1):
            print_fn(f"[{number}] {sentence}")
        print_fn(f"File: {self.tflite_bytes:,} bytes ({self.gzip_bytes:,} after gzip)")
        print_fn(f"Batch size: {'any' if self.batch_size is None else self.batch_size}")
        print_fn(
            f"Largest difference to Keras: {self.max_abs_difference:.3g} of an output range of "
            f"{self.output_range:.3g} (allowed: {self.tolerance:g} of it)"
        )
        if self.top1_agreement is not None:
            print_fn(f"Same top-1 as Keras: {self.top1_agreement:.1%}")
        if self.scores is not None:
            print_fn(
                f"On the test data: {self.scores['metric']} {self.scores['tflite']:.4f}, Keras "
                f"{self.scores['keras']:.4f}"
            )
        if self.sparse_inference is not None:
            skipped = "zeros are skipped" if self.sparse_inference else "no zeros are skipped"
            print_fn(f"Sparse inference on ARM: {skipped}")
        for note in self.notes:
            print_fn(f"Note: {note}")


def tensor_reports(
    tensors: Sequence[FlatTensor],
    matches: Mapping[str, Sequence[MatchedTensor]],
    model: FlatModel | None = None,
) -> tuple[TensorReport, ...]:
    """Describes the constants of a file, largest first.

    Matches are the tensors that hold the model's kernels, by path. From the model, the file's
    content, it is told what the kernels will exploit.
    """
    kernel_use = None if model is None else KernelUse(model)
    held = {id(match.tensor): name for name, found in matches.items() for match in found}
    reports = []
    for tensor in tensors:
        if not tensor.constant:
            continue
        reports.append(
            TensorReport(
                name=tensor.name,
                kernel=held.get(id(tensor)),
                shape=tensor.shape,
                dtype=tensor.dtype,
                elements=tensor.elements,
                zeros=tensor.zeros,
                bytes=tensor.stored_bytes + tensor.index_bytes,
                format=tensor.format,
                exploited="" if kernel_use is None else kernel_use.sentence(tensor),
            )
        )
    return tuple(sorted(reports, key=lambda report: -report.bytes))
