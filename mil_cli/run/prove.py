"""The proof: exports models, checks each file against its graph, and measures the files on the device profile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.device.host import detect
from mil_cli.events import Progress
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.export.session import OnnxModel, feeds_of
from mil_cli.files import sha256_of_file
from mil_cli.measure.compare import Counts, compare
from mil_cli.measure.latency import LATENCY_VERSION
from mil_cli.run.agreement import Predictions
from mil_cli.run.cache import Cache
from mil_cli.run.environment import versions
from mil_cli.run.kernels import kernel_notices, kernels_of
from mil_cli.stages.surroundings import StoredModel, fingerprint_of
from mil_cli.training.evaluate import evaluate, whole_batches

if TYPE_CHECKING:
    import numpy as np

    from mil_cli.data.base import Data
    from mil_cli.device.profile import DeviceProfile
    from mil_cli.graph.spec import ModelSpec
    from mil_cli.recipe.schema import MeasureConfig
    from mil_cli.task.base import Task

PARITY_BATCHES = 4
PARITY_BATCH_SIZE = 32

_EXPORT_VERSION = 4
"""Changes with the form of exported files."""

_SCORE_VERSION = 3
"""Changes with what is kept of a scored file."""


@dataclass(frozen=True)
class Proof:
    """A model as the file that ships, checked and scored.

    Attributes:
        model: The graph it was exported from.
        path: The ONNX file.
        quality: Its quality in onnxruntime on the test split.
        parity: How the file's outputs compare with the graph's, both qualities, and how often they predict the same
            class.
        notices: What the exporter has to say.
        counts: Its macs and params.
        kernels: Which kernels it runs on; None where nothing is quantized.
    """

    model: StoredModel
    path: Path
    quality: dict[str, Any]
    parity: dict[str, Any]
    notices: list[str]
    counts: dict[str, int]
    kernels: dict[str, Any] | None


@dataclass(frozen=True)
class Prover:
    """Exports and measures models for one task, data set and device.

    Attributes:
        task: What the models are for.
        data: Parity is checked on `val`; quality is reported on `test`.
        device: The target's profile.
        cache: Keeps files and figures by content.
        fresh: Whether to compute even what is there.
        progress: Where work is reported.
    """

    task: Task
    data: Data
    device: DeviceProfile
    cache: Cache
    fresh: bool
    progress: Progress

    def prove(self, name: str, model: StoredModel, *, judged: bool) -> Proof:
        """Export a model and check the file; with `judged` score it on the test split, else on val.

        Raises:
            ExportError: The model cannot be exported, or the file does not behave as the graph.
        """
        split_name = "test" if judged else "val"
        split = self.data.test if judged else self.data.val
        exported, _ = self.cache.memo(
            fingerprint_of(["export", _EXPORT_VERSION, model.fingerprint, self.device.fingerprint(), versions()]),
            kind="export",
            label=name,
            fresh=self.fresh,
            compute=lambda folder: self._export(name, model, folder),
        )
        path = exported.folder / "model.onnx"
        key = ["score", _SCORE_VERSION, sha256_of_file(path), model.fingerprint, self.task.fingerprint()]
        splits = [split.fingerprint(), self.data.val.fingerprint()]
        scored, _ = self.cache.memo(
            fingerprint_of([*key, *splits, self.device.threads, versions()]),
            kind="score",
            label=f"{name} on {split_name}",
            fresh=self.fresh,
            compute=lambda _: self._score(name, model, path, split_name),
        )
        facts = scored.facts
        return Proof(
            model=model,
            path=path,
            quality=facts["quality"],
            parity=facts["parity"],
            notices=[*exported.facts["notices"], *kernel_notices(facts["kernels"])],
            counts=exported.facts["counts"],
            kernels=facts["kernels"],
        )

    def quality_before(self, model: StoredModel) -> dict[str, Any]:
        """Return the quality on val of a model that no stage has made, as stages tell theirs."""
        key = ["quality", model.fingerprint, self.task.fingerprint(), self.data.val.fingerprint(), versions()]
        entry, _ = self.cache.memo(
            fingerprint_of(key),
            kind="score",
            label="baseline on val",
            fresh=self.fresh,
            compute=lambda _: asdict(evaluate(model.load(), task=self.task, split=self.data.val, split_name="val")),
        )
        return entry.facts

    def _export(self, name: str, model: StoredModel, folder: Path) -> dict[str, Any]:
        self.progress.notice(f"{name}: exporting to ONNX")
        graph = model.load()
        exported = export_onnx(graph, folder / "model.onnx", device=self.device)
        return {"notices": list(exported.notices), "counts": {"macs": graph.macs(), "params": graph.num_params()}}

    def _score(self, name: str, model: StoredModel, path: Path, split_name: str) -> dict[str, Any]:
        graph = model.load()
        whole = whole_batches(graph.spec, self.data.val, "val", batch_size=PARITY_BATCH_SIZE)
        batches = itertools.islice(whole, PARITY_BATCHES)
        parity = check_parity(graph, path, [self.task.inputs(batch) for batch in batches], threads=self.device.threads)
        split = getattr(self.data, split_name)
        session = OnnxModel(path, graph.spec, threads=self.device.threads)
        of_graph, of_file = Predictions(self.task), Predictions(self.task)
        in_torch = evaluate(graph, task=self.task, split=split, split_name=split_name, watch=of_graph.watch)
        in_onnx = evaluate(session, task=self.task, split=split, split_name=split_name, watch=of_file.watch)
        problem = of_graph.problem or of_file.problem
        if problem is not None:
            self.progress.notice(f"{name}: what graph and file predict is not compared: {problem}")
        return {
            "quality": asdict(in_onnx),
            "parity": {
                **asdict(parity),
                "metric_torch": in_torch.value,
                "metric_onnx": in_onnx.value,
                "agreement": of_graph.agreement(of_file),
            },
            "kernels": kernels_of(graph, path),
        }

    def measure(self, proofs: Sequence[Proof], settings: MeasureConfig) -> list[dict[str, Any]]:
        """Measure the files together, the first being what the others are compared with.

        Args:
            proofs: The models; all take the same inputs.
            settings: Rounds and sessions.

        Returns:
            One measurement each, as in the report.

        Raises:
            MeasureError: The runtime failed on a file.
        """
        feeds = self._feeds(proofs[0].model.load().spec)
        files = [proof.path for proof in proofs]
        key = fingerprint_of(
            [
                "measurement",
                LATENCY_VERSION,
                [sha256_of_file(path) for path in files],
                {name: sha256(array.tobytes()).hexdigest() for name, array in feeds.items()},
                self.device.fingerprint(),
                _machine(),
                settings.model_dump(mode="json"),
                versions(),
            ]
        )
        counts = [Counts(**proof.counts) for proof in proofs]

        def compute(_: Path) -> dict[str, Any]:
            with self.cache.measuring():
                measurements = compare(
                    files,
                    device=self.device,
                    feeds=feeds,
                    counts=counts,
                    rounds=settings.rounds,
                    sessions=settings.sessions,
                    progress=self.progress,
                )
            return {"measurements": [measurement.to_json() for measurement in measurements]}

        entry, _ = self.cache.memo(
            key, kind="measurement", label=f"{len(files)} files", fresh=self.fresh, compute=compute
        )
        figures = entry.facts["measurements"]
        return [{**figure, "quality": proof.quality} for proof, figure in zip(proofs, figures, strict=True)]

    def _feeds(self, spec: ModelSpec) -> dict[str, np.ndarray[Any, Any]]:
        """Return the inputs of one sample of the test split, or of as many as the files take, as they take them."""
        args, kwargs = self.task.inputs(next(whole_batches(spec, self.data.test, "test", batch_size=1)))
        return feeds_of(spec, args, kwargs)


def _machine() -> dict[str, object]:
    host = detect()
    return {"processor": host.processor, "isa": sorted(host.isa), "cores": host.cores}
