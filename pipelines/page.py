"""What the pages for people share: pictures in two colours, templates, and how numbers are written on them."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import jinja2

from pipelines.artifacts import as_text, atomic_path, flatten
from pipelines.figures import DARK, LIGHT
from pipelines.report_columns import calls, digits, with_interval


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page, PNG bytes for a light and a dark page."""

    name: str
    """File name under figures, without its ending."""
    title: str
    """What it shows; also the text for who cannot see it."""
    caption: str = ""
    """A sentence below the title."""
    light: bytes
    """What is written to figures."""
    dark: bytes = b""
    """Empty: the light one suits both."""

    @classmethod
    def drawn(cls, name: str, title: str, draw: Callable[..., bytes], *data: Any, caption: str = "") -> Self:
        """A figure as ``draw`` makes it of ``data`` and of a theme, in both themes."""
        light, dark = (draw(*data, theme=theme) for theme in (LIGHT, DARK))
        return cls(name=name, title=title, caption=caption, light=light, dark=dark)


def write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """Write the light form of each to ``folder``/figures."""
    for picture in pictures:
        with atomic_path(folder / "figures" / f"{picture.name}.png") as temporary:
            temporary.write_bytes(picture.light)


@cache
def template(name: str) -> jinja2.Template:
    """A page's template by its file name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines", "."),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(base64=lambda png: base64.b64encode(png).decode(), flat=_flat, calls=calls)
    environment.filters.update(times=lambda ratio: f"{ratio:.3g} times" if ratio < 100 else f"{ratio:,.0f} times")
    environment.filters.update(digits=lambda value: digits([value], 0)(value), measure=with_interval)
    return environment.get_template(name)


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value as text) of everything in nested mappings."""
    return [(name, as_text(value)) for name, value in flatten(record, prefix).items()]
