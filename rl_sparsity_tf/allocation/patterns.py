"""Plans of N:M patterns: of every M consecutive inputs of an output N weights live."""

from __future__ import annotations

import tf_keras as keras

from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.errors import check_choice
from rl_sparsity_tf.layers.groups import PATTERNS
from rl_sparsity_tf.layers.kernel_rule import KernelRule
from rl_sparsity_tf.layers.kernel_selection import Patterns
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import apply_rule

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
        model: A built `tf_keras` model. It is not changed.
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
