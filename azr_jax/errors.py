"""Errors meant for users: one clear line (what, where, what to do) and the exit code it maps to."""

from __future__ import annotations


class UserError(Exception):
    """A mistake or an environment problem the user can act on; the CLI prints it without a traceback.

    exit_code follows the command contract: 1 failed, 2 bad usage or bad config, 3 "the answer is no".
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError):
    """Bad configuration: unknown key, wrong type, impossible combination (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)
