"""Room that tenants share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from calumma.serve.shares import Shares


@given(total=st.integers(1, 12), visits=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 4)), max_size=40))
def test_nobodys_use_turns_others_away(total: int, visits: list[tuple[str, int]]) -> None:
    shares, held = Shares(total), dict.fromkeys("abc", 0)
    for tenant, number in visits:
        if number <= 0:
            back = min(held[tenant], -number)
            if back:
                shares.give_back(tenant, back)
                held[tenant] -= back
            continue
        active = len([one for one in held if held[one] or one == tenant])
        full = shares.full(tenant, number)
        if sum(held.values()) + number <= total or held[tenant] + number <= total // active:
            assert full is None
        else:
            assert full == "total"
        assert shares.full(tenant, number, held[tenant] + number - 1) == "tenant"
        if full is None:
            shares.take(tenant, number)
            held[tenant] += number
        assert sum(held.values()) <= total + total // 2 + total // 3
