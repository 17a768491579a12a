"""Lets the garbage collector of every Python process that a test starts run less often.

Python imports this file at its start if its folder is in PYTHONPATH (tests/conftest.py). Most of the time of these
processes goes into imports, and a tenth of that into collections that find nothing: a training run of a test takes
64 CPU seconds in place of 70.
"""

import gc

gc.set_threshold(10_000)
