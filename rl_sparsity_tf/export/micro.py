"""Exports a Keras model as a C header for TensorFlow Lite for Microcontrollers (TFLM)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.console import printing
from rl_sparsity_tf.errors import ArgumentError, ExportError, VerificationError
from rl_sparsity_tf.export.arguments import plain_model, sample_rows
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.export.micro_arena import estimate_arena
from rl_sparsity_tf.export.micro_header import MicroPort, check_name, check_operators, header_text
from rl_sparsity_tf.export.micro_runtime import TflmError, measure_arena, run_tflm, tflm_installed
from rl_sparsity_tf.export.recurrent import can_unroll, looping_layers, names_of, stateless
from rl_sparsity_tf.export.report import ExportReport
from rl_sparsity_tf.export.saved_model import in_float32, reference_outputs
from rl_sparsity_tf.export.verification import TOLERANCES, compare_outputs
from rl_sparsity_tf.files import check_new_file, scratch_folder, write_text
from rl_sparsity_tf.layers.structure import input_specs
from rl_sparsity_tf.tflite.reading import FlatModel, read_flat_model
from rl_sparsity_tf.tflite.worker import shared_worker
from rl_sparsity_tf.tflite.worker_process import TflmMissingError


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

    Example:
        >>> report = rls.export_micro(model, "digits.h", x[:100])
        >>> report.agreement  # share of outputs that are the same integer in TFLM
        1.0
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


# TFLM's reference kernels are slow, and each row goes through all of them.
_COMPARED_ROWS = 16
_ROOMY = 4
_ROOM = 65536


def export_micro(
    model: Any,
    path: str | os.PathLike[str],
    representative_data: Any,
    *,
    name: str = "model",
    overwrite: bool = False,
    test_data: Any = None,
    tolerance: float | None = None,
    unroll: bool = False,
    stateful: bool = False,
) -> MicroReport:
    """Writes a model as a C header for TensorFlow Lite for Microcontrollers.

    The model is exported as [export_tflite][rl_sparsity_tf.export_tflite] does with
    `"int8"` and batch size 1, and verified against Keras: weights, activations, inputs and outputs
    are int8, all tensors are dense. Pruned weights take as much flash as others here; to gain from
    them pass the output of `shrink`. If the package `tflite-micro` is installed, the file also runs
    in TFLM's own interpreter: its outputs are compared with LiteRT's, and the smallest arena it
    runs in is measured. Otherwise the arena is estimated from the lifetimes of the tensors.

    The arena is that of TFLM's reference kernels on a 64-bit machine. A microcontroller's pointers
    are half as long, but optimized kernels such as CMSIS-NN ask for memory on top: reserve more,
    look at `interpreter.arena_used_bytes()` on the device, and cut it back.

    Args:
        model: A built model of Keras 3 or `tf_keras`, plain or wrapped, or an object with
            attributes `model` and `plan` such as a search result.
        path: The header to write, ending in .h.
        representative_data: Inputs like those the model will see, to find the range of every
            activation: an array, a tuple with one array per input, an iterable of batches, or a
            function that yields batches, such as TFLite's `representative_dataset`.
        name: Prefix of everything the header defines: the array `<name>`, `<name>_len`,
            `<name>_arena_bytes`, `<name>_input_scale`, `<NAME>_ADD_OPERATORS(resolver)`, ...
        overwrite: Whether a file at `path` may be replaced.
        test_data: Data as `evaluate` takes it, `(x, y)`, to compare the metric on.
        tolerance: Largest allowed difference to Keras, as in `export_tflite`.
        unroll: Writes recurrent layers step by step, which GRU layers need.
        stateful: Lets LSTM layers keep their state between calls, for sequences that come in
            pieces; `interpreter.Reset()` begins a new one. By default every call starts from zero.

    Returns:
        The sizes, the arena, the operators and the agreement.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model is not a built Keras model.
        DataError: If the representative data does not fit the model.
        FileExistsRLSparsityError: If the file exists and `overwrite` is false.
        ExportError: If the model cannot be int8, or TFLM lacks an operator.
        VerificationError: If the file does not do what the model does, or TFLM does something else
            with it; nothing is written.

    Example:
        >>> report = rls.export_micro(model, "digits.h", x[:100], name="digits")
        >>> report.summary()
        digits.h: digits[], int8, batch size 1
        Model: ... bytes of flash
        Arena: ... bytes of RAM (...)
        ...
    """
    target = check_new_file(path, overwrite)
    if target.suffix != ".h":
        raise ArgumentError(
            f"path={str(path)!r} ends in {target.suffix!r}. Expected the name of a C header, "
            "ending in '.h'."
        )
    check_name(name)
    if representative_data is None:
        raise ArgumentError(
            "representative_data=None cannot be used: int8 needs it to find the range of every "
            "activation. Pass some hundred rows of training inputs."
        )
    plain, _ = plain_model(model, None)
    _check_batch(plain)
    rows, calibration = sample_rows(plain, representative_data)
    with scratch_folder() as folder:
        file = folder / "model.tflite"
        try:
            report = export_tflite(
                plain,
                file,
                "int8",
                representative_data=tuple(calibration or ()),
                test_data=test_data,
                tolerance=tolerance,
                batch_size=1,
                unroll=unroll,
                stateful=stateful,
            )
        except VerificationError:
            raise
        except ExportError as error:
            raise _not_int8(plain, unroll, error) from error
        flat, content = read_flat_model(file), file.read_bytes()
        operators = check_operators(plain.name, flat)
        inputs, outputs = _model_ports(flat)
        estimate = estimate_arena(flat)
        notes = _notes(flat, inputs, report, stateful)
        arena, version, agreement, largest = _run(
            file, plain, rows, inputs, outputs, estimate, tolerance, notes, stateful
        )
    basis = (
        f"{arena:,} bytes, the least that tflite-micro {version} runs in with its reference "
        "kernels on a 64-bit machine."
        if version
        else f"{arena:,} bytes, estimated from the lifetimes of the tensors and the structures of "
        "TFLM's reference kernels; not measured."
    ) + " Optimized kernels ask for more: see interpreter.arena_used_bytes() on the device."
    text = header_text(
        name,
        content,
        model=plain.name,
        arena_bytes=arena,
        arena_basis=basis,
        operators=operators,
        inputs=inputs,
        outputs=outputs,
        notes=notes,
    )
    write_text(target, text)
    return MicroReport(
        path=str(target),
        name=name,
        tflite_bytes=len(content),
        arena_bytes=arena,
        arena_measured=bool(version),
        arena_estimate=estimate,
        operators=operators,
        inputs=inputs,
        outputs=outputs,
        agreement=agreement,
        largest_step=largest,
        export=report,
        notes=tuple(notes),
    )


def _run(
    file: Path,
    model: keras.Model,
    rows: Sequence[np.ndarray],
    inputs: Sequence[MicroPort],
    outputs: Sequence[MicroPort],
    estimate: int,
    tolerance: float | None,
    notes: list[str],
    stateful: bool,
) -> tuple[int, str, float | None, int | None]:
    """Runs the file in TFLM if that is possible.

    It returns the arena, TFLM's version (empty if the arena is the estimate), the share of equal
    output values and their largest difference in steps.
    """
    lacking = "it is not installed"
    if tflm_installed():
        try:
            arena, version = measure_arena(file, _ROOMY * estimate + _ROOM)
            sample = [array[:_COMPARED_ROWS] for array in rows]
            stored = [_stored(sample[port.keras_index], port) for port in inputs]
            found = run_tflm(file, arena, stored, len(outputs), reset=stateful)
        except TflmMissingError as error:
            lacking = f"it could not be imported ({error})"
        except TflmError as error:
            raise VerificationError(
                f"Model {model.name!r} runs in LiteRT as int8, and TensorFlow Lite for "
                f"Microcontrollers does not take it: {error}. Nothing was written. Such a kernel "
                "may have no int8 form, or the representative data drives a layer's outputs to "
                "zero: replace the layer, or give representative_data like the training data."
            ) from error
        else:
            _verify(model, sample, found, outputs, tolerance)
            return arena, version, *_compare(file, sample, found, outputs, notes)
    notes.append(
        f"the file was not run in TFLM and the arena is an estimate, because tflite-micro: "
        f'{lacking}. pip install "rl_sparsity_tf[micro]" lets the next export measure it'
    )
    return estimate, "", None, None


def _verify(
    model: keras.Model,
    rows: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    outputs: Sequence[MicroPort],
    tolerance: float | None,
) -> None:
    """Holds what TFLM computed to the bound that the file was held to in LiteRT."""
    allowed = TOLERANCES["int8"]
    if tolerance is not None:
        allowed = dataclasses.replace(allowed, difference=tolerance, judge_difference=True)
    with in_float32(model) as (traced, _), stateless(traced):
        expected = reference_outputs(traced, rows, 1)
    by_keras = sorted(zip(outputs, found, strict=True), key=lambda pair: pair[0].keras_index)
    real = [_real(values, port) for port, values in by_keras]
    compare_outputs(real, expected, allowed, "in TFLM")


def _compare(
    file: Path,
    rows: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    outputs: Sequence[MicroPort],
    notes: list[str],
) -> tuple[float, int]:
    """The share of equal values of TFLM and LiteRT, and their largest difference."""
    real = shared_worker().run(file, rows, batch_size=1, xnnpack=False)
    steps = np.concatenate(
        [
            np.abs(values.astype(np.int64) - _stored(real[port.keras_index], port)).reshape(-1)
            for values, port in zip(found, outputs, strict=True)
        ]
    )
    largest = int(steps.max(initial=0))
    if largest > 1:
        notes.append(
            f"outputs of TFLM and LiteRT differ by up to {largest} integer steps, because they "
            "round differently inside the network"
        )
    return float(np.mean(steps == 0)), largest


def _model_ports(flat: FlatModel) -> tuple[tuple[MicroPort, ...], tuple[MicroPort, ...]]:
    """The inputs and outputs, which an export has in Keras's order."""
    both = []
    for indices in (flat.graphs[0].inputs, flat.graphs[0].outputs):
        ports = []
        for index, place in enumerate(indices):
            tensor = flat.tensor(0, place)
            ports.append(
                MicroPort(
                    index=index,
                    keras_index=index,
                    shape=tensor.shape,
                    dtype=tensor.dtype,
                    scale=float(tensor.scales[0]) if tensor.quantized else None,
                    zero_point=int(tensor.zero_points[0]) if tensor.quantized else None,
                )
            )
        both.append(tuple(ports))
    return both[0], both[1]


