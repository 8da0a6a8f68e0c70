"""``python -m msdkern``."""

import sys

from msdkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
