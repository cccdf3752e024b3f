"""The ``tpirt`` command, and ``python -m tpirt``."""

import sys

from tpirt.cli.sigint import exit_on_sigint

exit_on_sigint()  # before other imports, which take seconds on small devices


def main() -> int:
    """Run the command line; see :func:`tpirt.cli.main.main`."""
    from tpirt.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
