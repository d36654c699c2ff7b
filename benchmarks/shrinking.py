"""Does a shrunk model compute what the masked one did? Ten architectures of keras.applications.

Every set of tied channels that need not stay keeps a random part of its channels; the weights are
random, batch normalization included. Prints how many sets there are and how many stay, what is left
of weights and multiplications, and how far the shrunk model's outputs are from the masked one's.

    python benchmarks/shrinking.py --share 0.6
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.groups import find_groups
from rl_sparsity_tf.channels.units import mask_channels

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

ARCHITECTURES = {
    "VGG16": 32,
    "ResNet50": 64,
    "ResNet50V2": 64,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "EfficientNetB0": 64,
    "DenseNet121": 64,
    "InceptionV3": 80,
    "Xception": 80,
}
"""Names and sizes of the images."""


def network(name: str, rng: np.random.Generator) -> keras.Model:
    """An architecture with random weights."""
    size = ARCHITECTURES[name]
    # Without softmax, behind which differences between untrained outputs would all but vanish.
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            positive = ("gamma", "variance")
            layer.set_weights(
                [
                    rng.uniform(0.5, 1.5, weight.shape)
                    if any(part in weight.name for part in positive)
                    else rng.normal(0, 0.2, weight.shape)
                    for weight in layer.weights
                ]
            )
    return model


def run(name: str, share: float, rows: int) -> dict[str, Any]:
    """Masks, shrinks and compares one architecture."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = network(name, rng)
    groups = find_groups(model)
    live = {
        group.index: np.append(rng.random(group.size - 1) < share, True)
        for group in groups
        if group.frozen is None
    }
    masked = mask_channels(model, live)
    small = rls.shrink(masked)
    x = rng.normal(size=(rows, *model.input_shape[1:])).astype(np.float32)
    expected, found = (one.predict(x, verbose=0) for one in (masked, small))
    return {
        "sets": len(groups),
        "stay": sum(group.frozen is not None for group in groups),
        "weights": small.count_params() / model.count_params(),
        "macs": rls.count_macs(small) / rls.count_macs(model),
        "difference": float(np.abs(found - expected).max() / np.ptp(expected)),
        "top1": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.6, help="of the channels that live")
    parser.add_argument("--rows", type=int, default=1024)
    options = parser.parse_args()
    print("| architecture | sets of channels (stay) | weights | multiplications |", end="")
    print(" difference / range | same top-1 |")
    print("|---|---|---|---|---|---|")
    for name in ARCHITECTURES:
        row = run(name, options.share, options.rows)
        print(
            f"| {name} | {row['sets']} ({row['stay']}) | {row['weights']:.2f} | {row['macs']:.2f} "
            f"| {row['difference']:.1e} | {row['top1']:.1%} |",
            flush=True,
        )
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
