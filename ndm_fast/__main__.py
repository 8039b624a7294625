"""``python -m ndm_fast`` is the command ``ndm-fast``."""

import sys

from ndm_fast.cli import main

sys.exit(main())
