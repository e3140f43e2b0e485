"""One model of the zoo: how to build it, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

SEED = 1234


@dataclass(frozen=True)
class Entry:
    """One model with its inputs.

    Tags: `declinable` (leaving a site alone is right, e.g. its weights are returned), `train`
    (gradients are compared too), `random` (the model draws numbers: seed each run), `ci` (part of
    the subset that tests run), `negative` (looks like attention and has none), `ambiguous` (what
    counts as attention is a matter of taste: neither missed nor false positive), `breaks` (has
    graph breaks under torch.compile by itself).
    """

    name: str
    package: str
    make: Callable[[], Built]
    tags: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """Readable and unique: `package-name`."""
        return f"{self.package}-{self.name}"

    def build(self) -> Built:
        """The model in eval mode with its inputs, the same at every call."""
        torch.manual_seed(SEED)
        model, args, kwargs = self.make()
        return model.eval(), args, kwargs

    def has(self, tag: str) -> bool:
        """Whether the entry carries a tag."""
        return tag in self.tags


class Catalogue:
    """Entries of one package, collected by a decorator on the functions that make them."""

    def __init__(self, package: str) -> None:
        """An empty list of entries."""
        self.package = package
        self.entries: list[Entry] = []

    def add(self, *tags: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
        """Register a function without arguments that returns a model and its inputs."""

        def register(make: Callable[[], Built]) -> Callable[[], Built]:
            name = make.__name__.strip("_").replace("_", "-")
            self.entries.append(Entry(name, self.package, make, frozenset(tags)))
            return make

        return register
