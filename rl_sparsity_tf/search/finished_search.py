"""What a search leaves behind for contenders to be run under the same conditions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.search.channel_finishing import Task
from rl_sparsity_tf.search.result import Result

if TYPE_CHECKING:
    from rl_sparsity_tf.search.loop import SearchLoop


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedSearch(Task):
    """A search that has returned; its network keeps its cached data and traced functions.

    Attributes:
        plain: The network of single weights at 8 bits, where the search chose another storage by
            itself; else the searched one.
        loop: The episodes.
        result: What was returned.
        episodes: How many there were.
    """

    plain: CompressedNetwork
    loop: SearchLoop
    result: Result
    episodes: int
