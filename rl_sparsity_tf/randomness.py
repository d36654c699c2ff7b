"""Random generators: drawing from them, keeping the global ones as they were, and saving them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray


def spin(probabilities: NDArray[np.float64], generator: np.random.Generator) -> int:
    """Roulette wheel: an index drawn with the given probabilities; never one of probability 0."""
    edges = np.cumsum(probabilities)
    index = int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))
    # Rounding may put the ball on the wheel's very edge, behind the last possible action.
    return min(index, int(np.flatnonzero(probabilities)[-1]))


@contextmanager
def python_and_numpy_random_kept() -> Iterator[None]:
    """Puts Python's and NumPy's global generators back as they were.

    Keras draws the seeds of unseeded initialisers from Python's global generator.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def pack_generator(generator: np.random.Generator) -> NDArray[np.uint64]:
    """A PCG64 generator's state: its two 128-bit numbers and its spare 32 bits."""
    state: Any = generator.bit_generator.state
    words = []
    for number in (state["state"]["state"], state["state"]["inc"]):
        words += [number >> 64, number & (2**64 - 1)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], np.uint64)


def unpack_generator(words: NDArray[np.uint64]) -> np.random.Generator:
    """A generator in the state that [pack_generator][] saved; raises `ValueError` if it is none."""
    shape = np.shape(words)
    if np.asarray(words).dtype != np.uint64 or shape != (6,) or words[4] > 1 or not words[3] & 1:
        raise ValueError("the state of the random generator is none of PCG64")
    high, low, inc_high, inc_low, has_spare, spare = (int(word) for word in words)
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": high << 64 | low, "inc": inc_high << 64 | inc_low},
        "has_uint32": has_spare,
        "uinteger": spare,
    }
    return np.random.Generator(bits)
