"""`python -m loradrop` is the command `loradrop`."""

import sys

from loradrop.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
