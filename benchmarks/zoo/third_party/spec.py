"""Third-party models as rows of a table: where the class is, its arguments and its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Built, Entry
from benchmarks.zoo.hf import UnavailableError
from benchmarks.zoo.stir import stirred
from benchmarks.zoo.torchvision_schemas import import_torchvision

Inputs = Callable[[], tuple[Any, ...] | dict[str, Any]]


def image(channels: int = 3, side: int = 32, batch: int = 2) -> Inputs:
    """One batch of pictures."""
    return lambda: (torch.randn(batch, channels, side, side),)


def noise(*shapes: Sequence[int]) -> Inputs:
    """Random tensors of these shapes."""
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


def tokens(*lengths: int, vocabulary: int = 50, batch: int = 2) -> Inputs:
    """Token ids of these lengths."""
    return lambda: tuple(torch.randint(1, vocabulary, (batch, length)) for length in lengths)


def row(
    package: str,
    name: str,
    path: str,
    arguments: dict[str, Any] | Callable[[], dict[str, Any]],
    inputs: Inputs,
    *tags: str,
) -> Entry:
    """One entry.

    Args:
        package: Distribution name, for the table.
        name: Unique in the package.
        path: `module:attribute`, a class or function that gives a module.
        arguments: Its keyword arguments, or a function that makes them.
        inputs: A function that makes the model's positional inputs (a tuple) or keyword inputs.
        *tags: As in `Entry`.
    """

    def make() -> Built:
        try:
            import_torchvision()
            module, _, attribute = path.partition(":")
            factory = importlib.import_module(module)
            for part in attribute.split("."):
                factory = getattr(factory, part)
            given = arguments() if callable(arguments) else dict(arguments)
        except Exception as error:  # a package may be missing, or broken beside this torch
            raise UnavailableError(f"{package}: {type(error).__name__}: {error}") from error
        torch.manual_seed(1)
        made = inputs()
        args, kwargs = ((), made) if isinstance(made, dict) else (made, {})
        try:
            model = stirred(lambda: _module(factory(**given)).eval(), args, kwargs)
        except ImportError as error:  # where the factory imports its package
            raise UnavailableError(f"{package}: {type(error).__name__}: {error}") from error
        return model, args, kwargs

    return Entry(name, package, make, frozenset(tags))


def _module(made: Any) -> nn.Module:
    if isinstance(made, nn.Module):
        return made
    raise UnavailableError(f"{made!r} is not a module")


def method(factory: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    """A factory whose model's forward is one of its methods."""

    class Method(nn.Module):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self.inner = factory(**arguments)

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
            return getattr(self.inner, name)(*args, **kwargs)

    return Method
