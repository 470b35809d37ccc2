"""What tests of serving share."""

import pytest


@pytest.fixture(scope="module")
def chromium():
    """A browser for a module's tests. Not for longer: playwright keeps an event loop running, in which others cannot start one."""
    from helpers.browser import browser

    with browser() as running:
        yield running
