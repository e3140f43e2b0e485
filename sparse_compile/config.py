"""The user's choices, validated before anything is compiled."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import msgspec

from sparse_compile import settings
from sparse_compile.config_file import read_toml
from sparse_compile.errors import ConfigError
from sparse_compile.option_checks import (
    POLICIES,
    POLICY_DEFAULTS,
    check_inductor,
    check_names,
    check_values,
    refuse,
)

Policy = Literal["exact", "top_p", "top_k", "native"]
Scores = Literal["bounds", "mean"]

PREFIX = "sparse_compile."
NOT_YET = {  # policy -> what it waits for; delete a line when that policy can run
    "native": "the module that learns its selection",
}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How attention may be replaced. Every field is an option of `torch.compile`.

    Args:
        policy: What the user accepts: `exact`, `top_p`, `top_k` or `native`.
        p: Share of softmax mass that decoding reads of pages, in (0, 1]; only with `top_p`, 0.95
            there.
        k: KV blocks every row reads, at most 64; only with `top_k`, 16 there.
        block_size: Key positions in a KV block: 16, 32, 64 or 128.
        min_tokens: Sites with fewer key positions stay exact; not with `exact`.
        sinks: How many of the `k` are the first KV blocks; only with `top_k`, 1 there.
        local: How many of the `k` are those up to the row's own; only with `top_k`, 2 there.
        scores: How `top_k` ranks the others: by `bounds` on their keys (Quest), or by the `mean` of
            their keys, 'mean' there. `bounds` takes heads of at most 128 channels.
        sites: Pattern of module paths (`fnmatch`) -> options of the sites it matches. The first
            pattern that matches wins.
        verify: Compare every site with the model's own computation before it is replaced.
        strict: Raise `DeclinedSiteError` for a site that is left as it was.
        inductor: Options passed through to Inductor.

    Raises:
        ConfigError: A value has a wrong type, is out of range or contradicts another one.
    """

    policy: Policy = "exact"
    p: float | None = None
    k: int | None = None
    block_size: int = 64
    min_tokens: int = 0
    sinks: int | None = None
    local: int | None = None
    scores: Scores | None = None
    sites: dict[str, dict[str, Any]] = {}
    verify: bool = False
    strict: bool = False
    inductor: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Check the values, fill in the policy's own defaults and copy the tables."""
        check_values(msgspec.structs.asdict(self))
        for name in ("p", "k", "scores"):
            if name in POLICIES[self.policy] and getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, POLICY_DEFAULTS[name])
        sites = {pattern: dict(options) for pattern, options in self.sites.items()}
        msgspec.structs.force_setattr(self, "sites", sites)
        inductor = {str(key).replace("-", "_"): value for key, value in self.inductor.items()}
        msgspec.structs.force_setattr(self, "inductor", inductor)
        for pattern, options in sites.items():
            try:
                self._overridden(options)
            except ConfigError as error:
                raise ConfigError(f'sites["{pattern}"]: {error}') from None

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Config | None = None) -> Config:
        """The configuration that a compilation runs with.

        Args:
            options: What `torch.compile(..., options=...)` was given. It is put on top of the file
                that `SPARSE_COMPILE_CONFIG` names, field by field. Keys may carry the prefix
                `sparse_compile.`. A `Config` is complete: the file is not read.

        Raises:
            ConfigError: An option is unknown or wrong, or this version cannot run the policy.
        """
        if options is not None and not isinstance(options, (Mapping, Config)):
            refuse("options", options, "a dict", 'Write for example {"policy": "exact"}.')
        if isinstance(options, Config):
            config = options
        else:
            config = _build(_merged(_default_options(), _without_prefix(options or {})))
        _check_runnable(config)
        if config.inductor:
            check_inductor(config.inductor)
        return config

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> Config:
        """Read a TOML file.

        The options are the file's top level, or its table `[sparse_compile]` or
        `[tool.sparse_compile]`.

        Raises:
            ConfigError: The file cannot be read, is no TOML or holds a wrong option.
        """
        return _build(_checked_file(Path(path)))

    def for_site(self, name: str) -> Config:
        """The configuration of one site: the options of the first matching pattern applied.

        Args:
            name: Name of the site: a module path, with `#2` behind it for its second site. A
                pattern may speak of either.
        """
        path = name.partition("#")[0]
        for pattern, options in self.sites.items():
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path, pattern):
                return self._overridden(options)
        return self

    def forced_blocks(self) -> tuple[int, int]:
        """How many sinks and how many local KV blocks `top_k` always selects.

        Fewer than usual where `k` has no room for them.
        """
        assert self.k is not None
        n_sinks = 1 if self.sinks is None else self.sinks
        n_local = self.local
        if n_local is None:
            n_local = max(1, min(2, self.k - n_sinks))
        return (min(n_sinks, self.k - n_local) if self.sinks is None else n_sinks), n_local

    def to_options(self) -> dict[str, Any]:
        """The `options` of `torch.compile` that give this configuration."""
        return {k: v for k, v in msgspec.structs.asdict(self).items() if v not in (None, {})}

    def _overridden(self, options: Mapping[str, Any]) -> Config:
        return Config(**(_merged(self.to_options(), options) | {"sites": {}}))


def _build(options: Mapping[str, Any]) -> Config:
    check_names(options, Config.__struct_fields__)
    return Config(**options)


def _default_options() -> dict[str, Any]:
    path = settings.read().config_file
    return {} if path is None else _checked_file(path)


def _checked_file(path: Path) -> dict[str, Any]:
    options = read_toml(path)
    try:
        options = _without_prefix(options)
        _build(options)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return options


def _without_prefix(options: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in options.items():
        name = key.removeprefix(PREFIX) if isinstance(key, str) else key
        if name in plain:
            raise ConfigError(
                f'the option "{name}" is given twice, with and without "{PREFIX}".\n'
                "  Expected it once.\n"
                "  Remove one of them."
            )
        plain[name] = value
    return plain


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` put on `base`, field by field.

    A new policy drops the options of `base` that mean nothing under it. Site patterns of `over`
    come first, so that they win.
    """
    merged = dict(base)
    over = {key: value for key, value in over.items() if value is not None}
    policy = over.get("policy", base.get("policy", "exact"))
    if policy != base.get("policy", "exact") and isinstance(policy, str):
        for name in set(POLICY_DEFAULTS).difference(POLICIES.get(policy, POLICY_DEFAULTS)):
            merged.pop(name, None)
    for key, value in over.items():
        old = merged.get(key)
        if key == "inductor" and isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = {**old, **value}
        elif key == "sites" and isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = {**value, **{k: v for k, v in old.items() if k not in value}}
        else:
            merged[key] = value
    return merged


def _check_runnable(config: Config) -> None:
    """Refuse the policies that this version parses and cannot run yet."""
    for site in (config, *map(config._overridden, config.sites.values())):
        policy = site.policy
        if policy in NOT_YET:
            from sparse_compile import __version__

            raise ConfigError(
                f"policy {policy} needs {NOT_YET[policy]}, which this version ({__version__}) "
                "does not have yet.\n"
                "  Expected policy exact.\n"
                '  Set policy to "exact", or leave it out.'
            )
