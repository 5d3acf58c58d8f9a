"""YAML and dotted overrides to frozen, typed objects; every problem of a file is told at once, with its line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from danlu import yamls
from danlu.errors import ConfigError
from danlu.words import _


class Model(BaseModel):
    """A frozen value that knows no unknown keys.  `kind` tags the members of a union.

    `ALIASES` maps a name that users know from other tools to the dotted key that means the same here, or to a
    function from its value to {dotted key: value}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())
    ALIASES: ClassVar[Mapping[str, str | Callable[[Any], dict[str, Any]]]] = {}


M = TypeVar("M", bound=Model)
BRANCH = re.compile(r"(literal|dict|tuple|list)\[|constrained-|function-")      # what pydantic calls the branches of a union
SCALARS = ("str", "int", "float", "bool")                # … and the last of them
OUTER = ("literal_error", "too_short")                   # said of a whole of which a part is at fault


def load(cls: type[M], path: Path | None, overrides: Sequence[str] = ()) -> M:
    """Return the `cls` that the file at `path` and the `a.b=c` overrides describe.

    Raises ConfigError that lists every problem with its place.
    """
    data, lines = yamls.read(path) if path else ({}, {})
    name = str(path) if path else _("command line")
    if not isinstance(data, dict):
        raise ConfigError(_("the file must hold keys and values"), where=name)
    places = {key: f"{name}:{line}" for key, line in lines.items()}
    data = _unalias(cls, data, places)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip("-. "):
            raise ConfigError(_("{text!r} is not of the form key=value").format(text=text), where=_("command line"))
        for dotted, new in _moved(cls, key.lstrip("-").replace("-", "_"), yamls.scalar(value)).items():
            _put(data, tuple(dotted.split(".")), new)
            places[tuple(dotted.split("."))] = _("command line")
    return validate(cls, data, places)


def validate(cls: type[M], data: dict[str, Any], places: Mapping[tuple[str | int, ...], str] | None = None) -> M:
    """Return `data` as a `cls`, strictly: no text for numbers, no booleans for integers.  Raises ConfigError."""
    data = _tagged(cls, data)
    errors = list(_bent(cls, data))
    try:
        made = cls.model_validate(data)
        if not errors:
            return made
    except ValidationError as error:
        known = {_walk(cls, e["loc"])[1] for e in errors}
        errors += [dict(e) for e in error.errors(include_url=False) if _walk(cls, e["loc"])[1] not in known]
    keys = [_walk(cls, e["loc"])[1] for e in errors]
    inner = [e for e, key in zip(errors, keys, strict=True) if e["type"] not in OUTER or not any(
        len(other) > len(key) and other[: len(key)] == key for other in keys)]
    raise ConfigError("\n".join(dict.fromkeys(_problem(cls, e, places or {}) for e in inner)))


def dump(value: Model) -> dict[str, Any]:
    """Return `value` as JSON-ready data from which `validate` makes it again."""
    return value.model_dump(mode="json")


def to_yaml(value: Model, *, only_set: bool = False) -> str:
    """Return `value` as the YAML that loads to it; `only_set` leaves defaults out."""
    data = value.model_dump(mode="json", exclude_unset=only_set)
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


