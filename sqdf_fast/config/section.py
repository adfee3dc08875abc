"""What every group of settings has: frozen values, validation with one-line errors, and its own description."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
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
    return "\n".join(_described(section, prefix))


def _described(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        nested = _nested_section(field)
        if nested is not None:
            yield from ("", (nested.__doc__ or "").strip().splitlines()[0])
            yield from _described(nested, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = ",".join(default) if isinstance(default, tuple) else default
        yield f"  {prefix + name:<34}{shown!s:<24}{field.description or ''}".rstrip()


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
    """The closest known key, or what is allowed in its place."""
    sections = [name.rpartition(".")[0] for name in known if "." in name]
    best = max([*known, *dict.fromkeys(sections)], key=lambda name: _likeness(key, name))
    if _likeness(key, best) >= 0.7:
        return f"did you mean {best!r}?"
    section = key.rpartition(".")[0]
    allowed = [name for name in known if name.rpartition(".")[0] == section] or known
    return f"allowed: {', '.join(allowed)}"


def _likeness(key: str, name: str) -> float:
    """Of two dotted keys, in [0, 1]: a common section alone makes no likeness. A key may lack its section."""
    (section, _, own), (its_section, _, its_own) = key.rpartition("."), name.rpartition(".")
    likeness = difflib.SequenceMatcher(None, own, its_own).ratio()
    if section and section != its_section:
        likeness = min(likeness, difflib.SequenceMatcher(None, section, its_section).ratio())
    # Of two equally close settings, the one in the section that was named.
    return likeness - 0.01 * (section != its_section)
