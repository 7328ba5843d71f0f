"""``python -m bivec.engine.cli``: the command ``bivec``."""

import sys

from bivec.engine.cli import main

sys.exit(main())
