"""Policies as files: what an agent has learned, to begin with in the search of another network."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_sparsity_tf.agents.base import Agent
from rl_sparsity_tf.agents.configs import (
    AgentConfig,
    Random,
    SlotShape,
    config_from_dict,
    resolve_config,
)
from rl_sparsity_tf.claims import ArrayFileError, load_arrays
from rl_sparsity_tf.environment.features import FEATURES
from rl_sparsity_tf.environment.moves import MOVE_NAMES, OF_A_SLOT, OF_THE_NETWORK, SLOT_SHAPE
from rl_sparsity_tf.errors import (
    ArgumentError,
    PolicyFileError,
    RLSparsityError,
    check_choice,
    one_line,
)
from rl_sparsity_tf.files import as_file, check_new_file, parse_strict, replacing, sha256_of
from rl_sparsity_tf.layers.operations import Operation

FORMAT_VERSION = 1
PRETRAINED = "pretrained"
"""The name of the policy that comes with the package: of moves, taught by `benchmarks/moves.py`."""

_SHIPPED = "pretrained_moves.npz"
_TEXTS = ("agent", "strategy", "features", "operations")
# Of the arrays as they are in memory: a small file may claim to hold anything.
_LARGEST = 2**26


CONSTRUCT, IMPROVE = "construct", "improve"
STRATEGIES = (CONSTRUCT, IMPROVE)
"""What an episode is: every bucket of every kernel decided once, or a move from the best plan."""


@dataclasses.dataclass(frozen=True)
class Interface:
    """What policies of a strategy see and choose among, in this version.

    Attributes:
        features: Names of what is seen; of the network first and then of one slot, if there are
            `slots`.
        actions: Names of what is chosen among; of the first slot and then of the others.
    """

    features: tuple[str, ...]
    actions: tuple[str, ...]
    slots: SlotShape | None = None

    def shapes(self, config: AgentConfig) -> list[tuple[int, ...]]:
        """Shapes of the weights of such a policy."""
        slots = self.slots
        if slots is None:
            return config.policy_shapes(len(self.features), len(self.actions))
        seen = slots.shared + slots.slots * slots.features
        return config.policy_shapes(seen, slots.slots * len(self.actions) // 2, slots)


INTERFACES = {
    CONSTRUCT: Interface(
        tuple(feature.name for feature in FEATURES),
        tuple(operation.name.lower() for operation in Operation),
    ),
    IMPROVE: Interface(
        tuple(feature.name for feature in (*OF_THE_NETWORK, *OF_A_SLOT)),
        MOVE_NAMES,
        SlotShape(*SLOT_SHAPE),
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class SavedPolicy:
    """What an agent has learned, without the search it has learned it in.

    Attributes:
        weights: The weights of its networks, in order: of the Q-network for DQN, of the actor and
            then the value network for PPO; kernels of shape `(inputs, outputs)`, biases of
            shape `(outputs,)`.
        strategy: What it decides: `"construct"`, buckets; `"improve"`, moves.

    Example:
        >>> policy = SavedPolicy.load("policy.npz")
        >>> compressor = rls.Compressor(model, rls.Target(sparsity=0.9), policy=policy)
    """

    agent: AgentConfig
    weights: Sequence[np.ndarray]
    strategy: str = CONSTRUCT

    @classmethod
    def of(cls, config: AgentConfig, agent: Agent, strategy: str = CONSTRUCT) -> SavedPolicy:
        """What an agent that was built from this configuration has learned so far."""
        return cls(config, agent.policy_arrays(), strategy)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all that the policy's choices depend on."""
        features = INTERFACES[self.strategy].features
        texts = [json.dumps(self.agent.to_dict(), sort_keys=True), *features]
        return sha256_of(*(text.encode() for text in texts), *(w.tobytes() for w in self.weights))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes a .npz file in one step; it holds numbers and text, nothing pickled.

        Raises ArgumentError if the path cannot be written to or there is nothing to save, and
        FileExistsRLSparsityError if the file exists and `overwrite` is false.
        """
        path = check_policy_path(path, overwrite=overwrite)
        if isinstance(self.agent, Random):
            raise ArgumentError(
                "agent='random' has learned nothing that could be saved. Expected a search with "
                "agent='dqn' or agent='ppo'."
            )
        interface = INTERFACES[self.strategy]
        arrays = {
            "format_version": np.array(FORMAT_VERSION),
            "agent": np.array(json.dumps(self.agent.to_dict())),
            "strategy": np.array(self.strategy),
            "features": np.array(interface.features),
            "operations": np.array(interface.actions),
            **{f"weights/{index}": weight for index, weight in enumerate(self.weights)},
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SavedPolicy:
        """Reads what [save][] wrote, or `"pretrained"`, which comes with the package.

        Raises ArgumentError if there is no such file, and PolicyFileError if it is damaged or
        foreign, or made for other features.
        """
        shipped = path == PRETRAINED
        path = Path(__file__).with_name(_SHIPPED) if shipped else as_file("policy", path, _EXPECTED)
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise ArgumentError(f"policy={str(path)!r} {found}. Expected {_EXPECTED}.")
        arrays = _read(path)
        version = arrays.pop("format_version", np.array("none"))
        if version.shape != () or version.dtype.kind not in "iu" or int(version) != FORMAT_VERSION:
            raise _bad(path, f"is of format {version}", f"format {FORMAT_VERSION}")
        strategy = CONSTRUCT  # of files that are older than strategies
        if "strategy" in arrays:
            strategy = _text(path, arrays, "strategy", axes=0)
        if strategy not in INTERFACES:
            raise _bad(path, f"is of strategy {strategy!r}", f"one of {', '.join(STRATEGIES)}")
        interface = INTERFACES[strategy]
        _check_names(path, "features", arrays, interface.features)
        _check_names(path, "operations", arrays, interface.actions)
        config = _config(path, arrays)
        return cls(config, _weights(path, arrays, config, interface.shapes(config)), strategy)


_EXPECTED = "a .npz file that result.save_policy() wrote"


def check_policy_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Checks that a policy can be written to a path, before any work is done for it.

    Raises ArgumentError if it cannot, or the path has not the ending .npz, and
    FileExistsRLSparsityError if the file exists and `overwrite` is false.
    """
    path = check_new_file(path, overwrite)
    if path.suffix != ".npz":
        raise ArgumentError(f"{str(path)!r} ends in {path.suffix!r}. Expected a name in .npz.")
    return path


