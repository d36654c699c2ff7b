"""What wrapping, searching and growing cost, each as a ratio of two things timed in turns.

    python benchmarks/speed.py step        a training step: wrapped against bare Keras and TFMOT
    python benchmarks/speed.py episode     agent and environment against one evaluation
    python benchmarks/speed.py growth      time and memory from 10^5 to 10^7 weights

Steps are timed in rounds that visit every contender once, in changing order; the ratio of two is
the median over rounds of the ratio within a round. Made-up data: only time is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import resolve_config
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.search.episodes import LoopSettings
from rl_sparsity_tf.search.loop import SearchLoop

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

BATCH = 128


def network(name: str) -> keras.Model:
    """A network for images of 28 x 28."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    if name == "LeNet-300-100":
        x = layers.Flatten()(x)
        for units in (300, 100):
            x = layers.Dense(units, activation="relu")(x)
    elif name == "dense, 1 M weights":
        x = layers.Flatten()(x)
        for units in (768, 512):
            x = layers.Dense(units, activation="relu")(x)
    elif name == "LeNet-5":
        for filters in (6, 16):
            x = layers.Conv2D(filters, 5, padding="same", activation="relu")(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Flatten()(x)
        for units in (120, 84):
            x = layers.Dense(units, activation="relu")(x)
    elif name == "DS-CNN":
        x = layers.Conv2D(64, 3, 2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        for _ in range(4):
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
            x = layers.Conv2D(64, 1, use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.GlobalAveragePooling2D()(x)
    else:
        for filters, stride in ((16, 1), (32, 2), (64, 2)):
            x = layers.Conv2D(filters, 3, stride, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
            y = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(y)]))
        x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="model")
    return compiled(model)


def compiled(model: keras.Model) -> keras.Model:
    """The same compilation for every contender."""
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    return model


def images(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 28, 28, 1)).astype(np.float32)
    return x, rng.integers(0, 10, rows)


# ---------------------------------------------------------------------- a training step


def contenders(model: keras.Model) -> dict[str, Callable[[int], None]]:
    """Functions that train so many steps."""
    import tensorflow_model_optimization as tfmot

    x, y = images(BATCH * 8)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().repeat()

    def trainer(model: keras.Model, callbacks: list[Any]) -> Callable[[int], None]:
        def train(steps: int) -> None:
            model.fit(data, steps_per_epoch=steps, epochs=1, verbose=0, callbacks=callbacks)

        return train

    def copy() -> keras.Model:
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        return compiled(clone)

    kept = rls.baselines.uniform(model, sparsity=0.8)
    integers = rls.baselines.uniform(model, sparsity=0.8, quantize=True)
    learning = rls.wrap(model, kept, train_masks=True)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(
        copy(), pruning_schedule=tfmot.sparsity.keras.ConstantSparsity(0.8, 0, frequency=16)
    )
    return {
        "bare Keras": trainer(copy(), []),
        "fixed masks": trainer(compiled(rls.wrap(model, kept)), []),
        "fixed masks, int8": trainer(compiled(rls.wrap(model, integers)), []),
        "learning masks": trainer(compiled(learning), [rls.MaskTraining(16, 1.0)]),
        "TFMOT": trainer(compiled(pruned), [tfmot.sparsity.keras.UpdatePruningStep()]),
    }


def step(options: argparse.Namespace) -> None:
    """Prints a training step's cost relative to bare Keras and TFMOT."""
    print(f"One training step at batch {BATCH}; ratio to bare Keras (and to TFMOT).\n")
    head: list[str] = []
    for name in options.networks:
        functions = contenders(network(name))
        for train in functions.values():
            train(4)
        seconds: dict[str, list[float]] = {title: [] for title in functions}
        order = list(functions)
        for round_ in range(options.rounds):
            for title in order[round_ % len(order) :] + order[: round_ % len(order)]:
                started = time.perf_counter()
                functions[title](options.steps)
                seconds[title].append((time.perf_counter() - started) / options.steps)
        if not head:
            head = ["network", "bare Keras, ms", *order[1:]]
            print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        times = {title: np.array(values) for title, values in seconds.items()}
        cells = [name, f"{1e3 * np.median(times['bare Keras']):.1f}"]
        for title in order[1:]:
            own = np.median(times[title] / times["bare Keras"])
            other = np.median(times[title] / times["TFMOT"])
            cells.append(f"{own:.2f}" + ("" if title == "TFMOT" else f" ({other:.2f})"))
        print("| " + " | ".join(cells) + " |", flush=True)


# ---------------------------------------------------------------------- an episode


def searched(model: keras.Model, rows: int = 4096) -> CompressedNetwork:
    """A network that recovers by least squares at 90 % sparsity."""
    x, y = images(rows)
    training = training_data((x, y), model)
    validation = evaluation_data((x[:2000], y[:2000]), model, "validation")
    return CompressedNetwork(
        model,
        training,
        validation,
        target=rls.Target(sparsity=0.9),
        recovery=rls.Recovery(method="least_squares"),
    )


