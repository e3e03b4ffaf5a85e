"""Texts from elsewhere, names above all, as they may be shown and stored.

A name is any Python text: it can hold characters that move a terminal's cursor, that turn the direction of what stands
beside them (Unicode Standard Annex #9), or that UTF-8 has no bytes for (lone surrogates: bytes of file names that are
no text).
"""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]
"""A JSON object, or plain data that are to be one; what lies in it is looked at where it is read."""

_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_INVISIBLE = re.compile(f"[{_CONTROLS}{_DIRECTIONS}\u2028\u2029\ufeff\ud800-\udfff]")


def visible(text: str, *, line: bool = False) -> str:
    """The text with escapes such as U+202E's in place of control characters, direction overrides and lone surrogates.

    Args:
        text: The text.
        line: Whether it is to be one line: line breaks and tabs are then written as escapes, too.
    """
    shown = _INVISIBLE.sub(lambda found: f"\\x{code:02x}" if (code := ord(found[0])) < 256 else f"\\u{code:04x}", text)
    return shown.replace("\n", "\\n").replace("\t", "\\t") if line else shown


def utf8(text: str) -> bytes:
    """The text in UTF-8, lone surrogates as escapes: in JSON these are what stands for them."""
    return text.encode("utf-8", "backslashreplace")
