"""Hostile model files: models of many operators, changed where the format has meaning.

`python -m tests.fuzz --cases 20000` runs them all in worker processes that have a limit of memory and of time; `make
fuzz` is the same. A case is fine, or it is refused with an error of `graphopt.errors` in one line. Anything else, a
crash and a hang included, is a finding: `python -m tests.fuzz --seed S --only N` runs one again.
"""
