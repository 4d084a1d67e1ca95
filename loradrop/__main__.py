"""`python -m loradrop` is the command `loradrop`."""

import sys

from loradrop.cli import main

sys.exit(main())
