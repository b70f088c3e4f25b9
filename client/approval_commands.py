"""`flower-client approve`: what waits for a person, and the person's word on it.

flower-client approve DIR                      what waits: plans with what they will have cost, and updates
flower-client approve DIR RUN                  approve the plan of RUN as it waits, for its rounds and cost
flower-client approve DIR RUN --rounds 3       the same for the first three rounds
flower-client approve DIR RUN --no-evaluation  the same without scoring the validation patients
flower-client approve DIR RUN --round 3        let the sealed update of round 3 leave
flower-client approve DIR RUN --revoke         train no further round of RUN
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.command_line import Output, OutputFormat, print_table

if TYPE_CHECKING:
    from client.approval.approvals import Approvals
    from client.approval.records import PendingPlan
    from client.deployment.hospital_folder import HospitalFolder

_HERE = Path()


def approve(
    folder: Annotated[Path, typer.Argument(help="the hospital's folder, with hospital.toml")] = _HERE,
    run: Annotated[str, typer.Argument(help="the run to approve; without one, what waits is listed")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="approve only the first N rounds")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="what its training may cost at most; default: what the plan costs")
    ] = None,
    no_evaluation: Annotated[
        bool, typer.Option("--no-evaluation", help="approve training only, no counts of validation patients")
    ] = False,
    digest: Annotated[str, typer.Option(help="approve only a plan whose digest begins so")] = "",
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, help="let this round's sealed update leave")
    ] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="take the approval of a run back")] = False,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Approve a run's plan before anything is trained, or an update before it leaves (policy.approval)."""
    from client.approval.approvals import Approvals
    from client.deployment.hospital_folder import HospitalFolder

    hospital = HospitalFolder(folder)
    approvals = Approvals(hospital.state, hospital=hospital.path)
    if not run:
        _list(hospital, approvals, output)
    elif revoke:
        found = approvals.revoke(run)
        _say(
            output, {"run": run, "revoked": found}, f"Run {run} {'is not' if found else 'was not'} approved."
        )
    elif round_number is not None:
        update = approvals.release(run, round_number)
        said = {"run": run, "round": round_number, "released": update.digest}
        _say(output, said, f"The update of round {round_number} may leave ({update.digest[:16]}).")
    else:
        _approve(
            hospital,
            approvals,
            run,
            rounds=rounds,
            epsilon=epsilon,
            evaluates=not no_evaluation,
            digest=digest,
            output=output,
        )


def _approve(
    hospital: "HospitalFolder",
    approvals: "Approvals",
    run: str,
    *,
    rounds: int | None,
    epsilon: float | None,
    evaluates: bool,
    digest: str,
    output: OutputFormat,
) -> None:
    from dataclasses import asdict

    from client.planning.evaluations import evaluations_of
    from common.errors import ConfigError

    plan = approvals.known(run)
    if plan is None or not plan.digest.startswith(digest):
        raise ConfigError(
            f"no plan {digest + ' ' if digest else ''}of a run {run} waits here",
            why="a plan is known once its server has asked for a round" if plan is None else "it was changed",
            fix="flower-client approve lists what waits",
        )
    of_plan = plan.plan.federation.rounds
    if epsilon is None and plan.plan.claims_privacy:
        epsilon = _cost_of_plan(hospital, plan)
    outlook = evaluations_of(hospital.config, plan.plan)
    approval = approvals.approve(
        plan,
        rounds=min(rounds or of_plan, of_plan),
        epsilon=epsilon,
        evaluations=outlook.number if evaluates else 0,
        evaluation_epsilon=outlook.epsilon if evaluates else None,
    )
    cost = "no privacy is claimed" if epsilon is None else f"epsilon {epsilon:.4g} at most"
    words = f"Approved: run {run}, plan {approval.digest[:16]}, rounds 1 to {approval.rounds}, {cost}."
    words += f"\n{outlook.in_words() if evaluates else 'No evaluation was approved.'}"
    if hospital.config.policy.approval == "update":
        words += f"\nEach update waits as well: flower-client approve {hospital.path} {run} --round N"
    _say(output, asdict(approval), words)


def _cost_of_plan(hospital: "HospitalFolder", plan: "PendingPlan") -> float | None:
    from client.planning.hospital import outlook_of_run
    from common.errors import PolicyError

    outlook = outlook_of_run(hospital, plan.run, plan.plan)
    if outlook.refusal:
        raise PolicyError(
            "this hospital would refuse the run even with an approval",
            why=outlook.refusal,
            fix=outlook.fix or "approve it with a cost of your own: --epsilon E",
        )
    return outlook.epsilon


