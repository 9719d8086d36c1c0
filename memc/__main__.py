"""``python -m memc`` is ``memc``."""

import sys

from memc.cli import main

if __name__ == "__main__":
    sys.exit(main())
