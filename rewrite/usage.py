"""How every command reads its options: a wrong call is one line and exit code 2."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(Exception):
    """A wrong call of the command: printed in one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints are a `UsageError` instead of an exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")
