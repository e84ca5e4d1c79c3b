"""Which methods there are, and the function that runs each: registered by the type of its frozen config.

A method is one module that defines a `StageConfig` subclass and a function decorated with ``@stage(ThatConfig)``.
Its module is imported only when a recipe names it, so listing methods costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from mil_cli.errors import StageError, did_you_mean

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

METHODS: dict[tuple[str, str], str] = {
    ("train", "supervised"): "mil_cli.stages.train.supervised",
    ("nas", "elastic"): "mil_cli.stages.nas.elastic",
    ("nas", "spos"): "mil_cli.stages.nas.spos",
    ("nas", "fairnas"): "mil_cli.stages.nas.fairnas",
    ("nas", "bignas"): "mil_cli.stages.nas.bignas",
    ("nas", "ofa"): "mil_cli.stages.nas.ofa",
    ("nas", "hypernetwork"): "mil_cli.stages.nas.hypernetwork",
    ("nas", "from_scratch"): "mil_cli.stages.nas.from_scratch",
    ("nas", "darts"): "mil_cli.stages.nas.darts",
    ("nas", "pc_darts"): "mil_cli.stages.nas.pc_darts",
    ("prune", "magnitude"): "mil_cli.stages.prune.magnitude",
    ("prune", "taylor"): "mil_cli.stages.prune.taylor",
    ("prune", "fpgm"): "mil_cli.stages.prune.fpgm",
    ("prune", "hrank"): "mil_cli.stages.prune.hrank",
    ("prune", "activation"): "mil_cli.stages.prune.activation",
    ("prune", "bn_scale"): "mil_cli.stages.prune.bn_scale",
    ("prune", "random"): "mil_cli.stages.prune.random",
    ("prune", "slimming"): "mil_cli.stages.prune.slimming",
    ("prune", "group_lasso"): "mil_cli.stages.prune.group_lasso",
    ("prune", "growing_reg"): "mil_cli.stages.prune.growing_reg",
    ("prune", "soft_mask"): "mil_cli.stages.prune.soft_mask",
    ("prune", "netadapt"): "mil_cli.stages.prune.netadapt",
    ("prune", "sensitivity"): "mil_cli.stages.prune.sensitivity",
    ("prune", "evolution"): "mil_cli.stages.prune.evolution",
    ("prune", "kmeans"): "mil_cli.stages.prune.kmeans",
    ("prune", "sparse_magnitude"): "mil_cli.stages.prune.sparse_magnitude",
    ("prune", "wanda"): "mil_cli.stages.prune.wanda",
    ("prune", "sparsegpt"): "mil_cli.stages.prune.sparsegpt",
    ("distill", "soft_labels"): "mil_cli.stages.distill.soft_labels",
    ("distill", "dkd"): "mil_cli.stages.distill.dkd",
    ("distill", "dist"): "mil_cli.stages.distill.dist",
    ("distill", "function_matching"): "mil_cli.stages.distill.function_matching",
    ("distill", "ensemble"): "mil_cli.stages.distill.ensemble",
    ("distill", "assistants"): "mil_cli.stages.distill.assistants",
    ("distill", "born_again"): "mil_cli.stages.distill.born_again",
    ("distill", "deep_supervision"): "mil_cli.stages.distill.deep_supervision",
    ("distill", "hints"): "mil_cli.stages.distill.hints",
    ("distill", "attention_transfer"): "mil_cli.stages.distill.attention_transfer",
    ("distill", "relational"): "mil_cli.stages.distill.relational",
    ("distill", "similarity"): "mil_cli.stages.distill.similarity",
    ("distill", "unlabelled"): "mil_cli.stages.distill.unlabelled",
    ("distill", "data_free"): "mil_cli.stages.distill.data_free",
    ("quantize", "static"): "mil_cli.stages.quantize.static",
    ("quantize", "adaround"): "mil_cli.stages.quantize.adaround",
    ("quantize", "brecq"): "mil_cli.stages.quantize.brecq",
    ("quantize", "gptq"): "mil_cli.stages.quantize.gptq",
    ("quantize", "weight_only"): "mil_cli.stages.quantize.weight_only",
    ("quantize", "dynamic"): "mil_cli.stages.quantize.dynamic",
    ("quantize", "lsq"): "mil_cli.stages.quantize.lsq",
    ("quantize", "lsq_plus"): "mil_cli.stages.quantize.lsq_plus",
    ("quantize", "pact"): "mil_cli.stages.quantize.pact",
    ("quantize", "dorefa"): "mil_cli.stages.quantize.dorefa",
    ("quantize", "apot"): "mil_cli.stages.quantize.apot",
    ("quantize", "mixed"): "mil_cli.stages.quantize.mixed",
}
"""(family, method) -> the module that holds it."""


class StageConfig(BaseModel):
    """The settings of one stage; subclasses add theirs and name their family and method.

    Attributes:
        family: One of train, prune, distill, quantize, nas.
        method: The method's name, which is also its module's and its config file's.
        version: Raised when the method computes something else from the same settings, so that old results are
            not taken for new ones.
        never_after: Families that must not stand before this stage in a chain, with the reason.
        never_before: Families, or single methods (``quantize/lsq``), that must not stand behind it, with the reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: ClassVar[str]
    method: ClassVar[str]
    version: ClassVar[int] = 1
    never_after: ClassVar[dict[str, str]] = {}
    never_before: ClassVar[dict[str, str]] = {}

    @classmethod
    def key(cls) -> str:
        """Return family and method as recipes' reports write them: ``prune/magnitude``."""
        return f"{cls.family}/{cls.method}"

    def for_finetuning(self) -> Self:
        """Return the settings by which another stage trains its own model: without what only a chain has use for."""
        return self

    def check_by(self, other: StageConfig, *, name: str) -> None:
        """Refuse the settings of the stage that a field `by` names where they do not serve, before anything runs.

        Args:
            other: That stage's settings.
            name: The key of this stage in the recipe.

        Raises:
            StageError: Says what does not serve.
        """


