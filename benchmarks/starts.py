"""Which weights and masks should the final fine-tuning start from? Seven kinds of networks.

Every network is trained, pruned to LAMP's densities (Lee et al. 2021, arXiv 2010.07611), fitted as
a search does it, and then trained for the same epochs on the same batches in six ways:

- `final`: what a search does: from the fitted weights, what is pruned from 0, learning masks, 2e-3;
- `behind`: the same with the trained weights behind the masks, at 1e-3;
- `fixed`: from the fitted weights, with masks that stay, 2e-3;
- `dense`: from the trained weights, learning masks, 1e-3;
- `gradual`: from the trained weights, learning masks of a number that falls to the plan's, 1e-3;
- `tfmot`: TFMOT's polynomial schedule to the same densities, layer by layer, from the trained
  weights, Adam at 1e-3 with the same cosine;
- `search` (only if it is asked for): a whole search of 16 episodes instead of LAMP's densities, its
  final trainings as long.

All keep the best epoch by validation data, with batch-norm statistics estimated anew where that is
better. Prints the figures on test data (mean and range over the seeds): accuracy, and the mean
squared error of the autoencoder.

    python benchmarks/starts.py --seeds 3 --epochs 1 6
    python benchmarks/starts.py --networks residual --epochs 30 --ways dense tfmot search
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from networks import build
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.tfmot import load_tfmot
from rl_sparsity_tf.data.batches import evaluation_data, sample_rows, training_data
from rl_sparsity_tf.data.datasets import load_dataset, load_digits_data
from rl_sparsity_tf.data.metrics import Evaluator
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.training.mask_training import FreshStatistics, clear_pruned, finetune

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

layers = keras.layers
WAYS = ("final", "behind", "fixed", "dense", "gradual", "tfmot")
SEARCH, EPISODES = "search", 16
Rows = list[tuple[np.ndarray, np.ndarray]]


def digits(seed: int) -> Rows:
    data = load_digits_data(seed)
    return [
        (data.x_train, data.y_train),
        (data.x_validation, data.y_validation),
        (data.x_test, data.y_test),
    ]


def fashion(seed: int) -> Rows:
    return images("fashion_mnist", seed)


def cifar(seed: int) -> Rows:
    return images("cifar10", seed)


def images(name: str, seed: int) -> Rows:
    data = load_dataset(name, seed=seed)
    return [
        (data.x_train, data.y_train),
        (data.x_validation[:4000], data.y_validation[:4000]),
        (data.x_test, data.y_test),
    ]


def spectra(seed: int) -> Rows:
    """Mixtures of waves around -20, far from 0 as the decibels of a machine's sound are."""
    rng = np.random.default_rng(seed)
    waves = np.sin(
        np.linspace(0, 12, 128) * np.arange(1, 7)[:, None] / 2 + rng.uniform(0, 6, (6, 1))
    )
    mixed = np.tanh(rng.normal(size=(6000, 6))) @ waves * 8
    x = (mixed + rng.normal(size=mixed.shape) / 2 - 20).astype(np.float32)
    return [(part, part) for part in (x[:4000], x[4000:5000], x[5000:])]


def shared(shape: tuple[int, ...]) -> keras.Model:
    given = keras.Input(shape)
    x = layers.Dense(64, activation="relu")(layers.Flatten()(given))
    for _ in range(2):
        twice = layers.Dense(64, activation="relu")
        x = twice(twice(x))
    return keras.Model(given, layers.Dense(10, activation="softmax")(x))


