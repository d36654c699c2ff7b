"""What both agents see: named, bounded, unit-free features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rl_sparsity_tf.environment.group_ranks import NAMES
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.operations import Operation


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of the state, from `low`, which is -1 or 0, up to 1."""

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
    Feature("output_error", 0, "how far the layer's outputs moved so far (least squares, else 0)"),
    Feature("network_output_error", 0, "the same, mean over all kernels"),
    Feature("bucket_position", 0, "0 for the least salient bucket of the kernel, 1 for the most"),
    Feature("bucket_size", 0, "the bucket's share of the kernel's weights"),
    Feature("bucket_saliency", 0, "bucket's root mean square r against the kernel's k: r/(r+k)"),
    Feature("bucket_contrast", 0, "saliency of the least against the most salient group inside"),
    Feature("bucket_gradient", 0, "mean |gradient * weight| g against the kernel's k: g/(g+k)"),
    Feature(
        "bucket_mask_gradient",
        -1,
        "mean gradient of the loss by the groups' masks / mean of its magnitude in the kernel",
    ),
    Feature(
        "bucket_lamp",
        0,
        "mean of s/(s+t): LAMP's score s, and t where it cuts what is left to prune",
    ),
    Feature("bucket_magnitude", 0, "the same with squared weights: below 1/2 they would go"),
    Feature("bucket_output_price", 0, "the same with what a weight adds to the layer's outputs"),
    Feature("kept", 0, "share of the kernel's weights decided as Keep so far"),
    Feature("pruned", 0, "share of the kernel's weights pruned so far"),
    Feature("quantized", 0, "share of the kernel's weights quantized so far"),
    Feature("shuffled", 0, "share of the kernel's weights shuffled so far"),
    Feature("retention", 0, "how much of the dense model's metric is left"),
    Feature("loss_ratio", 0, "dense loss d against the present l: d / (d + l)"),
    Feature("target", 0, "the sparsity that is wanted"),
    Feature("budget_progress", 0, "share of the target that is met"),
    Feature("budget_pressure", 0, "weights still to prune / those that can still be pruned"),
    Feature("goal", 0, "share of the kernel's weights that is to be pruned"),
    Feature("goal_progress", 0, "share of that goal that is met"),
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

_BINS = 32


