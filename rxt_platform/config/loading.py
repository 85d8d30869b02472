"""From a YAML file and `key=value` overrides to a validated RunConfig, with errors that name the key and the fix."""

import difflib
import types
import typing
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rxt_platform.config.model import ModelConfig
from rxt_platform.config.run import RunConfig
from rxt_platform.errors import ConfigError


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and validate a run. Raises ConfigError with one line that names the place and the fix."""
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(raw, override)
    if isinstance(raw.get("model"), dict):
        raw["model"] = _expand_preset(raw["model"])
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, RunConfig, raw)}") from None


def preset_names() -> list[str]:
    """Names of the models that come with the package."""
    folder = resources.files("rxt_platform.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> ModelConfig:
    """A published model's configuration (DESIGN 15)."""
    return ModelConfig.model_validate(_preset(name))


def describe(error: ValidationError, model: type[BaseModel], raw: Any = None) -> str:
    """All errors of a validation of `raw` in one line, unknown keys first, each with the nearest valid keys."""
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    lines = []
    for item in found[:3]:
        loc = tuple(item["loc"])
        if item["type"] == "extra_forbidden":
            keys = _valid_keys(model, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), keys, n=3, cutoff=0.5) or keys
            lines.append(f"unknown key '{_key(model, loc, raw)}'; nearest valid: {', '.join(near)}")
        elif item["type"] == "union_tag_invalid":
            kind, known = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            lines.append(f"{_key(model, loc, raw)}: kind {kind!r} is none of {known}")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"{_key(model, loc, raw)}: missing key 'kind' (is the name a typo?)")
        elif item["type"] == "missing":
            lines.append(f"missing key '{_key(model, loc, raw)}'")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{_key(model, loc, raw)}: {message}" if loc else message)
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return "; ".join(lines) + more


_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader for which a key that stands twice is an error, not the last one's win."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)  # merge keys, `<<: *anchor`
    return dict(loader.construct_pairs(node, deep=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a run is a mapping of keys, this file holds {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {getattr(error, 'problem', error)}") from None
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        node = node[_place(node, parent, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: '{parent}' holds a value, not a section")
    node[_place(node, last, override) if isinstance(node, list) else last] = value


def _place(items: list[Any], key: str, override: str) -> int:
    """The element of a list that a part of a path means: its number, from 0."""
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"override {override!r}: '{key}' is no element of a list of {len(items)}, numbered from 0")
    return int(key)


def _preset(name: Any) -> dict[str, Any]:
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"model.preset: unknown preset {name!r}; {hint}presets: {', '.join(names)}")
    text = (resources.files("rxt_platform.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def _expand_preset(model: dict[str, Any]) -> dict[str, Any]:
    """The preset's values with the section's other keys put over them."""
    rest = dict(model)
    return _merge(_preset(rest.pop("preset")), rest) if "preset" in rest else rest


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _walk(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[Any, list[str]]:
    """The type at a pydantic error location and the user's path to it (without the tags of unions)."""
    at: Any = model
    path: list[str] = []
    for part in loc:
        at = _strip(at)
        if isinstance(at, type) and issubclass(at, BaseModel):
            path.append(str(part))
            field = at.model_fields.get(str(part))
            at = field.annotation if field else None
        elif typing.get_origin(at) is dict:
            path.append(str(part))
            at = typing.get_args(at)[1]
        elif typing.get_origin(at) is list:
            path.append(str(part))
            at = typing.get_args(at)[0]
        elif typing.get_origin(at) in (typing.Union, types.UnionType):
            options = [_strip(option) for option in typing.get_args(at)]
            tagged = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel) and _tag(o) == part]
            at = tagged[0] if tagged else None
        else:
            if at is not None:
                path.append(str(part))
            at = None
    return _strip(at), path


def _strip(annotation: Any) -> Any:
    """Take `Annotated` and an optional `None` off a type."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        if len(options) == 1:
            return _strip(options[0])
    return annotation


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind else None


def _valid_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    at, _ = _walk(model, loc)
    keys = list(at.model_fields) if isinstance(at, type) and issubclass(at, BaseModel) else []
    return ["preset", *keys] if at is ModelConfig else keys


def _key(model: type[BaseModel], loc: tuple[int | str, ...], raw: Any) -> str:
    """The user's path to an error. What may be one thing or a list of them has no index where the user wrote one."""
    path = []
    at = raw
    for part in _walk(model, loc)[1]:
        if part == "[key]" or (part.isdecimal() and not isinstance(at, list | None)):
            continue
        path.append(part)
        if isinstance(at, list):
            at = at[int(part)] if part.isdecimal() and int(part) < len(at) else None
        else:
            at = at.get(part) if isinstance(at, dict) else None
    return ".".join(path)
