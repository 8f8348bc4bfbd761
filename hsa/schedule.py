"""Which groups of tokens run at which step, and what that costs. Pure Python, no torch.

Symbols of the paper (arXiv 2605.06892): T steps, K groups, budget s_k of group k, s_1 = T.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

SMALLEST_FULL = 0.05  # `solve` keeps at least this share of the tokens on the full budget
SPLIT = (1 / 3, 2 / 3)  # `solve` divides the other tokens so between its two smaller budgets


@dataclass(frozen=True)
class Schedule:
    """Step budgets of the token groups and the windows in which every token runs.

    `budgets` are divisors of `budgets[0]`, the number of steps T, largest first. The first
    `warmup_steps` and the last `cooldown_steps` run in full: velocity and K/V change fastest there.

    Raises:
        ValueError: one line with the field, its value and what it may be.
    """

    budgets: tuple[int, ...]
    warmup_steps: int
    cooldown_steps: int

    def __post_init__(self) -> None:
        if not self.budgets or any(budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets: {self.budgets} must be one or more positive step counts")
        if any(self.steps % budget for budget in self.budgets):
            raise ValueError(
                f"budgets: {self.budgets} must divide the number of steps, their first entry; "
                f"choices: {divisors(self.steps)}"
            )
        if any(a <= b for a, b in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ValueError(f"budgets: {self.budgets} must decrease from the full budget down")
        if not 2 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} must lie in 2..{self.steps}; "
                "two full steps are needed to measure one velocity change"
            )
        if not 0 <= self.cooldown_steps <= self.steps - self.warmup_steps:
            raise ValueError(
                f"cooldown_steps: {self.cooldown_steps} must lie in "
                f"0..{self.steps - self.warmup_steps}, the steps after the warm-up"
            )

    @property
    def steps(self) -> int:
        """T, the number of denoising steps."""
        return self.budgets[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """T / s_k of each budget: how many steps lie between two runs."""
        return tuple(self.steps // budget for budget in self.budgets)

    @property
    def num_groups(self) -> int:
        return len(self.budgets)

    def active_groups(self, step: int) -> tuple[int, ...]:
        """Indices of the groups that run at `step` (0-based): k with step mod (T / s_k) == 0."""
        if self.in_window(step):
            return tuple(range(self.num_groups))
        return tuple(group for group, stride in enumerate(self.strides) if step % stride == 0)

    def in_window(self, step: int) -> bool:
        return step < self.warmup_steps or step >= self.steps - self.cooldown_steps

    def is_full(self, step: int) -> bool:
        """Whether every group runs at `step`."""
        return len(self.active_groups(step)) == self.num_groups

    def executed_steps(self) -> tuple[int, ...]:
        """How many of the T steps each group runs in, the windows included."""
        active = [self.active_groups(step) for step in range(self.steps)]
        return tuple(sum(group in groups for groups in active) for group in range(self.num_groups))

    def expected_fraction(self, fractions: Sequence[float]) -> float:
        """Mean over the steps of the share of active tokens, for groups of these shares.

        Time is linear in it: attention has active queries and N keys, all else is per token. The
        full step that a second expert starts with (Wan 2.2) is not known here and not counted.
        """
        executed = zip(fractions, self.executed_steps(), strict=True)
        return sum(fraction * steps for fraction, steps in executed) / self.steps


def divisors(steps: int) -> tuple[int, ...]:
    """The budgets a group may have under `steps` steps, largest first."""
    return tuple(budget for budget in range(steps, 0, -1) if steps % budget == 0)


def solve(
    runtime: float, steps: int, warmup_steps: int, cooldown_steps: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Budgets and group fractions whose expected fraction of active tokens is `runtime`.

    The paper does not say which fractions its settings have, so the rule is ours: three groups; of
    all budgets that meet `runtime` with at least `SMALLEST_FULL` of the tokens on the full budget,
    the ones that refresh the rest most often; the rest is split by `SPLIT`. A prime T gives two
    groups, runtime 1 one.

    Raises:
        ValueError: no budgets meet `runtime` between these windows.
    """
    if runtime == 1:
        return (steps,), (1.0,)
    costs = _smaller_budgets(steps, warmup_steps, cooldown_steps)
    shares = {
        rest: (runtime - cost) / (1 - cost) for rest, cost in costs.items() if cost < runtime < 1
    }
    feasible = [rest for rest, full in shares.items() if full >= SMALLEST_FULL - 1e-9]
    if not feasible:
        least = least_runtime(steps, warmup_steps, cooldown_steps)
        raise ValueError(
            f"runtime: {runtime} cannot be met with steps={steps}, warmup_steps={warmup_steps}, "
            f"cooldown_steps={cooldown_steps}; choices: {least:.4f} to 1.0"
        )
    rest = max(feasible, key=lambda rest: rest[::-1])
    full = shares[rest]
    return (steps, *rest), (full, *((1 - full) * share for share in _split(len(rest))))


def least_runtime(steps: int, warmup_steps: int, cooldown_steps: int) -> float:
    """The smallest expected fraction of active tokens that `solve` can meet."""
    costs = _smaller_budgets(steps, warmup_steps, cooldown_steps)
    return SMALLEST_FULL + (1 - SMALLEST_FULL) * min(costs.values())


def _smaller_budgets(
    steps: int, warmup_steps: int, cooldown_steps: int
) -> dict[tuple[int, ...], float]:
    """Each choice of smaller budgets, and the expected fraction of a token that is on them."""
    smaller = divisors(steps)[1:]
    count = min(len(SPLIT), len(smaller))
    return {
        rest: Schedule((steps, *rest), warmup_steps, cooldown_steps).expected_fraction(
            (0.0, *_split(count))
        )
        for rest in combinations(smaller, count)
    }


def _split(groups: int) -> tuple[float, ...]:
    return SPLIT if groups == len(SPLIT) else (1.0,) * groups
