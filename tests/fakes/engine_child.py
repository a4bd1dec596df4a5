"""A process for `EngineProcess` that does as it is told: (what, argument)."""

import os
import sys
import time
from multiprocessing.connection import Connection


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    while True:
        what, argument = connection.recv()
        if what == "answer":
            connection.send((True, argument))
        elif what == "fail":
            connection.send((False, argument))
        elif what == "exit":
            os._exit(argument)
        elif what == "leave_heir":
            if os.fork():
                os._exit(argument)
            time.sleep(60)
        else:
            time.sleep(60)


if __name__ == "__main__":
    main()
