"""What tests of serving share."""

import pytest


@pytest.fixture(scope="module")
def chromium():
    """A browser for a module's tests. Playwright keeps an event loop running, beside which others cannot start one."""
    from helpers.browser import browser

    with browser() as running:
        yield running
