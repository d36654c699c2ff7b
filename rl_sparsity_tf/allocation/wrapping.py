"""`wrap` as users have it: by a plan, or by a sparsity and a method that makes one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import tf_keras as keras

from rl_sparsity_tf.allocation import heuristics
from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.layers import wrapping
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import Patterns

_METHODS: dict[str, Callable[..., CompressionPlan]] = {
    "uniform": heuristics.uniform,
    "erk": heuristics.erk,
    "global_magnitude": heuristics.global_magnitude,
    "lamp": heuristics.lamp,
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
