"""What a compressed model has to meet."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rl_sparsity_tf.checks import is_number, is_whole
from rl_sparsity_tf.errors import ArgumentError

_SHARES = {
    "sparsity": "the share of weights to become zero, for example Target(sparsity=0.9)",
    "macs": "the share of the dense model's multiplications, for example Target(macs=0.5)",
    "latency": "the share of the dense file's time, for example Target(latency=0.5)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the compressed model has to meet; exactly one of these.

    Attributes:
        sparsity: Share of zeros among all weights of rank >= 2, in (0, 1). It is met by pruned
            groups, at the smallest count that reaches it.
        tflite_bytes: Bytes of the .tflite file at most, as it lies in flash. Tensors are stored
            sparse where that is smaller.
        gzip_bytes: Bytes of the gzipped .tflite file at most, as it is downloaded.
        macs: Multiply-accumulates of one example at most, as a share of the dense model's, in
            (0, 1). Whole channels are removed for it.
        latency: Time of one call of the .tflite file at most, as a share of the time that the
            dense model's file takes in the same quantization, in (0, 1). Whole channels are
            removed for it, by a table of what every layer takes.
        max_accuracy_drop: The smallest .tflite file whose metric on the validation data is at most
            this much worse than the dense model's: lower, or higher for one like a loss. Several
            sizes are searched for it, by bisection.

    Example:
        >>> rls.Target(sparsity=0.9).kind
        'sparsity'
        >>> rls.Target(tflite_bytes=50_000).kind
        'tflite_bytes'
    """

    sparsity: float | None = None
    tflite_bytes: int | None = None
    gzip_bytes: int | None = None
    macs: float | None = None
    latency: float | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            what = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ArgumentError(
                f"Target({what}) names {len(given) or 'no'} goals. Expected exactly one: "
                "Target(sparsity=0.9), the share of weights to become zero; "
                "Target(tflite_bytes=50_000), the size of the file; "
                "Target(gzip_bytes=20_000), its size when gzipped; Target(macs=0.5), the share of "
                "the multiplications; Target(latency=0.5), the share of the time; or "
                "Target(max_accuracy_drop=0.01), what the smallest file may lose."
            )
        ((name, value),) = given.items()
        if name == "max_accuracy_drop":
            if not is_number(value) or not 0.0 <= value < math.inf:
                raise ArgumentError(
                    f"Target({name}={value!r}) cannot be met. Expected a number of at least 0: how "
                    f"much worse than the dense model's the metric may be, for example "
                    f"Target({name}=0.01)."
                )
            object.__setattr__(self, name, float(value))
            return
        if name in _SHARES:
            if not is_number(value) or not 0.0 < value < 1.0:
                raise ArgumentError(
                    f"Target({name}={value!r}) cannot be met. Expected a number above 0 and "
                    f"below 1: {_SHARES[name]}."
                )
            object.__setattr__(self, name, float(value))
            return
        if not is_whole(value) or value < 1:
            raise ArgumentError(
                f"Target({name}={value!r}) cannot be met. Expected a whole number of bytes above "
                f"0, for example Target({name}=50_000)."
            )
        object.__setattr__(self, name, int(value))

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def kind(self) -> str:
        """The goal's name, that of its field."""
        return next(iter(self._given()))

    @property
    def value(self) -> float:
        """The goal's value."""
        return next(iter(self._given().values()))

    @property
    def in_bytes(self) -> bool:
        """Whether it is about the bytes of the file that the plan decides on."""
        return self.kind in ("tflite_bytes", "gzip_bytes", "max_accuracy_drop")

    @property
    def needs_channels(self) -> bool:
        """Whether it can only be met by removing whole channels."""
        return self.kind in ("macs", "latency")

    def to_dict(self) -> dict[str, Any]:
        """The goal by name."""
        return self._given()
