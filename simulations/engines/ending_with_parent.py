"""Start a program that ends when its parent dies.

    python -m simulations.engines.ending_with_parent CMD ARG...

Linux sends SIGTERM at the parent's death, also after SIGKILL, so no server of a killed command stays behind.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for a signal at the parent's death, then become the program."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m simulations.engines.ending_with_parent CMD ARG...")
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # Ctrl-C is for the command that started this, which stops the run in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
