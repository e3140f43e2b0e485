"""Options from a TOML file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sparse_compile.errors import ConfigError
from sparse_compile.option_checks import shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """The options of a TOML file, unchecked.

    They are the file's top level, or its table `[sparse_compile]` or `[tool.sparse_compile]`.

    Raises:
        ConfigError: The file cannot be read or is no TOML; the message has the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}).\n"
            "  Expected a TOML file with options.\n"
            "  Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8.\n"
            "  Expected a TOML file, which is always UTF-8.\n"
            "  Save the file again as UTF-8."
        ) from error
    return _options_table(path, parse_toml(text, str(path)))


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """A TOML document.

    Args:
        text: The document.
        origin: The name of its file, for messages.

    Raises:
        ConfigError: It is no TOML; the message has the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_message(origin, text, str(error))) from error


def _syntax_message(path: str, text: str, problem: str) -> str:
    lines = text.splitlines()
    found = re.search(r"line (\d+)", problem)
    number = int(found.group(1)) if found else len(lines)  # else "at end of document"
    line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    problem = re.sub(r"\s*\(at .*\)$", "", problem)
    return (
        f"{path}:{number}: {problem}, in the line: {line}\n"
        "  Expected valid TOML.\n"
        "  Correct this line; strings need quotes, true and false are lower case."
    )


def _options_table(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    tool = document.get("tool")
    if isinstance(tool, dict):
        table, name = tool.get("sparse_compile"), "[tool.sparse_compile]"
    elif "sparse_compile" in document:
        table, name = document["sparse_compile"], "[sparse_compile]"
    else:
        return document
    if not isinstance(table, dict):
        raise ConfigError(
            f"{path}: {name} is {'missing' if table is None else shown(table)}.\n"
            "  Expected a table of options.\n"
            f'  Write for example {name} and below it policy = "exact".'
        )
    return table
