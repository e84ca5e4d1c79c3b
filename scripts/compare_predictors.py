"""Which predictor ranks a table best after so many trainings, and which strategy finds its best soonest?

Takes a table whose architectures are all trained, such as a tabular benchmark. Each predictor is fitted to ever more of
them and ranks others that it has not seen; each strategy chooses what to train as if it did not know the rest.

    python scripts/compare_predictors.py cells.csv --id cell --categories edge0 edge1 --quality accuracy
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mil_cli.assess.active import Acquisition, replay
from mil_cli.assess.columns import Columns
from mil_cli.assess.prediction import learning_curve
from mil_cli.assess.predictors.base import Predictor
from mil_cli.assess.predictors.boosting import Boosting
from mil_cli.assess.predictors.ensemble import Ensemble
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.pairwise import Pairwise
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.table import Table, read_table
from mil_cli.cli.console import messages
from mil_cli.cli.progress import progress_on

PREDICTORS: dict[str, Predictor] = {
    "ridge": Ridge(),
    "ridge on values": Ridge(target="value"),
    "gaussian_process": GaussianProcess(),
    "boosting": Boosting(),
    "pairwise": Pairwise(),
    "ensemble": Ensemble(),
}

STRATEGIES = get_args(Acquisition.model_fields["strategy"].annotation)


def main() -> None:
    """Run the comparison and print what it found."""
    arguments = _arguments()
    columns = Columns(
        id=arguments.id,
        features=arguments.features,
        categories=arguments.categories,
        scores=arguments.scores,
        quality=arguments.quality,
        higher_is_better=not arguments.lower_is_better,
    )
    table = read_table(arguments.table, columns)
    found = {
        "architectures": len(table),
        "rows": int(table.rows.sum()),
        "ranking": ranking(table, sizes=arguments.sizes, repeats=arguments.repeats, held_out=arguments.held_out),
        "search": search(table, trainings=arguments.trainings, repeats=arguments.repeats),
    }
    arguments.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def ranking(table: Table, *, sizes: list[int], repeats: int, held_out: float) -> dict[str, Any]:
    """Return for each predictor its taus by the number of trainings, and processor seconds of a fit and its tau."""
    found = {}
    for name, predictor in PREDICTORS.items():
        began = time.process_time()
        curve = learning_curve(
            predictor,
            table.inputs,
            table.goodness,
            sizes=sizes,
            repeats=repeats,
            seed=0,
            held_out=held_out,
            progress=progress_on(messages()),
        )
        seconds = (time.process_time() - began) / (repeats * len(curve))
        found[name] = {"cpu_seconds": round(seconds, 3), "curve": [asdict(point) for point in curve]}
    return found


def search(table: Table, *, trainings: int, repeats: int) -> dict[str, Any]:
    """Return for each strategy by how much the best that it trained falls short of the best there is, mean and 95 %."""
    goodness = table.goodness
    found = {}
    for strategy in STRATEGIES:
        acquisition = Acquisition(strategy=strategy)
        short = []
        for seed in range(repeats):
            order = replay(
                Ridge(), table.inputs, goodness, acquisition, start=trainings // 4, trainings=trainings, seed=seed
            )
            short.append(float(goodness.max() - goodness[order].max()))
        low, high = np.percentile(short, [2.5, 97.5])
        found[strategy] = {"trainings": trainings, "short": np.mean(short), "low": low, "high": high}
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--id", default="id")
    for kind in ("features", "categories", "scores"):
        parser.add_argument(f"--{kind}", nargs="*", default=[], metavar="COLUMN")
    parser.add_argument("--quality", default="quality")
    parser.add_argument("--lower-is-better", action="store_true")
    parser.add_argument("--sizes", nargs="*", type=int, default=[20, 50, 100, 200])
    parser.add_argument("--held-out", type=float, default=0.3, help="share of the architectures that is ranked")
    parser.add_argument("--trainings", type=int, default=100, help="that a strategy may choose")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("predictors.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
