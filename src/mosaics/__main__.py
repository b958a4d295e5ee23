"""``python -m mosaics`` is the command ``mosaics``."""

import sys

from mosaics.cli import main

if __name__ == "__main__":
    sys.exit(main())
