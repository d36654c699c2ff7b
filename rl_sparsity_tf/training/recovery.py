"""How a network recovers after decisions, before it is evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.training.layer_problem import row_source

RECOVERIES = ("least_squares", "finetune", "none")
# Below this share of weights that can be fitted, training steps say more.
_LEAST_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """How the network recovers before a plan is evaluated.

    Attributes:
        method: `"least_squares"`: at the end of a search episode every kernel is fitted in closed
            form to the dense layer's outputs; the steps before are judged by how far their layer's
            outputs move. `"finetune"`: a few training steps after every decision, then an
            evaluation. `"none"`: an evaluation after every decision. None takes least squares
            where at least half of the weights are in layers that can be fitted (dense,
            convolutional and depthwise) and the model leaves the batch size open, else
            fine-tuning.
        steps: Training steps after every decision that changes the network, for `"finetune"`.
        learning_rate: Of the Adam optimizer that takes them.
        ridge: Strength of the ridge in the fits, relative to the mean square of a layer's inputs.

    Example:
        >>> recovery = rls.Recovery(method="finetune", steps=8)
        >>> compressor = rls.Compressor(model, rls.Target(sparsity=0.9), recovery=recovery)
    """

    method: str | None = None
    steps: int = 4
    learning_rate: float = 1e-3
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("Recovery(method)", self.method, RECOVERIES)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ArgumentError(
                f"Recovery(steps={self.steps!r}) cannot be used. Expected an integer of at least 0."
            )
        for name in ("learning_rate", "ridge"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 10:
                raise ArgumentError(
                    f"Recovery({name}={value!r}) cannot be used. Expected a positive number below "
                    "10, for example 1e-3."
                )

    def to_dict(self) -> dict[str, Any]:
        """The recovery's fields."""
        return dataclasses.asdict(self)

    def resolved(self, kernels: Sequence[Kernel], fixed: int | None = None) -> Recovery:
        """The recovery with a method that the kernels allow.

        Args:
            kernels: The kernels of the network.
            fixed: Rows that the model takes per call, if it fixes them: fits see no more.

        Raises:
            ArgumentError: If least squares are asked for and no kernel can be fitted.
        """
        fitted = [k for k in kernels if row_source(k.layer, k.spec, limit=1) is not None]
        if self.method == "least_squares" and not fitted:
            raise ArgumentError(
                "Recovery(method='least_squares') cannot be used: none of the kernels "
                f"{[kernel.path for kernel in kernels]} can be fitted in closed form. Expected a "
                "dense, convolutional or depthwise layer that is not inside another one; use "
                "Recovery(method='finetune')."
            )
        if self.method is not None:
            return self
        share = sum(kernel.size for kernel in fitted) / sum(kernel.size for kernel in kernels)
        enough = share >= _LEAST_SHARE and fixed is None
        method = "least_squares" if enough else "finetune"
        return dataclasses.replace(self, method=method)


def as_recovery(recovery: Recovery | str | None) -> Recovery:
    """Accepts a method's name in place of a [Recovery][]."""
    if recovery is None or isinstance(recovery, str):
        return Recovery(method=recovery)
    if not isinstance(recovery, Recovery):
        raise ArgumentError(
            f"recovery={recovery!r} is a {type(recovery).__name__}. Expected one of "
            f"{', '.join(map(repr, RECOVERIES))}, or a Recovery, for example "
            "Recovery(method='finetune')."
        )
    return recovery
