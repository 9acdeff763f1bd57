"""Says when a run's figures mean trouble, and what to change. Pure: figures in, findings out.

A rule measures one level over the newest steps. It starts when the level is at or past `starts_at`, and ends when it is back at
or past `ends_at`, which lies on the healthy side: between the two nothing changes, so that a level that trembles around
a threshold is told of once. Thresholds lie outside of what healthy runs show: six runs of chain_sum with SmolLM2-135M, 24 to 56
steps each. The reason of each stands beside it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

Metrics = Mapping[str, float | None]
"""A line of metrics.jsonl."""

BASELINE_STEPS = 5
"""First steps of a run that later ones are compared with."""
LONGEST_WINDOW = 20


@dataclass
class History:
    """What the rules look at: the first steps and the newest."""

    first: list[Metrics] = field(default_factory=list)
    newest: deque[Metrics] = field(default_factory=lambda: deque(maxlen=LONGEST_WINDOW))

    def add(self, metrics: Metrics) -> None:
        """One step more."""
        if len(self.first) < BASELINE_STEPS:
            self.first.append(metrics)
        self.newest.append(metrics)

    def last(self, name: str, steps: int) -> list[float]:
        """Values of a metric in the newest steps; empty before there are so many steps, or where one has no value."""
        lines = list(self.newest)[-steps:]
        values = _finite(lines, name)
        return values if len(values) == steps else []


Level = Callable[[History], float | None]
"""None where it cannot be told: nothing starts or ends then."""


@dataclass(frozen=True)
class AlarmRule:
    """One thing that can go wrong. Low levels are bad where starts_at is below ends_at."""

    name: str
    """In metrics.jsonl: alarm/<name>."""
    level: Level
    starts_at: float
    ends_at: float
    what: str
    """The level in words."""
    fix: str

    def is_over(self, level: float) -> bool:
        """Whether the level is bad enough to start."""
        return level >= self.starts_at if self.starts_at > self.ends_at else level <= self.starts_at

    def is_well(self, level: float) -> bool:
        """Whether the level is good enough to end."""
        return level <= self.ends_at if self.starts_at > self.ends_at else level >= self.ends_at


@dataclass(frozen=True)
class Finding:
    """An alarm that starts or ends."""

    name: str
    is_on: bool
    text: str


class Alarms:
    """Which alarms are on."""

    def __init__(self, rules: Sequence[AlarmRule]) -> None:
        self._rules = rules
        self._history = History()
        self._on: set[str] = set()

    def after_step(self, metrics: Metrics) -> list[Finding]:
        """What starts and what ends with this step."""
        self._history.add(metrics)
        findings = changes(self._rules, self._history, self._on)
        for finding in findings:
            (self._on.add if finding.is_on else self._on.discard)(finding.name)
        return findings


def changes(rules: Sequence[AlarmRule], history: History, on: set[str]) -> list[Finding]:
    """The alarms that start or end now, given those that are on."""
    findings = []
    for rule in rules:
        level = rule.level(history)
        if level is None:
            continue
        if rule.name not in on and rule.is_over(level):
            findings.append(
                Finding(rule.name, True, f"{rule.what} is {level:.3g} (limit {rule.starts_at:g}): {rule.fix}")
            )
        elif rule.name in on and rule.is_well(level):
            findings.append(Finding(rule.name, False, f"over: {rule.what} is {level:.3g}"))
    return findings


def alarm_rules(*, max_staleness: int) -> tuple[AlarmRule, ...]:
    """Every rule of a run.

    Args:
        max_staleness: policy versions that the run allows. With 0 every sequence is at the bound, and rightly.
    """
    return (*RULES, _staleness_rule(max_staleness)) if max_staleness else RULES


def _finite(lines: Sequence[Metrics], name: str) -> list[float]:
    values = (line.get(name) for line in lines)
    return [value for value in values if value is not None and math.isfinite(value)]


def _newest(name: str, steps: int) -> Level:
    """Median of a metric over the newest steps: one odd step is no alarm."""

    def level(history: History) -> float | None:
        values = history.last(name, steps)
        return median(values) if values else None

    return level


def _total(name: str, steps: int) -> Level:
    def level(history: History) -> float | None:
        values = _finite(list(history.newest)[-steps:], name)
        return sum(values) if values else None

    return level


def _spread(name: str, steps: int) -> Level:
    def level(history: History) -> float | None:
        values = history.last(name, steps)
        return max(values) - min(values) if values else None

    return level


def _growth(name: str, *, floor: float) -> Level:
    """Newer half of the window over the older half. Below the floor, growth is no matter."""

    def level(history: History) -> float | None:
        values = history.last(name, LONGEST_WINDOW)
        half = LONGEST_WINDOW // 2
        return median(values[half:]) / max(median(values[:half]), floor) if values else None

    return level


def _of_first(name: str, steps: int) -> Level:
    """Newest steps over the first steps of the run."""

    def level(history: History) -> float | None:
        values, first = history.last(name, steps), _finite(history.first, name)
        if not values or len(history.first) < BASELINE_STEPS or not first or fmean(first) <= 0:
            return None
        return median(values) / fmean(first)

    return level


def _wait_by_train(history: History) -> float | None:
    waits, trains = history.last("time/wait_s", 10), history.last("time/train_s", 10)
    return sum(waits) / sum(trains) if waits and trains and sum(trains) > 0 else None


def _staleness_rule(max_staleness: int) -> AlarmRule:
    def level(history: History) -> float | None:
        values = history.last("staleness/mean", 10)
        return median(values) / max_staleness if values else None

    # Of the mean: the stalest sequence is at the bound in any run whose trainer is slower than its sampling.
    return AlarmRule(
        "staleness_at_bound",
        level,
        starts_at=0.95,
        ends_at=0.8,
        what="mean staleness over max_staleness, 10 steps,",
        fix="sampling runs ahead of training as far as it may; give the trainer more devices or fewer sequences a step, or "
        "lower max_staleness for fresher data at the same speed",
    )


RULES = (
    # The gradient of half a sample: its variance is that of a batch of half the size. Healthy runs: 0.86 and more.
    AlarmRule(
        "ess_low",
        _newest("ess", 3),
        starts_at=0.5,
        ends_at=0.7,
        what="effective share of the sample, 3 steps,",
        fix="the off-policy weights differ too much; lower max_staleness or learning_rate, or use correction=mis, and look at "
        "mismatch/kl_k3",
    ),
    # Numerics alone give factors of 2 to 5, staleness up to 25 in single steps of healthy runs.
    AlarmRule(
        "ratio_max",
        _newest("mismatch/ratio_max", 5),
        starts_at=50.0,
        ends_at=25.0,
        what="largest ratio of trainer's to engine's probability, 5 steps,",
        fix="the engine samples some tokens from another distribution; check that it reports processed logprobs at the "
        "sampling temperature, without top-p or penalties, and that weights arrive (time/sync_s, policy_version)",
    ),
    # Healthy runs settle below 0.01; the fast start of a small model passes 0.03 for some 20 steps.
    AlarmRule(
        "mismatch_kl",
        _newest("mismatch/kl_k3", 10),
        starts_at=0.03,
        ends_at=0.02,
        what="mismatch/kl_k3, nats, 10 steps,",
        fix="trainer and engine disagree; normal in the first steps of a fast start, else lower learning_rate or "
        "max_staleness, and compare the dtypes of both",
    ),
    # The floor keeps growth from nothing to little out of it.
    AlarmRule(
        "mismatch_rising",
        _growth("mismatch/kl_k3", floor=0.005),
        starts_at=3.0,
        ends_at=1.5,
        what="mismatch/kl_k3 of the newest 10 steps over the 10 before",
        fix="trainer and engine drift apart, which often comes before a collapse; go back to an earlier checkpoint with a lower "
        "learning_rate or max_staleness",
    ),
    # One in five groups is left to learn from. Where environments drop such groups it stays 0.
    AlarmRule(
        "zero_variance",
        _newest("frac_reward_zero_std", 5),
        starts_at=0.8,
        ends_at=0.6,
        what="share of groups whose rewards are all equal, 5 steps,",
        fix="little is learnt from most of the batch; use items of a fitting difficulty, a larger group_size, or "
        "ensure_scores_are_not_same in the environment",
    ),
    # Beyond a fifth, the policy learns from a selection of short answers. Five steps, so that learning to stop is given time.
    AlarmRule(
        "truncated",
        _newest("completion/truncated_frac", 5),
        starts_at=0.2,
        ends_at=0.1,
        what="share of completions cut by a length limit, 5 steps,",
        fix="raise the environment's limit, use overlong=soft, or overlong=keep where the limit is part of the task",
    ),
    AlarmRule(
        "masked",
        _newest("completion/masked_frac", 5),
        starts_at=0.2,
        ends_at=0.1,
        what="share of sequences without a trained token, 5 steps,",
        fix="they were sampled for nothing; see overlong, and the loss masks that the environment sends",
    ),
    # Healthy runs fall to a fifth while they learn; at a tenth the group's samples are nearly the same text.
    AlarmRule(
        "entropy_collapse",
        _of_first("entropy", 5),
        starts_at=0.1,
        ends_at=0.15,
        what="entropy, 5 steps, over that of the first steps",
        fix="the policy hardly explores any more; raise epsilon_high, give entropy_coef a little (1e-3), or lower "
        "learning_rate. Right if the task is solved",
    ),
    # Each one is worth a look; the run ends by itself after a few in a row.
    AlarmRule(
        "skipped_step",
        _total("step/skipped", 5),
        starts_at=1.0,
        ends_at=0.0,
        what="optimizer steps skipped for a NaN or infinite loss or gradient, 5 steps,",
        fix="lower learning_rate or max_grad_norm, use torch_dtype=float32, and look for bad numbers in what environments send",
    ),
    # Twenty batches with the same mean is no chance: even a policy that does not learn has noise.
    AlarmRule(
        "reward_stuck",
        _spread("reward/mean", LONGEST_WINDOW),
        starts_at=1e-6,
        ends_at=1e-3,
        what="spread of reward/mean over 20 steps",
        fix="every batch is paid alike: the reward function answers a constant (often a parser that never matches), or the "
        "task is solved",
    ),
    # At 1 the training device idles for half of the time.
    AlarmRule(
        "waits_for_batches",
        _wait_by_train,
        starts_at=1.0,
        ends_at=0.5,
        what="seconds of waiting for batches over seconds of training, 10 steps,",
        fix="sampling is the bottleneck; add inference servers or requests in flight, raise max_staleness, or shorten "
        "completions",
    ),
)
"""Those that hold for any run."""