def resolve_policy(
    policy: SavedPolicy | str | os.PathLike[str] | None,
    agent: str | AgentConfig | None,
    *,
    hierarchy: bool = False,
    strategy: str = CONSTRUCT,
) -> tuple[SavedPolicy | None, AgentConfig]:
    """The policy that a search starts from, and the configuration of its agent.

    The agent is the policy's unless a configuration is given; a name leaves the settings to the
    policy. With `hierarchy` the search has two levels: the lower one meets goals, and policies do
    not know any. Raises ArgumentError if the agent has other networks than the policy, there is no
    such file, the search has two levels or another strategy, and PolicyFileError if the file cannot
    be used.
    """
    if policy is None:
        return None, resolve_config("dqn" if agent is None else agent)
    if hierarchy:
        raise ArgumentError(
            "policy=... does not go with hierarchy=True: in two levels the goals of layers are "
            "chosen by another agent, and a policy has learned without it. Leave one of them out."
        )
    if not isinstance(policy, SavedPolicy):
        policy = SavedPolicy.load(policy)
    if policy.strategy != strategy:
        check_choice("strategy", strategy, STRATEGIES)
        decides = {CONSTRUCT: "buckets of weights", IMPROVE: "moves from plan to plan"}
        raise ArgumentError(
            f"strategy={strategy!r} cannot go on from a policy of {policy.strategy!r}, which "
            f"decides {decides[policy.strategy]}. Pass strategy={policy.strategy!r}, or leave the "
            "policy out."
        )
    if agent is None:
        return policy, policy.agent
    config = resolve_config(agent)
    if config.name != policy.agent.name:
        raise ArgumentError(
            f"agent={config.name!r} cannot go on from a policy of {policy.agent.name!r}. Expected "
            f"agent={policy.agent.name!r}; leave agent out to take that of the policy."
        )
    if isinstance(agent, str):
        return policy, policy.agent
    shapes = INTERFACES[policy.strategy].shapes
    if shapes(config) != shapes(policy.agent):
        raise ArgumentError(
            f"agent={config!r} has other networks than the policy, whose agent is "
            f"{policy.agent!r}. Expected equal hidden_layers; leave agent out to take that of the "
            "policy."
        )
    return policy, config


