"""HTML from text of others: whatever is not markup of this package is escaped where it enters."""

from __future__ import annotations

import html

from ditas_export.plain_text import visible

_VOID = frozenset({"meta", "img", "br"})


class Html(str):
    """Markup that this package made; any other text is escaped."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Return text as markup; what turns its direction or is no character is written as escapes."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text), quote=True))


def joined(*parts: str) -> Html:
    """Return parts as one piece of markup."""
    return Html("".join(escaped(part) for part in parts))


def tag(_name: str, *children: str, **attributes: str | None) -> Html:
    """Return an element.

    Args:
        _name: of the element.
        children: texts and markup.
        attributes: by name, `_` for `-`, `class_` for class; None leaves one out, and a value is
            never markup.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(visible(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if _name in _VOID:
        return Html(f"<{_name}{given}>")
    return Html(f"<{_name}{given}>{joined(*children)}</{_name}>")
