"""Mistakes of the user: their exception, and the exit codes of entry points."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

EXIT_USER_ERROR = 2
_SECONDS_FOR_RANK_0 = 20
# The run was asked to stop, has saved and can be resumed: EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STOPPED = 75


class UserError(Exception):
    """A mistake of the user; names the setting, what was found and what would be right.

    Entry points print the message without a traceback and exit with code 2. Mistakes of this
    package are asserts or other exceptions, and keep their traceback.
    """


def say(text: str) -> None:
    """Prints a line to stderr, on global rank 0 only."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def speaks() -> bool:
    """Whether this process is the one that `say` prints on."""
    return _rank() == 0


def run_entry_point(main: Callable[[], int]) -> NoReturn:
    """Runs an entry point's ``main`` and exits with its return code.

    A `UserError` is printed to stderr, and the process exits with code 2 (some seconds later on
    ranks other than 0). Under torchrun, errors also appear at the end of its summary.
    """
    try:
        code = main()
    except UserError as error:
        if _rank() != 0:
            # torchrun ends all ranks when the first one fails, and that has to be rank 0, which
            # prints the message. If the error is on this rank only, nobody ends it, and it prints
            # the message itself.
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"error: {error}", file=sys.stderr, flush=True)
        _record(error)
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        _record(error)
        raise
    sys.exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK") or "0")


def _record(error: Exception) -> None:
    """Adds the error to torchrun's summary."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
