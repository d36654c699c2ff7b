"""What an agent sees: named, bounded, unit-free features of a layer and the bucket at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.operations import Operation


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of the state.

    Attributes:
        name: Its name.
        low: Smallest value, -1 or 0.
        meaning: What it says.
    """

    name: str
    low: float
    meaning: str


FEATURES: tuple[Feature, ...] = (
    Feature("weight_mean", -1, "mean of the kernel's present weights / their root mean square"),
    Feature("weight_variance", 0, "present variance v against the original v0: v / (v + v0)"),
    Feature("weight_entropy", 0, "entropy of the weights' histogram (32 bins) / log 32"),
    Feature("activation_mean", -1, "mean of the layer's outputs / their root mean square"),
    Feature("activation_variance", 0, "variance v against the original v0: v / (v + v0)"),
    Feature("activation_sparsity", 0, "share of the layer's outputs that are exactly zero"),
    Feature("gradient_mean", -1, "mean of the kernel's gradient / its root mean square"),
    Feature("gradient_variance", 0, "variance v against the network's v0: v / (v + v0)"),
    Feature("reconstruction_error", 0, "autoencoder's error on this kernel's present weights"),
    Feature("network_error", 0, "the same over all kernels, weighted by size"),
    Feature("bucket_position", 0, "0 for the least salient bucket of the kernel, 1 for the most"),
    Feature("bucket_size", 0, "the bucket's share of the kernel's weights"),
    Feature("bucket_saliency", 0, "bucket's root mean square r against the kernel's k: r/(r+k)"),
    Feature("bucket_contrast", 0, "saliency of the least against the most salient group inside"),
    Feature("bucket_gradient", 0, "mean |gradient * weight| g against the kernel's k: g/(g+k)"),
    Feature("kept", 0, "share of the kernel's weights decided as Keep so far"),
    Feature("pruned", 0, "share of the kernel's weights pruned so far"),
    Feature("quantized", 0, "share of the kernel's weights quantized so far"),
    Feature("shuffled", 0, "share of the kernel's weights shuffled so far"),
    Feature("retention", 0, "how much of the dense model's metric is left"),
    Feature("loss_ratio", 0, "dense loss d against the present l: d / (d + l)"),
    Feature("target", 0, "the sparsity that is wanted"),
    Feature("budget_progress", 0, "share of the target that is met"),
    Feature("budget_pressure", 0, "weights still to prune / those that can still be pruned"),
    Feature("kernel_share", 0, "the kernel's share of all weights"),
    Feature("kernel_fan_in", 0, "log2(1 + inputs) / 16"),
    Feature("kernel_fan_out", 0, "log2(1 + outputs) / 16"),
    Feature(
        "kernel_sensitivity", 0, "dense kernel's gradient variance g against the mean m: g/(g+m)"
    ),
    Feature("kernel_depth", 0, "0 for the first kernel of the network, 1 for the last"),
    Feature("convolution", 0, "1 for convolution kernels, 0 for dense ones"),
    Feature("depthwise", 0, "1 for kernels with one input channel per output, else 0"),
)
"""The features of the state, in order; every value lies in [low, 1]."""

STATE_SIZE = len(FEATURES)


def lower_bounds() -> np.ndarray:
    """Smallest value of every feature, float32 of shape `(STATE_SIZE,)`."""
    return np.array([feature.low for feature in FEATURES], np.float32)


def describe_state(
    state: Sequence[float] | np.ndarray | None = None, print_fn: Callable[[str], None] = print
) -> None:
    """Prints the names, ranges and meanings of the features, and a state's values if given.

    Args:
        state: A state of shape `(STATE_SIZE,)`, as found in an observation's `"state"`.
        print_fn: Called with every line.

    Raises:
        ArgumentError: If the state has another size.

    Example:
        >>> rls.describe_state(time_step.observation["state"])
    """
    if state is not None and np.shape(state) != (STATE_SIZE,):
        raise ArgumentError(
            f"The state has shape {np.shape(state)}. Expected ({STATE_SIZE},): the 'state' of one "
            "observation, without a batch axis."
        )
    value_title = "" if state is None else f" {'value':>7}"
    print_fn(f"{'#':>2} {'feature':<21} {'range':<7}{value_title}  meaning")
    for index, feature in enumerate(FEATURES):
        value = "" if state is None else f" {float(state[index]):7.3f}"
        bounds = f"[{feature.low:g}, 1]"
        print_fn(f"{index:>2} {feature.name:<21} {bounds:<7}{value}  {feature.meaning}")


@dataclasses.dataclass(frozen=True)
class BucketView:
    """The bucket at hand, as the state needs it.

    Attributes:
        position: Its number.
        count: Buckets of the kernel.
        groups: Flat indices of its groups.
        saliency: Saliency of all groups of the kernel, flat (1 is the kernel's average).
        pressure: Weights still to prune / weights that can still be pruned.
    """

    position: int
    count: int
    groups: np.ndarray
    saliency: np.ndarray
    pressure: float


