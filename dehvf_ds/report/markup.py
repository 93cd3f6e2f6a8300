"""HTML and SVG as trees: whatever a user wrote is escaped because it is text, not markup."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

Child = Element | str | int | None


def tag(name: str, /, *children: Child, **attributes: object) -> Element:
    """One element.

    Args:
        name: of the element, for example ``td``.
        children: elements and texts in their order; None is left out.
        attributes: ``class_`` is written ``class``, an underscore inside a name as a hyphen; None is left
            out.

    Returns:
        The element, to be put into another.
    """
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    element = Element(name, {names[k]: _written(v) for k, v in attributes.items() if v is not None})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None:
            _add_text(element, str(child))
    return element


def document(root: Element) -> str:
    """The whole page as text."""
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def _written(value: object) -> str:
    # Tenths of a pixel: more digits only make the page longer.
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _add_text(element: Element, text: str) -> None:
    if len(element):
        element[-1].tail = (element[-1].tail or "") + text
    else:
        element.text = (element.text or "") + text
