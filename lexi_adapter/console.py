"""What every command of `lexi-adapter` shares with the terminal: refusals in one line, tables."""

import sys
from typing import Any

import click

from lexi_adapter.allocation import AllocationError


class Refusal(click.ClickException):
    """Bad input: one line on stderr and, as for a wrong option, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """A group of commands whose `AllocationError` is a refusal."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AllocationError as error:
            raise Refusal(str(error)) from error


def print_table(table: Any) -> None:
    """A rich table on stdout, as wide as the terminal, or 200 columns where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)
