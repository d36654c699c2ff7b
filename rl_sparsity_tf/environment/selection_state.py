"""What the agent that chooses layers sees: the next kernels side by side, and the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from rl_sparsity_tf.environment.features import Feature, against, print_features
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.standings import NAMES

SLOTS = 4
"""Kernels that are seen at a time."""

SLOT_FEATURES: tuple[Feature, ...] = (
    Feature("present", 0, "1 if the slot holds a kernel, else 0, as all that follows"),
    Feature("share", 0, "the kernel's share of all weights"),
    Feature("share_left", 0, "the kernel's share of the undecided weights"),
    Feature("fan_in", 0, "log2(1 + inputs) / 16"),
    Feature("fan_out", 0, "log2(1 + outputs) / 16"),
    Feature("sensitivity", 0, "gradient variance g against the kernels' mean m: g/(g+m)"),
    Feature("variance", 0, "variance of the original weights v against the mean m: v/(v+m)"),
    Feature("activity", 0, "share of the dense layer's outputs that are not zero"),
    Feature("depth", 0, "0 for the first kernel of the network, 1 for the last"),
    Feature("convolution", 0, "1 for convolution kernels, 0 for dense ones"),
    Feature("depthwise", 0, "1 for kernels with one input channel per output, else 0"),
    Feature("integers", 0, "1 if it can be stored as int8, else 0"),
    Feature("capacity", 0, "share of its weights that can be pruned at most"),
    Feature("lamp", 0, "share of its weights that LAMP would prune"),
    Feature("magnitude", 0, "share of its weights that the magnitudes would prune"),
    Feature("output_price", 0, "the same by what a weight adds to the layer's outputs"),
)
"""What is seen of every slot's kernel."""

NETWORK_FEATURES: tuple[Feature, ...] = (
    Feature("target", 0, "the sparsity that is wanted"),
    Feature("budget_progress", 0, "share of the target that is met"),
    Feature("budget_pressure", 0, "weights still to prune / those that can still be pruned"),
    Feature("mean_density", 0, "share of the undecided weights that the target leaves"),
    Feature("weights_decided", 0, "share of the weights in kernels that were decided"),
    Feature("kernels_decided", 0, "share of the kernels that were decided"),
    Feature("network_error", 0, "autoencoder's error on the present weights"),
    Feature("network_output_error", 0, "how far the layers' outputs moved (least squares, else 0)"),
    Feature("retention", 0, "how much of the dense model's metric is left"),
    Feature("loss_ratio", 0, "dense loss d against the present l: d / (d + l)"),
    Feature("stored_bits", 0, "what is stored, as a share of the dense float32 network"),
)
"""What is seen of the network."""

SELECTION_FEATURES: tuple[Feature, ...] = (
    *(
        Feature(f"slot_{slot}_{feature.name}", feature.low, feature.meaning)
        for slot in range(SLOTS)
        for feature in SLOT_FEATURES
    ),
    *NETWORK_FEATURES,
)
"""The features of the state, in order; every value lies in [low, 1]."""

SELECTION_STATE_SIZE = len(SELECTION_FEATURES)


def describe_selection_state(
    state: Sequence[float] | np.ndarray | None = None, print_fn: Callable[[str], None] = print
) -> None:
    """Prints the features of [LayerSelectionEnvironment][rl_sparsity_tf.LayerSelectionEnvironment].

    Args:
        state: A state of shape `(SELECTION_STATE_SIZE,)`, whose values are printed too.
        print_fn: Called with every line.

    Raises:
        ArgumentError: If the state has another size.

    Example:
        >>> rls.describe_selection_state(time_step.observation["state"])
    """
    print_features(SELECTION_FEATURES, state, print_fn)


def portrait(network: CompressedNetwork, index: int) -> dict[str, float]:
    """What is seen of a kernel whatever was decided: the static ones of [SLOT_FEATURES][].

    Args:
        network: The network.
        index: The kernel's place in it.
    """
    kernel = network.kernels[index]
    path, grouping = kernel.path, network.groupings[kernel.path]
    variances = [one.gradient_variance for one in network.dense_statistics.values()]
    spread = [moments.variance for moments in network.original_moments.values()]
    owner = type(kernel.owner).__name__
    sizes = grouping.sizes.reshape(-1)
    gone = [
        float(sizes[network.standings.of(name, path) < 0.5].sum()) / kernel.size for name in NAMES
    ]
    return {
        "present": 1.0,
        "share": kernel.size / network.budget.elements,
        "fan_in": math.log2(1 + grouping.inputs) / 16,
        "fan_out": math.log2(1 + grouping.outputs) / 16,
        "sensitivity": against(
            network.dense_statistics[path].gradient_variance, float(np.mean(variances))
        ),
        "variance": against(network.original_moments[path].variance, float(np.mean(spread))),
        "activity": 1.0 - network.dense_statistics[path].activation_sparsity,
        "depth": index / max(1, len(network.kernels) - 1),
        "convolution": float("Conv" in owner),
        "depthwise": float("depthwise" in kernel.spec.attribute or "Depthwise" in owner),
        "integers": float(kernel.spec.exports_int8),
        "capacity": int(network.budget.capacity[index]) / kernel.size,
        "lamp": gone[NAMES.index("lamp")],
        "magnitude": gone[NAMES.index("global_magnitude")],
        "output_price": gone[NAMES.index("output_price")],
    }


@np.errstate(over="ignore", invalid="ignore")  # a network that diverged has a state, too
def observe_selection(
    network: CompressedNetwork,
    portraits: Sequence[dict[str, float]],
    undecided: Sequence[int],
    density: float,
    pressure: float,
) -> np.ndarray:
    """Computes the state.

    Args:
        network: The network being compressed.
        portraits: What [portrait][] gives for every kernel of the network.
        undecided: Indices of the undecided kernels, those in the slots first.
        density: What the target leaves of them.
        pressure: Weights still to prune / those that they can still give.

    Returns:
        The features, float32 of shape `(SELECTION_STATE_SIZE,)`, finite and within bounds.
    """
    left = sum(network.kernels[index].size for index in undecided)
    whole = sum(kernel.size for kernel in network.kernels)
    values = [0.0] * (SLOTS * len(SLOT_FEATURES))
    for slot, index in enumerate(undecided[:SLOTS]):
        seen = {**portraits[index], "share_left": network.kernels[index].size / left}
        start = slot * len(SLOT_FEATURES)
        values[start : start + len(SLOT_FEATURES)] = [seen[one.name] for one in SLOT_FEATURES]
    outcome = network.outcome
    seen = {
        "target": outcome.target_sparsity,
        "budget_progress": network.budget.progress,
        "budget_pressure": pressure,
        "mean_density": density,
        "weights_decided": 1.0 - left / whole,
        "kernels_decided": 1.0 - len(undecided) / len(network.kernels),
        "network_error": outcome.reconstruction_error,
        "network_output_error": outcome.output_error,
        "retention": outcome.retention,
        "loss_ratio": against(network.dense.loss, outcome.loss),
        "stored_bits": outcome.stored_bits,
    }
    values += [seen[feature.name] for feature in NETWORK_FEATURES]
    state = np.array(values, np.float32)
    low = np.array([feature.low for feature in SELECTION_FEATURES], np.float32)
    return np.clip(np.nan_to_num(state, nan=0.0, posinf=1.0, neginf=-1.0), low, 1.0)
