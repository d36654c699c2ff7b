"""What do 4-bit kernels cost in time? Files in LiteRT, by the layers that have them.

    python benchmarks/int4.py
    python benchmarks/int4.py --networks ds-cnn --computes static --threads 2

Every kernel is stored in 8 bits, then those of one kind of layer in 4, then all that can be; the
files are timed in turns. Weights do not change how long dense kernels take, so none are trained.
A ratio is of two files' times in the same turn: its median over the turns, and its quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernel_spec import has_int4
from rl_sparsity_tf.layers.kernels import Kernel, find_kernels
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.tflite.worker import shared_worker

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)
from networks import NETWORKS, build  # isort: skip

_ROWS = 64
_COMPUTES = ("weight_only", "dynamic", "static")


_TEXT = "embedding"
_WORDS = 4000
_ALL = (*NETWORKS, _TEXT)


class Images:
    """The shapes of Fashion-MNIST."""

    input_shape = (28, 28, 1)
    num_classes = 10


def build_text() -> keras.Model:
    """A classifier of 64 words."""
    inputs = keras.Input((64,), dtype="int32")
    x = keras.layers.Embedding(_WORDS, 32)(inputs)
    x = keras.layers.Dense(64, activation="relu")(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(x), name=_TEXT)


def example_rows(model: keras.Model, seed: int) -> np.ndarray:
    """Random inputs to calibrate on."""
    rng = np.random.default_rng(seed)
    shape = (_ROWS, *model.input_shape[1:])
    if model.name == _TEXT:
        return rng.integers(0, _WORDS, shape).astype(np.int32)
    return rng.uniform(0, 1, shape).astype(np.float32)


def kind_of(kernel: Kernel) -> str:
    """The kernel's kind of layer, with convolutions of 1 x 1 by themselves."""
    if kernel.spec.kind == "conv2d" and set(kernel.shape[:-2]) == {1}:
        return "1 x 1 convolution"
    names = {
        "fully_connected": "dense",
        "conv2d": "convolution",
        "depthwise_conv2d": "depthwise",
        "gather": "embedding",
    }
    return names[kernel.spec.kind]


def plan_of(model: keras.Model, in_4_bits: Iterable[str]) -> rls.CompressionPlan:
    """A plan without a zero: the named kernels in 4 bits, the others in 8."""
    chosen = set(in_4_bits)
    rules = [
        KernelRule(
            path=kernel.path,
            sparsity=0.0,
            quantize=kernel.spec.exports_int8,
            bits=4 if kernel.path in chosen else 8,
        )
        for kernel in find_kernels(model)
    ]
    return resolve(rls.CompressionPlan(rules), model)


def timed(model: keras.Model, options: argparse.Namespace) -> list[list[str]]:
    """The rows of one network."""
    kernels = [one for one in find_kernels(model) if has_int4(one.spec.kind)]
    kinds = {
        kind: [one.path for one in kernels if kind_of(one) == kind]
        for kind in dict.fromkeys(map(kind_of, kernels))
    }
    variants = {"none": [], **kinds}
    if len(kinds) > 1:
        variants["all"] = [one.path for one in kernels]
    rows = example_rows(model, options.seed)
    cases = list(itertools.product(options.computes, variants))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, (compute, name) in enumerate(cases):
            path = Path(folder, f"{number}.tflite")
            wrapped = rls.wrap(model, plan_of(model, variants[name]))
            rls.export_tflite(wrapped, path, compute=compute, representative_data=rows)
            files.append(path)
        sizes = [path.stat().st_size for path in files]
        seconds = shared_worker().time(
            files, index_limits=[_WORDS] * len(files), runs=options.runs, threads=options.threads
        )
    samples = np.array(seconds)
    found = []
    for index, (compute, name) in enumerate(cases):
        first = index - index % len(variants)
        cells = [f"{sizes[index] / sizes[0]:.2f}", f"{1e3 * np.median(samples[index]):.4f}"]
        for other in (first, 0):
            low, median, high = np.percentile(samples[index] / samples[other], [25, 50, 75])
            cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        found.append([model.name, compute, name, *cells])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=_ALL, default=_ALL)
    parser.add_argument("--computes", nargs="+", choices=_COMPUTES, default=_COMPUTES)
    parser.add_argument("--runs", type=int, default=51)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"Dense kernels in 8 and 4 bits; LiteRT, {options.threads} thread(s), XNNPACK on.\n")
    head = [
        *("network", "compute", "in 4 bits", "bytes", "ms"),
        *("time, of 8 bits", "time, of the first file"),
    ]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in options.networks:
        keras.utils.set_random_seed(options.seed)
        for row in timed(build_text() if name == _TEXT else build(name, Images), options):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
