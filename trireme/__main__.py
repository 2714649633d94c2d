"""``python -m trireme``: the `trireme` command where its script is not on PATH."""

from orchestrator.cli.entry import main

main()
