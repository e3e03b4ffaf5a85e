"""Numbers as people read them; what does not exist is a dash."""

import math

DASH = "–"
_SPACE = "\u00a0"  # lines do not break there


def number(value: object) -> float | None:
    """A finite number, or None; journals write what JSON has no word for as texts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except ValueError:
        return None
    return read if math.isfinite(read) else None


def count(value: float | None) -> str:
    """63,468."""
    return DASH if value is None else f"{value:,.0f}"


def part(value: float | None, digits: int = 1) -> str:
    """0.238 as 23.8 %."""
    return DASH if value is None else f"{100 * value:.{digits}f}{_SPACE}%"


def figure(value: float | None) -> str:
    """Four digits behind the point."""
    return DASH if value is None else f"{value:.4f}"


def small(value: float | None) -> str:
    """8.7·10⁻⁴ as 8.7e-4, and a plain 0."""
    if value is None:
        return DASH
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}"


def data(value: float | None) -> str:
    """1,066,440 as 1.07 MB."""
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def duration(value: float | None) -> str:
    """0.00123 as 1.23 ms."""
    return _scaled(value, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def operations(value: float | None) -> str:
    """532,400,000 as 532 M."""
    return _scaled(value, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)))


def change(before: float | None, after: float | None, scatter: float = 0.0) -> str:
    """The relative change, or that there is none beyond the scatter."""
    if before is None or after is None or before <= 0:
        return DASH
    ratio = after / before - 1
    if abs(ratio) <= scatter or round(100 * ratio) == 0:
        return "no change"
    return f"{'−' if ratio < 0 else '+'}{abs(100 * ratio):.0f}{_SPACE}%"


def _scaled(value: float | None, units: tuple[tuple[str, float], ...]) -> str:
    if value is None:
        return DASH
    unit, factor = next((pair for pair in units if abs(value) >= pair[1]), units[-1])
    scaled = value / factor
    whole = unit == "B" or abs(scaled) >= 100
    return f"{scaled:,.{0 if whole else 1 if abs(scaled) >= 10 else 2}f}{_SPACE}{unit}".rstrip()
