"""`wrap` puts compression wrappers around a model's layers; `strip` takes them off again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.console import without_traces
from rl_sparsity_tf.errors import ModelError, PlanError, check_choice, did_you_mean
from rl_sparsity_tf.keras3.door import (
    admitted,
    check_return,
    give_origin,
    handed_back,
    origin_of,
)
from rl_sparsity_tf.layers.copy_checks import check_copy
from rl_sparsity_tf.layers.copying import (
    copy_compile_state,
    copy_layer,
    copy_own_weights,
    copy_weights,
    rebuild,
)
from rl_sparsity_tf.layers.groups import KINDS
from rl_sparsity_tf.layers.kernels import (
    Kernel,
    check_constraints,
    check_model,
    find_kernels,
    layer_pairs,
    walk,
)
from rl_sparsity_tf.layers.operations import MASKS, Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.rules import KernelSelection, Patterns, resolve
from rl_sparsity_tf.layers.structure import follow, is_graph, is_pruning_wrapper, masked_weights
from rl_sparsity_tf.layers.wrapper import CompressionWrapper, KernelSettings, unwrapped

_log = logging.getLogger(__name__)


@without_traces()
def wrap(
    model: keras.Model,
    plan: CompressionPlan | None = None,
    *,
    group: str = "element",
    groups: Mapping[str, str] | None = None,
    mask: str = "straight_through",
    train_masks: bool = False,
    operations: Collection[Operation] = tuple(Operation),
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> keras.Model:
    """Copies a model with its compressible layers wrapped, and applies a plan.

    What users call is `allocation.heuristics.wrap`, which also makes plans and says what the
    arguments mean. Raises ArgumentError, ModelError or PlanError.
    """
    given, model = model, admitted(model)
    origin = None if given is model else origin_of(model)
    if origin is not None:
        check_return(model)
    check_model(model)
    check_choice("group", group, KINDS)
    check_choice("mask", mask, MASKS)
    if is_wrapped(model):
        raise ModelError(
            f"Model {model.name!r} is wrapped already. Call rl_sparsity_tf.strip(model) first."
        )
    if plan is not None and not isinstance(plan, CompressionPlan):
        raise PlanError(
            f"plan is a {type(plan).__name__}. Expected a CompressionPlan, for example "
            "CompressionPlan.load('plan.json')."
        )
    model = accepted(model)
    selection = KernelSelection.of(model, include, exclude)
    entries = None if plan is None else resolve(plan, model, selection).kernels
    settings: dict[int, dict[str, KernelSettings]] = {}
    for kernel in find_kernels(model):
        if entries is None and kernel.path not in selection.left:
            chosen = _settings(kernel, (groups or {}).get(kernel.path, group), operations)
        elif entries is not None and kernel.path in entries:
            chosen = _settings_for(kernel, entries[kernel.path])
        else:
            continue
        if chosen.prune:
            check_constraints([kernel])
        settings.setdefault(id(kernel.layer), {})[kernel.spec.attribute] = chosen

    def convert(layer: keras.layers.Layer) -> keras.layers.Layer:
        inner = unwrapped(layer)
        copy = copy_layer(inner)
        if id(inner) not in settings:
            return copy
        return CompressionWrapper(
            copy, group=group, mask=mask, train_masks=train_masks, kernels=settings[id(inner)]
        )

    wrapped = rebuild(model, convert)
    _copy_weights(model, wrapped)
    check_copy(model, wrapped)
    if entries is not None:
        apply_plan(wrapped, entries)
    copy_compile_state(model, wrapped)
    give_origin(wrapped, origin)
    return wrapped


@without_traces()
def strip(model: keras.Model) -> keras.Model:
    """Copies a wrapped model without its wrappers, masks, grids and permutations folded in.

    Args:
        model: A wrapped model (a plain one is copied). Wrappers of TFMOT's pruning go, too.

    Returns:
        A plain `tf_keras` model that computes the same bits, compiled as the wrapped one was; a
        Keras 3 model if one was wrapped. It can be saved and loaded without this package.

    Raises:
        ModelError: If the model is not built or cannot be copied.

    Example:
        >>> small = rls.strip(rls.wrap(model, plan))
        >>> small.save("small.keras")
        >>> float((small.get_layer("hidden").kernel.numpy() == 0).mean()) > 0.8
        True
    """
    given, model = model, admitted(model)
    plain = stripped(model)
    # Models inside the package stay what they are, converted ones too: only what a user has wrapped
    # or given is handed back.
    came_in = given is not model or is_wrapped(model)
    return handed_back(plain, origin_of(model)) if came_in else plain


def stripped(model: keras.Model) -> keras.Model:
    """[strip][] for this package: a `tf_keras` model, whatever the wrapped one came from."""
    check_model(model)
    plain = rebuild(model, lambda layer: copy_layer(unwrapped(layer)))
    _copy_weights(model, plain)
    check_copy(model, plain)
    copy_compile_state(model, plain)
    return plain


def accepted(model: keras.Model) -> keras.Model:
    """The model itself, or a copy without the pruning wrappers of TFMOT if it carries any.

    Raises `ModelError` if the model is not built or carries other wrappers.
    """
    model = admitted(model)
    check_model(model)
    if not any(is_pruning_wrapper(layer) for _, layer in walk(model)):
        return model
    _log.warning("The pruning wrappers of TFMOT are taken off %r; its zeros stay.", model.name)
    return stripped(model)


def is_wrapped(model: keras.Model) -> bool:
    """Whether any layer of a model is wrapped."""
    return any(isinstance(layer, CompressionWrapper) for _, layer in walk(model))


def wrappers_of(model: keras.Model) -> list[CompressionWrapper]:
    """The wrappers of a model, in the order of its layers."""
    return [layer for _, layer in walk(model) if isinstance(layer, CompressionWrapper)]


def wrapped_kernels(model: keras.Model) -> list[Kernel]:
    """The kernels of a model that its wrappers act on, in the order of its layers."""
    return [
        kernel
        for kernel in find_kernels(model)
        if kernel.wrapper is not None and kernel.spec.attribute in kernel.wrapper.kernels
    ]


def apply_plan(wrapped: keras.Model, entries: Mapping[str, KernelPlan]) -> None:
    """Sets the operations of a wrapped model's kernels."""
    kernels = {kernel.path: kernel for kernel in wrapped_kernels(wrapped)}
    for path, entry in entries.items():
        kernel = kernels.get(path)
        if kernel is None or kernel.wrapper is None:
            raise PlanError(
                f"The model {wrapped.name!r} has no wrapped kernel {path!r}. "
                f"{did_you_mean(path, kernels)}"
            )
        kernel.wrapper.assign_operations(kernel.spec.attribute, entry.operations, entry.bits)


