"""The program `lexi-search`: `main`, with Ctrl-C heeded from the first import to the end.

Nothing but the standard library is imported at the top: an interruption during the other imports is one line, too.
"""

import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line and leave; 130 and one line after Ctrl-C."""
    _open_streams()
    try:
        from lexi_search.cli.main import main

        main()
    except KeyboardInterrupt:
        os.write(2, b"Error: interrupted\n")
        os._exit(130)
    except SystemExit as end:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is written, and Python only takes itself apart
        if end.code == 130:  # a library that was loaded in part may crash in that
            os._exit(130)
        raise
    sys.exit()


def _open_streams() -> None:
    """Open what the caller has closed of the standard streams, on the null device.

    Else the next file that is opened, such as the output, would be one of them, and libraries would print into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
