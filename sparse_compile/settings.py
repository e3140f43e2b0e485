"""The only reader of the environment.

| variable | meaning | default |
|---|---|---|
| `SPARSE_COMPILE_CONFIG` | TOML file with default options | none |
| `SPARSE_COMPILE_CACHE_DIR` | folder of converted weights, tuning results, rates | the user's cache folder |
| `SPARSE_COMPILE_CHECK_VALUES` | 1: operators check values on CUDA too, which waits for the device | 0 |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sparse_compile.errors import ConfigError

CONFIG_VARIABLE = "SPARSE_COMPILE_CONFIG"
CACHE_VARIABLE = "SPARSE_COMPILE_CACHE_DIR"
CHECK_VARIABLE = "SPARSE_COMPILE_CHECK_VALUES"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says."""

    config_file: Path | None  # of default options
    cache_dir: Path  # may not exist yet
    check_values: bool  # of tensors on CUDA that are given to operators


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process.

    Args:
        environ: Variables to read instead of the process's own.

    Raises:
        ConfigError: A variable has a value that cannot be used.
    """
    environ = os.environ if environ is None else environ
    return Settings(
        config_file=_config_file(environ),
        cache_dir=_cache_dir(environ),
        check_values=_check_values(environ),
    )


def _config_file(environ: Mapping[str, str]) -> Path | None:
    value = environ.get(CONFIG_VARIABLE)
    if value is None:
        return None
    path = Path(value).expanduser()
    if not value or not path.is_file():
        raise ConfigError(
            f'the environment variable {CONFIG_VARIABLE} is "{value}".\n'
            "  Expected the path of a TOML file that exists.\n"
            "  Correct the path, or unset the variable to use no default options."
        )
    return path


def _cache_dir(environ: Mapping[str, str]) -> Path:
    value = environ.get(CACHE_VARIABLE)
    if value is None:
        import platformdirs

        return platformdirs.user_cache_path("sparse_compile")
    path = Path(value).expanduser()
    if not path.is_absolute() or (path.exists() and not path.is_dir()):
        raise ConfigError(
            f'the environment variable {CACHE_VARIABLE} is "{value}".\n'
            "  Expected the absolute path of a folder; it need not exist yet.\n"
            "  Correct the path, or unset the variable to use the default folder."
        )
    return path


def _check_values(environ: Mapping[str, str]) -> bool:
    value = environ.get(CHECK_VARIABLE, "0")
    if value not in ("0", "1"):
        raise ConfigError(
            f'the environment variable {CHECK_VARIABLE} is "{value}".\n'
            "  Expected 0 or 1.\n"
            "  Correct it, or unset it."
        )
    return value == "1"
