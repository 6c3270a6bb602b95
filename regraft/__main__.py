"""`python -m regraft` is the command `regraft`."""

from regraft.cli import main

main()
