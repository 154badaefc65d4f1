"""Finding the answer in a text: None where there is none. The last one counts, as answers stand at the end."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from opd_mesh.config.tasks import BoxedExtract, Extract, LastNumberExtract, RegexExtract, TagExtract

# ASCII digits only: Python's own parsers also take underscores, "nan", "inf" and the digits of every script.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# A sign counts where it does not stand between two operands; thousands may be set apart by commas.
_NUMBER_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]])[+-])?(?<![\w.])"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
)


def extract(config: Extract, text: str) -> str | None:
    """The answer in ``text``, stripped; None where there is none or it is empty."""
    match config:
        case RegexExtract(pattern=pattern, group=group):
            found = None
            for last in re.finditer(pattern, text):
                found = last.group(group)
        case BoxedExtract():
            found = _last_boxed(text)
        case LastNumberExtract():
            numbers = _NUMBER_IN_TEXT.findall(text)
            found = numbers[-1].replace(",", "") if numbers else None
        case TagExtract(tag=tag):
            found = _last_between(text, f"<{tag}>", f"</{tag}>")
        case _:
            found = text
    return (found or "").strip() or None


def _last_between(text: str, start: str, end: str) -> str | None:
    stop = text.rfind(end)
    begin = text.rfind(start, 0, max(stop, 0))
    return text[begin + len(start) : stop] if begin >= 0 and stop >= 0 else None


def _last_boxed(text: str) -> str | None:
    r"""Of the last ``\boxed{`` whose brace is closed again. One pass, however deep."""
    opened: list[int | None] = []  # for every open brace where the content of its box begins, if it is one
    last: tuple[int, int] | None = None
    for place, character in enumerate(text):
        if character == "{":
            opened.append(place + 1 if text.endswith(r"\boxed", 0, place) else None)
        elif character == "}" and opened:
            begin = opened.pop()
            if begin is not None and (last is None or begin > last[0]):
                last = begin, place
    return None if last is None else text[slice(*last)]


def parse_number(text: str) -> Decimal | None:
    """One finite decimal number and nothing else; None for anything else."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        number = Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return None
    return number if number.is_finite() else None