def members(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every Model class named in an annotation: itself, of a union, of a tuple."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        if not isinstance(inner, str):
            yield from members(inner)


def _kind(cls: type[BaseModel]) -> str | None:
    field = cls.model_fields.get("kind")
    return str(field.default) if field is not None and isinstance(field.default, str) else None


def _is_sequence(annotation: Any) -> bool:
    origins = [get_origin(a) for a in (annotation, *get_args(annotation))]
    return any(o in (tuple, list) for o in origins)


def _scalars(annotation: Any) -> frozenset[type]:
    """Return the scalar types an annotation takes, those of its literals and items among them."""
    if isinstance(annotation, type) and not get_args(annotation):
        return frozenset([annotation])
    if get_origin(annotation) is Literal:
        return frozenset(type(value) for value in get_args(annotation))
    return frozenset().union(*(_scalars(inner) for inner in get_args(annotation))) - {Any}


def _bent(cls: type[BaseModel], data: Any, loc: tuple[str | int, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield an error for true in place of 1, "5" of 5 and "yes" of true, which pydantic would bend into shape."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if name not in cls.model_fields:
            continue
        annotation = cls.model_fields[name].annotation
        inner = list(members(annotation))
        for at, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            place = (*loc, name) if at is None else (*loc, name, at)
            if isinstance(item, dict):
                chosen = [c for c in inner if len(inner) == 1 or _kind(c) == item.get("kind")]
                yield from _bent(chosen[0], item, place) if chosen else ()
            elif (wrong := _misfit(item, _scalars(annotation))) is not None:
                yield {"type": wrong, "loc": place, "input": item}


def _misfit(value: Any, taken: frozenset[type]) -> str | None:
    """Return pydantic's name of what is wrong with a scalar where the types `taken` are asked for."""
    number = "int_type" if int in taken else "float_type" if float in taken else None
    if isinstance(value, bool):
        return number if bool not in taken else None
    if isinstance(value, str):
        return (number or "bool_type") if taken & {int, float, bool} and not taken & {str, Path} else None
    if isinstance(value, int | float):
        return "bool_type" if bool in taken and number is None else None
    return None


def _tagged(cls: type[BaseModel], data: Any) -> Any:
    """Spell out the short forms: `optim: adamw` is `{kind: adamw}`; a missing kind is the default's."""
    if not isinstance(data, dict):
        return data
    result = dict(data)
    for name, field in cls.model_fields.items():
        choices = {_kind(c): c for c in members(field.annotation) if _kind(c)}
        if name not in result:
            continue
        value = result[name]
        if not choices:
            inner = next(members(field.annotation), None)
            if inner is not None:
                result[name] = _each(value, inner) if isinstance(value, list) else _tagged(inner, value)
            continue
        if isinstance(value, list) and _is_sequence(field.annotation):
            result[name] = [_union(choices, v, None) for v in value]
        else:
            result[name] = _union(choices, value, field.default)
    return result


def _each(values: list[Any], cls: type[BaseModel]) -> list[Any]:
    return [_tagged(cls, v) for v in values]


def _union(choices: Mapping[str | None, type[BaseModel]], value: Any, default: Any) -> Any:
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, dict):
        if "kind" not in value and isinstance(default, BaseModel):
            value = {"kind": _kind(type(default)), **value}
        if "kind" not in value and len(choices) == 1:
            value = {"kind": next(iter(choices)), **value}
        chosen = choices.get(value.get("kind"))
        return _tagged(chosen, value) if chosen else value
    return value


def _unalias(cls: type[Model], data: dict[str, Any], places: dict[tuple[str | int, ...], str]) -> dict[str, Any]:
    """Move the names users know from other tools to ours; refuse a value given under both."""
    result = {k: v for k, v in data.items() if _moved(cls, k, v) == {k: v}}
    moved = [(tuple(dotted.split(".")), value, name) for name in data if name not in result
             for dotted, value in _moved(cls, name, data[name]).items()]
    for key, value, name in sorted(moved, key=lambda move: len(move[0])):      # `optim` first, then its `optim.lr`
        if _get(result, key) is not None and _get(result, key) != value:
            raise ConfigError(
                _("{a} and {b} say the same thing twice, and differ").format(a=name, b=".".join(key)),
                where=places.get((name,)),
            )
        _put(result, key, value)
        places[key] = places.get((name,), _("command line"))
    return result


def _moved(cls: type[Model], name: str, value: Any) -> dict[str, Any]:
    """Return {our dotted key: value} for a key that may be another tool's (`optim: adamw_torch`)."""
    alias = cls.ALIASES.get(name, name)
    return {alias: value} if isinstance(alias, str) else alias(value)


def _get(data: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _put(data: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    here: Any = data
    for i, part in enumerate(key[:-1]):
        child = here[int(part)] if isinstance(here, list) and part.isdigit() and int(part) < len(here) else None
        if not isinstance(here, list):
            child = here.get(part)
            if isinstance(child, str):
                child = {"kind": child}          # `adapt=lora adapt.rank=8`
            child = {} if child is None else list(child) if isinstance(child, list) else dict(child)
            here[part] = child
        if not isinstance(child, dict | list):
            raise ConfigError(_("{key} has no parts").format(key=".".join(key[: i + 1])), where=_("command line"))
        here = child
    if isinstance(here, list):
        if not key[-1].isdigit() or int(key[-1]) >= len(here):
            raise ConfigError(_("{key} has no parts").format(key=".".join(key)), where=_("command line"))
        here[int(key[-1])] = value
    else:
        here[key[-1]] = value


def _problem(cls: type[Model], error: dict[str, Any], places: Mapping[tuple[str | int, ...], str]) -> str:
    """Return one line: place, key, what is wrong, what was meant."""
    owner, key = _walk(cls, error["loc"])
    dotted = ".".join(str(k) for k in key)
    place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), "")
    text = _sentence(error, dotted)
    if error["type"] == "extra_forbidden":
        text += _did_you_mean(str(key[-1]), owner, cls)
    return f"{place}: {text}" if place else text


def _walk(cls: type[BaseModel], loc: tuple[Any, ...]) -> tuple[type[BaseModel], tuple[str | int, ...]]:
    """Return the class that owns the last part of `loc`, and the key without the union tags pydantic adds."""
    key: list[str | int] = []
    owner, choices = cls, [cls]
    for place, part in enumerate(loc):
        branch = isinstance(part, str) and (BRANCH.match(part) or (part in SCALARS and 0 < place == len(loc) - 1))
        if branch and part not in owner.model_fields:
            continue
        tagged = next((c for c in choices if _kind(c) == part and part not in owner.model_fields), None)
        if isinstance(part, str) and tagged is not None and tagged is not owner and choices != [owner]:
            owner, choices = tagged, [tagged]
            continue
        key.append(part)
        if isinstance(part, str):
            if len(choices) == 1:
                owner = choices[0]
            field = owner.model_fields.get(part)
            if field is not None:
                choices = list(members(field.annotation)) or choices
    return (choices[0] if len(choices) == 1 and len(key) > 1 and key[-1] not in owner.model_fields else owner), tuple(key)


def _did_you_mean(name: str, owner: type[BaseModel], root: type[Model]) -> str:
    known = {f: f for f in owner.model_fields}
    known |= {a: a for a in root.ALIASES if owner is root}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    elsewhere = [d for d in _dotted(root) if d.rsplit(".", 1)[-1] == name]
    if not close and not elsewhere:
        far = {d.rsplit(".", 1)[-1]: d for d in _dotted(root)}
        elsewhere = [far[c] for c in difflib.get_close_matches(name, far, n=1, cutoff=0.75)]
    found = close or elsewhere[:1]
    if not found:
        return _("; known here: {names}").format(names=", ".join(sorted(owner.model_fields)))
    return _(" — did you mean {name!r}?").format(name=found[0])


def _dotted(cls: type[BaseModel], prefix: str = "", depth: int = 0) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        if depth < 2:
            for inner in members(field.annotation):
                yield from _dotted(inner, f"{prefix}{name}.", depth + 1)


def _sentence(error: dict[str, Any], key: str) -> str:
    ctx, given = error.get("ctx", {}), error.get("input")
    shown = json.dumps(given, ensure_ascii=False) if isinstance(given, str | int | float | bool) else str(given)[:80]
    match error["type"]:
        case "extra_forbidden":
            return _("unknown key {key!r}").format(key=key)
        case "missing":
            return _("{key}: this key is needed").format(key=key)
        case "value_error" | "assertion_error":
            why = str(ctx.get("error", error["msg"]))
            return f"{key}: {why}" if key else why
        case "union_tag_not_found":
            return _("{key}: say which `kind` it is").format(key=key)
        case "dict_type" | "model_type" | "model_attributes_type":
            return _("{key}: must hold keys and values, not {value}").format(key=key, value=shown)
        case "list_type" | "tuple_type":
            return _("{key}: must be a list, not {value}").format(key=key, value=shown)
        case "too_short":
            return _("{key}: must not be empty").format(key=key)
        case "literal_error" | "union_tag_invalid":
            choices = ctx.get("expected") or ctx.get("expected_tags")
            tag = ctx.get("tag", shown)
            return _("{key}: {value} is not one of {choices}").format(key=key, value=tag, choices=choices)
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
            bound = next(iter(ctx.values()))
            return _("{key}: must be {sign} {bound}, not {value}").format(
                key=key, sign=sign[error["type"]], bound=bound, value=shown)
        case "finite_number":
            return _("{key}: must be a finite number, not {value}").format(key=key, value=shown)
        case "int_type" | "int_from_float" | "int_parsing":
            return _("{key}: must be a whole number, not {value}").format(key=key, value=shown)
        case "float_type" | "float_parsing":
            return _("{key}: must be a number, not {value}").format(key=key, value=shown)
        case "bool_type" | "bool_parsing":
            return _("{key}: must be true or false, not {value}").format(key=key, value=shown)
        case "string_type" | "path_type":
            return _("{key}: must be text, not {value} (quote it)").format(key=key, value=shown)
    return f"{key}: {error['msg']}"


def schema(cls: type[Model]) -> dict[str, Any]:
    """Return the JSON schema of `cls`, for editors and programs."""
    return cls.model_json_schema()

