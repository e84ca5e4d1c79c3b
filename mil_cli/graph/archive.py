"""Writes and reads a Model: a `.pt2` archive, a versioned JSON sidecar beside it, and the samples."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from mil_cli.errors import ArchiveError, OutputError
from mil_cli.graph.foreign import infer_model
from mil_cli.graph.mode import set_mode
from mil_cli.graph.model import Model, mark_transient
from mil_cli.graph.nodes import get_attribute, set_attribute
from mil_cli.graph.program import capture_settings, set_out_spec, to_graph
from mil_cli.graph.safety import check_archive, check_tree
from mil_cli.graph.samples import Call
from mil_cli.graph.spec import ModelSpec
from mil_cli.graph.tree import runtime_spec

_FORMAT = "mil-model"
_VERSION = 1


def sidecar_path(path: Path) -> Path:
    """Return the path of the JSON file beside an archive."""
    return path.with_suffix(".json")


def samples_path(path: Path) -> Path:
    """Return the path of the samples beside an archive."""
    return path.with_suffix(".samples.safetensors")


def save(model: Model, path: Path) -> None:
    """Write a model in evaluation form: the archive, its sidecar, its samples.

    Each file is written under a temporary name and renamed; nothing is left behind on failure.

    Args:
        model: The model; it is not changed.
        path: The archive's path; it ends in `.pt2`.

    Raises:
        OutputError: If the files cannot be written.
        ArchiveError: If the model holds something an archive cannot.
    """
    if path.suffix != ".pt2":
        raise OutputError("a model is written to a .pt2 file", value=str(path))
    program = model.export_program()
    program.example_inputs = None
    archive = io.BytesIO()
    with capture_settings():
        torch.export.save(program, archive)
    tensors, constants = _split_samples(model.samples)
    try:
        samples = safetensors.torch.save(tensors)
    except KeyError as error:
        raise ArchiveError(
            "samples of this type cannot be stored", value=error.args[0], hint="let the model take another type"
        ) from None
    sidecar = {
        "format": _FORMAT,
        "version": _VERSION,
        "torch": torch.__version__,
        "spec": model.spec.to_json(),
        "tied": _tied_names(model.graph),
        "sample_constants": constants,
        "sha256": {"archive": _sha256(archive.getvalue()), "samples": _sha256(samples)},
    }
    text = json.dumps(sidecar, indent=1, sort_keys=True) + "\n"
    write_files({samples_path(path): samples, path: archive.getvalue(), sidecar_path(path): text.encode()})


def load(path: Path) -> Model:
    """Read a model; an archive without a sidecar is read too, its specification inferred.

    Raises:
        ArchiveError: If a file is missing, damaged, of another version, or could run code.
    """
    content = _read(path)
    sidecar = _read_sidecar(path, content)
    check_archive(content, where=str(path))
    try:
        with capture_settings():
            program = load_pt2(io.BytesIO(content)).exported_programs["model"]
    except Exception as error:
        raise ArchiveError(
            f"torch {torch.__version__} cannot read the archive ({type(error).__name__}: {_first_line(error)})",
            where=str(path),
            hint="write it again with the torch version that is installed here",
        ) from None
    try:
        return infer_model(program, where=str(path)) if sidecar is None else _assemble(program, sidecar, path)
    except SyntaxError as error:
        raise ArchiveError("the archive's graph makes no code", where=str(path), value=error.text) from None


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write several files together: all under temporary names first, then renamed in order.

    Raises:
        OutputError: If one cannot be written; no temporary file is left.
    """
    temporary: dict[Path, Path] = {}
    current = next(iter(files))
    try:
        for current, content in files.items():
            current.parent.mkdir(parents=True, exist_ok=True)
            temporary[current] = current.with_name(f".{current.name}.{secrets.token_hex(8)}.tmp")
            with temporary[current].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for current, name in temporary.items():
            os.replace(name, current)
    except OSError as error:
        raise OutputError(
            f"the file cannot be written: {error.strerror or error}",
            where=str(current),
            hint="choose a folder that can be written, with enough space",
        ) from error
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)


