"""Files as version 0.1.0 wrote them, which later versions have to read: what they were made of.

`python tests/helpers/earlier_files.py <folder>` writes such files with the present version. Those
in `fixtures/0.1.0` are kept as they are: when a format changes, add a folder for the new version.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import rl_sparsity_tf as rls

# isort: split
import tf_keras as keras

from rl_sparsity_tf.channels.latency_table import LayerLatency

AGENT = rls.DQN(hidden_layers=(8,), train_steps=4, batch_size=8, replay_capacity=64)
EPISODES = 4
PLAYED = 2
"""Episodes that the run in the fixtures was cut off after."""


class CutOffError(Exception):
    """Raised in the middle of an episode."""


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes; small fractions of two, so that every machine has the same bits."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = (rng.integers(-16, 17, (count, 6)) / 16).astype(np.float32)
    x[np.arange(count), y] += 1.5
    return x, y


def network() -> keras.Model:
    """A network that tells the classes apart, without training: kernels of 6 x 8 and 8 x 3."""
    model = keras.Sequential(
        [
            keras.layers.Input((6,), name="given"),
            keras.layers.Dense(8, activation="relu", name="first"),
            keras.layers.Dense(3, activation="softmax", name="last"),
        ],
        name="earlier",
    )
    rng = np.random.default_rng(7)
    noise = [(2 * rng.integers(-8, 8, value.shape) + 1) / 64 for value in model.get_weights()]
    model.set_weights([value + (np.eye(*value.shape) if value.ndim == 2 else 0) for value in noise])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def plan() -> rls.CompressionPlan:
    """All four operations in the first kernel; blocks of 4 and 8 bits in the last."""
    operations = np.full((6, 8), rls.Operation.KEEP, np.uint8)
    operations[::3] = rls.Operation.PRUNE
    operations[1, ::2] = rls.Operation.QUANTIZE
    operations[4, :3] = rls.Operation.SHUFFLE
    blocks = np.array([[1, 2, 2], [2, 1, 2]], np.uint8)
    return rls.CompressionPlan(
        [
            rls.KernelPlan("first/kernel", (6, 8), "io", "element", 8, operations),
            rls.KernelPlan("last/kernel", (8, 3), "io", "block4", 8, blocks),
        ]
    )


RULES = {
    "format_version": 1,
    "kernels": [
        {"path": "last/*", "pattern": "2:4", "quantize": True, "bits": 4},
        {"path": "*", "sparsity": 0.5, "method": "magnitude", "group": "channel"},
    ],
}


def table() -> rls.LatencyTable:
    """Times of the network's layers, made up."""

    def times(inputs: int, outputs: int, activation: str) -> LayerLatency:
        grid = [np.arange(1, width + 1) for width in (inputs, outputs)]
        return LayerLatency(
            kind=f"Dense(use_bias=true, {activation}) on 1",
            inputs=grid[0],
            outputs=grid[1],
            ms=np.outer(*grid) / 64,
            spread=0.03125,
        )

    return rls.LatencyTable(
        device="a test",
        quantization="int8",
        threads=1,
        xnnpack=True,
        layers={"first": times(6, 8, "relu"), "last": times(8, 3, "softmax")},
        overhead_ms=0.25,
        spread=0.0625,
    )


def compressor(folder: Path) -> rls.Compressor:
    """The search that was cut off."""
    return rls.Compressor(
        network(),
        rls.Target(sparsity=0.5),
        agent=AGENT,
        directory=folder,
        recovery=rls.Recovery(method="finetune", steps=1),
        buckets=3,
    )


def search(one: rls.Compressor, episodes: int = EPISODES) -> rls.Result:
    """Its call."""
    return one.search(
        rows(96, 1),
        validation_data=rows(60, 2),
        episodes=episodes,
        batch_size=32,
        finetune_epochs=1,
        finalists=1,
        verbose=0,
    )


def facts(folder: Path) -> dict[str, Any]:
    """What the files were when they were written."""
    wrapped = rls.load_model(folder / "wrapped.keras")
    policy = rls.Compressor(network(), policy=folder / "policy.npz").policy
    assert policy is not None
    return {
        "version": rls.__version__,
        "outputs": wrapped.predict(rows(4, 3)[0], verbose=0).tolist(),
        "policy": policy.digest,
        "policy_sum": float(sum(np.abs(weight).sum() for weight in policy.weights)),
    }


def write(folder: Path) -> None:
    """Writes all of them into an empty folder."""
    model = network()
    for name, train_masks in (("wrapped", False), ("learning", True)):
        rls.wrap(model, plan(), train_masks=train_masks).save(folder / f"{name}.keras")
    plan().save(folder / "plan.json")
    rules = rls.CompressionPlan.from_dict(RULES)
    rules.save(folder / "rules.json")
    table().save(folder / "latency.json")
    _cut_off(folder / "run")
    one = compressor(folder / "whole")
    search(one, episodes=1).save_policy(folder / "policy.npz")
    shutil.rmtree(folder / "whole")
    (folder / "facts.json").write_text(json.dumps(facts(folder), indent=2) + "\n")


def _cut_off(folder: Path) -> None:
    taken, step = 0, rls.LayerEnvironment._step

    def stopping(self: rls.LayerEnvironment, action: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > PLAYED * 2 * 3 + 2:  # kernels, buckets
            raise CutOffError
        return step(self, action)

    rls.LayerEnvironment._step = stopping
    with contextlib.suppress(CutOffError):
        search(compressor(folder))
    rls.LayerEnvironment._step = step


if __name__ == "__main__":
    write(Path(sys.argv[1]))
