"""``python -m tpirt``."""

import sys

from tpirt.cli.main import main

sys.exit(main())
