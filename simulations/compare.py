"""Compare ways to train on one split: central, every hospital alone, federated, federated under privacy.

comparison = compare(make_scenario({"hospitals": 3}), epsilons=(1.0, 8.0))
comparison.content["verdicts"][0]["text"]
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import FederationConfig
from common.errors import ConfigError, FederationError
from common.pages.html import duration, figure, interval
from common.tasks import task_of
from simulations.baselines.training import check_baselines, train_baselines
from simulations.comparison import SCORES, Trained, interval_of, score, to_dict
from simulations.preparation import HELD_BACK, Prepared, new_run_folder, prepare
from simulations.run import Outcome, train_in
from simulations.scenario import Scenario
from simulations.ways import Way, prepare_way, ways_to_compare

EPSILONS = (1.0, 3.0, 8.0)
SPLIT = "split"
"""Sub-folder with the parts that all ways share."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison and where it lies."""

    folder: Path
    trained: tuple[Trained, ...]
    content: dict[str, Any]
    """comparison.json."""

    @property
    def stopped(self) -> bool:
        """Whether a person stopped it before every way was trained."""
        return any(t.status == "stopped" for t in self.trained)


def compare(
    scenario: Scenario,
    *,
    epsilons: Sequence[float] = EPSILONS,
    alone_private: bool = False,
    baselines: bool = False,
    quiet: bool = True,
    say: Say = lambda line: None,
) -> Comparison:
    """Train every way on the same parts, score all on the same test patients, write the comparison.

    `baselines` adds classical classifiers without privacy (`simulations.baselines`).
    A way that cannot be trained is a row with its reason; Ctrl-C ends with the ways trained so far. Raises
    FederationError when the data cannot be prepared or nothing can be compared.
    """
    from simulations.comparison_page import write_comparison
    from simulations.engines.processes import warm_up

    if baselines:
        check_baselines(scenario)
    warm_up()
    folder = _new_folder(scenario)
    base = _prepare_split(scenario, folder)
    ways = ways_to_compare(
        [hospital.name for hospital in base.hospitals],
        epsilons=tuple(dict.fromkeys(epsilons)) if scenario.private else (),
        alone_private=alone_private,
    )
    say(f"comparing {len(ways)} ways on {base.facts.name}, {len(base.hospitals)} hospitals, in {folder}")
    for entry in base.left_out:
        say(f"without {entry.name}: {entry.reason}")
    done = _train_all(base, ways, scenario, folder, quiet=quiet, say=say)
    trained = _score_all(base, done, seed=scenario.seed)
    if baselines and not any(t.status == "stopped" for t in trained):
        trained += train_baselines(base, seed=scenario.seed, say=say)
    content = _head(base, scenario) | to_dict(trained)
    write_comparison(folder, content, trained)
    return Comparison(folder=folder, trained=tuple(trained), content=content)


@dataclass(frozen=True, kw_only=True)
class _Done:
    way: Way
    config: FederationConfig | None
    outcome: Outcome | None
    problem: str = ""


def _new_folder(scenario: Scenario) -> Path:
    folder = new_run_folder(scenario)
    return folder if scenario.out else folder.with_name(f"{folder.name}-compare")


def _prepare_split(scenario: Scenario, folder: Path) -> Prepared:
    base = prepare(scenario.model_copy(update={"out": str(folder / SPLIT), "epsilon": None, "delta": None}))
    if len(base.hospitals) < 2:
        shutil.rmtree(base.folder)
        raise ConfigError(
            "a comparison needs at least two hospitals",
            why=f"these data and flags give {len(base.hospitals)}",
            fix="raise --hospitals, or choose another --partition",
        )
    return base


def _train_all(
    base: Prepared, ways: Sequence[Way], scenario: Scenario, folder: Path, *, quiet: bool, say: Say
) -> list[_Done]:
    done: list[_Done] = []
    for number, way in enumerate(ways, start=1):
        head = f"{number} of {len(ways)}  {way.title}"
        if not quiet:
            say(head)
        try:
            config, own = prepare_way(base, way, scenario, folder / way.name)
            outcome = train_in(folder / way.name, config, own, quiet=quiet, say=lambda line: None)
        except FederationError as error:
            done.append(_Done(way=way, config=None, outcome=None, problem=error.what))
            say(f"{head}: not trained, {error.what}")
            continue
        done.append(_Done(way=way, config=config, outcome=outcome))
        say(f"{head}: {_summary(outcome)}")
        if outcome.status == "stopped":
            break
    return done


def _summary(outcome: Outcome) -> str:
    test = outcome.result.get("test") or {}
    bounds = interval((test.get("ci95") or {}).get("auc"))
    seconds = (outcome.result.get("time") or {}).get("wall_s")
    return f"{outcome.status}, AUC {figure(test.get('auc'))} ({bounds}), {duration(seconds)}"


def _score_all(base: Prepared, done: Sequence[_Done], *, seed: int) -> list[Trained]:
    """Ask every trained model about the same test patients, in one process."""
    from simulations.predictions import MODEL, predict_test_split

    runs = {d.way.name: d.config for d in done if d.config is not None}
    runs = {name: c for name, c in runs.items() if (Path(c.runtime.run_folder) / MODEL).is_file()}
    if not runs:
        raise FederationError(
            "no way could be trained",
            why=next((d.problem for d in done if d.problem), "every run ended without a model"),
            fix="try `flower-simulate run` with the same flags",
        )
    test = base.held_back.sets["test"]
    said = predict_test_split(base.folder / HELD_BACK, runs)
    trained, task = [], task_of(base.config)
    for d in done:
        result = d.outcome.result if d.outcome is not None else {}
        scores, samples = (
            score(said[d.way.name], test.targets, test.units, seed=seed, task=task)
            if d.way.name in said
            else (dict.fromkeys(SCORES), {})
        )
        spent = [h["epsilon"] for h in result.get("hospitals", []) if h.get("epsilon") is not None]
        trained.append(
            Trained(
                way=d.way,
                status=d.outcome.status if d.outcome is not None else "failed",
                problem=d.problem,
                private=bool(result.get("private", False)),
                rounds=int(result.get("rounds", 0)),
                seconds=(result.get("time") or {}).get("wall_s"),
                epsilon_spent=max(spent, default=None),
                metrics=scores,
                ci95={name: interval_of(values) for name, values in samples.items()},
                samples=samples,
            )
        )
    return trained


def _head(base: Prepared, scenario: Scenario) -> dict[str, Any]:
    test = base.held_back.sets["test"]
    return {
        "schema": 1,
        "data": {
            "name": base.facts.name,
            "task": base.config.data.task,
            "classes": list(base.facts.classes),
            "unit": base.facts.unit,
            "generated": scenario.generates_images,
        },
        "seed": scenario.seed,
        "reproducible": scenario.reproducible,
        "engine": scenario.engine,
        "model": base.config.model.name,
        "partition": scenario.partition or "default",
        "hospitals": [{"name": h.name, "enrolled_patients": h.enrolled_patients} for h in base.hospitals],
        "left_out": [{"name": entry.name, "reason": entry.reason} for entry in base.left_out],
        "test": {"images": len(test.targets), "units": len(np.unique(test.units))},
    }
