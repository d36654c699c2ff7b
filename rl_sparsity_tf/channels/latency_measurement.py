"""Measures a latency table: every layer by itself, at a grid of widths, in LiteRT.

The layers of many widths are converted side by side as one model, whose file is then taken apart:
what runs as one operator in the model runs as one in its piece. The costs of channels are steps, as
wide as the kernels' tiles, so that widths on both sides of a step are measured along each axis, and
a coarse grid between the axes. A few narrowed versions of the whole model say what a call costs
beside its layers, and by how much layers that run one after the other differ from layers that run
alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.channels.groups import find_groups
from rl_sparsity_tf.channels.latency_table import QUANTIZATIONS, LatencyTable, LayerLatency
from rl_sparsity_tf.channels.shrinking import shrink
from rl_sparsity_tf.channels.units import mask_channels
from rl_sparsity_tf.channels.widths import Chain, LayerWidths, Width, widths_of
from rl_sparsity_tf.checks import check_count, check_flag
from rl_sparsity_tf.errors import ExportError, NotMeasuredError, check_choice
from rl_sparsity_tf.export.arguments import check_ids, file_batch_size
from rl_sparsity_tf.export.export import convert_traced
from rl_sparsity_tf.export.recurrent import stateless
from rl_sparsity_tf.export.saved_model import in_float32
from rl_sparsity_tf.export.stored_weights import store_weights
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.structure import all_layers, input_specs, random_rows
from rl_sparsity_tf.tflite.editing import split_file
from rl_sparsity_tf.tflite.timing import LARGEST_SPREAD
from rl_sparsity_tf.tflite.worker import WorkerError, shared_worker

# Models converted at a time.
_BATCH = 100
_ROWS = 2
# Shares of the channels of the whole models that are timed beside the layers.
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.25)

# Prefix of names -> inputs and outputs.
Builder = Callable[[str], tuple[list[Any], list[Any]]]


def layer_model(chain: Chain, width: Width) -> Builder:
    """Builds a chain with other channels; the outputs of a tied one follow from its inputs."""
    outputs = width.outputs
    if chain.tied:
        outputs = math.ceil(chain.width.outputs * width.inputs / chain.width.inputs)
    return lambda prefix: chain.build(Width(width.inputs, outputs), prefix)


def whole_model(model: keras.Model) -> Builder:
    """Builds a model, whose weights will be others."""

    def build(prefix: str) -> tuple[list[Any], list[Any]]:
        flat = keras.Model(list(model.inputs), list(model.outputs), name=prefix)
        inputs = [keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in model.inputs]
        return inputs, tf.nest.flatten(flat(inputs))

    return build


def empty_model(prefix: str) -> tuple[list[Any], list[Any]]:
    """What a call costs whatever it does."""
    x = keras.Input((1,))
    return [x], [keras.layers.ReLU(name=prefix)(x)]


def narrowed(model: keras.Model) -> list[keras.Model]:
    """The model, and versions with a share of all channels that can be removed."""
    groups = [group for group in find_groups(model) if not group.frozen]
    models = []
    for share in _SHARES if groups else _SHARES[:1]:
        live = {g.index: np.arange(g.size) < math.ceil(share * g.size) for g in groups}
        models.append(shrink(mask_channels(model, live)))
    return models


@contextlib.contextmanager
def converted(
    builders: Sequence[Builder], batch_size: int | None, quantization: str
) -> Iterator[list[Path | None]]:
    """Files of the models that the builders build, in a folder that goes in the end.

    A model of which no operator is left has None in its place.
    """
    files: list[Path | None] = []
    with scratch_folder() as folder:
        for start in range(0, len(builders), _BATCH):
            part = folder / str(start)
            part.mkdir()
            some = builders[start : start + _BATCH]
            built = [build(f"piece_{number}") for number, build in enumerate(some)]
            ends = [
                [tensor for some in side for tensor in some] for side in zip(*built, strict=True)
            ]
            together = keras.Model(*ends, name="pieces")
            _set_weights(together)
            file = _convert(together, part, batch_size, quantization)
            files += split_file(file, [len(inputs) for inputs, _ in built])
        yield files


def _set_weights(model: keras.Model) -> None:
    """Gives a model random weights: none that the converter could leave out, and alive.

    What an int8 file computes must have a range, or LiteRT aborts; narrowed models may have none.
    """
    rng = np.random.default_rng(0)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if not weight.dtype.is_floating or not shape:
            continue
        if "variance" in weight.name or "gamma" in weight.name:
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            value = rng.uniform(-0.1, 0.1, shape)
        else:
            fan_in = math.prod(shape[:-2] if "depthwise" in weight.name else shape[:-1])
            value = rng.normal(0.0, math.sqrt(2 / fan_in), shape)
        weight.assign(value)


def _convert(model: keras.Model, folder: Path, batch_size: int | None, quantization: str) -> Path:
    with in_float32(model) as (traced, _), stateless(traced):
        rows = None
        if quantization == "int8":
            rows = random_rows(traced, input_specs(traced), (batch_size or 1) * _ROWS)
        file = convert_traced(traced, folder, batch_size, quantization, rows)
        if quantization != "plan":
            return file
        kernels = {kernel.path: kernel.value() for kernel in find_kernels(traced)}
    return store_weights(file, kernels, dict.fromkeys(kernels, 8)).file


_log = logging.getLogger(__name__)

# Channels are padded to a multiple of this or of a multiple of it, as far as was seen.
_TILE = 8
# One or two channels take longer than this many: kernels read and write four at a time.
_FEW = 3
# From this many tiles on steps matter less than their number would cost.
_TILES = 8
# Quartiles of fewer samples are noise.
_FEWEST_RUNS = 5
# Files timed in turns: all of them stay in memory.
_TOGETHER = 400


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Grid:
    """The widths at which a chain is timed, and those of its table."""

    chain: Chain
    inputs: list[int]
    outputs: list[int]
    coarse_inputs: list[int]
    coarse_outputs: list[int]

    def measured(self) -> list[Width]:
        """Widths on a coarse grid, and on a fine one along the two dense edges."""
        dense_in, dense_out = self.inputs[-1], self.outputs[-1]
        pairs = {(i, o) for i in self.coarse_inputs for o in self.coarse_outputs}
        pairs |= {(i, dense_out) for i in self.inputs} | {(dense_in, o) for o in self.outputs}
        return [Width(i, o) for i, o in sorted(pairs)]

    def latency(self, times: Mapping[tuple[str, Width], tuple[float, float]]) -> LayerLatency:
        """The chain's entry of the table, from times and spreads by signature and width."""
        known = {width: times[self.chain.signature, width] for width in self.measured()}
        return LayerLatency(
            kind=self.chain.kind,
            inputs=np.array(self.inputs),
            outputs=np.array(self.outputs),
            ms=self.filled({width: ms for width, (ms, _) in known.items()}),
            spread=float(np.median([spread for _, spread in known.values()])),
        )

    def filled(self, times: Mapping[Width, float]) -> np.ndarray:
        """Times on the whole grid: between coarse points the steps are those of the dense edge."""
        dense_in, dense_out = self.inputs[-1], self.outputs[-1]
        rows = [times[Width(i, dense_out)] for i in self.inputs]
        columns = [times[Width(dense_in, o)] for o in self.outputs]
        low, share = _warped(self.inputs, self.coarse_inputs, rows)
        left, part = _warped(self.outputs, self.coarse_outputs, columns)
        coarse = np.array(
            [[times[Width(i, o)] for o in self.coarse_outputs] for i in self.coarse_inputs]
        )
        below = np.minimum(low + 1, len(self.coarse_inputs) - 1)
        right = np.minimum(left + 1, len(self.coarse_outputs) - 1)
        first = coarse[low][:, left] * (1 - part) + coarse[low][:, right] * part
        second = coarse[below][:, left] * (1 - part) + coarse[below][:, right] * part
        table = first * (1 - share[:, None]) + second * share[:, None]
        table[-1], table[:, -1] = columns, rows
        return table


