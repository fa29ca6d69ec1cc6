"""`python -m sla2` is the same program as the `sla2` command."""

import sys

from sla2.cli import main

if __name__ == "__main__":
    sys.exit(main())
