"""What `inspect` is pointed at: a model and the inputs to run it with, from a short text."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sparse_compile.errors import TargetError

_FORMS = (
    "Expected `module:callable`, `file.py:callable`, a local Hugging Face model directory or its "
    "config.json."
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model with the inputs of one call."""

    model: Any  # an nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    description: str  # for headings

    def __str__(self) -> str:
        return self.description


def load_target(text: str) -> Target:
    """Build the model that `text` names, and its example inputs.

    Args:
        text: `module:callable` or `file.py:callable`, where the callable takes nothing and returns
            `(model, args, kwargs)`; or a local Hugging Face model directory or config.json, which
            gives random weights and made-up inputs. The current directory and the file's folder
            can be imported from meanwhile.

    Raises:
        TargetError: Nothing is there, it cannot be imported, or it returns something else.
    """
    path = Path(text).expanduser()
    if (text and path.is_dir()) or (path.suffix == ".json" and (path.exists() or ":" not in text)):
        from sparse_compile.inspect import hf_target

        return hf_target.load(path)
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(_unclear(text, path))
    folder = Path(place).expanduser().resolve().parent if _is_file(place) else None
    with _importable(Path.cwd(), folder):
        module = _from_file(Path(place).expanduser()) if folder else _from_module(place)
        built = _call(_find(module, name, place), text)
    return _checked(built, text)


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _unclear(text: str, path: Path) -> str:
    if path.suffix == ".py" and path.is_file():
        return (
            f"TARGET {text!r} names a file, but not what to call in it.\n  {_FORMS}\n"
            f"  Write for example `{text}:build`."
        )
    return f"TARGET {text!r} is not found.\n  {_FORMS}\n  Check the spelling and the folder."


@contextmanager
def _importable(*folders: Path | None) -> Iterator[None]:
    """Put folders first in the import path for a while."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders if folder]
    try:
        yield
    finally:
        sys.path[:] = before


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(
            f"There is no file {str(path)!r}.\n  {_FORMS}\n  The current directory is {Path.cwd()}."
        )
    spec = importlib.util.spec_from_file_location(f"_inspected_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{str(path)!r} is no Python file.\n  {_FORMS}")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickles of the file look their module up
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise _import_failed(str(path), error) from error
    return module


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise TargetError(
                f"There is no module {missing!r}.\n  {_FORMS}\n"
                "  The current directory and everything installed were searched."
            ) from None
        raise _import_failed(name, error) from error


def _import_failed(what: str, error: BaseException) -> TargetError:
    return TargetError(
        f"Importing {what!r} failed: {type(error).__name__}: {error}.\n"
        f"  Expected a file that imports by itself; try `python -c` with the same import."
    )


def _find(module: ModuleType, name: str, place: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if callable(found):
        return found
    state = "is not there" if found is None else f"is {_said(found)}, which cannot be called"
    names = sorted(
        key
        for key, value in vars(module).items()
        if callable(value)
        and not key.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
    )
    hint = f"It defines {', '.join(names[:12])}." if names else "It defines nothing to call."
    raise TargetError(
        f"{name!r} {state} in {place!r}.\n"
        f"  Expected a function that returns (model, args, kwargs).\n  {hint}"
    )


def _call(function: Any, text: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise TargetError(
            f"TARGET {text!r} failed: {type(error).__name__}: {error}.\n"
            "  Expected it to return (model, args, kwargs) when called without arguments."
        ) from error


def _checked(built: Any, text: str) -> Target:
    """The target, if `built` is `(model, args, kwargs)`."""
    from torch import nn

    if not isinstance(built, tuple) or len(built) != 3:
        raise _wrong(text, _said(built))
    model, args, kwargs = built
    if not isinstance(model, nn.Module):
        raise _wrong(text, f"{_said(model)} as model")
    if not isinstance(args, (tuple, list)):
        raise _wrong(text, f"{_said(args)} as args")
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise _wrong(text, f"{_said(kwargs)} as kwargs")
    return Target(model=model, args=tuple(args), kwargs=kwargs, description=text)


def _wrong(text: str, came: str) -> TargetError:
    return TargetError(
        f"TARGET {text!r} returned {came}.\n"
        "  Expected (model, args, kwargs): an nn.Module, a tuple and a dict.\n"
        "  Return for example `model, (tokens,), {}`."
    )


def _said(value: Any) -> str:
    """A value's type in words; a tuple's with the types in it."""
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return f"a value of type {type(value).__name__}"
