"""What model code could do on this machine: every tier of the sandbox is tried with programs that try to get out.

    python -m experiments.sandbox

prints a table, closed or open, and which tier would be taken for the reward `code`. Nothing is harmed: what the programs are
after is bait. docs/security.md has the table of a Debian machine. Exit code 2 when no tier that is chosen by itself works here.
"""

from jaxllm import launch
from jaxllm.generate.sandbox import probes, runner, tiers


def main(seconds: float) -> None:
    """The table of all tiers that work here."""
    limits = runner.Limits(seconds=seconds)
    missing = {tier.name: tier.why_not() or runner.works(tier) for tier in tiers.TIERS.values()}
    print(probes.table({name: probes.measure(tiers.TIERS[name], limits) for name, why in missing.items() if not why}))
    for name, why in missing.items():
        if why:
            print(f"{name}: {why}")
    print(f"\nchosen by itself: {runner.make(limits=limits).tier}")


if __name__ == "__main__":
    launch.tool(main, "sandbox", {"seconds": 5.0})
