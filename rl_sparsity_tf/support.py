"""Which layers of a model can be compressed, and why the others are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tf_keras as keras

from rl_sparsity_tf.kernels import check_model, walk
from rl_sparsity_tf.registry import kernel_specs
from rl_sparsity_tf.wrapper import CompressionWrapper


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What is known of one layer.

    Attributes:
        path: The layer's path.
        layer_class: Name of its class.
        kernels: Attributes of the kernels that can be compressed.
        weights: Elements of its weights of rank >= 2.
        reason: Why it is skipped; empty if it is not.
    """

    path: str
    layer_class: str
    kernels: tuple[str, ...]
    weights: int
    reason: str


def support_report(model: keras.Model) -> list[LayerReport]:
    """Lists every layer of a model with its compressible kernels, or the reason to skip it.

    Raises:
        ModelError: If the model is not a built Sequential or functional model.
    """
    check_model(model)
    reports = []
    for path, layer in walk(model):
        inner = layer.layer if isinstance(layer, CompressionWrapper) else layer
        specs = kernel_specs(inner)
        weights = sum(int(w.shape.num_elements()) for w in inner.weights if w.shape.rank >= 2)
        name = type(inner).__name__
        reason = ""
        if not specs:
            reason = "has no weights of rank 2 or more"
            if weights:
                reason = f"class {name} is not registered (register_layer adds it)"
        kernels = tuple(spec.attribute for spec in specs)
        reports.append(LayerReport(path, name, kernels, weights, reason))
    return reports


def describe_support(model: keras.Model, print_fn: Callable[[str], None] = print) -> None:
    """Prints which layers of a model can be compressed and why the others are skipped.

    Args:
        model: A built model, plain or wrapped.
        print_fn: Called with every line.

    Example:
        >>> rls.describe_support(model)
    """
    reports = support_report(model)
    width = max([len(report.path) for report in reports] + [5])
    print_fn(f"{'layer':<{width}}  {'class':<22} {'weights':>10}  compressible")
    for report in reports:
        verdict = ", ".join(report.kernels) if report.kernels else f"no: {report.reason}"
        print_fn(
            f"{report.path:<{width}}  {report.layer_class:<22} {report.weights:>10,}  {verdict}"
        )
