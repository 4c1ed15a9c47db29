"""Find the cheapest fleet for a stream of requests.

Covers: what is asked, prices of your own, the answer, and why another fleet loses.

Scenario: conversations as Azure's, drawn from the distributions of `azure-conv-fit`,
on L40S or H100, one GPU a replica. Nine of ten requests are to begin within 0.3 s and to go on
at 20 tokens a second. In how many of four worlds with other kernels and engines would the answer
hold?
"""

from servegym.plan.answer import answer
from servegym.plan.prices import Price
from servegym.plan.question import Question
from servegym.scenario import load_scenario

RATE_FACTOR, NUM_REQUESTS = 4.0, 800

question = Question(
    gpus=("L40S", "H100-SXM-80GB"),
    degrees=(1,),
    ttft_s=0.3,
    tpot_s=0.05,
    attainment=0.9,
    num_worlds=4,
)
prices = {
    "L40S": Price(usd_per_h=0.9, source="an offer"),
    "H100-SXM-80GB": Price(usd_per_h=2.5, source="an offer"),
}
requests = load_scenario("azure-conv-fit").episode(0, num_requests=NUM_REQUESTS).table

found = answer(question, prices, requests.scaled(RATE_FACTOR))
best = found.best
assert best is not None
assert best.certainty is not None
print(f"{best.name} under {best.trial.rule}: ${best.usd_per_h:.2f} an hour")
print(f"{best.trial.attainment:.1%} in time; holds in {best.certainty.held} of 4 worlds")
for other in found.others[:3]:
    print(f"{other.name}, ${other.usd_per_h:.2f}: {other.why}")
