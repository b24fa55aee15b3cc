"""The run-time type checker behind the shapes in `hd_core`'s signatures, for the tests only."""

from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintException


def check(function: Any) -> Any:
    """Beartype, but a function with a hint that it cannot check by itself (such as ``Self``) stays as it is."""
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        return function
