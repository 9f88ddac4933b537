"""Entry point of ``python -m viladiff``."""

from __future__ import annotations

import sys

from viladiff.cli.main import main

sys.exit(main())
