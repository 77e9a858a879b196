"""The damping bound: σ_L <= sᵀŷ / sᵀs <= σ_H (S Lemma 1; M A.2.4), at every branch of the rule.

With μ = sᵀy / sᵀs and ŷ = τ y + (1-τ) s the damped ratio is τ μ + 1 - τ, a function of four
numbers. It is evaluated in rational arithmetic, so that "<=" means "<=", over a grid that holds
both sides of every border, and compared with the rule that the optimizer uses.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

from experiments.theory.exact import damping_coefficient
from experiments.theory.findings import Findings, exact
from mlbfgs.damping import damping_coefficient as optimizer_rule

TINY = Fraction(1, 10**9)
#: Thresholds: S's and M's as printed, wide ones, and ones close to 1.
THRESHOLDS = (("1/100", "3/2"), ("1/100", "1"), ("1/1000", "10"), ("9/10", "11/10"), ("-1", "2"))
TAU0 = ("1/100", "1/2", "9/10", "95/100", "99/100", "999/1000")


def ratios(low: Fraction, high: Fraction) -> list[Fraction]:
    """Curvature ratios μ on both sides of every border of the rule, and far away."""
    borders = [low, high, Fraction(0), Fraction(1)]
    near = [border + sign * TINY for border in borders for sign in (-1, 0, 1)]
    far = [Fraction(sign * 10**k) for k in (1, 3, 6, 12) for sign in (-1, 1)]
    inner = [low + (high - low) * Fraction(i, 8) for i in range(1, 8)]
    return sorted({*near, *far, *inner})


def branch(mu: Fraction, tau: Fraction, tau0: Fraction, low: Fraction, high: Fraction) -> str:
    """Which line of the rule gave τ, and which side of its minimum."""
    if low < mu < high:
        return "between"
    side = "μ <= σ_L" if mu <= low else "μ >= σ_H"
    return f"{side}, {'τ0' if tau == tau0 else 'threshold'}"


def run() -> Findings:
    """Settle S-L1 and M-A.2.4."""
    found = Findings("damping_bound", settings={"thresholds": THRESHOLDS, "tau0": TAU0})
    slack: dict[str, list[Fraction]] = {}
    undefined = 0
    disagreement = 0.0
    unused = 0
    for (low_text, high_text), tau_text in product(THRESHOLDS, TAU0):
        low, high, tau0 = Fraction(low_text), Fraction(high_text), Fraction(tau_text)
        for mu in ratios(low, high):
            try:
                tau = damping_coefficient(mu, tau0, low, high)
            except ZeroDivisionError:
                undefined += 1
                continue
            damped = tau * mu + 1 - tau
            name = branch(mu, tau, tau0, low, high) + (", σ_H = 1" if high == 1 else "")
            slack.setdefault(name, []).append(min(damped - low, high - damped))
            unused += high == 1 and mu > 1 and tau == 0
            # the optimizer gets μ as a float64; the border itself must fall on the same side
            if all(abs(mu - border) > TINY for border in (low, high)) or mu in (low, high):
                ours = optimizer_rule(float(mu), float(tau0), (float(low), float(high)))
                disagreement = max(disagreement, abs(ours - float(tau)))
    _write(found, slack, undefined, disagreement, unused)
    return found


def _write(
    found: Findings,
    slack: dict[str, list[Fraction]],
    undefined: int,
    disagreement: float,
    unused: int,
) -> None:
    regular = [v for name, values in slack.items() if "σ_H = 1" not in name for v in values]
    special = [v for name, values in slack.items() if "σ_H = 1" in name for v in values]
    words = "smallest distance of sᵀŷ/sᵀs to its bounds (negative: outside), rational arithmetic"
    found.add("smallest_slack", exact(float(min(regular)), f"{words}, σ_H > 1", len(regular)))
    found.add("smallest_slack_at_1", exact(float(min(special)), f"{words}, σ_H = 1", len(special)))
    cases = len(TAU0)
    words = f"cases of {cases} (one per τ0) at μ = σ_H = 1 in which the rule divides 0 by 0"
    found.add("undefined_at_1", exact(undefined, words, cases))
    words = "cases with μ > σ_H = 1 in which τ = 0, so that ŷ = s and the pair says nothing"
    found.add("pairs_lost_at_1", exact(unused, words, unused))
    words = "largest difference of τ between the optimizer's float64 rule and the exact one"
    found.add("optimizer_rule", exact(disagreement, words, len(regular) + len(special)))
    rows = [
        [name, len(values), float(min(values)), "yes" if min(values) >= 0 else "no"]
        for name, values in sorted(slack.items())
    ]
    columns = ("branch", "cases", "smallest slack", "bound holds")
    found.table("Every branch of the damping rule", columns, rows)
    found.notes.append(
        "S prints σ_H = 1 for its experiments. Its rule (4) asks for σ_H > 1; at 1 the bound still "
        "holds where the rule is defined, but every pair with μ > 1 becomes ŷ = s, and at μ = 1 "
        "the rule is 0/0. The optimizer takes τ0 there."
    )
