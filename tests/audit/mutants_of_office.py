"""Mutants of the ledger, the accounting, the policy, the metrics and the door."""

from dataclasses import replace

import numpy as np

import client.evaluation
import client.ledger.ledger
import client.policy
import client.round
from client.ledger.ledger import Ledger
from client.ledger.records import EVALUATION
from client.outbox import Outbox
from client.training.patient_optimizer import PatientDPOptimizer
from common import messages
from common.evaluation import CountPlan
from common.privacy import accountant
from common.privacy.plan import PrivacyEvent, PrivacyPlan
from tests.audit.mutants import mutant, nothing

CLIENT_RATE = 0.1

# --- what a round costs ---


def with_event(patch, **changes):
    def event(plan):
        numbers = plan.to_dict() | {name: change(plan) for name, change in changes.items()}
        return PrivacyEvent(
            sampling_rate=numbers["sampling_rate"],
            noise_multiplier=numbers["noise_multiplier"],
            steps=numbers["steps"],
        )

    patch.setattr(PrivacyPlan, "event", event)
    # Otherwise the second round would be refused: what it asks is not what the first one charged.
    patch.setattr(client.round, "_require_plan_of_run", lambda *_: None)


@mutant("amplification", caught_by="accounting")
def client_rate_multiplied_in(patch):
    """The event's sampling rate is multiplied by the share of hospitals that take part in a round."""
    with_event(patch, sampling_rate=lambda plan: CLIENT_RATE * plan.sampling_rate)


@mutant("amplification", caught_by="accounting")
def client_rate_multiplied_in_by_the_accountant(patch):
    """Events are right, and the accountant multiplies the share of hospitals into their sampling rates."""
    real = accountant.merge
    patch.setattr(
        accountant,
        "merge",
        lambda events: tuple((CLIENT_RATE * q, sigma, steps) for q, sigma, steps in real(events)),
    )


@mutant("amplification", caught_by="accounting")
def only_the_last_local_step_is_charged(patch):
    """A round of several steps is charged as one, because the iterates between are not sent."""
    with_event(patch, steps=lambda plan: 1)


@mutant("amplification", caught_by="accounting")
def sampling_rate_of_all_hospitals_patients(patch):
    """The event's sampling rate is a batch over the patients of four hospitals, not over this one's."""
    with_event(patch, sampling_rate=lambda plan: plan.sampling_rate / 4)


@mutant("handling", caught_by="accounting")
def more_noise_is_charged_than_added(patch):
    """The event names a tenth more noise than the plan trains with."""
    with_event(patch, noise_multiplier=lambda plan: 1.1 * plan.noise_multiplier)


# --- the ledger ---


@mutant("handling", caught_by="killed-round")
def charge_after_training(patch):
    """The ledger is charged when training is over, so that a crash forgets what was done."""
    real_charged, real_formed, later = client.round._charged, client.round._formed, []

    def charged(*arguments, **options):
        later.append((arguments, options))

    def formed(site, plan, charge, result, weights):
        arguments, options = later.pop()
        return real_formed(site, plan, real_charged(*arguments, **options), result, weights)

    patch.setattr(client.round, "_charged", charged)
    patch.setattr(client.round, "_formed", formed)


@mutant("handling", caught_by="asked-twice")
def asked_again_it_trains_again(patch):
    """No answer is kept, so that a round that is asked for twice gives two updates for one charge."""
    patch.setattr(Outbox, "find", nothing)
    patch.setattr(Ledger, "mark_sealed", nothing)


@mutant("handling", caught_by="several-runs")
def each_run_starts_with_a_full_budget(patch):
    """The ledger leaves out what other runs have charged to the same patients."""
    real_cost = client.ledger.ledger.cost_of_charge

    def histories(self, cohort, *, run_id="", **_):
        mine = [c.event for c in self.charges() if c.key.run_id == run_id and c.event is not None]
        return [tuple(mine)]

    def cost(charges, cohorts, *, run_id, **others):
        mine = [charge for charge in charges if charge.key.run_id == run_id]
        return real_cost(mine, cohorts, run_id=run_id, **others)

    patch.setattr(Ledger, "histories", histories)
    patch.setattr(client.ledger.ledger, "cost_of_charge", cost)


