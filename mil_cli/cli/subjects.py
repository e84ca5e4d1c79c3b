"""What a user may name on the command line as a model: an ONNX file, a `.pt2` archive, or a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.errors import DeviceError, ModelError, OutputError, did_you_mean

if TYPE_CHECKING:
    from mil_cli.device.profile import DeviceProfile
    from mil_cli.graph.model import Model

SUFFIXES = (".onnx", ".pt2", ".yaml")


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: What the user called it.
        path: Its ONNX file.
        model: Its graph, where there is one.
    """

    name: str
    path: Path
    model: Model | None


def check_exists(path: Path) -> None:
    """Refuse a path that is missing or of a kind that is no model.

    Raises:
        ModelError: Says what can be named.
    """
    if path.suffix not in SUFFIXES:
        hint = "name an .onnx file, a .pt2 archive, or a recipe (.yaml) for its uncompressed model"
        raise ModelError("this is no model", where=str(path), hint=hint)
    if path.is_dir():
        raise ModelError("this is a folder", where=str(path), hint="name a file in it")
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else "check the path"
        raise ModelError("there is no such file", where=str(path), hint=hint)


def load_graph(path: Path) -> Model:
    """Return the model of a `.pt2` archive, or the uncompressed model of a recipe.

    Raises:
        MilError: It cannot be read or built.
    """
    check_exists(path)
    if path.suffix == ".pt2":
        from mil_cli.graph.model import Model

        return Model.load(path)
    if path.suffix == ".onnx":
        hint = "name the .pt2 beside it: `mil compress` writes both"
        raise ModelError("an ONNX file holds no captured graph", where=str(path), hint=hint)
    from mil_cli.recipe.load import load_recipe
    from mil_cli.run.surroundings import build_surroundings, source_model

    recipe = load_recipe(path)
    return source_model(recipe, build_surroundings(recipe))


def as_onnx(path: Path, *, device: DeviceProfile, folder: Path, number: int) -> Subject:
    """Return a model as an ONNX file, exporting it into `folder` if it is none yet.

    Raises:
        MilError: It cannot be read, built or exported.
    """
    check_exists(path)
    if path.suffix == ".onnx":
        return Subject(str(path), path, None)
    from mil_cli.export.onnx import export_onnx

    model = load_graph(path)
    exported = export_onnx(model, folder / f"{number}.onnx", device=device)
    return Subject(str(path), exported.path, model)


def feeds_for(subjects: list[Subject], sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return inputs of one sample that every subject takes: a real example where a graph has one, else random.

    Args:
        subjects: The models.
        sizes: Lengths of free axes by name, such as 128 tokens: the sample is cut or repeated along them.

    Raises:
        ModelError: A subject cannot be read, they do not take the same inputs, or the first has no such free axis.
    """
    import numpy as np

    feeds = _sample_feeds(subjects)
    if not sizes:
        return feeds
    free = {
        (name, axis): label
        for name, labels in free_axes(subjects[0].path).items()
        for axis, label in labels.items()
        if axis > 0
    }
    for label in sizes:
        if label not in free.values():
            hint = "it has none but its batch" if not free else did_you_mean(label, sorted({*free.values()}))
            raise ModelError("the first model has no such free axis", where="--axis", value=label, hint=hint)
    for (name, axis), label in free.items():
        if label in sizes:
            places = np.arange(sizes[label]) % feeds[name].shape[axis]
            feeds[name] = np.ascontiguousarray(np.take(feeds[name], places, axis))
    return feeds


def _sample_feeds(subjects: list[Subject]) -> dict[str, Any]:
    import numpy as np

    signatures = {subject.name: signature(subject.path) for subject in subjects}
    first = subjects[0].name
    for name, inputs in signatures.items():
        if set(inputs) != set(signatures[first]):
            hint = f"{first} takes {', '.join(signatures[first])}; compare models that replace one another"
            raise ModelError("the models do not take the same inputs", where=name, value=list(inputs), hint=hint)
    example = next((subject.model for subject in subjects if subject.model is not None), None)
    if example is not None:
        args, kwargs = example.batch_input(1)
        tensors = example.flat_inputs(*args, **kwargs)
        return {
            spec.name: np.ascontiguousarray(tensor.numpy())
            for spec, tensor in zip(example.spec.inputs, tensors, strict=True)
        }
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for name, (shape, dtype) in signatures[first].items():
        if np.issubdtype(dtype, np.floating):
            feeds[name] = generator.standard_normal(shape).astype(dtype)
        elif dtype == np.bool_:
            feeds[name] = np.ones(shape, dtype)
        else:
            feeds[name] = np.zeros(shape, dtype)
    return feeds


def signature(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return input name -> (shape of one sample, dtype) of an ONNX file; free axes are 1.

    Raises:
        ModelError: It is no ONNX file, or takes what is no tensor.
    """
    import onnx

    found = {}
    for value in _inputs(path):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            what = f"its input {value.name} is no tensor but of the ONNX {kind or 'type unknown'}"
            raise ModelError(what, where=str(path), hint="export a model whose inputs are tensors")
        tensor = value.type.tensor_type
        shape = tuple(axis.dim_value if axis.HasField("dim_value") else 1 for axis in tensor.shape.dim)
        found[value.name] = (shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return found


def free_axes(path: Path) -> dict[str, dict[int, str]]:
    """Return input name -> {axis: its name} of the axes of an ONNX file's inputs that take any length.

    Raises:
        ModelError: It is no ONNX file.
    """
    return {
        value.name: {
            number: axis.dim_param for number, axis in enumerate(value.type.tensor_type.shape.dim) if axis.dim_param
        }
        for value in _inputs(path)
    }


def _inputs(path: Path) -> list[Any]:
    """Return what an ONNX file must be given, without its weights."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError, ValueError) as error:
        raise ModelError(f"not an ONNX file: {error}", where=str(path), hint="export the model again") from None
    if not graph.node:
        raise ModelError("not an ONNX model: it has no nodes", where=str(path), hint="export the model again")
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def named_device(name: str, *, runnable: bool = True) -> DeviceProfile:
    """Return a device profile by the name of its file in the shipped group, or by a path to a YAML file.

    Args:
        name: The name or path.
        runnable: Whether this machine must be able to run on the profile.

    Raises:
        DeviceError: There is no such profile, or this machine does not meet it.
    """
    import yaml

    from mil_cli.device.host import resolve
    from mil_cli.recipe.locations import configs_folder

    folder = configs_folder() / "device"
    file = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        raise DeviceError("there is no such device", where="--device", value=name, hint=did_you_mean(name, known))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise DeviceError(f"the profile is not valid YAML: {first}", where=str(file), hint="mend it") from None
    if not isinstance(content, dict):
        hint = f"copy one of {folder} and change it"
        raise DeviceError("a device profile is a mapping of keys", where=str(file), hint=hint)
    return resolve(content, runnable=runnable)


def check_writable(path: Path, *, option: str) -> None:
    """Refuse an output file that cannot be written, before any long work.

    Raises:
        OutputError: Says why.
    """
    import os

    from mil_cli.files import output_error

    if path.is_dir():
        raise OutputError("this is a folder", where=option, value=str(path), hint="name a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = OSError(13 if parent.is_dir() else 20, "permission denied" if parent.is_dir() else "not a folder")
        raise output_error(problem, path)