def residual(shape: tuple[int, ...]) -> keras.Model:
    def normed(x: Any, channels: int, stride: int = 1) -> Any:
        x = layers.Conv2D(channels, 3, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    given = keras.Input(shape)
    x = layers.ReLU()(normed(given, 16))
    for channels, stride in ((16, 1), (32, 2)):
        y = normed(layers.ReLU()(normed(x, channels, stride)), channels)
        if stride > 1:
            x = layers.Conv2D(channels, 1, stride)(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(given, layers.Dense(10, activation="softmax")(x))


def lenet(shape: tuple[int, ...]) -> keras.Model:
    stack = [
        layers.Conv2D(6, 5, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(16, 5, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(120, activation="relu"),
        layers.Dense(84, activation="relu"),
        layers.Dense(10, activation="softmax"),
    ]
    return keras.Sequential([layers.Input(shape), *stack])


def resnet(shape: tuple[int, ...]) -> keras.Model:
    return build("resnet-8", types.SimpleNamespace(input_shape=shape, num_classes=10))


def separable(shape: tuple[int, ...]) -> keras.Model:
    stack: list[Any] = [layers.Conv2D(24, 3, 2, padding="same", use_bias=False)]
    for channels in (32, 48):
        stack += [layers.BatchNormalization(), layers.ReLU()]
        stack += [layers.DepthwiseConv2D(3, padding="same", use_bias=False)]
        stack += [layers.BatchNormalization(), layers.ReLU()]
        stack += [layers.Conv2D(channels, 1, use_bias=False)]
    stack += [layers.BatchNormalization(), layers.ReLU(), layers.GlobalAveragePooling2D()]
    return keras.Sequential([layers.Input(shape), *stack, layers.Dense(10, activation="softmax")])


def recurrent(shape: tuple[int, ...]) -> keras.Model:
    stack = [layers.Reshape(shape[:2]), layers.LSTM(64), layers.Dense(10, activation="softmax")]
    return keras.Sequential([layers.Input(shape), *stack])


def autoencoder(shape: tuple[int, ...]) -> keras.Model:
    stack: list[Any] = []
    for units in (64, 64, 8, 64, 64):
        stack += [layers.Dense(units), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([layers.Input(shape), *stack, layers.Dense(shape[0])])


# Data, network, epochs of its training, share of zeros.
CASES: dict[str, tuple[Callable[[int], Rows], Callable[..., keras.Model], int, float]] = {
    "shared": (digits, shared, 40, 0.85),
    "residual": (digits, residual, 60, 0.93),
    "lenet-5": (fashion, lenet, 8, 0.95),
    "separable": (fashion, separable, 10, 0.8),
    "resnet-8": (cifar, resnet, 10, 0.8),
    "lstm": (fashion, recurrent, 8, 0.8),
    "autoencoder": (spectra, autoencoder, 30, 0.85),
}


def dense_network(case: str, data: Rows, seed: int, batch_size: int) -> keras.Model:
    """A network of a case, trained with Adam and a rate that falls to 0."""
    _, architecture, epochs, _ = CASES[case]
    keras.utils.set_random_seed(seed)
    keras.backend.reset_uids()
    model = architecture(data[0][0].shape[1:])
    steps = epochs * math.ceil(len(data[0][0]) / batch_size)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    regression = case == "autoencoder"
    model.compile(
        keras.optimizers.Adam(rate),
        "mse" if regression else "sparse_categorical_crossentropy",
        metrics=["mse" if regression else "accuracy"],
    )
    model.fit(*data[0], batch_size=batch_size, epochs=epochs, verbose=0)
    return model


def with_tfmot(model: keras.Model, densities: dict[str, float], steps: int) -> keras.Model:
    """The model in TFMOT's wrappers, every layer with a schedule to its own density."""
    pruning = load_tfmot()

    def wrapped(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer.name not in densities:
            return layer.__class__.from_config(layer.get_config())
        final = 1.0 - densities[layer.name]
        frequency = max(1, min(100, steps // 20))
        schedule = pruning.PolynomialDecay(
            initial_sparsity=min(0.5, final),
            final_sparsity=final,
            begin_step=0,
            end_step=int(0.7 * steps) // frequency * frequency,
            frequency=frequency,
        )
        return pruning.prune_low_magnitude(layer, pruning_schedule=schedule)

    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return keras.models.clone_model(copy, clone_function=wrapped)


class _Best(keras.callbacks.Callback):
    """The best epoch at full sparsity, as `finetune` keeps it for the others."""

    def __init__(self, evaluator: Evaluator, validation: Any, statistics: FreshStatistics):
        super().__init__()
        self.evaluator, self.validation, self.statistics = evaluator, validation, statistics
        self.best: tuple[float, list[np.ndarray]] | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (epoch + 1) / self.params["epochs"] < 0.7:
            return
        trained = self.model.get_weights()
        for renewed in (False, True):
            if renewed and self.statistics.layers:
                self.statistics.renew()
            value = self.evaluator(self.validation).metric
            better = self.evaluator.metric.better
            if self.best is None or better(value, self.best[0]):
                self.best = value, self.model.get_weights()
        self.model.set_weights(trained)


def run(
    way: str,
    model: keras.Model,
    candidate: Candidate,
    data: Any,
    validation: Any,
    test: Any,
    network: CompressedNetwork,
    epochs: int,
    seed: int,
) -> dict[str, float]:
    """Trains a candidate in one way."""
    tf.random.set_seed(seed)
    if way == "tfmot":
        steps = epochs * (data.steps or len(data.pool))
        sizes: dict[str, list[int]] = {}
        for path, entry in candidate.plan.kernels.items():
            alive = (entry.operations != rls.Operation.PRUNE).sum()
            found = sizes.setdefault(path.rsplit("/", 1)[0], [0, 0])
            found[0] += int(alive)
            found[1] += entry.operations.size
        densities = {layer: alive / total for layer, (alive, total) in sizes.items()}
        pruned = with_tfmot(model, densities, steps)
        rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
        pruned.compile(keras.optimizers.Adam(rate), model.loss, metrics=[network.metric.name])
        evaluator = Evaluator(pruned, network.metric)
        best = _Best(evaluator, validation, FreshStatistics(pruned, data.pool))
        follow = load_tfmot().UpdatePruningStep()
        pruned.fit(data.dataset, epochs=epochs, verbose=0, callbacks=[follow, best])
        assert best.best is not None
        pruned.set_weights(best.best[1])
        return {"validation": best.best[0], "test": evaluator(test).metric}
    learns = way != "fixed"
    wrapped = rls.wrap(model, candidate.plan, train_masks=learns)
    if way not in ("dense", "gradual"):
        candidate.put_weights(wrapped)
    if way == "final":
        clear_pruned(wrapped)
    rate = 2e-3 if way in ("final", "fixed") else 1e-3
    given = (wrapped, data, validation, network.metric)
    score = finetune(*given, epochs=epochs, learning_rate=rate, gradual=way == "gradual")
    return {
        "validation": score.metric,
        "test": Evaluator(wrapped, network.metric)(test).metric,
    }


def searched(
    network: CompressedNetwork,
    model: keras.Model,
    parts: Rows,
    test: Any,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The result of a whole search with the network's target, on the same rows."""
    compressor = rls.Compressor(model, target=network.target, seed=seed)
    result = compressor.search(
        parts[0],
        validation_data=parts[1],
        episodes=EPISODES,
        finetune_epochs=epochs,
        batch_size=batch_size,
        verbose=0,
    )
    found = Evaluator(result.model, network.metric)(test).metric
    return {"validation": result.metrics["compressed"]["validation_metric"], "test": found}


def main() -> None:
    """Runs all cells, printing rows as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to go on with more seeds")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, SEARCH], default=list(WAYS))
    parser.add_argument("--rows", type=int, default=10_000, help="training rows at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for case in options.networks:
            load, _, _, sparsity = CASES[case]
            parts = load(seed)
            parts[0] = (parts[0][0][: options.rows], parts[0][1][: options.rows])
            model = dense_network(case, parts, seed, options.batch_size)
            data = training_data(parts[0], model, batch_size=options.batch_size, seed=seed)
            validation = evaluation_data(parts[1], model, "validation")
            test = evaluation_data(parts[2], model, "test")
            network = CompressedNetwork(
                model,
                data,
                sample_rows(validation, 2000, seed=seed, fixed=None),
                target=rls.Target(sparsity=sparsity),
            )
            evaluate_plan(
                network, rls.baselines.lamp(model, sparsity=sparsity), network.recovery.steps
            )
            candidate = Candidate.of(network, 0.0, -1, "lamp")
            base = {"network": case, "seed": seed}
            dense = Evaluator(model, network.metric)(test).metric
            found.append({**base, "epochs": 0, "way": "trained", "validation": 0.0, "test": dense})
            for epochs in options.epochs:
                for way in options.ways:
                    row: dict[str, Any] = {**base, "epochs": epochs, "way": way}
                    if way == SEARCH:
                        row |= searched(
                            *(network, model, parts, test),
                            epochs=epochs,
                            batch_size=options.batch_size,
                            seed=seed,
                        )
                    else:
                        row |= run(
                            *(way, model, candidate, data, validation, test, network, epochs, seed)
                        )
                    found.append(row)
                    print(row, file=sys.stderr, flush=True)
                    if options.csv:
                        append(options.csv, row)
    report(found, options.epochs, options.ways)


def report(rows: list[dict[str, Any]], lengths: list[int], ways: list[str]) -> None:
    """Prints the rows as a table."""
    print(f"| network | epochs | trained | {' | '.join(ways)} |")
    print("|---" * (3 + len(ways)) + "|")

    def shown(case: str, epochs: int, way: str) -> str:
        cell = (case, epochs, way)
        values = [r["test"] for r in rows if (r["network"], r["epochs"], r["way"]) == cell]
        if not values:
            return "-"
        digits = 4 if max(values) <= 1 else 2
        mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(values), min(values), max(values)))
        return f"{mean} ({low} to {high})"

    for case in dict.fromkeys(row["network"] for row in rows):
        for epochs in lengths:
            cells = [shown(case, epochs, way) for way in ways]
            print(f"| {case} | {epochs} | {shown(case, 0, 'trained')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
