"""`python -m trio_router` is `trio-router`."""

import sys

from trio_router.cli import main

if __name__ == "__main__":
    sys.exit(main())
