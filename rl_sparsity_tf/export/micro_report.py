"""What an export for a microcontroller wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rl_sparsity_tf.export.micro_header import MicroPort
from rl_sparsity_tf.export.report import ExportReport
from rl_sparsity_tf.tables import printing


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroReport:
    """The result of [export_micro][rl_sparsity_tf.export_micro].

    Attributes:
        path: The header.
        name: Prefix of what it defines.
        tflite_bytes: Size of the model, i.e. of the array.
        arena_bytes: The arena that the header asks for.
        arena_measured: Whether TFLM was seen to need exactly that; else it is the estimate.
        arena_estimate: The estimate, also where it was measured.
        operators: TFLite's names of the operators, each once.
        inputs: The inputs in the order of the runtime.
        outputs: The outputs in the order of the runtime.
        agreement: Share of output values, on up to 16 sample rows, that are the same integer in
            TFLM and LiteRT; None if TFLM is not installed.
        largest_step: The largest difference between those integers; None likewise.
        export: How the .tflite file that the header holds agrees with the Keras model.
        notes: What was not done as asked, and what to see to on the device.
    """

    path: str
    name: str
    tflite_bytes: int
    arena_bytes: int
    arena_measured: bool
    arena_estimate: int
    operators: tuple[str, ...]
    inputs: tuple[MicroPort, ...]
    outputs: tuple[MicroPort, ...]
    agreement: float | None
    largest_step: int | None
    export: ExportReport
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for kind in ("inputs", "outputs"):
            ports = [dataclasses.asdict(port) for port in values[kind]]
            values[kind] = [port | {"shape": list(port["shape"])} for port in ports]
        values |= {"operators": list(self.operators), "notes": list(self.notes)}
        return values | {"export": self.export.to_dict()}

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints the sizes, the operators and the agreement.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        print_fn(f"{self.path}: {self.name}[], int8, batch size 1")
        print_fn(f"Model: {self.tflite_bytes:,} bytes of flash")
        how = "measured" if self.arena_measured else "estimated"
        beside = f"; estimate {self.arena_estimate:,}" if self.arena_measured else ""
        print_fn(f"Arena: {self.arena_bytes:,} bytes of RAM ({how}{beside})")
        print_fn(f"Operators: {', '.join(self.operators)}")
        for kind, ports in (("Input", self.inputs), ("Output", self.outputs)):
            for port in ports:
                shape = "x".join(map(str, port.shape))
                scaled = (
                    ""
                    if port.scale is None
                    else f", (value - {port.zero_point}) * {port.scale:.6g}"
                )
                print_fn(f"{kind} {port.index}: {port.dtype} {shape}{scaled}")
        if self.export.top1_agreement is not None:
            print_fn(f"Same top-1 as Keras: {self.export.top1_agreement:.1%}")
        if self.export.scores is not None:
            scores = self.export.scores
            print_fn(
                f"On the test data: {scores['metric']} {scores['tflite']:.4f}, Keras "
                f"{scores['keras']:.4f}"
            )
        if self.agreement is not None:
            print_fn(
                f"TFLM and LiteRT: {self.agreement:.1%} of the outputs equal, the others differ by "
                f"up to {self.largest_step}"
            )
        for note in self.notes:
            print_fn(f"Note: {note}")
