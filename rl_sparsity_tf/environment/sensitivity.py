"""How much every layer minds being pruned and quantized, alone: before any search."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.dynamic_programming import layer_problems
from rl_sparsity_tf.allocation.layer_errors import (
    FLOAT,
    KernelErrors,
    kernel_errors,
    most_salient,
)
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.checks import check_flag, is_number
from rl_sparsity_tf.console import fitted_lines, printing, without_traces
from rl_sparsity_tf.data.batches import evaluation_data, sample_rows, training_data
from rl_sparsity_tf.data.forms import as_rows
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import ArgumentError, DataError, MissingDependencyError
from rl_sparsity_tf.export.verification import check_repeatable
from rl_sparsity_tf.files import check_new_file, write_text
from rl_sparsity_tf.layers.kernel_spec import has_int4
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.rules import Patterns
from rl_sparsity_tf.layers.structure import fixed_batch
from rl_sparsity_tf.training.layer_problem import LayerProblem

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
"""Shares of a kernel's groups that live, by default."""

# Within reach of every model: nothing is asked for.
_ANY = 1e-12
_ROWS, _BATCH = 2000, 128
_WIDTH = 150


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What one kernel loses at one density and precision, the rest of the network being dense.

    Attributes:
        kernel: The kernel's path.
        weights: How many weights it has.
        density: The share of its groups that was to live.
        live: How many of its weights do.
        bits: 32, 8 or 4 per living weight.
        error: Energy of the change of the layer's outputs after the closed-form fit, over that of
            the outputs: 0 for no change, and 1 as if all were pruned. Of the weights where `fitted`
            is false.
        fitted: Whether the layer could be fitted: dense, convolutional and depthwise ones.
        metric: The validation metric of the network with this kernel alone changed; None without
            `evaluate`.
    """

    kernel: str
    weights: int
    density: float
    live: int
    bits: int
    error: float
    fitted: bool
    metric: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What [sensitivity][rl_sparsity_tf.sensitivity] has measured.

    Attributes:
        rows: One per kernel, precision and density, in the model's order; dense first.
        metric: Name of the validation metric; None if it was not measured.
        dense_metric: The dense network's, on the same rows; None if it was not measured.

    Example:
        >>> found = rls.sensitivity(model, (x, y), densities=(0.5, 0.1), bits=(32,))
        >>> len(found.rows), found.rows[0].kernel, found.rows[0].density
        (6, 'conv/kernel', 0.5)
        >>> found.rows[0].error < found.rows[1].error
        True
    """

    rows: tuple[LayerSensitivity, ...]
    metric: str | None = None
    dense_metric: float | None = None

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints a table for every precision: kernels down, densities across.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        for lines in self._tables():
            for line in lines:
                print_fn(line)
        if not all(row.fitted for row in self.rows):
            print_fn("* not fitted: the share of the energy of its weights")
        if self.metric is not None:
            print_fn(f"{self.metric} of the dense network: {self.dense_metric:.4f}")

    def to_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes all rows to a file, under the names of their attributes.

        Args:
            path: The file.
            overwrite: Whether a file that is there is replaced.

        Raises:
            ArgumentError: If the path cannot be used.
            FileError: If the file cannot be written.
            RLSparsityError: If it exists, and `overwrite` is not given.

        Example:
            >>> rls.sensitivity(model, (x, y)).to_csv("sensitivity.csv")
        """
        check_flag("overwrite", overwrite)
        target = check_new_file(path, overwrite)
        names = [field.name for field in dataclasses.fields(LayerSensitivity)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            values = [getattr(row, name) for name in names]
            writer.writerow(["" if value is None else value for value in values])
        write_text(target, text.getvalue())

    def plot(self, ax: Any = None) -> Any:
        """Draws the error of every kernel over its density, a line per kernel and precision.

        Args:
            ax: Axes of matplotlib to draw on; by default new ones.

        Returns:
            The axes.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        if ax is None:
            ax = _new_axes()
        styles = {FLOAT: "-", 8: "--", 4: ":"}
        for (kernel, bits), rows in self._lines().items():
            name = kernel if bits == FLOAT else f"{kernel}, {bits} bits"
            densities, errors = [row.live / row.weights for row in rows], [r.error for r in rows]
            ax.plot(densities, errors, styles[bits], label=name)
        ax.set_xscale("log")
        ax.set_xlabel("share of the kernel's weights that live")
        ax.set_ylabel("error of the layer's outputs")
        ax.legend()
        return ax

    def _lines(self) -> dict[tuple[str, int], list[LayerSensitivity]]:
        found: dict[tuple[str, int], list[LayerSensitivity]] = {}
        for row in self.rows:
            found.setdefault((row.kernel, row.bits), []).append(row)
        return found

    def _tables(self) -> Iterator[list[str]]:
        for bits in sorted({row.bits for row in self.rows}, reverse=True):
            lines = {k: rows for (k, b), rows in self._lines().items() if b == bits}
            stored = "floats" if bits == FLOAT else f"{bits} bits"
            yield _table(f"Error of the outputs, {stored}", lines, lambda row: f"{row.error:.2g}")
            if self.metric is not None:
                title = f"{self.metric} with one kernel changed, {stored}"
                yield _table(title, lines, lambda row: f"{row.metric:.4f}")