def _notes(
    flat: FlatModel, inputs: Sequence[MicroPort], report: ExportReport, stateful: bool
) -> list[str]:
    # What an interpreter of LiteRT calls its state has another name here.
    notes = [note for note in report.notes if "reset_all_variables" not in note]
    if stateful:
        notes.append(
            "recurrent layers keep their state between calls: call interpreter.Reset() before "
            "every sequence"
        )
    per_channel = any(
        operator.name == "FULLY_CONNECTED"
        and flat.tensor(operator.subgraph, operator.inputs[1]).scales.size > 1
        for operator in flat.operators
    )
    if per_channel:
        notes.append(
            "FULLY_CONNECTED has a scale per unit: sources of TFLM from before September 2024 "
            "refuse that, and those from before June 2024 compute wrongly without an error"
        )
    notes += [
        f"input {port.index} is {port.dtype}, not int8: it holds ids"
        for port in inputs
        if port.dtype != "int8"
    ]
    return notes


def _check_batch(model: keras.Model) -> None:
    fixed = sorted({spec.batch for spec in input_specs(model)} - {None, 1})  # type: ignore[type-var]
    if fixed:
        raise ArgumentError(
            f"Model {model.name!r} is built for batches of {fixed[0]}, and a microcontroller runs "
            "one row at a time. Build it with Input(shape=...), without a batch size, and copy the "
            "weights with set_weights."
        )


def _not_int8(model: keras.Model, unroll: bool, error: ExportError) -> ExportError:
    loops = [] if unroll else looping_layers(model)
    if loops:
        way = "Pass unroll=True, or replace" if can_unroll(model) else "Replace"
        return ExportError(
            f"Model {model.name!r} cannot be int8 throughout, as microcontrollers need: the loops "
            f"of its recurrent layers {names_of(loops)} have no integer form. {way} them, by "
            "Conv1D for example."
        )
    return ExportError(
        f"Model {model.name!r} cannot be int8 throughout, as microcontrollers need, so another "
        f"quantization is no way out: replace the layers that the converter refuses. {error}"
    )


def _stored(values: np.ndarray, port: MicroPort) -> np.ndarray:
    if port.scale is None or port.zero_point is None:
        return values.astype(port.dtype)
    limits = np.iinfo(port.dtype)
    steps = np.round(values / np.float32(port.scale)) + port.zero_point
    return np.clip(steps, limits.min, limits.max).astype(port.dtype)


def _real(values: np.ndarray, port: MicroPort) -> np.ndarray:
    if port.scale is None or port.zero_point is None:
        return values
    return (values.astype(np.float32) - port.zero_point) * np.float32(port.scale)
