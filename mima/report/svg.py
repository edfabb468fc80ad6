"""Matplotlib's SVG made fit to stand inside a page that forbids inline styles."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from markupsafe import Markup

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_GEOMETRY = ("d", "transform")


def inline(svg: str, *, label: str) -> Markup:
    """The element to put into a page.

    Styles become presentation attributes, which no content security policy forbids and which the
    page's style sheet can recolour; ids that nothing refers to, fonts and metadata are left out.
    The label says what the picture shows to those who do not see it.

    Returns:
        One `svg` element without namespace prefixes, safe to insert.
    """
    root = ET.fromstring(svg)
    metadata = root.find(f"{_SVG}metadata")
    if metadata is not None:
        root.remove(metadata)
    for defs in root.iter(f"{_SVG}defs"):
        for style in defs.findall(f"{_SVG}style"):
            defs.remove(style)
    markup = ET.tostring(root, encoding="unicode")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag != "text":
            element.text = None
        element.tail = None
        for declaration in element.attrib.pop("style", "").split(";"):
            name, colon, value = declaration.partition(":")
            if colon and name.strip() != "font-family":
                element.set(name.strip(), value.strip())
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        name = element.get("id", "")
        if f"#{name})" not in markup and f'#{name}"' not in markup:
            element.attrib.pop("id", None)
        for attribute in _GEOMETRY:
            if attribute in element.attrib:
                element.set(attribute, " ".join(element.attrib[attribute].split()))
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
        "stroke-linejoin": "round",
    }
    # ElementTree escapes text and attributes
    return Markup(ET.tostring(root, encoding="unicode", method="html"))
