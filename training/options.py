"""Options are declared once, as dataclass fields; command lines and presets are made from them."""

import argparse
import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, least: float | None = None, most: float | None = None) -> Any:
    """A dataclass field with its help, its choices or its range (both ends allowed)."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most))


def add_options(parser: argparse.ArgumentParser, group: type) -> None:
    """One flag for every field of a dataclass."""
    flags = parser.add_argument_group(group.__doc__.splitlines()[0].rstrip(".") if group.__doc__ else group.__name__)
    types_of = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        kind = _kind(types_of[field.name])
        help_text = field.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
        if kind is bool:
            flags.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, default=field.default, help=help_text)
        else:
            flags.add_argument(f"--{field.name}", type=kind, default=field.default, choices=field.metadata["choices"], help=help_text)


def read_options(arguments: argparse.Namespace, group: type[T]) -> T:
    """The dataclass from parsed flags.

    Raises:
        ValueError: a value out of its range.
    """
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(group)}
    for field in dataclasses.fields(group):
        value, least, most = values[field.name], field.metadata["least"], field.metadata["most"]
        low, high = -math.inf if least is None else least, math.inf if most is None else most
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"--{field.name} is {value}; it must be finite")
        if isinstance(value, int | float) and not low <= value <= high:  # not a number is in no range
            allowed = (
                "a number"
                if least is most is None
                else f"at least {least}"
                if most is None
                else f"at most {most}"
                if least is None
                else f"between {least} and {most}"
            )
            raise ValueError(f"--{field.name} is {value}; it must be {allowed}")
    return group(**values)


def _kind(annotation: Any) -> type:
    """int from `int` or `int | None`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    return annotation