@mutant("handling", caught_by="older-ledger")
def an_older_ledger_is_taken(patch):
    """A copy of the ledger that was put back is trained on, whatever the receipts say."""
    patch.setattr(client.round, "require_current", nothing)
    patch.setattr(client.round, "issued", lambda site: b"")


@mutant("handling", caught_by="accounting")
def delta_of_the_true_number(patch):
    """Delta is one over ten times the true number of patients."""
    real = Ledger.charge

    def charge(self, key, *, cohort, delta, **others):
        return real(self, key, cohort=cohort, delta=1 / (10 * cohort.size), **others)

    patch.setattr(Ledger, "charge", charge)


# --- what a server may ask ---


@mutant("handling", caught_by="greedy-server")
def the_server_chooses_the_noise(patch):
    """The noise multiplier is the one that the server asks for, whatever the hospital's policy says."""
    patch.setattr(
        client.policy,
        "_noise_multiplier",
        lambda config, request, limits, earlier: request.knobs.minimum_noise_multiplier or 1.0,
    )


@mutant("handling", caught_by="greedy-server")
def no_ceilings_for_the_server(patch):
    """Clip, steps and rounds are the server's, without a ceiling of the hospital."""
    patch.setattr(client.policy, "_require_below_ceilings", nothing)


# --- what leaves beside the update ---


def with_metric(patch, metric_of):
    """Add to an answer's scalars what `metric_of(site)` gives."""
    real = client.round._formed

    def formed(site, plan, charge, result, weights):
        sealed = real(site, plan, charge, result, weights)
        return replace(sealed, metrics={**sealed.metrics, **metric_of(site)})

    patch.setattr(client.round, "_formed", formed)


@mutant("handling", caught_by="accounting")
def true_number_as_weight(patch):
    """The weight for averaging is the true number of patients, not the enrolled one."""
    with_metric(patch, lambda site: {messages.NUM_EXAMPLES: site._images[1].train.num_units})


@mutant("handling", caught_by="accounting")
def gradient_norm_as_metric(patch):
    """The norm of the clipped sum, before noise, travels beside the update, and the white list has it."""
    patch.setattr(messages, "METRIC_WHITE_LIST", messages.METRIC_WHITE_LIST | {"gradient-norm"})
    real, norms = PatientDPOptimizer.add_noise, []

    def add_noise(self):
        held = [p.summed_grad for p in self._parameters if p.summed_grad is not None]
        norms.append(float(np.sqrt(sum(float(total.square().sum()) for total in held))))
        real(self)

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)
    with_metric(patch, lambda site: {"gradient-norm": norms[-1]})


# --- metrics about validation patients ---


@mutant("amplification", caught_by="charged-counts")
def evaluation_is_free(patch):
    """Counts about validation patients are released without a charge."""
    real_charge, real_seal = Ledger.charge, Ledger.mark_sealed

    def charge(self, key, *, purpose, event, delta, **others):
        from tests.audit.hospital_checks import unwritten_charge

        return unwritten_charge(key, purpose=purpose, event=event, delta=delta)

    def only_counts(real, instead):
        def method(self, *arguments, purpose="training", **options):
            chosen = instead if purpose == EVALUATION else real
            return chosen(self, *arguments, purpose=purpose, **options)

        return method

    patch.setattr(Ledger, "charge", only_counts(real_charge, charge))
    patch.setattr(Ledger, "mark_sealed", only_counts(real_seal, nothing))


@mutant("handling", caught_by="charged-counts")
def exact_counts_leave(patch):
    """Counts about validation patients are charged and released without noise."""
    patch.setattr(client.evaluation, "noised", lambda plan, counts, **_: dict(counts))


@mutant("handling", caught_by="charged-counts")
def noise_for_one_of_two_counts(patch):
    """The noise is made for one table of counts where a patient stands in two."""
    patch.setattr(CountPlan, "l2_sensitivity", property(lambda plan: 1.0))
