"""`python -m spmoe`."""

from spmoe.cli import main

main()
