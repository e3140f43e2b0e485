"""`python -m sparse_compile` is `sparse-compile`."""

import sys

from sparse_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