@without_traces()
def sensitivity(
    model: keras.Model,
    data: Any,
    validation_data: Any = None,
    *,
    densities: Sequence[float] = DENSITIES,
    bits: Sequence[int] = (FLOAT, 8),
    group: str = "element",
    evaluate: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> Sensitivity:
    """Measures what every layer loses when it alone is pruned and quantized.

    The errors are those that the search and `rls.baselines.dynamic_programming` use: a kernel is
    pruned to a density, what lives is fitted in closed form to give back the dense layer's outputs
    on the training data, and the change that is left is measured. Nothing is trained; it takes
    seconds for small networks. Within a kernel the groups are ranked by magnitude or by what they
    add to the outputs, whichever fits better at the least density.

    A layer's error says nothing of what the layers behind it make of it. With `evaluate` every row
    is put into the network, with the fit and all other layers dense, and evaluated once: one
    evaluation per row.

    Args:
        model: A built model of Keras 3 or `tf_keras`; compiled, with `evaluate`. It is not changed.
        data: Training data as `fit` takes it.
        validation_data: What `evaluate` evaluates on, up to 2,000 rows of it.
        densities: Shares of a kernel's groups that live, above 0 and at most 1. At least one group
            lives.
        bits: Precisions: 32 for floats, 8, 4. Kernels that TFLite cannot hold as such integers have
            no rows of them.
        group: The unit that is pruned: `"element"`, `"block4"`, `"block16"`, `"channel"`.
        evaluate: Whether the validation metric is measured, too.
        include: What alone is measured, see [baselines][rl_sparsity_tf.baselines].
        exclude: What is left out.

    Returns:
        The rows, which can be printed, written and drawn.

    Raises:
        ArgumentError: If an argument cannot be used.
        DataError: If data is missing, or does not fit the model.
        ModelError: If the model has nothing to compress, is wrapped, or holds NaN; with `evaluate`,
            if it is not compiled.

    Example:
        >>> found = rls.sensitivity(model, (x, y), (x_val, y_val), evaluate=True)
        >>> found.summary()
        Error of the outputs, floats
        ...
        accuracy of the dense network: ...
    """
    request = PlanRequest.of(model, sparsity=_ANY, group=group, include=include, exclude=exclude)
    shares, precisions = _densities(densities), _bits(bits)
    check_flag("evaluate", evaluate)
    _check_data(data, validation_data, evaluate)
    if not evaluate:
        rows = _rows(_Pieces.of_request(request, data), shares, precisions)
        return Sensitivity(rows=tuple(row for row, _ in rows))
    return _evaluated(request, data, validation_data, shares, precisions)


# ------------------------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pieces:
    """What errors are measured of."""

    kernels: Sequence[Kernel]
    storage: Storage
    originals: Mapping[str, np.ndarray]
    problems: Mapping[str, LayerProblem]

    @classmethod
    def of_request(cls, request: PlanRequest, data: Any) -> _Pieces:
        return cls(
            kernels=request.kernels,
            storage=request.storage,
            originals=request.originals,
            problems=layer_problems(request, data),
        )


def _rows(
    pieces: _Pieces, shares: Sequence[float], precisions: Sequence[int]
) -> Iterator[tuple[LayerSensitivity, np.ndarray]]:
    """The rows without metrics, each with the groups that live."""
    for kernel in pieces.kernels:
        grouping, problem = pieces.storage.grouping(kernel), pieces.problems.get(kernel.path)
        counts = {share: max(1, round(share * grouping.count)) for share in shares}
        levels = sorted(set(counts.values()))
        able = [one for one in precisions if _storable(kernel, one)]
        found: KernelErrors = kernel_errors(
            pieces.originals[kernel.path],
            grouping,
            kernel.spec,
            problem,
            bits=able,
            density=min(shares),
            counts=levels,
        )
        for bits in able:
            for share, count in counts.items():
                at = levels.index(count)
                row = LayerSensitivity(
                    kernel=kernel.path,
                    weights=kernel.size,
                    density=share,
                    live=int(found.live[at]),
                    bits=bits,
                    error=float(found.errors[bits][at]),
                    fitted=problem is not None,
                )
                yield row, most_salient(found.saliency, count)


def _storable(kernel: Kernel, bits: int) -> bool:
    if bits == FLOAT:
        return True
    return kernel.spec.exports_int8 and (bits == 8 or has_int4(kernel.spec.kind))


def _evaluated(
    request: PlanRequest,
    data: Any,
    validation_data: Any,
    shares: Sequence[float],
    precisions: Sequence[int],
) -> Sensitivity:
    model = request.model
    rows, batch_size = as_rows(data, "train", _BATCH)
    train = training_data(rows, model, batch_size=batch_size)
    check_repeatable(model, train.pool[0][0])
    validation = evaluation_data(validation_data, model, "validation_data")
    validation = sample_rows(validation, _ROWS, seed=0, fixed=fixed_batch(model))
    networks: dict[int, CompressedNetwork] = {}

    def network_of(bits: int) -> CompressedNetwork:
        # Integers of another number of bits are another storage, and so another network.
        grid = 4 if bits == 4 else 8
        if grid not in networks:
            networks[grid] = CompressedNetwork(
                model,
                train,
                validation,
                target=request.target,
                decisions=KernelDecisions(
                    Storage(request.group, default_bits=grid), selection=request.selection
                ),
                like=next(iter(networks.values()), None),
            )
        return networks[grid]

    found = [
        dataclasses.replace(row, metric=_metric(network_of(row.bits), row, live))
        for row, live in _rows(_Pieces.of_request(request, data), shares, precisions)
    ]
    network = next(iter(networks.values()))
    return Sensitivity(
        rows=tuple(found),
        metric=network.metric.name,
        dense_metric=float(network.dense.metric),
    )


def _metric(network: CompressedNetwork, row: LayerSensitivity, live: np.ndarray) -> float:
    """The metric of the network in which one kernel is changed, fitted where that is possible."""
    stays = Operation.KEEP if row.bits == FLOAT else Operation.QUANTIZE
    network.reset()
    network.assign(row.kernel, np.where(live, stays, Operation.PRUNE).astype(np.uint8))
    return float(network.finish(evaluated=False).metric)


# ----------------------------------------------------------------------- arguments, tables


def _densities(densities: Sequence[float]) -> list[float]:
    given = list(densities) if isinstance(densities, Sequence | np.ndarray) else [densities]
    right = bool(given) and all(is_number(one) and 0.0 < one <= 1.0 for one in given)
    if isinstance(densities, str) or not right:
        raise ArgumentError(
            f"densities={densities!r} cannot be used. Expected numbers above 0 and at most 1, the "
            "shares of a kernel that live, such as (1.0, 0.5, 0.1)."
        )
    return sorted({float(one) for one in given}, reverse=True)


def _bits(bits: Sequence[int]) -> list[int]:
    given = list(bits) if isinstance(bits, Sequence | np.ndarray) else [bits]
    if isinstance(bits, str) or not given or not all(one in (FLOAT, 8, 4) for one in given):
        raise ArgumentError(
            f"bits={bits!r} cannot be used. Expected some of 32, 8 and 4, such as (32, 8)."
        )
    return sorted({int(one) for one in given}, reverse=True)


def _check_data(data: Any, validation_data: Any, evaluate: bool) -> None:
    if data is None:
        raise DataError(
            "sensitivity was given no data, which it measures the layers' outputs on. Pass "
            "data=(x, y) or a dataset as fit takes it."
        )
    if evaluate and validation_data is None:
        raise DataError(
            "sensitivity(evaluate=True) was given no validation_data, which the metric is measured "
            "on. Pass validation_data=(x, y), or leave evaluate out."
        )
    if validation_data is not None and not evaluate:
        raise ArgumentError(
            "validation_data was given, and evaluate=True was not, without which nothing is "
            "evaluated. Pass both, or neither."
        )


def _table(
    title: str,
    lines: Mapping[str, Sequence[LayerSensitivity]],
    shown: Callable[[LayerSensitivity], str],
) -> list[str]:
    titles = [f"{row.density:g}" for row in next(iter(lines.values()))]
    cells = [
        [
            kernel if rows[0].fitted else f"{kernel} *",
            f"{rows[0].weights:,}",
            *(shown(row) for row in rows),
        ]
        for kernel, rows in lines.items()
    ]
    columns = ["kernel", "weights", *titles]
    return fitted_lines(title, columns, cells, right=columns[1:], spare=["weights"], width=_WIDTH)


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError(
            "Sensitivity.plot draws with matplotlib, which is not installed. Install it with: pip "
            'install "rl_sparsity_tf[plots]". summary() and to_csv() do without.'
        ) from error
    return pyplot.subplots()[1]
