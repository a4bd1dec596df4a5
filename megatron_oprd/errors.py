"""The user's mistakes: one exception type, and how entry points turn it into exit code 2."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake of the user's, with the setting, what was found and what would be right.

    Entry points print the message without a traceback and exit with code 2. Everything that is
    our own mistake is an assert or another exception, and keeps its traceback.
    """


def run_entry_point(main: Callable[[], int]) -> NoReturn:
    """Runs an entry point's ``main`` and exits with its return code.

    A `UserError` is printed to stderr, on global rank 0 only (every rank finds the same one), and
    the process exits with code 2.
    """
    try:
        code = main()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(code)
