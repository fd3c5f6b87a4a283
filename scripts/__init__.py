"""Entry points: each parses, calls the library and prints."""

import signal
import sys

# Ctrl-C ends a script whose imports still run, without a traceback. Then scripts.cli.run takes over. Python calls a
# module "-m" until it has found it: tests and others that import a script keep their own handling.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