def _bad(path: Path, found: str, expected: str = _EXPECTED) -> PolicyFileError:
    return PolicyFileError(f"The policy file {str(path)!r} {found}. Expected {expected}.")


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = load_arrays(path, largest=_LARGEST)
    except ArrayFileError as error:
        raise _bad(path, str(error)) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # a member that is no array comes out as bytes
            raise _bad(path, f"holds {name!r}, which is no array")
    return arrays


def _check_names(
    path: Path, key: str, arrays: Mapping[str, np.ndarray], wanted: Sequence[str]
) -> None:
    found = _text(path, arrays, key, axes=1)
    if found == list(wanted):
        return
    unknown = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    parts = [f"knows {key} that this version has not: {unknown}"] if unknown else []
    parts += [f"does not know the {key} {missing}"] if missing else []
    raise _bad(
        path,
        " and ".join(parts) or f"has the {key} in another order",
        f"the {len(wanted)} {key} of this version, in its order; train the policy anew with it",
    )


def _text(path: Path, arrays: Mapping[str, np.ndarray], key: str, axes: int) -> Any:
    array = arrays.get(key)
    if array is None:
        raise _bad(path, f"holds no {key!r}")
    if array.dtype.kind != "U" or array.ndim != axes:
        raise _bad(path, f"holds {key!r} of type {array.dtype} and shape {array.shape}", "text")
    return array.tolist()


def _config(path: Path, arrays: Mapping[str, np.ndarray]) -> AgentConfig:
    try:
        values = parse_strict(_text(path, arrays, "agent", axes=0))
        if not isinstance(values, dict):
            raise ValueError(f"{values!r} is no dictionary")
        config = config_from_dict(values)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RLSparsityError) and not isinstance(error, ArgumentError):
            raise
        raise _bad(
            path,
            f"holds an agent that cannot be built ({one_line(error, 300)})",
            "the configuration of a 'dqn' or 'ppo' agent of this version",
        ) from error
    if isinstance(config, Random):
        raise _bad(path, "is of agent='random', which learns nothing", "one of 'dqn' or 'ppo'")
    return config


def _weights(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    config: AgentConfig,
    wanted: Sequence[tuple[int, ...]],
) -> list[np.ndarray]:
    names = [f"weights/{index}" for index in range(len(wanted))]
    others = set(arrays) - set(names) - set(_TEXTS)
    missing = [name for name in names if name not in arrays]
    if others or missing:
        found = f"lacks {missing}" if missing else f"holds {sorted(others)}, which are not known"
        raise _bad(path, found, f"{len(names)} arrays of weights, as {config!r} has")
    for name, shape in zip(names, wanted, strict=True):
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            found = f"holds {name!r} of type {array.dtype} and shape {array.shape}"
            raise _bad(path, found, f"float32 of shape {shape}, as {config!r} has")
        bad = int(np.sum(~np.isfinite(array)))
        if bad:
            raise _bad(path, f"holds {bad} NaN or infinite values in {name!r}", "finite numbers")
    return [arrays[name] for name in names]
