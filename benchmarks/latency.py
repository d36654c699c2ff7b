"""How well a latency table predicts narrower models: predicted against measured in LiteRT.

    python benchmarks/latency.py                       both networks, int8 and float32
    python benchmarks/latency.py --networks ds-cnn --quantizations int8 --models 40

A table is measured for an untrained network; then channels are removed at random, every narrower
model is converted by itself and timed in turns with the dense one. What counts is the ratio to the
dense model: the table's against the measured one. Times that scatter by more than 10 % are left
out and counted. Weights do not change how long dense layers take, so none are trained.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import rl_sparsity_tf  # noqa: F401  (asks for Keras 2 before it is imported)
from rl_sparsity_tf.channels.groups import find_groups
from rl_sparsity_tf.channels.latency_measurement import measure_latency
from rl_sparsity_tf.channels.shrinking import shrink
from rl_sparsity_tf.channels.units import mask_channels
from rl_sparsity_tf.channels.widths import widths_of
from rl_sparsity_tf.export.export import convert_traced
from rl_sparsity_tf.tflite.timing import LARGEST_SPREAD, FileTiming
from rl_sparsity_tf.tflite.worker import shared_worker

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)
from networks import build  # isort: skip

_ROWS = 8


class Images:
    """The shapes of Fashion-MNIST."""

    input_shape = (28, 28, 1)
    num_classes = 10


def narrowed(model: keras.Model, rng: np.random.Generator) -> keras.Model:
    """A model that keeps a random share of each group of channels."""
    overall = rng.uniform(0.2, 1.0)
    live = {}
    for group in find_groups(model):
        if not group.frozen:
            share = np.clip(overall + rng.uniform(-0.3, 0.3), 0.1, 1.0)
            order = rng.permutation(group.size)
            live[group.index] = order < max(1, round(share * group.size))
    return shrink(mask_channels(model, live))


def timed(
    models: Sequence[keras.Model], quantization: str, options: argparse.Namespace
) -> list[FileTiming]:
    """The models' times, each converted by itself, all in turns."""
    rng = np.random.default_rng(0)
    rows = None
    if quantization == "int8":
        rows = [rng.uniform(-1, 1, (_ROWS, *Images.input_shape)).astype(np.float32)]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, model in enumerate(models):
            part = Path(folder, str(number))
            part.mkdir()
            files.append(convert_traced(model, part, None, quantization, rows))
        seconds = shared_worker().time(
            files, index_limits=[2] * len(files), runs=options.runs, threads=options.threads
        )
    return [
        FileTiming(path=file.parent.name, samples_ms=tuple(1e3 * s for s in samples))
        for file, samples in zip(files, seconds, strict=True)
    ]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def compare(name: str, quantization: str, options: argparse.Namespace) -> list[str]:
    """The cells of one row of the table."""
    keras.utils.set_random_seed(options.seed)
    model = build(name, Images)
    rng = np.random.default_rng(options.seed)
    models = [model, *(narrowed(model, rng) for _ in range(options.models))]
    started = time.perf_counter()
    table = measure_latency(model, quantization=quantization, threads=options.threads)
    seconds = time.perf_counter() - started
    times = timed(models, quantization, options)
    predicted = np.array([table.predict(widths_of(one)) for one in models])
    medians = np.array([np.median(one.samples_ms) for one in times])
    spreads = np.array([one.spread for one in times])
    samples = np.array([one.samples_ms for one in times])
    ratios = np.median(samples / samples[0], axis=1)
    used = spreads <= LARGEST_SPREAD
    used[0] = False
    if options.verbose:
        for row in zip(predicted, medians, predicted / predicted[0], ratios, spreads, strict=True):
            print(
                "  predicted {:.4f} ms, measured {:.4f}; {:.3f} {:.3f}; spread {:.1%}".format(*row)
            )
    if spreads[0] > LARGEST_SPREAD or not used.any():
        return [name, quantization, f"not measured (spread {spreads[0]:.0%})"]
    errors = np.abs(predicted / predicted[0] / ratios - 1)[used]
    absolute = np.abs(predicted / medians - 1)[used]
    return [
        name,
        quantization,
        f"{medians[0]:.4f}",
        f"{ratios[used].min():.2f} to {ratios[used].max():.2f}",
        f"{used.sum()} of {options.models}",
        f"{np.median(errors):.1%}",
        f"{np.percentile(errors, 90):.1%}",
        f"{np.median(absolute):.1%}",
        f"{rank_correlation(predicted[used], medians[used]):.3f}",
        f"{np.median(spreads):.1%} ({spreads.max():.1%})",
        f"{seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet-8", "ds-cnn"])
    parser.add_argument("--quantizations", nargs="+", default=["int8", "none"])
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every model")
    options = parser.parse_args()
    print(f"Narrower models against a latency table; {options.threads} thread(s), XNNPACK on.\n")
    head = [
        *("network", "quantization", "dense, ms", "ratios measured", "models with spread <= 10 %"),
        *("median error of the ratio", "90th percentile", "median error of the ms"),
        *("rank correlation", "spread: median (largest)", "table, s"),
    ]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in options.networks:
        for quantization in options.quantizations:
            row = compare(name, quantization, options)
            cells = [*row, *[""] * (len(head) - len(row))]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