@np.errstate(over="ignore", invalid="ignore")  # a network that diverged has a state, too
def observe(network: CompressedNetwork, path: str, bucket: BucketView) -> np.ndarray:
    """Computes the state of a kernel and bucket.

    Args:
        network: The network being compressed; its statistics are those of the last `measure()`.
        path: The kernel's path.
        bucket: The bucket at hand.

    Returns:
        The features, float32 of shape `(STATE_SIZE,)`, finite and within bounds.
    """
    index = network.index_of(path)
    kernel, grouping = network.kernels[index], network.groupings[path]
    weights = network.effective_matrix(path)
    original = network.originals[path]
    now, dense = network.statistics[path], network.dense_statistics[path]
    all_variances = [s.gradient_variance for s in network.dense_statistics.values()]
    operations, decided = network.operations[path], network.decided[path]
    sizes = grouping.sizes

    def share(operation: Operation) -> float:
        return float(sizes[decided & (operations == operation)].sum()) / kernel.size

    flat_sizes = sizes.reshape(-1)[bucket.groups]
    saliency = bucket.saliency[bucket.groups]
    first_order = grouping.sum_numpy(np.abs(now.gradient * network.latent_matrix(path)))
    in_bucket = float(first_order.reshape(-1)[bucket.groups].sum()) / max(1, flat_sizes.sum())
    in_kernel = float(first_order.sum()) / kernel.size
    owner = type(kernel.owner).__name__
    outcome = network.outcome
    values = {
        "weight_mean": _over(weights.mean(), math.sqrt(float(np.mean(weights**2)))),
        "weight_variance": _against(weights.var(), original.var()),
        "weight_entropy": _entropy(weights, float(np.abs(original).max())),
        "activation_mean": _over(
            now.activation_mean, math.hypot(math.sqrt(now.activation_variance), now.activation_mean)
        ),
        "activation_variance": _against(now.activation_variance, dense.activation_variance),
        "activation_sparsity": now.activation_sparsity,
        "gradient_mean": _over(
            now.gradient_mean, math.hypot(math.sqrt(now.gradient_variance), now.gradient_mean)
        ),
        "gradient_variance": _against(now.gradient_variance, float(np.mean(all_variances))),
        "reconstruction_error": network.errors[path],
        "network_error": outcome.reconstruction_error,
        "bucket_position": bucket.position / max(1, bucket.count - 1),
        "bucket_size": float(flat_sizes.sum()) / kernel.size,
        "bucket_saliency": _against(
            math.sqrt(float((flat_sizes * saliency**2).sum()) / max(1, flat_sizes.sum())), 1.0
        ),
        "bucket_contrast": _over(saliency.min(), saliency.max()) if len(saliency) else 0.0,
        "bucket_gradient": _against(in_bucket, in_kernel),
        "kept": share(Operation.KEEP),
        "pruned": share(Operation.PRUNE),
        "quantized": share(Operation.QUANTIZE),
        "shuffled": share(Operation.SHUFFLE),
        "retention": outcome.retention,
        "loss_ratio": _against(network.dense.loss, outcome.loss),
        "target": outcome.target_sparsity,
        "budget_progress": network.budget.progress,
        "budget_pressure": bucket.pressure,
        "kernel_share": kernel.size / network.budget.elements,
        "kernel_fan_in": math.log2(1 + grouping.inputs) / 16,
        "kernel_fan_out": math.log2(1 + grouping.outputs) / 16,
        "kernel_sensitivity": _against(dense.gradient_variance, float(np.mean(all_variances))),
        "kernel_depth": index / max(1, len(network.kernels) - 1),
        "convolution": float("Conv" in owner),
        "depthwise": float("depthwise" in kernel.spec.attribute or "Depthwise" in owner),
    }
    state = np.array([values[feature.name] for feature in FEATURES], np.float32)
    return np.clip(np.nan_to_num(state, nan=0.0, posinf=1.0, neginf=-1.0), lower_bounds(), 1.0)


def _over(value: float, scale: float) -> float:
    return float(value) / float(scale) if scale > 0 else 0.0


def _against(value: float, reference: float) -> float:
    total = abs(float(value)) + abs(float(reference))
    return abs(float(value)) / total if total > 0 else 0.5


def _entropy(weights: np.ndarray, largest: float) -> float:
    if largest <= 0:
        return 0.0
    clipped = np.clip(weights, -largest, largest)
    counts, _ = np.histogram(clipped, bins=32, range=(-largest, largest))
    shares = counts[counts > 0] / weights.size
    return float(-(shares * np.log(shares)).sum() / math.log(32))
