"""``python -m ndm_fast`` is the command ``ndm-fast``."""

from __future__ import annotations

import sys

from ndm_fast.cli.main import main

sys.exit(main())
