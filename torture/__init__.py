"""What Flash must survive: seeded faults by the hundred, one module a row of the table, one command for all.

`python -m torture` runs the long form and prints a table of what was injected, survived and lost; the tests
under `tests/torture` run the short form of the same functions.
"""
