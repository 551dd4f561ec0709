"""`python -m fastcm`: the command line without the console script."""

import sys

from fastcm.cli import main

if __name__ == "__main__":
    sys.exit(main())
