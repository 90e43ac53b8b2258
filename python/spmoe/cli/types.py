"""Kinds of values on the command line, each checked before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from spmoe.config import check_draft_length, check_memory
from spmoe.errors import InvalidArgument


class Checked(click.types.StringParamType):
    """Text that a function of spmoe refuses with InvalidArgument if it is wrong.

    Args:
        metavar: What help calls it.
        check: Raises on a wrong value; what it returns is not used.
    """

    def __init__(self, metavar: str, check: Callable[[str], object]) -> None:
        self.name = metavar
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text as it is."""
        text = str(value)
        try:
            self._check(text)
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)
        return text


class CommaList(click.types.StringParamType):
    """Values of one type, with commas between them.

    Args:
        of: The type.
    """

    def __init__(self, of: click.ParamType[Any]) -> None:
        self.name = f"{of.name},..."
        self._of = of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the list of converted values."""
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not parts:
            self.fail("give at least one value", param, ctx)
        return [self._of.convert(part, param, ctx) for part in parts]


class OutputFile(click.Path):
    """A file that will be written, whose folder must be there by now.

    Args:
        allow_dash: "-" means standard output.
    """

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(dir_okay=False, writable=True, allow_dash=allow_dash)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        path = os.fsdecode(super().convert(value, param, ctx))
        if self.allow_dash and path == "-":
            return path
        folder = Path(path).parent
        if not folder.is_dir():
            self.fail(f"{path}: there is no folder {folder}; make it first", param, ctx)
        if not Path(path).exists() and not os.access(folder, os.W_OK):
            self.fail(f"{path}: the folder {folder} cannot be written to", param, ctx)
        return path


class WholeText(click.types.StringParamType):
    """Text of an option that may be given again; its environment twin holds one such text."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the value whole, where click would split it at white space."""
        return [rv]


def _check_device(text: str) -> None:
    if re.fullmatch(r"auto|host|cpu|cuda(:[0-9]+)?", text) is None:
        raise InvalidArgument(f'device "{text}" is not one of auto, host, cuda, cuda:<index>')


MEMORY = Checked("auto|share|size", check_memory)
PINNED_MEMORY = Checked("auto|share|size", partial(check_memory, setting="pinned_memory", least=0))
DRAFT_LENGTH = Checked("auto|0..31", check_draft_length)
DEVICE = Checked("device", _check_device)
