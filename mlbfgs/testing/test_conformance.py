"""The place where the plugin collects its checks; see :mod:`mlbfgs.testing.plugin`.

There is no test function here: the plugin makes the tests itself, so that no `pytest.ini` (which
files and functions are tests) and no fixture of a `conftest.py` has a say in them.
"""
