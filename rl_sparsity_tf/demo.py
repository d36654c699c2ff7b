"""`rl-sparsity demo`: train a small network, compress it, and show what that cost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

import tf_keras as keras

from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.search.comparison import compare, comparison_table
from rl_sparsity_tf.search.compressor import Compressor
from rl_sparsity_tf.search.result import Result

MAX_WEIGHTS = 40_000
_TRAIN_STEPS = 900


def base_network(input_shape: tuple[int, ...], classes: int, seed: int = 0) -> keras.Model:
    """A small untrained CNN: conv 16, conv 32, dense 64, one output per class.

    It is compiled and gives logits. Pooling brings any image down to at most 4 x 4 before the dense
    layers, so that the network has at most 40,000 weights; with many classes the dense layer is
    narrower. Raises `DataError` if the images are not of shape (height, width, channels), or there
    are too many classes for so small a network.
    """
    if len(input_shape) != 3:
        raise DataError(
            f"The inputs have shape {input_shape}. The demo's network expects images: (height, "
            "width, channels). Use `rl-sparsity compress` with a model of your own."
        )
    layers = keras.layers
    height, width, channels = input_shape
    first = [max(1, math.ceil(side / 16)) for side in (height, width)]
    sides = [side // pool for side, pool in zip((height, width), first, strict=True)]
    second = [next(p for p in range(1, side + 1) if side // p <= 4) for side in sides]
    flat = math.prod(side // pool for side, pool in zip(sides, second, strict=True)) * 32
    fixed = 9 * channels * 16 + 16 + 9 * 16 * 32 + 32 + classes
    units = min(64, (MAX_WEIGHTS - fixed) // (flat + 1 + classes))
    if units < 8:
        raise DataError(
            f"{classes} classes do not fit into the demo's network of {MAX_WEIGHTS:,} weights. "
            "Choose a data set with fewer classes, or use `rl-sparsity compress` with a model of "
            "your own."
        )
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            layers.Input(input_shape),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv_16"),
            layers.MaxPooling2D(first, name="pool_1"),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv_32"),
            layers.MaxPooling2D(second, name="pool_2"),
            layers.Flatten(name="flatten"),
            layers.Dense(units, activation="relu", name="dense_64"),
            layers.Dense(classes, name="logits"),
        ],
        name="demo",
    )
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train_base(model: keras.Model, data: Data, batch_size: int) -> None:
    """Trains the demo's network for about 900 steps, two epochs at least."""
    steps = math.ceil(len(data.x_train) / batch_size)
    epochs = max(2, math.ceil(_TRAIN_STEPS / steps))
    rate = keras.optimizers.schedules.CosineDecay(2e-3, epochs * steps)
    model.optimizer.learning_rate = rate
    model.fit(data.x_train, data.y_train, batch_size=batch_size, epochs=epochs, verbose=0)


def run_demo(
    dataset: str = "digits",
    *,
    agent: str = "dqn",
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    episodes: int = 20,
    sparsity: float = 0.9,
    curriculum: str = "constant",
    finetune_epochs: int | None = None,
    memory_limit_mb: float = 2048,
    contenders: str | Sequence[str] | None = None,
    verbose: int = 1,
) -> Result:
    """Trains, compresses, compares and prints.

    Args:
        dataset: `"digits"` or the name of a TFDS image classification set.
        agent: `"dqn"` or `"ppo"`.
        output: Folder for the run, if it is to be kept.
        seed: Seed of everything.
        episodes: Search episodes.
        sparsity: The target.
        curriculum: How it rises over the episodes: `"constant"`, `"linear"` or `"staged"`.
        finetune_epochs: Epochs of every fine-tuning; by default about 1,500 steps.
        memory_limit_mb: What the data set may take.
        contenders: Whom to compare with, as in [compare][rl_sparsity_tf.compare].
        verbose: As in `Compressor.search`.

    Returns:
        The result; its metrics hold the contenders as baselines.
    """
    from rl_sparsity_tf.allocation.target import Target

    started = time.monotonic()
    say = SearchProgress(episodes, "accuracy", verbose).say
    data = load_dataset(dataset, seed=seed, memory_limit_mb=memory_limit_mb)
    if data.num_classes is None:
        raise DataError(f"{dataset!r} has no classes. The demo expects integer labels.")
    model = base_network(data.input_shape, data.num_classes, seed)
    batch_size = 64 if len(data.x_train) < 10_000 else 128
    say(
        f"{data.name}: {len(data.x_train):,} images of shape {data.input_shape}, "
        f"{data.num_classes} classes; training a network of {model.count_params():,} weights"
    )
    train_base(model, data, batch_size)
    compressor = Compressor(
        model,
        Target(sparsity=sparsity),
        agent=agent,
        directory=output,
        seed=seed,
        curriculum=curriculum,
    )
    result = compressor.search(
        **search_data(data),
        episodes=episodes,
        batch_size=batch_size,
        finetune_epochs=finetune_epochs,
        dataset=data.name,
        verbose=verbose,
    )
    compare(compressor, contenders, verbose)
    if output is not None:
        result.save(output, overwrite=True)
    print_fn = print if verbose else (lambda _: None)
    print_fn("")
    result.summary(print_fn)
    print_fn("")
    comparison_table(result.metrics, print_fn)
    where = "" if output is None else f"; files in {os.fspath(output)}"
    print_fn(f"took {time.monotonic() - started:.0f} s{where}")
    return result


def search_data(data: Data) -> dict[str, Any]:
    """The data arguments of `Compressor.search`."""
    return {
        "train": (data.x_train, data.y_train),
        "validation_data": (data.x_validation, data.y_validation),
        "test_data": None if data.x_test is None else (data.x_test, data.y_test),
    }
