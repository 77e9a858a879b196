"""The marker `bit_equal`: tests that compare computed numbers to the last bit.

They hold on every processor, which `python -m tests.processors` emulates.
"""

import inspect
import re

import pytest

#: What a test that compares bits says in its name or in its code.
_BITS = re.compile(r"_bits?_|_bits?\(|torch\.equal\(|first_difference\(|on_all_ranks\(|ends_as_if")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test whose name or code speaks of bits; a module may mark all of its own."""
    for item in items:
        function = getattr(item, "function", None)
        if function is not None and _BITS.search(inspect.getsource(function)):
            item.add_marker(pytest.mark.bit_equal)
