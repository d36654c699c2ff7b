"""What agents record: one step of an environment as the agent saw it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

FIRST, MID, LAST = 0, 1, 2
"""TF-Agents' step types, as numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transition:
    """One step of an environment as the agent saw it."""

    state: NDArray[np.float32]
    """Observation before the action, shape (F,)."""
    legal: NDArray[np.int32]
    """1 for each legal action, shape (n_actions,)."""
    action: int
    """The action taken."""
    info: Mapping[str, NDArray[np.float32]]
    """What the policy knew when it acted, for its own training."""
    forced: bool
    """Whether the action was given by the caller instead of chosen by the policy."""
    step_type: int
    """FIRST or MID: the kind of time step acted on."""
    next_step_type: int
    """MID or LAST: the kind of time step that followed."""
    reward: float
    """In [-1, 1]."""
    discount: float
    """The environment's discount: 0 where the episode ended for good."""
    next_state: NDArray[np.float32]
    """Observation after the action, shape (F,)."""
    next_legal: NDArray[np.int32]
    """Legal actions after the action, shape (n_actions,)."""
