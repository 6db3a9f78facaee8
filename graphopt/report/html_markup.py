"""HTML as values: strings are escaped when they are put into an element, elements are not. Nothing else writes tags."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

# Characters that no HTML file may hold: controls other than tab and line ends, lone surrogates, non-characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "br", "col"})


class Html(str):
    """Text that is HTML already. A plain `str` is not, and gets escaped by `el`."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def escape(text: str) -> Html:
    """Any text as HTML text or attribute value; characters that HTML cannot hold become U+FFFD."""
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True))


def el(tag: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """`el("a", "x < y", href="#z")` -> `<a href="#z">x &lt; y</a>`.

    Children may be nested lists; None is left out. Attribute names: `class_` is class, `aria_label` is aria-label,
    None and False leave the attribute out, True writes its bare name.
    """
    written = []
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {name}")
        elif value is not None and value is not False:
            written.append(f' {name}="{escape(str(value))}"')
    opening = f"<{tag}{''.join(written)}>"
    return Html(opening if tag in _VOID else f"{opening}{join(children)}</{tag}>")


def join(children: Child) -> Html:
    """Children one after the other, each escaped unless it is Html."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, (str, int, float)):
        return escape(str(children))
    return Html("".join(join(child) for child in children))


def section(title: str, identifier: str, *children: Child, note: Child = None) -> Html:
    """A titled part of the page, with an explaining line under the title."""
    heading = el("h2", title, id=identifier)
    return el("section", heading, el("p", note, class_="note") if note else None, *children, aria_labelledby=identifier)


def table(
    headings: Sequence[str], rows: Iterable[Sequence[Child]], *, label: str, numeric: Sequence[int] = (), wide: int = -1
) -> Html:
    """A table that scrolls by itself on a narrow screen. `numeric` columns are set right, `wide` takes what is left.

    A row that is a `Row` carries its own class.
    """
    kinds = dict.fromkeys(numeric, "number") | ({wide: "wide"} if wide >= 0 else {})
    head = el("tr", [el("th", h, scope="col", class_=kinds.get(i)) for i, h in enumerate(headings)])
    body = []
    for row in rows:
        first, *rest = row
        cells = [el("th", first, scope="row", class_=kinds.get(0))]
        cells += [el("td", cell, class_=kinds.get(i)) for i, cell in enumerate(rest, start=1)]
        body.append(el("tr", cells, class_=getattr(row, "mark", None)))
    inner = el("table", el("thead", head), el("tbody", body))
    return el("div", inner, class_="scroll", role="region", aria_label=label, tabindex=0)


class Row(tuple[Child, ...]):
    """A table row with a class: `delivered`, `total`, `bad`."""

    mark: str | None = None

    @classmethod
    def of(cls, cells: Iterable[Child], mark: str | None) -> Row:
        row = cls(cells)
        row.mark = mark
        return row


def fold(summary: Child, *children: Child, open_: bool = False) -> Html:
    """A part that is closed until asked for."""
    return el("details", el("summary", summary), *children, open=open_)


def code(text: Child) -> Html:
    return el("code", text)


def badge(text: str, kind: str) -> Html:
    """A small label; `kind` is good, bad, warn or plain."""
    return el("span", text, class_=f"badge {kind}")


def bars(rows: Iterable[tuple[Child, float, str, str]], *, label: str) -> Html:
    """Horizontal bars from zero on one scale. A row is (name, value, value as text, class of the bar)."""
    kept = [row for row in rows if finite(row[1])]
    largest = max((value for _, value, _, _ in kept), default=0.0)
    items = []
    for name, value, text, kind in kept:
        share = 100 * value / largest if largest > 0 else 0.0
        bar = el("span", el("span", class_=f"bar {kind}".strip(), style=f"width:{share:.2f}%"), class_="track")
        items.append(el("li", el("span", name, class_="bar-name"), bar, el("span", text, class_="bar-value")))
    return el("ul", items, class_="bars", aria_label=label)


def finite(value: Any) -> TypeGuard[float]:
    """A number that can be drawn: null (what infinity and NaN are in JSON) and text cannot."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plural(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def nice_step(span: float, ticks: int = 5) -> float:
    """The 1, 2 or 5 times a power of ten that divides `span` (> 0) into at most about `ticks` parts."""
    raw = span / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power)
