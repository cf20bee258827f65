"""`python -m bilevel` is the `bilevel` command."""

import sys

from bilevel.cli import main

sys.exit(main())