def plan_of(wrapped: keras.Model) -> CompressionPlan:
    """Reads the plan that a wrapped model carries, learned masks included.

    Example:
        >>> rls.plan_of(rls.wrap(model, plan)) == plan
        True
    """
    entries = []
    for kernel in wrapped_kernels(wrapped):
        wrapper, attribute = kernel.wrapper, kernel.spec.attribute
        assert wrapper is not None
        entries.append(
            KernelPlan(
                kernel.path,
                kernel.shape,
                kernel.spec.layout,
                wrapper.kernels[attribute].group,
                wrapper.bits(attribute),
                wrapper.operations(attribute),
            )
        )
    return CompressionPlan(entries)


def _settings_for(kernel: Kernel, entry: KernelPlan) -> KernelSettings:
    # Only what the plan uses is compiled into the layer, so that an all-Keep kernel costs nothing.
    return _settings(kernel, entry.group, {Operation(one) for one in np.unique(entry.operations)})


def _settings(kernel: Kernel, group: str, used: Collection[Operation]) -> KernelSettings:
    return KernelSettings.of(
        kernel.spec,
        group=group,
        prune=Operation.PRUNE in used,
        quantize=Operation.QUANTIZE in used,
        shuffle=Operation.SHUFFLE in used,
    )


def _copy_weights(source: keras.Model, destination: keras.Model) -> None:
    for old, new in layer_pairs(source, destination):
        inner = unwrapped(new)
        copy_weights(unwrapped(old), inner)
        if isinstance(old, CompressionWrapper):
            for attribute in old.kernels:
                follow(inner, attribute).assign(old.effective_kernel(attribute))
        elif is_pruning_wrapper(old):
            inner.set_weights(masked_weights(old))
    if not is_graph(source):
        copy_own_weights(source, destination)
    before, after = (
        {id(weight) for _, layer in walk(model) for weight in unwrapped(layer).weights}
        for model in (source, destination)
    )
    if len(before) != len(after):
        raise ModelError(
            f"Layers of the model {source.name!r} share weights with each other "
            f"({len(before)} weights, {len(after)} in a copy), which a copy cannot keep. Share the "
            "whole layer instead: call one layer several times."
        )
