"""The user's mistakes: one exception type, and how entry points turn it into exit code 2."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

EXIT_USER_ERROR = 2
_SECONDS_FOR_RANK_0 = 20
# A run that was asked to stop has saved and can go on: sysexits.h's EX_TEMPFAIL, "try again".
EXIT_STOPPED = 75


class UserError(Exception):
    """A mistake of the user's, with the setting, what was found and what would be right.

    Entry points print the message without a traceback and exit with code 2. Everything that is
    our own mistake is an assert or another exception, and keeps its traceback.
    """


def say(text: str) -> None:
    """Prints a line to stderr, on global rank 0 only."""
    if _rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run_entry_point(main: Callable[[], int]) -> NoReturn:
    """Runs an entry point's ``main`` and exits with its return code.

    A `UserError` is printed to stderr and the process exits with code 2, on other ranks than global
    rank 0 some seconds later. Under torchrun any error also stands at the end of its summary.
    """
    try:
        code = main()
    except UserError as error:
        if _rank() != 0:
            # torchrun ends all ranks when the first one fails: that has to be the one that speaks.
            # A rank that alone has found an error is not ended, and speaks for itself.
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
    """Has torchrun's summary say what went wrong, if there is a torchrun."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
