"""What ``--help`` says of each option: its docstring as plain text, and a default where there is one."""

import dataclasses
import re
import typing
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


def add_help_texts(registry: ConstructorRegistry) -> None:
    """Has ``registry`` describe the fields of dataclasses as terminals show text, without the marks that
    docstrings carry for code."""
    asking = False

    @registry.struct_rule
    def described(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None  # tyro's own rule comes next
        asking = True
        try:
            found = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(found, StructConstructorSpec):
            return None
        return dataclasses.replace(found, fields=tuple(map(_described, found.fields)))


def plain_text(docstring: str) -> str:
    """Without the marks for code, and with the names of other options as they are typed."""
    typed = re.sub(r"``([a-z0-9_]+)``", lambda name: name[1].replace("_", "-"), docstring)
    return typed.replace("`", "")


def _described(field: StructFieldSpec) -> StructFieldSpec:
    kind: Any = field.type
    marks = typing.get_args(kind)
    empty = tyro.conf.Positional in marks or field.default in (None, (), "")
    if empty and tyro.conf.UseAppendAction not in marks:
        # The text says what happens then; "(default: None)" says nothing.
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    return dataclasses.replace(field, type=kind, helptext=_help_text(field))


def _help_text(field: StructFieldSpec) -> Callable[[], str | None]:
    """Called only where the help is shown: tyro reads a docstring late, since that is slow."""

    def text() -> str | None:
        found = field.helptext() if callable(field.helptext) else field.helptext
        if found is None and dataclasses.is_dataclass(field.type):
            found = (field.type.__doc__ or "").partition("\n\n")[0]  # heads the group of its options
        return None if found is None else re.sub(r"\s*\n\s*", " ", plain_text(found))

    return text
