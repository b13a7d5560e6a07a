"""`python -m moespec`."""

import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # threads that wait longer leave the core to others

from moespec.cli import main

sys.exit(main())