def _list(hospital: "HospitalFolder", approvals: "Approvals", output: OutputFormat) -> None:
    plans = [_plan_entry(hospital, plan) for plan in approvals.pending_plans()]
    updates = [
        {
            "run": update.run,
            "round": update.round_number,
            "attempt": update.attempt,
            "kind": update.purpose,
            "bytes": update.num_bytes,
            "sha256": update.digest,
            "epsilon": update.epsilon,
            "asked": update.asked,
        }
        for update in approvals.pending_updates()
    ]
    if output is OutputFormat.JSON:
        mode = hospital.config.policy.approval
        _print_json({"approval": mode, "plans": plans, "updates": updates})
        return
    for entry in plans:
        typer.echo("\n".join(_words(hospital, entry)))
    if updates:
        columns = ("run", "round", "attempt", "what", "bytes", "sha256", "epsilon of the run")
        print_table(columns, [_row(update) for update in updates])
        typer.echo(f"Let one leave: flower-client approve {hospital.path} RUN --round N")
    if not plans and not updates:
        typer.echo(f'Nothing waits (policy.approval = "{hospital.config.policy.approval}").')


def _plan_entry(hospital: "HospitalFolder", pending: "PendingPlan") -> dict[str, Any]:
    """What a person decides on; the cost is the planner's, from the plan object that training uses."""
    from client.planning.evaluations import evaluations_of
    from client.planning.hospital import outlook_of_run
    from common.errors import FederationError

    plan, problem, outlook = pending.plan, "", None
    try:
        outlook = outlook_of_run(hospital, pending.run, plan)
        problem = outlook.refusal
    except FederationError as error:
        problem = f"{error.what}: {error.why}" if error.why else error.what
    claims = outlook is not None and plan.claims_privacy
    return {
        "run": pending.run,
        "digest": pending.digest,
        "reason": pending.reason,
        "asked": pending.asked,
        "study": plan.federation.name,
        "private": plan.claims_privacy,
        "task": plan.data.task,
        "classes": list(plan.data.classes),
        "unit": plan.data.unit,
        "model": plan.model.name,
        "image_size": plan.data.image_size,
        "rounds": plan.federation.rounds,
        "local_steps": plan.privacy.local_steps,
        "sampling_rate": plan.privacy.sampling_rate,
        "l2_clip_norm": plan.privacy.l2_clip_norm,
        "rounds_trained": outlook.rounds if outlook else None,
        "noise_multiplier": outlook.plan.noise_multiplier if outlook and outlook.plan else None,
        "plan_digest": outlook.plan.digest() if outlook and outlook.plan else None,
        "epsilon": outlook.epsilon if outlook and claims else None,
        "epsilon_after": outlook.epsilon_after if outlook and claims else None,
        "delta": hospital.config.delta,
        "evaluation": evaluations_of(hospital.config, plan).as_json(),
        "problem": problem or None,
    }


def _words(hospital: "HospitalFolder", entry: dict[str, Any]) -> list[str]:
    from common.errors import printable

    classes = ", ".join(printable(name, most=40) for name in entry["classes"])
    lines = [
        f"Run {entry['run']} of study {entry['study']} waits: {entry['reason']}.",
        f"  {entry['rounds']} rounds of {entry['local_steps']} step(s), sampling rate "
        f"{entry['sampling_rate']:g}, clip {entry['l2_clip_norm']:g}, model {printable(entry['model'])} "
        f"on {entry['image_size']} px, {entry['task']} of {classes}; protects one {entry['unit']}.",
    ]
    if entry["problem"]:
        lines.append(f"  It would be refused anyway: {entry['problem']}.")
    elif entry["epsilon"] is None:
        lines.append("  WITHOUT PRIVACY: nothing is guaranteed to the patients in this run.")
    else:
        lines.append(
            f"  {entry['rounds_trained']} rounds will have cost epsilon {entry['epsilon']:.4g} at delta "
            f"{entry['delta']:.3g}, noise multiplier {entry['noise_multiplier']:g}; the worst-off patient is "
            f"then at {entry['epsilon_after']:.4g} of {hospital.config.policy.epsilon:g}."
        )
    lines.append(f"  {entry['evaluation']['words']}")
    command = f"flower-client approve {hospital.path} {entry['run']} --digest {entry['digest'][:16]}"
    return [*lines, f"  Approve: {command}"]


def _row(update: dict[str, Any]) -> tuple[str, ...]:
    cost = "" if update["epsilon"] is None else f"{update['epsilon']:.4g}"
    words = (update["run"], update["round"], update["attempt"], update["kind"], update["bytes"])
    return (*(str(word) for word in words), update["sha256"][:16], cost)


def _say(output: OutputFormat, content: object, words: str) -> None:
    if output is OutputFormat.JSON:
        _print_json(content)
    else:
        typer.echo(words)


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
