"""The texts of this package, filled in."""

from functools import cache
from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """A template by its file name."""
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines", "community"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
