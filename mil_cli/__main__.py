"""Lets ``python -m mil_cli`` run the command line."""

from __future__ import annotations

import sys

from mil_cli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
