"""Checks of option values; every message says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from sparse_compile.errors import ConfigError

BLOCK_SIZES = (16, 32, 64, 128)
POLICIES: dict[str, tuple[str, ...]] = {  # policy -> the options that have a meaning only there
    "exact": (),
    "top_p": ("p", "min_tokens"),
    "top_k": ("k", "min_tokens", "sinks", "local", "scores"),
    "native": ("min_tokens",),
}
POLICY_DEFAULTS: dict[str, Any] = {
    "p": 0.95, "k": 16, "min_tokens": 0, "sinks": None, "local": None, "scores": "mean",
}  # fmt: skip
SITE_OPTIONS = ("policy", "block_size", *POLICY_DEFAULTS)
MAX_K = 64  # slots that the kernels have for a row
SCORES = ("bounds", "mean")

_EXAMPLES = {
    "sites": 'Write for example sites = {"model.layers.0.*": {"policy": "exact"}}.',
    "inductor": 'Write for example inductor = {"max_autotune": True}.',
}


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse wrong types, values out of range and combinations that contradict each other.

    Args:
        values: Every field of `Config`; contents of `sites` are checked for their names only.
    """
    policy = values["policy"]
    if not isinstance(policy, str) or policy not in POLICIES:
        refuse("policy", policy, f"one of {listed(POLICIES)}", nearest(policy, POLICIES))
    _check_policy_options(policy, values)
    size = values["block_size"]
    if not _is_int(size) or size not in BLOCK_SIZES:
        sizes = listed(map(str, BLOCK_SIZES), "or")
        refuse("block_size", size, f"the integer {sizes}", "Leave it out to use 64.")
    for name in ("verify", "strict"):
        if not isinstance(values[name], bool):
            refuse(name, values[name], "true or false", "Write a boolean without quotes.")
    for name in ("sites", "inductor"):
        if not isinstance(values[name], Mapping):
            refuse(name, values[name], "a table (a dict)", _EXAMPLES[name])
    _check_site_names(values["sites"], values)


def _check_policy_options(policy: str, values: Mapping[str, Any]) -> None:
    p, k, min_tokens = values["p"], values["k"], values["min_tokens"]
    if p is not None and (not _is_number(p) or not 0 < p <= 1):
        refuse("p", p, "a number above 0 and at most 1", "Write for example p = 0.95.")
    if k is not None and (not _is_int(k) or k < 1):
        refuse("k", k, "an integer of at least 1", "Write for example k = 16.")
    if k is not None and k > MAX_K:
        refuse("k", k, f"at most {MAX_K} KV blocks", "Take a larger block_size.")
    if not _is_int(min_tokens) or min_tokens < 0:
        refuse("min_tokens", min_tokens, "an integer of at least 0", "Write 0 for no threshold.")
    _check_selection(values)
    for name in POLICY_DEFAULTS:
        value = values[name] or None if name == "min_tokens" else values[name]
        if value is not None and name not in POLICIES[policy]:
            owners = [owner for owner, options in POLICIES.items() if name in options]
            raise ConfigError(
                f'{name} is {value}, but policy is "{policy}".\n'
                f"  Expected {name} only with policy {listed(owners, 'or')}.\n"
                f'  Remove {name}, or set policy to "{owners[0]}".'
            )


def _check_selection(values: Mapping[str, Any]) -> None:
    sinks, local, scores = values["sinks"], values["local"], values["scores"]
    if sinks is not None and (not _is_int(sinks) or sinks < 0):
        refuse("sinks", sinks, "an integer of at least 0", "Leave it out to use 1.")
    if local is not None and (not _is_int(local) or local < 1):
        advice = "A row's own KV block has no score: it is always read."
        refuse("local", local, "an integer of at least 1", advice)
    if scores is not None and scores not in SCORES:
        hint = nearest(scores, SCORES) or "Leave it out to let the head size decide."
        refuse("scores", scores, f"one of {listed(SCORES)}", hint)
    k = POLICY_DEFAULTS["k"] if values["k"] is None else values["k"]
    forced = (sinks or 0) + (1 if local is None else local)
    if values["policy"] == "top_k" and forced > k:
        raise ConfigError(
            f"sinks is {sinks or 0} and local {local or 1}, but k is {k}.\n"
            "  Expected at most k KV blocks that are always read.\n"
            "  Raise k, or lower the others."
        )


