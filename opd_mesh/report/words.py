"""Numbers as a reader of a page wants them."""

from __future__ import annotations


def signed_percent(share: float) -> str:
    """−0.684 → "−68 %"; beyond tenfold growth as a factor."""
    if share >= 10:
        return f"×{share + 1:.3g}"
    text = f"{abs(share) * 100:.0f} %" if abs(share) >= 0.0995 else f"{abs(share) * 100:.1f} %"
    return ("+" if share >= 0 else "−") + text


def format_kl(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def format_count(value: float | None) -> str:
    if value is None:
        return "—"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def format_bytes(value: float | None) -> str:
    if not value:
        return "—"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.3g} TiB"


def format_duration(seconds: float | None) -> str:
    if seconds is None or seconds < 0:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
