"""Does a supernet rank its candidates as training each of them would? What does sampling and scoring one cost?

Trains the supernet of a recipe's nas/elastic stage, takes candidates across a range of operations, scores them as they
are, fine-tunes each by itself, and compares the two orders (Kendall's tau-b with its interval over candidates).

    python scripts/elastic_ranking.py recipes/fashion_mnist/elastic_bench.yaml --out elastic_ranking.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mil_cli.assess.ranking import interval, tau_b
from mil_cli.cli.console import messages
from mil_cli.cli.progress import progress_on
from mil_cli.data.base import Batch
from mil_cli.graph.model import Model
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.run.cache import Cache, default_location
from mil_cli.run.runner import run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.context import Context
from mil_cli.stages.nas.cost import CandidateCost
from mil_cli.stages.nas.elastic import ElasticConfig, candidate_model, prepare, train_supernet
from mil_cli.stages.nas.space import Candidate, ElasticSpace
from mil_cli.stages.nas.supernet import POOL_USES, shared_candidate

POOL = 4000
TIMED = 30


def main() -> None:
    """Run the comparison and print what it found."""
    arguments = _arguments()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    stages = [config for config in recipe.stages.values() if isinstance(config, ElasticConfig)]
    if len(stages) != 1:
        raise SystemExit("the recipe must have one stage of the method nas/elastic")
    (config,) = stages
    progress = progress_on(messages())
    cache = Cache(default_location(), progress)
    with importable(recipe.root):
        surroundings = build_surroundings(recipe)
        baseline = recipe.model_copy(update={"chain": ()})
        chain = run_chain(baseline, surroundings, cache=cache, fresh=False, progress=progress)
        context = Context(
            name="ranking",
            surroundings=replace(surroundings, original=chain.original),
            progress=progress,
            workspace=arguments.out.with_suffix(".work"),
        )
        ordered, space = prepare(chain.original.load(), config, context)
        cost = CandidateCost(space, "macs", kernels="float", device=context.device, known={}, progress=progress)
        found = {
            "speed": speed(ordered, space, cost, config, context),
            **ranking(ordered, space, cost, config, context, arguments),
        }
    arguments.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def ranking(
    ordered: Model,
    space: ElasticSpace,
    cost: CandidateCost,
    config: ElasticConfig,
    context: Context,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return the qualities of candidates from the supernet and by themselves, and the agreement of the two orders."""
    chosen = spread(space, cost, count=arguments.candidates, span=arguments.span)
    supernet = train_supernet(ordered, space, config, context)
    rows = []
    for number, candidate in enumerate(chosen):
        model = candidate_model(supernet, space, candidate, config, context)
        shared = context.evaluate(model).value
        tuned = context.finetune(
            model, stage=None, name=f"candidate{number}", trainer={"epochs": arguments.epochs, "learning_rate": 0.05}
        )
        rows.append({"macs": cost(candidate), "shared": shared, "tuned": context.evaluate(tuned).value})
    shared, tuned = ([row[key] for row in rows] for key in ("shared", "tuned"))
    return {"candidates": rows, "tau_b": asdict(interval(tau_b, shared, tuned, seed=0))}


def spread(space: ElasticSpace, cost: CandidateCost, *, count: int, span: float) -> list[Candidate]:
    """Return candidates whose operations lie evenly, by ratio, over a range that ends at the largest's."""
    generator = torch.Generator().manual_seed(0)
    pool = {candidate: cost(candidate) for candidate in (space.sample(generator) for _ in range(POOL))}
    whole = cost(space.largest)
    targets = [whole * 0.9 / span ** (place / (count - 1)) for place in range(count)]
    return [min(pool, key=lambda candidate, at=target: abs(pool[candidate] - at)) for target in targets]


def speed(
    ordered: Model, space: ElasticSpace, cost: CandidateCost, config: ElasticConfig, context: Context
) -> dict[str, float]:
    """Return milliseconds of sampling and building, of a candidate's training step, and of scoring."""
    model = ordered.clone().train()
    batch: Batch = next(iter(context.data.train.batches(context.trainer().batch_size)))
    generator = torch.Generator().manual_seed(0)
    building, stepping = [], []
    for _ in range(TIMED):
        started = time.perf_counter()
        candidate = space.sample(generator)
        graph = shared_candidate(space, candidate, model)
        building.append(time.perf_counter() - started)
        stepping.append(min(_step(graph, batch, context) for _ in range(2)))
    started = time.perf_counter()
    for _ in range(TIMED):
        cost(space.sample(generator))
    scoring = (time.perf_counter() - started) / TIMED
    return {
        "build_ms": 1e3 * sum(building) / TIMED,
        "build_share_of_its_steps": sum(building) / POOL_USES / sum(stepping),
        "step_ms": 1e3 * sum(stepping) / TIMED,
        "score_macs_ms": 1e3 * scoring,
    }


def _step(graph: torch.fx.GraphModule, batch: Batch, context: Context) -> float:
    started = time.perf_counter()
    args, kwargs = context.task.inputs(batch)
    context.task.loss(graph(*args, **kwargs), batch).backward()
    return time.perf_counter() - started


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--span", type=float, default=6.0, help="largest over smallest operations")
    parser.add_argument("--epochs", type=int, default=6, help="of each candidate's own training")
    parser.add_argument("--out", type=Path, default=Path("elastic_ranking.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
