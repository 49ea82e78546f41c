"""`python -m pixelbytes`."""

import sys

from pixelbytes.cli import main

if __name__ == "__main__":
    sys.exit(main())
