"""Pydantic's findings as recipe errors: dotted key, value, bound and a did-you-mean for each."""

from __future__ import annotations

import typing
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mil_cli.errors import MilError, RecipeError, did_you_mean

_HINTS = {
    "int_type": "write a whole number",
    "int_parsing": "write a whole number",
    "int_from_float": "write a whole number",
    "float_type": "write a number",
    "float_parsing": "write a number",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "string_type": "write a text",
    "dict_type": "write a mapping of keys, {key: value}",
    "model_type": "write a mapping of keys, {key: value}",
    "model_attributes_type": "write a mapping of keys, {key: value}",
    "list_type": "write a list, [first, second]",
    "tuple_type": "write a list, [first, second]",
    "finite_number": "write a finite number",
}

# How the part of a message begins that says what to do.
_STEPS = ("write ", "give ", "use ", "set ", "choose ", "leave ", "remove ")

_CONTAINERS = (dict, list, tuple, Mapping)

M = TypeVar("M", bound=BaseModel)


def dotted(*parts: object) -> str:
    """Join the parts of a key; list positions become ``[0]``."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "":
            text += f".{part}" if text else str(part)
    return text


def validate(
    model_type: type[M],
    content: object,
    *,
    where: str = "",
    problems: MutableSequence[MilError],
    aliases: Sequence[str] = (),
) -> M | None:
    """Validate a part of a recipe; what is wrong is added to `problems`, each with its full key.

    Args:
        model_type: The pydantic type of the part.
        content: The part as composed.
        where: The part's dotted key.
        problems: Where problems are added.
        aliases: Keys that are allowed beside the fields, for the did-you-mean.

    Returns:
        The validated part, or None.
    """
    try:
        return model_type.model_validate(content)
    except ValidationError as error:
        problems.extend(problems_of(error, model_type, where=where, aliases=aliases))
        return None


def problems_of(
    error: ValidationError, model_type: type[BaseModel], *, where: str = "", aliases: Sequence[str] = ()
) -> list[RecipeError]:
    """Return one `RecipeError` for each finding of pydantic."""
    findings = error.errors()
    # Entries that are wrong count as missing: a list that is too short by them is told by them.
    within = {finding["loc"][:-1] for finding in findings}
    told = [each for each in findings if each["type"] != "too_short" or each["loc"] not in within]
    return [_problem(dict(finding), model_type, where=where, aliases=aliases) for finding in told]


def _problem(
    finding: Mapping[str, Any], model_type: type[BaseModel], *, where: str, aliases: Sequence[str]
) -> RecipeError:
    location: tuple[Any, ...] = finding["loc"]
    key = dotted(where, *location) or "recipe"
    kind: str = finding["type"]
    value = finding.get("input")
    if kind == "extra_forbidden":
        known = [*_fields_at(model_type, location[:-1]), *(aliases if len(location) == 1 else ())]
        return RecipeError("there is no such key", where=key, value=value, hint=did_you_mean(str(location[-1]), known))
    if kind == "missing":
        return RecipeError("a value is needed here", where=key, hint=f"set {key} in the recipe")
    message: str = finding["msg"]
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        what, _, step = message.rpartition("; ")
        if not step.startswith(_STEPS) or not what:
            what, step = message, f"change {key}"
        hint = step
        if isinstance(value, Mapping):
            return RecipeError(what, where=key, hint=hint)
        return RecipeError(what, where=key, value=value, hint=hint)
    if kind in ("literal_error", "enum"):
        expected = str(finding.get("ctx", {}).get("expected", ""))
        choices = [choice.strip(" '\"") for part in expected.split(" or ") for choice in part.split(",")]
        return RecipeError(f"must be one of {expected}", where=key, value=value, hint=did_you_mean(str(value), choices))
    if kind == "union_tag_invalid":
        context = finding["ctx"]
        name, tags = context["discriminator"].strip("'"), context["expected_tags"]
        hint = did_you_mean(context["tag"], [tag.strip(" '") for tag in tags.split(",")])
        return RecipeError(f"must be one of {tags}", where=f"{key}.{name}", value=context["tag"], hint=hint)
    if kind in ("too_short", "too_long"):
        bound = finding["ctx"]["min_length" if kind == "too_short" else "max_length"]
        wanted = f"{'at least' if kind == 'too_short' else 'at most'} {bound}"
        entries = f"must have {wanted} {'entry' if bound == 1 else 'entries'}"
        return RecipeError(entries, where=key, value=value, hint=f"write {wanted}")
    what = message.replace("Input should be", "must be").replace("String should", "must")
    hint = _HINTS.get(kind) or f"change {key}; it {what}"
    return RecipeError(what, where=key, value=value, hint=hint)


def _fields_at(model_type: type[BaseModel], location: Sequence[object]) -> list[str]:
    """Return the field names of the model that `location` leads to from `model_type`."""
    current: Any = model_type
    entered = False
    for part in location:
        if entered:  # the key or place of an entry, whose model is known already
            entered = False
            continue
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            return []
        annotation = fields[part].annotation
        current, entered = _model_in(annotation), typing.get_origin(annotation) in _CONTAINERS
    return list(getattr(current, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
