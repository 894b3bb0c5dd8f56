"""`python -m azr_jax` is `azr-jax`."""

from __future__ import annotations

import sys

from azr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
