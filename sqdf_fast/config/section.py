"""What every group of settings has: frozen values, validation with one-line errors, and its own description."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from sqdf_fast.errors import UserError

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


S = TypeVar("S", bound=Section)


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys and values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def validate(section: type[S], values: Mapping[str, Any]) -> S:
    """``values`` as a section. Raises UserError: one line that names the key, the value and what is allowed."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, section)) from None


def setting_names(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key that ``--set`` accepts."""
    names = []
    for name, field in section.model_fields.items():
        nested = _nested_section(field)
        names += [f"{prefix}{name}"] if nested is None else setting_names(nested, f"{prefix}{name}.")
    return names


def describe_settings(section: type[Section], prefix: str = "") -> str:
    """Every setting with its default and meaning, one per line: what ``--help-settings`` prints."""
    lines = []
    for name, field in section.model_fields.items():
        nested = _nested_section(field)
        if nested is not None:
            lines += ["", (nested.__doc__ or "").partition("\n")[0], describe_settings(nested, f"{prefix}{name}.")]
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = ",".join(default) if isinstance(default, tuple) else default
        lines.append(f"  {prefix + name:<34}{shown!s:<24}{field.description or ''}".rstrip())
    return "\n".join(lines)


def _nested_section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _one_line(error: ValidationError, section: type[Section]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-int", "constrained-float"))
    if first["type"] == "extra_forbidden":
        return f"setting {key!r} is unknown; {_suggestion(key, setting_names(section))}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"].removeprefix("Input should be ").rstrip(".")
    return f"setting {key} = {first['input']!r} is not allowed: it must be {message}"


def _suggestion(key: str, known: list[str]) -> str:
    """The closest known key, or the keys allowed in the same section. A key without a section may belong to any."""
    section, _, name = key.rpartition(".")
    allowed = [other for other in known if other.rpartition(".")[0] == section]
    sections = [other.partition(".")[0] for other in known if "." in other]
    # Reversed: of two settings of one name the first one is suggested.
    candidates = {other.rpartition(".")[2]: other for other in reversed(allowed if section else [*known, *sections])}
    if close := difflib.get_close_matches(name, candidates, n=1, cutoff=0.7):
        return f"did you mean {candidates[close[0]]!r}?"
    return f"allowed: {', '.join(allowed)}"
