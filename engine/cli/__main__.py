"""``python -m bivec.engine.cli``: the command ``bivec``."""

import sys

from bivec.engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
