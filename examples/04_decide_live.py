"""Put a policy in front of your own engines: four calls a request.

Covers: `Dispatcher`, what it is told of a request, what it decides, its counters.
Scenario: two replicas of different speed, described by their numbers.
"""

from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.runtime import RuntimeConfig

FAST = Rates(prefill_tokens_per_s=20_000, decode_step_s=0.010, decode_seq_s=0.0001)
SLOW = Rates(prefill_tokens_per_s=5_000, decode_step_s=0.025, decode_seq_s=0.0003)


def main() -> None:
    """Run the example."""
    config = DispatchConfig(runtime=RuntimeConfig(policy="added-delay"))
    dispatcher = Dispatcher(config, ["fast", "slow"], fleet_facts([FAST, SLOW]))
    jobs = []
    for i in range(12):
        job = dispatcher.arrive("Why is the sky blue? " * 50, key=f"request-{i}", max_tokens=200)
        decision = dispatcher.decide(job)
        # send the request to the engine of that name here; then tell what comes back:
        jobs.append((dispatcher.names[decision.action], job))
    for _, job in jobs:
        dispatcher.first_token(job)
        dispatcher.tokens(job, 150)
        dispatcher.finish(job, 150)  # or dispatcher.end(job, "failed")
    places = [name for name, _ in jobs]
    print(f"fast: {places.count('fast')} requests, slow: {places.count('slow')}")
    print(f"decided by the policy: {dispatcher.runtime.counters.num_policy} of {len(jobs)}")


if __name__ == "__main__":
    main()
