"""Settings of something that has a name, as plain dictionaries: of agents and of curricula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from rl_sparsity_tf.errors import ArgumentError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedSettings:
    """What configurations share: conversion to and from JSON-ready dictionaries.

    Attributes:
        kind: What they configure, in a word: the key that the name stands under.
    """

    kind: ClassVar[str]
    name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values, with the name under the kind."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        return {self.kind: self.name, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` described.

        Raises:
            ArgumentError: If the dictionary has another name, or a key that is no setting.
        """
        given = dict(values)
        name = given.pop(cls.kind, cls.name)
        if name != cls.name:
            raise ArgumentError(
                f"{cls.__name__}.from_dict() received the settings of {cls.kind}={name!r}. "
                f"Expected those of {cls.name!r}: use the class of that name."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ArgumentError(
                    f"{cls.__name__} has no setting {key!r}. {cls._instead(key, known)}"
                )
        return cls(**given)

    @classmethod
    def _instead(cls, key: str, known: list[str]) -> str:
        """What could be meant by a key that is no setting."""
        return did_you_mean(key, known) if known else "It has none: leave it out."
