"""`python -m mima` is `mima`."""

from mima.cli import main

main()
