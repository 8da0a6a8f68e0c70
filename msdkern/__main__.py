# SPDX-License-Identifier: Apache-2.0
"""``python -m msdkern``."""

from msdkern.cli import entry

if __name__ == "__main__":
    entry()