def _check_site_names(sites: Mapping[Any, Any], fields: Iterable[str]) -> None:
    for pattern, options in sites.items():
        if not isinstance(pattern, str):
            refuse("a pattern in sites", pattern, "a string", _EXAMPLES["sites"])
        if not isinstance(options, Mapping):
            refuse(f'sites["{pattern}"]', options, "a table (a dict)", _EXAMPLES["sites"])
        for key in options:
            if key not in SITE_OPTIONS:
                whole = key in fields
                hint = f"Move {key} out of sites: it holds for the whole model." if whole else ""
                refuse_name(key, SITE_OPTIONS, hint, f'sites["{pattern}"]: ')


def check_names(options: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse a name that is no option; say when it is one of Inductor's."""
    known = list(known)
    for key in options:
        if key not in known:
            hint = ""
            if isinstance(key, str) and not nearest(key, known) and _is_inductor_option(key):
                hint = f'It is an option of Inductor: write inductor = {{"{key}": ...}}.'
            refuse_name(key, known, hint)


def check_inductor(options: Mapping[Any, Any]) -> None:
    """Refuse names and types that Inductor does not have."""
    from sparse_compile import _compat

    known = _compat.inductor_options()
    for key, value in options.items():
        if key not in known:
            hint = nearest(key, known) or "torch._inductor.list_options() lists them."
            inner = f"{key}.{next(iter(value), '')}" if isinstance(value, Mapping) else ""
            if inner in known:
                hint = f'Write "{inner}" as one quoted key.'
            raise ConfigError(
                f"inductor: unknown option {_quoted(key)}.\n"
                f"  Expected one of the {len(known)} options of Inductor.\n"
                f"  {hint}"
            )
        kind = known[key]
        if kind is not None and not isinstance(value, kind):
            refuse(f'inductor["{key}"]', value, f"a value of type {kind.__name__}")


def _is_inductor_option(key: str) -> bool:
    from sparse_compile import _compat

    return key.replace("-", "_") in _compat.inductor_options()


def refuse(name: str, value: Any, expected: str, advice: str = "") -> NoReturn:
    """Raise the error of one wrong value."""
    advice = advice or "Correct the value."
    raise ConfigError(f"{name} is {shown(value)}.\n  Expected {expected}.\n  {advice}")


def refuse_name(key: Any, known: Iterable[str], hint: str = "", origin: str = "") -> NoReturn:
    """Raise the error of one unknown option."""
    names = sorted(known)
    hint = hint or nearest(key, names) or "Remove it."
    raise ConfigError(
        f"{origin}unknown option {_quoted(key)}.\n  Expected one of: {listed(names)}.\n  {hint}"
    )


def shown(value: Any) -> str:
    """A value and its type as a message shows them: `"64" (a string)`."""
    if isinstance(value, str):
        return f'"{value}" (a string)'
    return repr(value) if _is_number(value) else f"{value!r} (a {type(value).__name__})"


def _quoted(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else shown(key)


def listed(names: Iterable[str], last: str = "") -> str:
    """Names with commas between them, the word `last` before the last one."""
    names = list(names)
    if last and len(names) > 1:
        return f"{', '.join(names[:-1])} {last} {names[-1]}"
    return ", ".join(names)


def nearest(key: Any, names: Iterable[str]) -> str:
    """A question that names the nearest name; empty when none is near."""
    close = difflib.get_close_matches(key, list(names), n=1) if isinstance(key, str) else []
    return f'Did you mean "{close[0]}"?' if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
