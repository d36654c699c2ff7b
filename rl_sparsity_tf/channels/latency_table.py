"""How long every layer of a model takes at which widths, and so any narrower model as a whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.channels.widths import LayerWidths, Width
from rl_sparsity_tf.console import printing
from rl_sparsity_tf.errors import ArgumentError, check_choice, did_you_mean
from rl_sparsity_tf.files import as_file, check_new_file, parse_strict, write_text
from rl_sparsity_tf.keras3.door import takes_keras_3

FORMAT_VERSION = 1
QUANTIZATIONS = ("none", "int8", "plan")
_WHAT = "a latency table"
# Every width up to a layer's own is looked up in a list.
_WIDEST = 2**22
_LARGEST = float(np.finfo(np.float64).max)
_FIELDS = frozenset(
    "format_version device quantization threads xnnpack overhead_ms spread layers".split()
)
_LAYER_FIELDS = frozenset("kind inputs outputs ms spread".split())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerLatency:
    """The times of one layer, with what runs in its operator.

    Attributes:
        kind: The layers, their settings and the sizes of their input.
        inputs: Widths of the input, increasing; the last is the dense one.
        outputs: Widths of the output, increasing. A layer whose output follows from its input, such
            as a pooling, has the dense width alone.
        ms: Milliseconds by input and output width.
        spread: Interquartile range over median of the samples, the median over the widths.
    """

    kind: str
    inputs: np.ndarray
    outputs: np.ndarray
    ms: np.ndarray
    spread: float = 0.0

    def __post_init__(self) -> None:
        _check_text("kind", self.kind)
        for name in ("inputs", "outputs"):
            widths = _array(name, getattr(self, name), 1)
            wrong = (widths % 1).any() or (np.diff(widths, prepend=0) < 1).any()
            if wrong or widths[-1] > _WIDEST:
                raise ArgumentError(
                    f"{name}={widths.tolist()} cannot be used. Expected the widths as increasing "
                    f"whole numbers of at least 1 and at most {_WIDEST:,}."
                )
            object.__setattr__(self, name, _read_only(widths.astype(np.int64)))
        ms = _array("ms", self.ms, 2)
        expected = (len(self.inputs), len(self.outputs))
        if ms.shape != expected or (ms < 0).any():
            raise ArgumentError(
                f"ms has the shape {ms.shape} and its smallest entry is "
                f"{ms.min(initial=math.inf):g}. Expected milliseconds of at least 0 in the shape "
                f"{expected}: a row for every input width, a column for every output width."
            )
        object.__setattr__(self, "ms", _read_only(ms))
        _check_number("spread", self.spread)

    @functools.cached_property
    def _places(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return _interpolation(self.inputs), _interpolation(self.outputs)

    def at(self, inputs: Any, outputs: Any) -> np.ndarray:
        """Milliseconds at the widths given, which are integers or arrays of them."""
        (low, share), (left, part) = self._places
        try:
            if np.min(inputs, initial=1) < 1:  # would be looked up from the end
                raise IndexError(inputs)
            i, a = low[inputs], share[inputs]
            if len(self.outputs) == 1:
                times = self.ms[:, 0]
                return times[i] + a * (times[np.minimum(i + 1, len(times) - 1)] - times[i])
            o, b = left[outputs], part[outputs]
        except IndexError as error:
            raise ArgumentError(
                f"Widths {_extremes(inputs)} -> {_extremes(outputs)} cannot be looked up. Expected "
                f"whole numbers from 1 to {self.inputs[-1]} -> 1 to {self.outputs[-1]}, the dense "
                "widths."
            ) from error
        below = np.minimum(i + 1, len(self.inputs) - 1)
        right = np.minimum(o + 1, len(self.outputs) - 1)
        first = self.ms[i, o] + b * (self.ms[i, right] - self.ms[i, o])
        second = self.ms[below, o] + b * (self.ms[below, right] - self.ms[below, o])
        return first + a * (second - first)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatencyTable:
    """Times of a model's layers on one device, for narrower versions of the model.

    Attributes:
        device: Where they were measured, in words.
        quantization: `"none"`, `"int8"`, or `"plan"` for int8 weights that are restored on loading.
        threads: Threads of the interpreter.
        xnnpack: Whether XNNPACK was used.
        layers: The layers' times by path (see [widths_of][rl_sparsity_tf.widths_of]).
        overhead_ms: Milliseconds per call that no layer accounts for.
        spread: Interquartile range over median of the dense model's samples.

    Example:
        >>> table = rls.LatencyTable.load("phone.json")
        >>> small = rls.shrink(rls.mask_channels(model, {0: [True, False] * 8}))
        >>> table.predict(rls.widths_of(small)) < table.predict(rls.widths_of(model))
        True
    """

    device: str
    quantization: str
    threads: int
    xnnpack: bool
    layers: Mapping[str, LayerLatency]
    overhead_ms: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        _check_text("device", self.device)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if not isinstance(self.xnnpack, bool):
            raise ArgumentError(f"xnnpack={self.xnnpack!r} cannot be used. Expected true or false.")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ArgumentError(f"threads={self.threads!r} cannot be used. Expected 1 or more.")
        for name in ("overhead_ms", "spread"):
            _check_number(name, getattr(self, name))
        if not self.layers:
            raise ArgumentError("layers is empty. Expected the times of every layer of a model.")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def layer_ms(self, path: str, inputs: Any, outputs: Any) -> np.ndarray:
        """The times of one layer at many widths.

        Args:
            path: The layer's path.
            inputs: Channels that go in: whole numbers, 1 to the dense width.
            outputs: Channels that come out; looked at where they do not follow from the input's.

        Returns:
            Milliseconds, linear between the widths that were measured, those above and below the
            steps in which channels cost time.

        Raises:
            ArgumentError: If there is no such layer or no such width.
        """
        layer = self.layers.get(path)
        if layer is None:
            raise ArgumentError(
                f"The latency table has no layer {path!r}. {did_you_mean(path, self.layers)}"
            )
        return layer.at(np.asarray(inputs), np.asarray(outputs))

    def predict(self, widths: Mapping[str, Width]) -> float:
        """Milliseconds per call of a model of these widths.

        Args:
            widths: The widths of all layers of the table.

        Raises:
            ArgumentError: If the layers or widths are not those of the table.
        """
        self._check_paths(widths)
        times = [self.layer_ms(path, w.inputs, w.outputs) for path, w in widths.items()]
        return self.overhead_ms + float(np.sum(times))

    @takes_keras_3
    def check(self, model: keras.Model) -> None:
        """Raises unless the table is one of this model.

        Args:
            model: The dense model.

        Raises:
            ArgumentError: Naming the first layer that differs.
            ModelError: If the model has no graph or an input of open size.
        """
        chains = LayerWidths(model).chains
        self._check_paths([chain.path for chain in chains])
        for chain in chains:
            layer, width = self.layers[chain.path], chain.width
            dense = Width(int(layer.inputs[-1]), int(layer.outputs[-1]))
            if layer.kind != chain.kind or dense != width:
                raise ArgumentError(
                    f"The latency table has {chain.path!r} as {layer.kind}, {dense.inputs} -> "
                    f"{dense.outputs} channels; in model {model.name!r} it is {chain.kind}, "
                    f"{width.inputs} -> {width.outputs}. Expected a table of this model: measure "
                    "one with measure_latency(model)."
                )

    def _check_paths(self, paths: Iterable[str]) -> None:
        given = list(paths)
        missing = [path for path in given if path not in self.layers]
        over = [path for path in self.layers if path not in set(given)]
        if missing or over:
            first, where = (missing[0], "the model") if missing else (over[0], "the latency table")
            other = "the latency table" if missing else "the model"
            raise ArgumentError(
                f"The layer {first!r} of {where} is not in {other}. Expected a table of this "
                "model: measure one with measure_latency(model)."
            )

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values, format 1."""
        return {
            "format_version": FORMAT_VERSION,
            "device": self.device,
            "quantization": self.quantization,
            "threads": self.threads,
            "xnnpack": self.xnnpack,
            "overhead_ms": self.overhead_ms,
            "spread": self.spread,
            "layers": {
                path: {
                    "kind": layer.kind,
                    "inputs": layer.inputs.tolist(),
                    "outputs": layer.outputs.tolist(),
                    "ms": layer.ms.tolist(),
                    "spread": layer.spread,
                }
                for path, layer in self.layers.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Any) -> LatencyTable:
        """Makes a table of what [to_dict][] returned.

        Raises:
            ArgumentError: If it is not that.
        """
        _check_fields(_WHAT, values, _FIELDS)
        version = values["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ArgumentError(
                f"The latency table has format_version {version!r}. Expected {FORMAT_VERSION}: "
                "measure it again, or update rl_sparsity_tf."
            )
        if not isinstance(values["layers"], dict):
            raise ArgumentError(
                f"layers is a {type(values['layers']).__name__}. Expected an object with an entry "
                "per layer."
            )
        layers = {}
        for path, entry in values["layers"].items():
            _check_fields(f"layer {path!r} of a latency table", entry, _LAYER_FIELDS)
            try:
                layers[path] = LayerLatency(**entry)
            except ArgumentError as error:
                raise ArgumentError(f"Layer {path!r} of the latency table: {error}") from error
        rest = {name: values[name] for name in _FIELDS - {"format_version", "layers"}}
        return cls(layers=layers, **rest)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the table as JSON.

        Args:
            path: The file to write.
            overwrite: Whether a file there may be replaced.

        Raises:
            ArgumentError: If the folder is missing.
            FileExistsRLSparsityError: If the file exists and `overwrite` is false.
        """
        write_text(check_new_file(path, overwrite), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads a table that [save][] wrote, here or on another device.

        Raises:
            ArgumentError: If there is no such file, or it is no latency table.

        Example:
            >>> table = rls.LatencyTable.load("phone.json")
            >>> table.check(model)
        """
        file: Path = as_file("path", path, "the path of a latency table's JSON file")
        try:
            values = parse_strict(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArgumentError(
                f"The latency table {str(path)!r} cannot be read ({error}). Expected a JSON file "
                "written by LatencyTable.save."
            ) from error
        try:
            return cls.from_dict(values)
        except ArgumentError as error:
            raise ArgumentError(f"{str(path)!r}: {error}") from error

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints the dense times of all layers.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        width = max(len(path) for path in (*self.layers, "overhead"))
        for path, layer in self.layers.items():
            print_fn(f"{path.ljust(width)}  {layer.ms[-1, -1]:9.4f} ms  {layer.kind}")
        print_fn(f"{'overhead'.ljust(width)}  {self.overhead_ms:9.4f} ms")
        print_fn(
            f"{self.device}; {self.quantization}, {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}, XNNPACK {'on' if self.xnnpack else 'off'}; "
            f"spread of the dense model {self.spread:.0%}"
        )


def _interpolation(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every whole width the grid point below and the share of the way to the next."""
    widths = np.arange(grid[-1] + 1)
    low = np.clip(np.searchsorted(grid, widths, side="right") - 1, 0, max(len(grid) - 2, 0))
    high = np.minimum(low + 1, len(grid) - 1)
    # Below the first point the time is that of the first point.
    step = np.maximum(grid[high] - grid[low], 1)
    return low, np.clip((widths - grid[low]) / step, 0.0, 1.0)


def _check_fields(what: str, values: Any, expected: frozenset[str]) -> None:
    found = set(values) if isinstance(values, dict) else type(values).__name__
    if found != expected:
        shown = sorted(found) if isinstance(found, set) else found
        raise ArgumentError(
            f"This is not {what}: it is or has {shown}. Expected an object with exactly "
            f"{sorted(expected)}, as LatencyTable.save writes it."
        )


def _array(name: str, values: Any, rank: int) -> np.ndarray:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.ndim != rank or not array.size or not np.isfinite(array).all():
        raise ArgumentError(
            f"{name} cannot be used. Expected finite numbers in a list"
            f"{' of equally long lists' if rank > 1 else ''} that is not empty."
        )
    return array


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected a description.")


def _check_number(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite: it fails on integers that no float can hold.
    if not number or not 0 <= value <= _LARGEST:
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected a number of at least 0.")


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _extremes(values: Sequence[int] | np.ndarray) -> str:
    array = np.asarray(values)
    return f"{array.min()} to {array.max()}" if array.ndim else str(array)