def _assemble(program: ExportedProgram, sidecar: Mapping[str, Any], path: Path) -> Model:
    """Put a program, its sidecar and its samples together."""
    where = str(sidecar_path(path))
    try:
        spec = ModelSpec.from_json(sidecar["spec"])
        tied = [[str(name) for name in group] for group in sidecar["tied"]]
        constants = {int(index): value for index, value in sidecar["sample_constants"].items()}
        digest = str(sidecar["sha256"]["samples"])
        for tree in (spec.in_tree, spec.out_tree):
            check_tree(tree, where=where)
        in_tree, out_tree = pytree.treespec_loads(spec.in_tree), pytree.treespec_loads(spec.out_tree)
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ArchiveError(f"the sidecar is damaged ({error})", where=where) from None
    found = program.call_spec.in_spec.num_leaves, program.call_spec.out_spec.num_leaves
    if found != (in_tree.num_leaves, out_tree.num_leaves):
        raise ArchiveError("the sidecar is damaged (its trees do not fit the archive)", where=where)
    graph, transient = to_graph(program)
    set_out_spec(graph, runtime_spec(out_tree))
    _tie(graph, tied, where)
    mark_transient(graph, transient)
    model = Model(graph=graph, spec=spec, samples=_read_samples(path, digest, constants, in_tree, spec))
    set_mode(model.graph, False)
    return model


def _split_samples(samples: Call) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate the leaves of the samples into tensors and constants, both keyed by the leaf's index."""
    leaves = pytree.tree_leaves(samples)
    tensors = {str(index): leaf.contiguous() for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    constants = {str(index): leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    return tensors, constants


def _read_samples(
    path: Path, digest: str, constants: Mapping[int, Any], tree: pytree.TreeSpec, spec: ModelSpec
) -> Call:
    where = samples_path(path)
    content = _read(where)
    if _sha256(content) != digest:
        raise ArchiveError(
            "the samples do not belong to this model", where=str(where), hint="copy the three files together"
        )
    try:
        tensors = safetensors.torch.load(content)
        leaves = [tensors[str(i)] if i not in constants else constants[i] for i in range(tree.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArchiveError(f"the samples are damaged ({error})", where=str(where)) from None
    if len(tensors) != len(spec.inputs):
        raise ArchiveError("the samples do not fit the model's inputs", where=str(where))
    return tuple(args), dict(kwargs)


def _read_sidecar(path: Path, content: bytes) -> dict[str, Any] | None:
    """Read and check the sidecar; None where there is none."""
    file = sidecar_path(path)
    if not file.exists():
        return None
    try:
        sidecar = json.loads(_read(file))
        kind, version, digest = sidecar["format"], sidecar["version"], sidecar["sha256"]["archive"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArchiveError("the sidecar is damaged", where=str(file), hint="copy the three files again") from None
    if kind != _FORMAT or version != _VERSION:
        raise ArchiveError(
            f"the sidecar's version cannot be read: this package reads {_FORMAT} {_VERSION}",
            where=str(file),
            value=f"{kind} {version}",
            hint="write the model again with this version, or read it with the one that wrote it",
        )
    if digest != _sha256(content):
        raise ArchiveError(
            "the archive is damaged or does not belong to its sidecar",
            where=str(path),
            hint="copy the three files together again",
        )
    return dict(sidecar)


def _tied_names(graph: GraphModule) -> list[list[str]]:
    """Return the groups of names that are one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in graph.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie(graph: GraphModule, groups: list[list[str]], where: str) -> None:
    for first, *others in groups:
        try:
            parameter = get_attribute(graph, first)
        except AttributeError:
            raise ArchiveError("the sidecar names a weight that the archive lacks", where=where, value=first) from None
        if isinstance(parameter, nn.Parameter):
            for other in others:
                set_attribute(graph, other, parameter)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArchiveError("there is no such file", where=str(path)) from None
    except OSError as error:
        raise ArchiveError(f"the file cannot be read: {error.strerror}", where=str(path)) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]