StageFunction = Callable[["Model", "StageConfig", "Context"], "Model"]

_CONFIGS: dict[tuple[str, str], type[StageConfig]] = {}
_FUNCTIONS: dict[type[StageConfig], StageFunction] = {}


F = TypeVar("F", bound=Callable[..., "Model"])


def stage(config_type: type[StageConfig]) -> Callable[[F], F]:
    """Register the decorated ``(model, config, context) -> model`` as what runs `config_type`."""

    def register(function: F) -> F:
        _CONFIGS[config_type.family, config_type.method] = config_type
        _FUNCTIONS[config_type] = function
        return function

    return register


def config_type(family: str, method: str) -> type[StageConfig]:
    """Return the config type of a method, importing its module if needed.

    Raises:
        StageError: There is no such family, or no such method in it.
    """
    if (family, method) not in METHODS:
        families = {known for known, _ in METHODS}
        if family not in families:
            raise StageError(f"there is no family '{family}'", hint=did_you_mean(family, families))
        methods = {name for known, name in METHODS if known == family}
        raise StageError(f"{family} has no method '{method}'", hint=did_you_mean(method, methods))
    import_module(METHODS[family, method])
    return _CONFIGS[family, method]


def function_of(config: StageConfig) -> StageFunction:
    """Return the function registered for the type of `config`."""
    return _FUNCTIONS[type(config)]


def check_order(chain: Sequence[tuple[str, StageConfig]]) -> list[StageError]:
    """Return what is wrong with the order of a chain of (name, config); empty when it can run."""
    problems = []
    for position, (name, config) in enumerate(chain):
        for earlier_name, earlier in chain[:position]:
            reason = _why_not_after(config, earlier)
            if reason is not None:
                exclusive = _why_not_after(earlier, config) is not None
                problems.append(
                    StageError(
                        f"'{name}' ({config.family}) cannot follow '{earlier_name}' ({earlier.family}): {reason}",
                        where="chain",
                        value=[stage_name for stage_name, _ in chain],
                        hint="leave one of the two out" if exclusive else f"put '{name}' before '{earlier_name}'",
                    )
                )
    return problems


def _why_not_after(config: StageConfig, earlier: StageConfig) -> str | None:
    """Return why a stage cannot stand behind another, None if it can."""
    behind = earlier.never_before
    return config.never_after.get(earlier.family) or behind.get(config.family) or behind.get(config.key())
