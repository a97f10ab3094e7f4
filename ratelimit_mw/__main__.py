"""`python -m ratelimit_mw` is `ratelimit-mw`."""

import sys

from ratelimit_mw.cli import main

if __name__ == "__main__":
    sys.exit(main())