def episode(options: argparse.Namespace) -> None:
    """Prints what agent and environment take beside the evaluation of the episode's plan."""
    titles = ["network", "agent", "evaluation, s", "environment", "agent's actions", "learning"]
    print("Per search episode, relative to the evaluation of its plan.\n")
    print("| " + " | ".join([*titles, "all three"]) + " |\n|" + "---|" * 7)
    for name in options.networks:
        compressed = searched(network(name))
        for agent in ("dqn", "ppo"):
            settings = LoopSettings(
                agent=resolve_config(agent),
                reward=rls.Reward(),
                buckets=8,
                seed=0,
                warm_start=False,
            )
            compressed._known.clear()
            loop = SearchLoop(settings, compressed)
            spent = {"finish": [], "step": [], "act": [], "learn": []}

            def timing(own: Callable[..., Any], key: str, spent: Any = spent) -> Callable[..., Any]:
                def call(*arguments: Any, **keywords: Any) -> Any:
                    started = time.perf_counter()
                    try:
                        return own(*arguments, **keywords)
                    finally:
                        spent[key].append(time.perf_counter() - started)

                return call

            finish = compressed.finish
            compressed.finish = timing(finish, "finish")  # type: ignore[method-assign]
            for environment in loop.episodes.environments:
                environment.step = timing(environment.step, "step")
                environment.reset = timing(environment.reset, "step")
            loop.episodes.agent.step = timing(loop.episodes.agent.step, "act")  # type: ignore[method-assign]
            loop.episodes.agent.observe = timing(loop.episodes.agent.observe, "act")  # type: ignore[method-assign]
            loop.episodes.agent.end_episode = timing(loop.episodes.agent.end_episode, "learn")  # type: ignore
            loop.run(options.warmup, SearchProgress(options.warmup, "loss", 0))
            assert compressed.least_squares is not None
            for values in spent.values():
                values.clear()
            for total in range(options.warmup + 1, options.warmup + options.episodes + 1):
                compressed._known.clear()  # an episode that repeats a plan evaluates it, too
                loop.done = total - 1
                loop.run(total, SearchProgress(total, "loss", 0))
            del compressed.finish
            evaluation = sum(spent["finish"])
            parts = [sum(spent["step"]) - evaluation, sum(spent["act"]), sum(spent["learn"])]
            shares = [part / evaluation for part in (*parts, sum(parts))]
            each = evaluation / options.episodes
            cells = [name, agent, f"{each:.3f}", *(f"{share:.2f}" for share in shares)]
            print("| " + " | ".join(cells) + " |", flush=True)


# ---------------------------------------------------------------------- growth


def grown(layers: int) -> dict[str, float]:
    """Seconds and memory of a network of so many dense layers, 512 by 512."""
    inputs = x = keras.Input((512,))
    for _ in range(layers):
        x = keras.layers.Dense(512, activation="relu", kernel_initializer="he_normal")(x)
    model = compiled(keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x)))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4096, 512)).astype(np.float32), rng.integers(0, 10, 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    training = training_data(rows, model)
    validation = evaluation_data(tuple(part[:1000] for part in rows), model, "validation")
    compressed = CompressedNetwork(model, training, validation, target=rls.Target(sparsity=0.9))
    setup = time.perf_counter() - started
    plans = [
        rls.baselines.uniform(model, sparsity=0.9, quantize=quantize) for quantize in (False, True)
    ]
    evaluate_plan(compressed, plans[0])
    seconds = []
    for _ in range(3):
        compressed._known.clear()
        started = time.perf_counter()
        evaluate_plan(compressed, plans[1])
        seconds.append(time.perf_counter() - started)
        compressed._known.clear()
        evaluate_plan(compressed, plans[0])
    weights = sum(kernel.size for kernel in compressed.kernels)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "weights": weights,
        "setup": setup,
        "evaluation": float(np.median(seconds)),
        "megabytes": memory / 1024,
    }


def growth(options: argparse.Namespace) -> None:
    """Prints seconds and memory per million weights, each size in a process of its own."""
    print("Dense layers of 512 by 512, 90 % zeros. Linear growth means equal figures per weight.\n")
    print("| weights | set-up, s | evaluation, s | s per million weights | peak memory, MB |")
    print("|---|---|---|---|---|")
    for layers in options.layers:
        command = [sys.executable, __file__, "grown", str(layers)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        one = json.loads(output.splitlines()[-1])
        millions = one["weights"] / 1e6
        print(
            f"| {one['weights']:,} | {one['setup']:.1f} | {one['evaluation']:.2f} | "
            f"{one['evaluation'] / millions:.3f} | {one['megabytes']:,.0f} |",
            flush=True,
        )


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    names = ["LeNet-5", "ResNet", "DS-CNN", "LeNet-300-100", "dense, 1 M weights"]
    steps = commands.add_parser("step")
    steps.add_argument("--networks", nargs="+", default=names)
    steps.add_argument("--rounds", type=int, default=9)
    steps.add_argument("--steps", type=int, default=24)
    episodes = commands.add_parser("episode")
    episodes.add_argument("--networks", nargs="+", default=["LeNet-300-100", "LeNet-5", "ResNet"])
    episodes.add_argument("--warmup", type=int, default=6)
    episodes.add_argument("--episodes", type=int, default=8)
    sizes = commands.add_parser("growth")
    sizes.add_argument("--layers", type=int, nargs="+", default=[1, 4, 12, 38])
    one = commands.add_parser("grown")
    one.add_argument("layers", type=int)
    options = parser.parse_args()
    if options.command == "grown":
        print(json.dumps(grown(options.layers)))
    else:
        {"step": step, "episode": episode, "growth": growth}[options.command](options)


if __name__ == "__main__":
    main()