@takes_keras_3
def measure_latency(
    model: keras.Model,
    *,
    quantization: str = "int8",
    threads: int = 1,
    xnnpack: bool = True,
    points: int = 4,
    runs: int = 11,
    print_fn: Callable[[str], Any] | None = None,
) -> LatencyTable:
    """Measures how long the layers of a model take in LiteRT on this machine, at many widths.

    Weights and inputs are random: neither changes how long dense layers take.

    Args:
        model: A built, plain functional or Sequential model with inputs of fixed size. It is not
            changed.
        quantization: How the files will be exported: `"none"`, `"int8"`, or `"plan"` with int8
            weights that are restored on loading.
        threads: Threads LiteRT may use.
        xnnpack: Whether LiteRT may use its XNNPACK delegate, as it does by default.
        points: Widths per axis of the coarse grid that every layer is timed on. Along its dense
            edges a layer is timed at every multiple of 8 channels and one more.
        runs: Samples per file, at least 5; each covers about 5 ms of calls.
        print_fn: Called with a line per stage, and with every line of the table.

    Returns:
        The table.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model has no graph or an input of open size.
        ExportError: If layers cannot be converted or run.
        NotMeasuredError: If the dense model's times scatter by more than 10 %.

    Example:
        >>> table = rls.measure_latency(model, quantization="int8")  # doctest: +SKIP
        >>> table.save("latency.json")  # doctest: +SKIP
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    threads = check_count("threads", threads, 1)
    check_count("points", points, 1)
    check_count("runs", runs, _FEWEST_RUNS)
    xnnpack = check_flag("xnnpack", xnnpack)
    chains = LayerWidths(model).chains
    if quantization == "int8":
        check_ids(model)
    say = print_fn or _log.debug
    grids = [_grid(chain, points) for chain in chains]
    # Chains of equal signatures are timed once.
    wanted = {
        (grid.chain.signature, width): grid.chain for grid in grids for width in grid.measured()
    }
    models = narrowed(model)
    say(f"Latency: converting {len(wanted)} layers and {len(models)} models")
    builders = [whole_model(some) for some in models] + [empty_model]
    builders += [layer_model(chain, width) for (_, width), chain in wanted.items()]
    with converted(builders, file_batch_size(model, None, False)[0], quantization) as files:
        say(f"Latency: timing {len(files)} files")
        ids = _smallest_vocabulary(model)
        samples = _timed(files, ids=ids, runs=runs, threads=threads, xnnpack=xnnpack)
    medians, spreads = np.median(samples, axis=1), _spreads(samples)
    if spreads[0] > LARGEST_SPREAD:
        raise NotMeasuredError(
            f"The dense model's times scatter by {spreads[0]:.0%} (interquartile range over "
            f"median). Expected at most {LARGEST_SPREAD:.0%}: measure again on a machine that does "
            "nothing else, or load a table that was measured before."
        )
    count = len(models)
    # Every call of an interpreter costs a little; of a model it is paid once.
    alone = np.maximum(medians[count + 1 :] - medians[count], 0.0)
    times = dict(zip(wanted, zip(alone, spreads[count + 1 :], strict=True), strict=True))
    raw = LatencyTable(
        device=_device(),
        quantization=quantization,
        threads=threads,
        xnnpack=xnnpack,
        layers={grid.chain.path: grid.latency(times) for grid in grids},
        spread=float(spreads[0]),
    )
    table = _fitted(raw, [raw.predict(widths_of(some)) for some in models], medians[:count])
    if print_fn is not None:
        table.summary(print_fn)
    return table


# The grid.


def _grid(chain: Chain, points: int) -> _Grid:
    inputs, outputs = chain.width.inputs, chain.width.outputs
    steps_in = _steps(inputs) if chain.inputs_free else [inputs]
    # What has no kernel has as many outputs as its inputs make.
    steps_out = _steps(outputs) if chain.outputs_free and not chain.tied else [outputs]
    return _Grid(
        chain=chain,
        inputs=steps_in,
        outputs=steps_out,
        coarse_inputs=_coarse(steps_in, points),
        coarse_outputs=_coarse(steps_out, points),
    )


def _steps(dense: int) -> list[int]:
    """Widths on both sides of every step, farther apart where there are many."""
    widths = {1, dense} if dense <= _TILE else {1, _FEW, dense}
    width, step = _TILE, _TILE
    while width < dense:
        widths |= {width, width + 1}
        if width >= _TILES * step:
            step *= 2
        width += step
    return sorted(widths)


def _coarse(widths: Sequence[int], points: int) -> list[int]:
    """Some of the widths: the ends, and the upper ends of steps in between."""
    dense = widths[-1]
    between = [dense * number // points for number in range(1, points)]
    upper = [width for width in widths if width % _TILE == 0 or width == dense]
    found = {1, _FEW, dense} & set(widths)
    found |= {min(upper, key=lambda width: abs(width - wanted)) for wanted in between}
    return sorted(found)


def _warped(
    fine: Sequence[int], coarse: Sequence[int], profile: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """For every fine width the coarse one below and the share of the way, in time, to the next."""
    grid = np.array(coarse)
    low = np.clip(np.searchsorted(grid, fine, side="right") - 1, 0, max(len(grid) - 2, 0))
    high = np.minimum(low + 1, len(grid) - 1)
    known = dict(zip(fine, profile, strict=True))
    start = np.array([known[coarse[n]] for n in low])
    rise = np.array([known[coarse[n]] for n in high]) - start
    steep = rise > 0.05 * np.maximum(start, 1e-9)
    width = np.maximum(grid[high] - grid[low], 1)
    linear = (np.array(fine) - grid[low]) / width
    warped = (np.array(profile) - start) / np.where(steep, rise, 1.0)
    return low, np.clip(np.where(steep, warped, linear), 0.0, 1.0)


# The times.


def _smallest_vocabulary(model: keras.Model) -> int:
    """What integer inputs must stay below."""
    embeddings = [e for e in all_layers(model) if isinstance(e, keras.layers.Embedding)]
    return min((embedding.input_dim for embedding in embeddings), default=2)


def _timed(
    files: Sequence[Path | None], *, ids: int, runs: int, threads: int, xnnpack: bool
) -> np.ndarray:
    """Milliseconds per call, one row per file."""
    present = [file for file in files if file is not None]
    seconds: list[list[float]] = []
    try:
        for start in range(0, len(present), _TOGETHER):
            some = present[start : start + _TOGETHER]
            seconds += shared_worker().time(
                some, index_limits=[ids] * len(some), runs=runs, threads=threads, xnnpack=xnnpack
            )
    except WorkerError as error:
        if error.reason in ("died", "timeout"):
            raise
        raise ExportError(
            f"LiteRT cannot run a layer of the model by itself: {error.detail.strip().rstrip('.')}."
            " Expected layers that export_tflite can export: try it, or measure with "
            f"xnnpack={not xnnpack}."
        ) from error
    samples = np.zeros((len(files), runs))
    samples[[file is not None for file in files]] = 1e3 * np.array(seconds)
    return samples


def _spreads(samples: np.ndarray) -> np.ndarray:
    low, median, high = np.percentile(samples, [25, 50, 75], axis=1)
    return (high - low) / np.maximum(median, 1e-12)


def _fitted(table: LatencyTable, predicted: Sequence[float], measured: np.ndarray) -> LatencyTable:
    """The table with an overhead and a factor for all layers that fit whole models best.

    Least squares of the relative errors; neither is negative.
    """
    sums = np.array(predicted)
    design = np.stack([np.ones(len(measured)), sums], 1) / measured[:, None]
    (overhead, factor), *_ = np.linalg.lstsq(design, np.ones(len(measured)), rcond=None)
    if not sums.any():  # nothing but the call takes any time
        overhead, factor = float(np.median(measured)), 1.0
    elif len(measured) < 2 or overhead < 0 or factor <= 0:
        slope = design[:, 1]
        overhead, factor = 0.0, float(slope.sum() / (slope**2).sum())
    layers = {
        path: dataclasses.replace(layer, ms=layer.ms * factor)
        for path, layer in table.layers.items()
    }
    return dataclasses.replace(table, layers=layers, overhead_ms=float(overhead))


def _device() -> str:
    """This machine in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
