"""``python -m evermini``: the same as the ``evermini`` command."""

from evermini.cli import main

main()
