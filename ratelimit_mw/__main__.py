"""`python -m ratelimit_mw` is `ratelimit-mw`."""

import sys

from ratelimit_mw._internal.cli import main

if __name__ == "__main__":
    sys.exit(main())
