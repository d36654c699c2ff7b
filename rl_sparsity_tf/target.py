"""What a compressed model has to meet."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rl_sparsity_tf.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the compressed model has to meet; exactly one of these.

    Attributes:
        sparsity: Share of zeros among all weights of rank >= 2, in (0, 1). It is met by pruned
            groups, at the smallest count that reaches it.
        tflite_bytes: Bytes of the .tflite file at most, as it lies in flash. Tensors are stored
            sparse where that is smaller.
        gzip_bytes: Bytes of the gzipped .tflite file at most, as it is downloaded.

    Example:
        >>> Target(sparsity=0.9).kind
        'sparsity'
        >>> Target(tflite_bytes=50_000).kind
        'tflite_bytes'
    """

    sparsity: float | None = None
    tflite_bytes: int | None = None
    gzip_bytes: int | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            what = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ArgumentError(
                f"Target({what}) names {len(given) or 'no'} goals. Expected exactly one: "
                "Target(sparsity=0.9), the share of weights to become zero; "
                "Target(tflite_bytes=50_000), the size of the file; or "
                "Target(gzip_bytes=20_000), its size when gzipped."
            )
        if self.sparsity is not None:
            value = self.sparsity
            number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
            if not number or not 0.0 < value < 1.0:
                raise ArgumentError(
                    f"Target(sparsity={value!r}) cannot be met. Expected a number above 0 and "
                    "below 1: the share of weights to become zero, for example "
                    "Target(sparsity=0.9)."
                )
            object.__setattr__(self, "sparsity", float(value))
            return
        ((name, value),) = given.items()
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < 1:
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
        """The goal's name: `"sparsity"`, `"tflite_bytes"` or `"gzip_bytes"`."""
        return next(iter(self._given()))

    @property
    def value(self) -> float:
        """The goal's value."""
        return next(iter(self._given().values()))

    def to_dict(self) -> dict[str, Any]:
        """The goal by name."""
        return self._given()
