"""``python -m queen`` is ``queen-trio``."""

import sys

from queen.cli import main

sys.exit(main())
