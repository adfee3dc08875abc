"""Durations, bytes and energy in readable units."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"


def format_duration(seconds: float) -> str:
    """``0.25`` as "0.25 s", ``80`` as "1 min 20 s", ``6510`` as "1 h 48 min", ``100_000`` as "1 d 4 h"."""
    if round(seconds) < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return _pair(minutes, "min", rest, "s")
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return _pair(hours, "h", minutes, "min")
    days, hours = divmod(round(seconds / 3600), 24)
    return _pair(days, "d", hours, "h")


def _pair(count: int, unit: str, rest: int, small: str) -> str:
    return f"{count} {unit} {rest} {small}" if rest else f"{count} {unit}"


def format_bytes(count: float) -> str:
    """``3_221_225_472`` as "3.00 GiB"; binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def format_against(now: float | None, peak: float, limit: float) -> str:
    """``2.3e9, 5.1e9, 6e9`` as "now 2.1, peak 4.7 of 5.6 GiB": all in the unit of the last, GiB or MiB."""
    size, unit = (2**30, "GiB") if limit >= 2**30 else (2**20, "MiB")
    live = "" if now is None else f"now {now / size:.1f}, "
    return f"{live}peak {peak / size:.1f} of {limit / size:.1f} {unit}"


def format_energy(joules: float) -> str:
    """``900`` as "900 J", ``1500`` as "1.5 kJ"."""
    return f"{joules:.3g} J" if joules < 1000 else f"{joules / 1000:.3g} kJ"
