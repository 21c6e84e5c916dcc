"""The retry budget's exact balances."""

import pytest

from sidecar.policy.budget import Budget


def spend(budget: Budget, now: float) -> int:
    """How many retries the budget pays for at once."""
    count = 0
    while budget.withdraw(now):
        count += 1
    return count


def test_the_reserve_alone_pays_for_ten_retries_in_ten_seconds() -> None:
    budget = Budget(20.0, 1.0, now=100.0)
    assert budget.balance(100.0) == 10.0
    assert spend(budget, 100.0) == 10
    assert spend(budget, 109.999) == 0
    assert spend(budget, 110.0) == 10


def test_each_original_request_deposits_its_percentage() -> None:
    budget = Budget(20.0, 0.0, now=0.0)
    for _ in range(4):
        budget.deposit(0.0)
    assert not budget.withdraw(0.0)
    budget.deposit(0.0)
    assert budget.balance(0.0) == 1.0
    assert budget.withdraw(0.0)
    assert budget.balance(0.0) == 0.0


@pytest.mark.parametrize("percent", [0.1, 10.0, 12.5, 30.0, 33.0, 100.0, 150.0])
def test_sums_are_exact(percent: float) -> None:
    budget = Budget(percent, 0.0, now=0.0)
    for _ in range(1000):
        budget.deposit(0.5)
    assert spend(budget, 0.5) == round(10 * percent)


def test_an_entry_leaves_with_its_one_second_bucket() -> None:
    budget = Budget(100.0, 0.0, now=0.0)
    budget.deposit(0.9)
    budget.deposit(1.0)
    assert budget.balance(9.999) == 2.0
    assert budget.balance(10.0) == 1.0
    assert budget.balance(10.999) == 1.0
    assert budget.balance(11.0) == 0.0


def test_withdrawals_expire_too() -> None:
    budget = Budget(100.0, 0.2, now=0.0)  # a reserve of 2
    assert budget.withdraw(0.0)
    assert budget.withdraw(5.0)
    assert not budget.withdraw(9.0)
    assert budget.withdraw(10.0)
    assert not budget.withdraw(10.0)
    assert budget.balance(20.0) == 2.0


def test_a_withdrawal_may_outlive_the_deposit_that_paid_for_it() -> None:
    budget = Budget(100.0, 0.0, now=0.0)
    budget.deposit(0.0)
    assert budget.withdraw(9.0)
    assert budget.balance(10.0) == -1.0
    budget.deposit(10.0)
    assert not budget.withdraw(10.0)
    assert budget.balance(19.0) == 1.0


def test_a_long_silence_leaves_nothing_behind() -> None:
    budget = Budget(20.0, 1.0, now=0.0)
    for second in range(100):
        budget.deposit(float(second))
    assert budget.balance(1e9) == 10.0
    budget.deposit(1e9)
    assert budget.balance(1e9 + 9.5) == pytest.approx(10.2)


def test_buckets_do_not_drift_with_late_calls() -> None:
    budget = Budget(100.0, 0.0, now=0.0)
    budget.deposit(0.7)
    for now in (1.9, 3.8, 5.7, 7.6, 9.5):
        assert budget.balance(now) == 1.0
    assert budget.balance(10.0) == 0.0


def test_a_new_policy_judges_the_same_history() -> None:
    budget = Budget(20.0, 1.0, now=0.0)
    for _ in range(10):
        budget.deposit(0.0)
    assert budget.withdraw(0.0)
    budget.configure(50.0, 0.0)
    assert budget.balance(0.0) == 4.0
