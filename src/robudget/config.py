"""Reading YAML that is named, in a file or typed as `key=value`: what recipes, studies and prices have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from robudget.errors import InputError, unknown


def named(folder: str) -> dict[str, str]:
    """Name → YAML text of everything that ships in `robudget/<folder>/`."""
    entries = resources.files("robudget").joinpath(folder).iterdir()
    return {
        e.name.removesuffix(".yaml"): e.read_text("utf-8")
        for e in sorted(entries, key=lambda e: e.name)
        if e.name.endswith(".yaml")
    }


def read_named(folder: str, kind: str, source: str | Path) -> tuple[str, str]:
    """Text and name of what ships in `robudget/<folder>/`, or of a YAML file where `source` ends in .yaml."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {kind} {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    known = named(folder)
    if str(source) not in known:
        raise unknown(kind, source, known)
    return known[str(source)], str(source)


def load_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise InputError(f"{where} must be a mapping of keys to values, not {type(data).__name__}")
    return data


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["craft.steps=5", "threat.eps=8/255"]` → dotted key → value, read as YAML."""
    flat: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise InputError(f"override {item!r} is not key=value (e.g. craft.steps=5)")
        try:
            flat[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"override {item!r}: the value is not YAML") from None
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys → nested dict."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"override {key!r}: {parent!r} is already a value")
        node[leaf] = value
    return out


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, recursively; neither is modified."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merge(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
    return out
