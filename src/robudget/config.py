"""What recipes, studies, sites and prices have in common: YAML by name, from a file or typed, and checked values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from robudget.errors import InputError, unknown
from robudget.threat import parse_number

Number = Annotated[float, BeforeValidator(parse_number)]  # a finite number, or text such as 8/255


class Record(BaseModel):
    """Values that are checked when the record is made and do not change after.

    Raises InputError: one line with `prefix`, the field (its `title` where it has one), its value, and its
    `description`, which says what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    prefix: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(self.prefix + one_line(error, type(self))) from None


def one_line(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """pydantic's first complaint as `key = value: what is allowed`; `model` may describe its fields."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    value, kind, context = first["input"], first["type"], first.get("ctx", {})
    field = model.model_fields.get(key) if model else None
    if kind == "value_error":  # raised by our own validators, which already say everything
        cause = str(context["error"])
        return cause if not key or key in cause else f"{key}: {cause}"
    if kind == "literal_error":
        choices = str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        return str(unknown(key, value, choices))
    if kind == "extra_forbidden" and model:
        return str(unknown("field", key, model.model_fields))
    if field and field.description:
        return f"{field.title or key} = {value!r} (allowed: {field.description})"
    return f"{key} = {value!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


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
    if is_yaml(source):
        return read_file(kind, source), str(Path(source))
    known = named(folder)
    if str(source) not in known:
        raise unknown(kind, source, known)
    return known[str(source)], str(source)


def is_yaml(source: str | Path) -> bool:
    """Whether this is the name of a YAML file."""
    return Path(source).suffix in (".yaml", ".yml")


def read_file(kind: str, path: str | Path) -> str:
    """The text of a file of the user's."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {kind} {str(Path(path))!r}: {reason}") from None


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
    """`["craft.steps=5", "threat.eps=8/255"]` → dotted key → value, read as YAML.

    By hand, with `nest` and `merge`: 35 lines, which OmegaConf's dotted lists would not make fewer, since its errors
    would have to be put into one line that names the key.
    """
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
