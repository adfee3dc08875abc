"""The protocol of `sqdf-fast compare` from its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqdf_fast.compare.command import protocol_of
from sqdf_fast.compare.protocol import Protocol, read_protocol
from sqdf_fast.config import parse_assignments, preset_for
from sqdf_fast.errors import UserError


def chosen_protocol(
    *,
    file: Path | None,
    methods: str | None,
    seeds: str | None,
    budget: str | None,
    points: int | None,
    ablate: str | None,
    assignments: Sequence[str],
    **flags: str | None,
) -> Protocol:
    """The protocol of a file and the options of the command line, which win.

    Args:
        file: YAML file of a protocol; without one the settings start from the preset that `train` would use.
        methods, seeds, ablate: comma-separated; flags: settings by name.

    Raises:
        UserError: one line.
    """
    settings: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    assigned = parse_assignments(assignments)
    preset = settings.get("preset")
    names = _names(methods)
    if file is not None:
        values = dict(read_protocol(file))
    elif budget is not None:
        values = {"preset": preset_for({}, assigned, settings) or preset}
        names = names or (["sqdf"] if ablate else ["sqdf", "draft-1", "refl", "ddpo"])
    else:
        raise UserError("compare needs --budget, such as 20000 UNet evaluations or 120s, or --protocol FILE")
    settings.pop("preset", None)
    given = {"preset": preset, "seeds": _seeds(seeds), "budget": budget, "points": points, "ablate": _names(ablate)}
    return protocol_of(values, {**assigned, **settings}, names, **given)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise UserError(f"invalid --seeds {text!r}: expected comma-separated whole numbers such as 0,1,2") from None