def lower_bounds(features: Sequence[Feature]) -> np.ndarray:
    """Smallest value of every feature, float32."""
    return np.array([feature.low for feature in features], np.float32)


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
        >>> rls.describe_state()
         # feature               range    meaning
         0 weight_mean           [-1, 1]  mean of the kernel's present weights / ...
        ...
    """
    print_features(FEATURES, state, print_fn)


def print_features(
    features: Sequence[Feature],
    state: Sequence[float] | np.ndarray | None,
    print_fn: Callable[[str], None],
) -> None:
    """Prints a line for every feature, with its value if there is a state.

    Raises ArgumentError if the state has another size.
    """
    if state is not None and np.shape(state) != (len(features),):
        raise ArgumentError(
            f"The state has shape {np.shape(state)}. Expected ({len(features)},): the 'state' of "
            "one observation, without a batch axis."
        )
    width = 1 + max(len(feature.name) for feature in features)
    value_title = "" if state is None else f" {'value':>7}"
    print_fn(f"{'#':>2} {'feature':<{width}} {'range':<7}{value_title}  meaning")
    for index, feature in enumerate(features):
        value = "" if state is None else f" {float(state[index]):7.3f}"
        bounds = f"[{feature.low:g}, 1]"
        print_fn(f"{index:>2} {feature.name:<{width}} {bounds:<7}{value}  {feature.meaning}")


@dataclasses.dataclass(frozen=True)
class BucketView:
    """The bucket at hand, as the state needs it.

    Attributes:
        position: Its number, from 0.
        count: Buckets of the kernel.
        groups: Flat indices of its groups.
        saliency: Saliency of all groups of the kernel, flat (1 is the kernel's average).
        pressure: Weights still to prune / weights that can still be pruned.
        goal: Share of the kernel's weights that is to be pruned.
    """

    position: int
    count: int
    groups: np.ndarray
    saliency: np.ndarray
    pressure: float
    goal: float


@np.errstate(over="ignore", invalid="ignore")  # a network that diverged has a state, too
def observe(network: CompressedNetwork, path: str, bucket: BucketView) -> np.ndarray:
    """The state of a kernel and bucket: float32 of shape `(STATE_SIZE,)`, finite and within bounds.

    The network's statistics are those of the last `measure()`.
    """
    index = network.index_of(path)
    kernel, grouping = network.kernels[index], network.groupings[path]
    weights = network.effective_matrix(path)
    original, fixed = network.original_moments[path], _of_kernel(network, index)
    now, dense = network.statistics[path], network.dense_statistics[path]
    decided = network.decided[path]
    done = np.bincount(
        network.operations[path][decided], grouping.sizes[decided], minlength=len(Operation)
    )
    mean, square = float(weights.mean()), float(np.vdot(weights, weights)) / weights.size

    flat_sizes = grouping.sizes.reshape(-1)[bucket.groups]
    saliency = bucket.saliency[bucket.groups]
    first_order, by_mask = network.first_order(path)
    in_bucket = float(first_order[bucket.groups].sum()) / max(1, flat_sizes.sum())
    in_kernel = float(first_order.sum()) / kernel.size
    group_ranks = network.group_ranks
    values = _of_network(network) | {
        "weight_mean": _over(mean, math.sqrt(square)),
        "weight_variance": against(square - mean**2, original.variance),
        "weight_entropy": _entropy(weights, original.largest),
        "activation_mean": _over(
            now.activation_mean, math.hypot(math.sqrt(now.activation_variance), now.activation_mean)
        ),
        "activation_variance": against(now.activation_variance, dense.activation_variance),
        "activation_sparsity": now.activation_sparsity,
        "gradient_mean": _over(
            now.gradient_mean, math.hypot(math.sqrt(now.gradient_variance), now.gradient_mean)
        ),
        "gradient_variance": against(now.gradient_variance, _mean_variance(network)),
        "reconstruction_error": network.errors[path],
        "output_error": network.output_errors[path],
        "bucket_position": bucket.position / max(1, bucket.count - 1),
        "bucket_size": float(flat_sizes.sum()) / kernel.size,
        "bucket_saliency": against(
            math.sqrt(float((flat_sizes * saliency**2).sum()) / max(1, flat_sizes.sum())), 1.0
        ),
        "bucket_contrast": _over(saliency.min(), saliency.max()) if len(saliency) else 0.0,
        "bucket_gradient": against(in_bucket, in_kernel),
        "bucket_mask_gradient": _over(
            float(by_mask[bucket.groups].mean()) if len(bucket.groups) else 0.0,
            float(np.abs(by_mask).mean()),
        ),
        "bucket_lamp": _mean(group_ranks.of("lamp", path, bucket.groups)),
        "bucket_magnitude": _mean(group_ranks.of("global_magnitude", path, bucket.groups)),
        "bucket_output_price": _mean(group_ranks.of("output_price", path, bucket.groups)),
        "kept": done[Operation.KEEP] / kernel.size,
        "pruned": done[Operation.PRUNE] / kernel.size,
        "quantized": done[Operation.QUANTIZE] / kernel.size,
        "shuffled": done[Operation.SHUFFLE] / kernel.size,
        "budget_pressure": bucket.pressure,
        "goal": bucket.goal,
        "goal_progress": _over(done[Operation.PRUNE] / kernel.size, bucket.goal)
        if bucket.goal > 0
        else 1.0,
        "kernel_share": fixed["share"],
        "kernel_fan_in": fixed["fan_in"],
        "kernel_fan_out": fixed["fan_out"],
        "kernel_sensitivity": fixed["sensitivity"],
        "kernel_depth": fixed["depth"],
        "convolution": fixed["convolution"],
        "depthwise": fixed["depthwise"],
    }
    return state_of(FEATURES, values)


def _of_network(network: CompressedNetwork) -> dict[str, float]:
    """What both agents see of the whole network."""
    outcome = network.outcome
    return {
        "target": outcome.target_sparsity,
        "budget_progress": network.budget.progress,
        "network_error": outcome.reconstruction_error,
        "network_output_error": outcome.output_error,
        "retention": outcome.retention,
        "loss_ratio": against(network.dense.loss, outcome.loss),
    }


def _of_kernel(network: CompressedNetwork, index: int) -> dict[str, float]:
    """What both agents see of a kernel whatever was decided."""
    kernel, grouping = network.kernels[index], network.groupings[network.kernels[index].path]
    owner = type(kernel.owner).__name__
    variance = network.dense_statistics[kernel.path].gradient_variance
    return {
        "share": kernel.size / network.budget.elements,
        "fan_in": math.log2(1 + grouping.inputs) / 16,
        "fan_out": math.log2(1 + grouping.outputs) / 16,
        "sensitivity": against(variance, _mean_variance(network)),
        "depth": index / max(1, len(network.kernels) - 1),
        # By name: of a class that the user registered, no operator of TFLite is known.
        "convolution": float("Conv" in owner),
        "depthwise": float("depthwise" in kernel.spec.attribute or "Depthwise" in owner),
    }


def _mean_variance(network: CompressedNetwork) -> float:
    return float(np.mean([one.gradient_variance for one in network.dense_statistics.values()]))


def state_of(features: Sequence[Feature], values: Mapping[str, float]) -> np.ndarray:
    """The values in the features' order: float32, finite and within bounds."""
    state = np.array([values[feature.name] for feature in features], np.float32)
    finite = np.nan_to_num(state, nan=0.0, posinf=1.0, neginf=-1.0)
    return np.clip(finite, lower_bounds(features), 1.0)


def _over(value: float, scale: float) -> float:
    return float(value) / float(scale) if scale > 0 else 0.0


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.5


def against(value: float, reference: float) -> float:
    """A magnitude v against another r, without units: v / (v + r), in [0, 1]."""
    total = abs(float(value)) + abs(float(reference))
    return abs(float(value)) / total if total > 0 else 0.5


def _entropy(weights: np.ndarray, largest: float) -> float:
    if largest <= 0:
        return 0.0
    # Several times faster than np.histogram on equal bins.
    bins = ((weights + largest) * (_BINS / (2.0 * largest))).astype(np.int32)
    counts = np.bincount(np.clip(bins, 0, _BINS - 1).reshape(-1), minlength=_BINS)
    shares = counts[counts > 0] / weights.size
    return float(-(shares * np.log(shares)).sum() / math.log(_BINS))


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
        >>> rls.describe_selection_state()
         # feature               range    meaning
         0 slot_0_present        [0, 1]   1 if the slot holds a kernel, else 0, ...
        ...
    """
    print_features(SELECTION_FEATURES, state, print_fn)


def static_features(network: CompressedNetwork, index: int) -> dict[str, float]:
    """What is seen of a kernel whatever was decided: [SLOT_FEATURES][] but for `share_left`."""
    kernel = network.kernels[index]
    path = kernel.path
    spread = [moments.variance for moments in network.original_moments.values()]
    sizes = network.groupings[path].sizes.reshape(-1)
    gone = [
        float(sizes[network.group_ranks.of(name, path) < 0.5].sum()) / kernel.size for name in NAMES
    ]
    return _of_kernel(network, index) | {
        "present": 1.0,
        "variance": against(network.original_moments[path].variance, float(np.mean(spread))),
        "activity": 1.0 - network.dense_statistics[path].activation_sparsity,
        "integers": float(kernel.spec.exports_int8),
        "capacity": int(network.budget.capacity[index]) / kernel.size,
        "lamp": gone[NAMES.index("lamp")],
        "magnitude": gone[NAMES.index("global_magnitude")],
        "output_price": gone[NAMES.index("output_price")],
    }


@np.errstate(over="ignore", invalid="ignore")  # a network that diverged has a state, too
def observe_selection(
    network: CompressedNetwork,
    static: Sequence[dict[str, float]],
    undecided: Sequence[int],
    density: float,
    pressure: float,
) -> np.ndarray:
    """The state before a kernel is chosen, finite and within bounds.

    It is float32 of shape `(SELECTION_STATE_SIZE,)`. `static` has the [static_features][] of every
    kernel; `undecided` has the undecided kernels' indices, those in the slots first. `density` is
    what the target leaves of their weights, and `pressure` is weights still to prune / those that
    they can still give.
    """
    left = sum(network.kernels[index].size for index in undecided)
    whole = sum(kernel.size for kernel in network.kernels)
    values = dict.fromkeys((feature.name for feature in SELECTION_FEATURES), 0.0)
    for slot, index in enumerate(undecided[:SLOTS]):
        seen = static[index] | {"share_left": network.kernels[index].size / left}
        values |= {f"slot_{slot}_{name}": value for name, value in seen.items()}
    values |= _of_network(network) | {
        "budget_pressure": pressure,
        "mean_density": density,
        "weights_decided": 1.0 - left / whole,
        "kernels_decided": 1.0 - len(undecided) / len(network.kernels),
        "stored_bits": network.outcome.stored_bits,
    }
    return state_of(SELECTION_FEATURES, values)
