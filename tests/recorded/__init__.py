"""What users and peers of Trireme see, written down: help texts, exit codes, HTTP answers, messages on the wire, status.

Each ``test_*.py`` here makes its texts again and compares them with the files under ``data/``. Any difference fails the test and is shown
as a diff. The tests never write. When a difference is wanted, record again, look at the diff in git, and commit it:

    python -m tests.recorded.record          # all
    python -m tests.recorded.record wire     # one area: the name of a folder under data/
"""
