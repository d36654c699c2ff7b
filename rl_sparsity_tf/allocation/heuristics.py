"""Heuristics that allocate without evaluating a plan, and `wrap`, which takes one by its name.

Users know them as `rls.baselines`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.allocation import ranking
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.console import without_traces
from rl_sparsity_tf.data.batches import training_data
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.metrics import choose_metric, search_compile_arguments
from rl_sparsity_tf.errors import ArgumentError, DataError, check_choice
from rl_sparsity_tf.layers import wrapping
from rl_sparsity_tf.layers.copy_checks import check_figures
from rl_sparsity_tf.layers.groups import PATTERNS
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelRule
from rl_sparsity_tf.layers.rules import Patterns, apply_rule
from rl_sparsity_tf.training.statistics import StatisticsCollector

# Rows that a gradient is averaged over, and the batches in which arrays are read for it.
_ROWS, _BATCHES = 4096, 64


def uniform(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """The same density in every kernel, to the nearest group; smallest groups first.

    The arguments are those of every function of this [module][rl_sparsity_tf.baselines].

    Example:
        >>> plan = rls.baselines.uniform(model, sparsity=0.8, group="channel")
    """
    return _heuristic(
        "uniform", model, data, target, sparsity, group, quantize, bits, include, exclude
    )


def erk(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    r"""Erdos-Renyi-kernel densities: small kernels stay denser than large ones.

    Evci et al. 2020, "Rigging the lottery: making all tickets winners", arXiv 1911.11134, section
    3: the density of a kernel of shape \((w, h, n_{l-1}, n_l)\) is in proportion to
    \((n_{l-1} + n_l + w + h) / (n_{l-1} n_l w h)\), the sum of its dimensions over their product.
    Kernels whose density would pass 1 are kept whole, and the factor is computed anew for the
    others. Within a kernel the smallest groups go first.

    The arguments are those of every function of this [module][rl_sparsity_tf.baselines].

    Example:
        >>> plan = rls.baselines.erk(model, sparsity=0.9)
        >>> {path: round(entry.sparsity, 2) for path, entry in plan.kernels.items()}
        {'conv/kernel': 0.34, 'hidden/kernel': 0.92, 'classes/kernel': 0.53}
    """
    return _heuristic("erk", model, data, target, sparsity, group, quantize, bits, include, exclude)


def global_magnitude(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """The smallest groups of the whole network, by the mean square of their weights.

    Kernels compete at their own scales: one of small weights loses most of them. Han et al. 2015,
    "Learning both weights and connections", arXiv 1506.02626, with one threshold for all layers.

    The arguments are those of every function of this [module][rl_sparsity_tf.baselines].

    Example:
        >>> plan = rls.baselines.global_magnitude(model, target=rls.Target(gzip_bytes=20_000))
    """
    return _heuristic(
        "global_magnitude", model, data, target, sparsity, group, quantize, bits, include, exclude
    )


def lamp(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    r"""Layer-adaptive magnitude: what a group weighs among those of its kernel that outlive it.

    Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning", arXiv 2010.07611,
    equation 2: with the groups of a kernel sorted by norm, group u scores
    \(\|W_u\|^2 / \sum_{v \ge u} \|W_v\|^2\), and the lowest scores of the network go. The largest
    group of a kernel scores 1, so that scale does not matter.

    The arguments are those of every function of this [module][rl_sparsity_tf.baselines].

    Example:
        >>> plan = rls.baselines.lamp(model, target=rls.Target(tflite_bytes=50_000))
        >>> small = rls.strip(rls.wrap(model, plan))
        >>> report = rls.export_tflite(small, "small.tflite", plan=plan, formats="raw")
        >>> report.tflite_bytes <= 50_000
        True
    """
    return _heuristic(
        "lamp", model, data, target, sparsity, group, quantize, bits, include, exclude
    )


def first_order(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    r"""The groups whose removal changes the loss least, to first order.

    A group scores `abs(sum_i g_i w_i)` over its weights, with the gradient g of the compiled loss
    averaged over up to 4,096 rows of the data. That is the root of the group contribution of
    Molchanov et al. 2019, "Importance estimation for neural network pruning", arXiv 1906.10771,
    section 3; for single weights it is the connection sensitivity of SNIP (Lee et al. 2019, arXiv
    1810.02340) on a trained network.

    The arguments are those of every function of this [module][rl_sparsity_tf.baselines]; the model
    has to be compiled, and data is needed. Of a dataset the first batches count, 64 at most.

    Example:
        >>> plan = rls.baselines.first_order(model, (x, y), sparsity=0.8)
    """
    return _heuristic(
        "first_order", model, data, target, sparsity, group, quantize, bits, include, exclude
    )


def mean_gradients(
    model: keras.Model, data: Any, include: Patterns | None = None
) -> dict[str, np.ndarray]:
    """The mean gradient of the compiled loss by every kernel, over up to 4,096 rows.

    Gradients are by path and viewed as `(inputs, outputs)`. The model is not wrapped, and not
    changed; `include` says which kernels, by default all that are not frozen. Data that cannot be
    used, or that nothing depends on, raises a DataError; a model that is not compiled with a loss
    raises a ModelError.
    """
    search_compile_arguments(model, 1e-3)  # says in words what is missing
    pool = training_data(data, model, batch_size=_ROWS // _BATCHES, pool_size=_BATCHES).pool
    wrapped = wrapping.wrap(model, include=include)
    wrapped.compile(**search_compile_arguments(wrapped, 1e-3))
    choose_metric(wrapped, pool[0], "loss")  # says in words what a loss does not take
    check_figures(model, wrapped, pool[0])
    statistics = StatisticsCollector(wrapped)(_first_rows(pool))
    gradients = {path: one.gradient for path, one in statistics.items()}
    if not any(gradient.any() for gradient in gradients.values()):
        raise DataError(
            f"The gradient of the loss of model {model.name!r} is zero in every kernel, so that "
            "first_order cannot tell groups apart. Expected data with examples that the model "
            "does not fit perfectly yet; lamp needs no data."
        )
    return gradients


def _first_rows(pool: Sequence[Batch]) -> list[Batch]:
    """As many batches as it takes to have enough rows; all of them have the same number."""
    rows = len(tf.nest.flatten(pool[0][0])[0])
    return list(pool[: -(-_ROWS // rows)])


def _heuristic(
    name: str,
    model: keras.Model,
    data: Any,
    target: Target | None,
    sparsity: float | None,
    group: str,
    quantize: bool | None,
    bits: int,
    include: Patterns | None,
    exclude: Patterns | None,
) -> CompressionPlan:
    request = PlanRequest.of(
        model,
        target,
        sparsity=sparsity,
        group=group,
        quantize=quantize,
        bits=bits,
        include=include,
        exclude=exclude,
    )
    with without_traces():
        gradients: Mapping[str, np.ndarray] | None = None
        if name == "first_order":
            if data is None:
                raise DataError(
                    "first_order was given no data, which it takes the gradient of the loss over. "
                    "Pass data=(x, y) or a dataset as fit takes them; lamp needs no data."
                )
            gradients = mean_gradients(request.model, data, request.selection.paths)
        pieces = (request.kernels, request.groupings, request.originals, gradients)
        return request.plan(ranking.scores(name, *pieces))


_ANY = 1e-12


def n_m(
    model: keras.Model,
    data: object = None,  # noqa: ARG001  (so that it can be put in another baseline's place)
    *,
    pattern: str = "2:4",
    quantize: bool = False,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """The N largest of every M consecutive inputs of an output, in every kernel.

    Mishra et al. 2021, "Accelerating sparse deep neural networks", arXiv 2104.08378, section 3. Of
    a shorter tail of inputs half live, rounded up; blocks run along the inputs of the kernel's
    matrix, of a convolution along its channels. Masks that learn keep the pattern
    ([MaskTraining][rl_sparsity_tf.MaskTraining]). To have more magnitude kept, permute the channels
    first ([permute_channels][rl_sparsity_tf.permute_channels]).

    The pattern says how much is pruned; there is no target.

    Args:
        model: A built model of Keras 3 or `tf_keras`. It is not changed.
        data: Accepted, as by every function of [baselines][rl_sparsity_tf.baselines].
        pattern: `"2:4"`.
        quantize: Whether what lives is quantized, in kernels that TFLite can hold as integers.
        bits: 8 or 4, the grid of what is quantized.
        include: What alone is changed, see [baselines][rl_sparsity_tf.baselines].
        exclude: What is left as it is.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model has nothing to compress, is wrapped, or holds NaN.

    Example:
        >>> plan = rls.baselines.n_m(model, pattern="2:4")
        >>> wrapped = rls.wrap(model, plan, train_masks=True)
    """
    check_choice("pattern", pattern, PATTERNS)
    request = PlanRequest.of(
        model,
        # The pattern says how much goes; this is within reach whatever takes no part.
        sparsity=_ANY,
        quantize=quantize,
        bits=bits,
        include=include,
        exclude=exclude,
    )
    entries = []
    for kernel in request.kernels:
        integers = request.quantize and kernel.spec.exports_int8
        rule = KernelRule(kernel.path, pattern=pattern, quantize=integers, bits=request.bits)
        entries.append(apply_rule(rule, kernel))
    return CompressionPlan(entries)


# ---------------------------------------------------------------------- in place of a plan

_METHODS: dict[str, Callable[..., CompressionPlan]] = {
    "uniform": uniform,
    "erk": erk,
    "global_magnitude": global_magnitude,
    "lamp": lamp,
}
# Baselines that need more than a model, or another target: plans of them are made by hand.
_ELSEWHERE = {
    "first_order": "(x, y), sparsity=...",
    "dynamic_programming": "(x, y), sparsity=...",
    "tfmot": "(x, y), sparsity=...",
    "random_search": "(x, y), sparsity=..., validation_data=(x_val, y_val)",
    "hill_climbing": "(x, y), sparsity=..., validation_data=(x_val, y_val)",
    "n_m": "pattern='2:4'",
}
_DEFAULT = "lamp"
_ALL = tuple(Operation)


def wrap(
    model: keras.Model,
    plan: CompressionPlan | None = None,
    *,
    sparsity: float | None = None,
    method: str | None = None,
    group: str = "element",
    groups: Mapping[str, str] | None = None,
    mask: str = "straight_through",
    train_masks: bool = False,
    operations: Collection[Operation] = _ALL,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> keras.Model:
    """Copies a model with its compressible layers wrapped, and applies a plan.

    The model given is not changed. The copy is compiled as the model was (with a fresh optimizer),
    so it can be trained at once; layers of classes that are not registered stay as they are
    (see [describe_support][rl_sparsity_tf.describe_support]). So do frozen layers
    (`layer.trainable = False`) that neither the plan nor `include` names; those that they name
    are masked, but neither they nor their masks are trained.

    Constraints hold for the kernels that the network computes with (those on a grid to within a
    step of it), and so for what `strip` returns.

    Args:
        model: A built model of Keras 3 or `tf_keras`: Sequential, functional, or subclassed with
            its layers in attributes. Wrappers of TFMOT's pruning are taken off.
        plan: What to do. With a plan, the layers it names are wrapped. With neither a plan nor a
            sparsity every compressible layer is, with everything kept and every operation open to
            `assign_operations`.
        sparsity: In place of a plan, the share of all weights of rank >= 2 to prune, above 0 and
            below 1: short for the plan of one of the [baselines][rl_sparsity_tf.baselines]. What
            lives stays in floating point.
        method: Which baseline that is: `"lamp"` (the default), `"uniform"`, `"erk"` or
            `"global_magnitude"`. The others need data: make their plan, and pass it.
        group: Kind of groups, where there is no plan.
        groups: Other kinds by kernel path, where there is neither a plan nor a sparsity.
        mask: Gradient of learnable masks, `"straight_through"` or `"hard_concrete"`.
        train_masks: Whether masks learn, with each kernel's sparsity held, instead of staying
            fixed (see [MaskTraining][rl_sparsity_tf.MaskTraining]).
        operations: The operations that the wrappers are open to, where there is neither a plan nor
            a sparsity; each takes memory and time.
        include: What alone is wrapped: layer names, paths of layers or kernels, or patterns of
            them. By default all kernels that are not frozen.
        exclude: What is not wrapped. It wins over `include`; a plan's rules with wildcards pass
            over it.

    Returns:
        The wrapped model: one of `tf_keras`, whatever came in.

    Raises:
        ArgumentError: If `include` or `exclude` matches nothing, or `sparsity` and `method` do not
            go with what else is given.
        ModelError: If the model cannot be wrapped, is wrapped already, or has a constraint that
            pruned weights cannot meet.
        PlanError: If the plan does not fit the model, or changes what is excluded.
        TargetError: If the sparsity cannot be reached.

    Example:
        >>> wrapped = rls.wrap(model, sparsity=0.8, method="lamp")
        >>> history = wrapped.fit(x, y, epochs=4, verbose=0)
        >>> small = rls.strip(wrapped)

        With a plan, for example one that a search has found:

        >>> wrapped = rls.wrap(model, rls.CompressionPlan.load("plan.json"))
    """
    if sparsity is not None:
        _check_short(plan, groups, operations)
        make = _method(method or _DEFAULT)
        plan = make(model, sparsity=sparsity, group=group, include=include, exclude=exclude)
    elif method is not None:
        raise ArgumentError(
            f"method={method!r} was given without a sparsity, which says how much it prunes. Pass "
            "sparsity=0.8, too, or leave method out."
        )
    return wrapping.wrap(
        model,
        plan,
        group=group,
        groups=groups,
        mask=mask,
        train_masks=train_masks,
        operations=operations,
        include=include,
        exclude=exclude,
    )


def _check_short(
    plan: CompressionPlan | None,
    groups: Mapping[str, str] | None,
    operations: Collection[Operation],
) -> None:
    """Raises ArgumentError unless a sparsity alone says what to do."""
    if plan is not None:
        raise ArgumentError(
            "Received both a plan and a sparsity, which is short for a plan of its own. Pass one "
            "of the two."
        )
    if groups is not None:
        raise ArgumentError(
            f"groups={dict(groups)!r} does not go with a sparsity, whose plan cuts every kernel "
            "alike. Pass group='block4', say, or a plan in place of the sparsity."
        )
    if operations is not _ALL:
        raise ArgumentError(
            "operations=... does not go with a sparsity, whose plan says which operations there "
            "are. Leave it out, or leave sparsity out and call assign_operations on the wrappers."
        )


def _method(name: str) -> Callable[..., CompressionPlan]:
    """The baseline of a name; raises ArgumentError if it is not known, or needs more."""
    if name in _ELSEWHERE:
        raise ArgumentError(
            f"method={name!r} needs more than a sparsity. Make its plan, and pass that: "
            f"rls.wrap(model, rls.baselines.{name}(model, {_ELSEWHERE[name]}))."
        )
    check_choice("method", name, tuple(_METHODS))
    return _METHODS[name]
