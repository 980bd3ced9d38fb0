"""One byte ledger: who has taken how much of the memory that the owner grants. Reserve before you take.

    free --reserve--> reserved by an account --release--> free            reserved <= budget, unless the budget shrank

Accounts are 'MODEL/weights', 'MODEL/scratch', 'MODEL/kv', 'MODEL/buffers' (of the disk tier), 'MODEL/text' (tokenizer
and template, in the API process); adapters take 'MODEL/adapters'. It knows numbers only. The promise: PSS of the two
processes never exceeds the budget plus OVERHEAD_BYTES. Children that train or pack are beside it: docs/memory.md.
"""

from __future__ import annotations

from hob.config import MIN_BUDGET_BYTES
from hob.errors import InternalError, InvalidRequest

OVERHEAD_BYTES = 140_000_000
"""What the two processes take at most beside what is reserved: interpreters, libraries, sockets, messages. 106 MB when
they start; `python -m tests.soak.memory` holds it."""


class Ledger:
    """Owned by the engine process's loop; no locks."""

    def __init__(self, budget_bytes: int) -> None:
        self._accounts: dict[str, int] = {}
        self.num_refused = 0
        self.fail_at: int | None = None
        """Refuse the reservation of this number (counted from 1): a fault on purpose."""
        self._num_asked = 0
        self.budget_bytes = budget_bytes
        self.set_budget(budget_bytes)

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget. Below what is reserved, nothing more is granted until enough was released."""
        if budget_bytes < MIN_BUDGET_BYTES:
            raise InvalidRequest(
                f"the memory budget is {budget_bytes:,} bytes. Expected at least {MIN_BUDGET_BYTES:,}.", param="budget"
            )
        self.budget_bytes = budget_bytes

    @property
    def reserved_bytes(self) -> int:
        """Of all accounts."""
        return sum(self._accounts.values())

    @property
    def free_bytes(self) -> int:
        """What may still be reserved. Below 0: the budget shrank, and this much is to be given back."""
        return self.budget_bytes - self.reserved_bytes

    def reserve(self, account: str, num_bytes: int) -> bool:
        """Add to an account, or leave all as it was and say False."""
        self._num_asked += 1
        if num_bytes > self.free_bytes or self._num_asked == self.fail_at:
            self.num_refused += 1
            return False
        self._accounts[account] = self._accounts.get(account, 0) + num_bytes
        return True

    def release(self, account: str, num_bytes: int | None = None) -> int:
        """Take from an account; None: all of it. Returns how much. Give the memory back first."""
        held = self._accounts.get(account, 0)
        num_bytes = held if num_bytes is None else num_bytes
        if not 0 <= num_bytes <= held:
            raise InternalError(f"ledger: {num_bytes:,} bytes released from '{account}', which holds {held:,}")
        self._accounts[account] = held - num_bytes
        if not self._accounts[account]:
            del self._accounts[account]
        return num_bytes

    def owners(self) -> set[str]:
        """Of all accounts."""
        return {name.rpartition("/")[0] for name in self._accounts}

    def held_by(self, owner: str) -> dict[str, int]:
        """The accounts of one owner, without its name: {'weights': 1, ...}."""
        start = f"{owner}/"
        return {name[len(start) :]: count for name, count in self._accounts.items() if name.startswith(start)}
