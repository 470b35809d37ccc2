"""TODO docstring of fastft.inference.budget."""

import asyncio


class OverBudget(Exception):
    """The next request could cost more than what is left, or nothing is to be spent any more."""


class Money:
    """Dollars spent, and the limit. Prices are dollars per million tokens, (prompt, completion)."""

    def __init__(self, limit: float | None = None):
        self.limit, self.spent, self.closed, self._reserved = limit, 0.0, False, []

    async def reserve(self, usd: float) -> None:
        """Raises OverBudget. What is on its way mostly costs less than its reserve: where that decides, it is waited for."""
        while not self.closed and not self._is_enough(usd, *self._reserved):
            if not self._reserved:
                raise OverBudget
            await asyncio.sleep(0.05)
        if self.closed:
            raise OverBudget
        self._reserved.append(usd)

    def settle(self, reserved: float, usd: float) -> None:
        self._reserved.remove(reserved)
        self.spent += usd

    def _is_enough(self, *usd: float) -> bool:
        return self.limit is None or self.spent + sum(usd) <= self.limit
