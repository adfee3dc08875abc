"""The description of a comparison, ``protocol.yaml``: methods, budget, seeds and tuning."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, model_validator

from sqdf_fast.compare.methods import ABLATIONS, TRAINING_FREE, Settings, builtin
from sqdf_fast.config import Config, Limits, Section, dotted, make_config, read_config_file, validate, with_settings
from sqdf_fast.errors import UserError

Seed = Annotated[int, Field(ge=0, lt=2**31)]
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_budget(text: str) -> Limits:
    """ "20000", "20_000" or "20k" UNet evaluations; "120s", "2m", "1.5h" of training. Raises UserError."""
    rows = re.fullmatch(r"\s*(\d[\d_,]*)(k?)\s*", text)
    if rows and (count := int(re.sub("[_,]", "", rows[1])) * (1000 if rows[2] else 1)) > 0:
        return Limits(unet_evaluations=count)
    time = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|m|h)\s*", text)
    if time and float(time[1]) > 0:
        return Limits(seconds=float(time[1]) * _UNITS[time[2]])
    raise UserError(
        f"invalid budget {text!r}: expected UNet evaluations such as 20000 or 20k, or training time such as 120s"
    )


def _budget(value: Any) -> Any:
    text = str(value) if isinstance(value, int) else value
    if isinstance(text, str):
        parse_budget(text)
    return text


Budget = Annotated[str, BeforeValidator(_budget)]
Dotted = Annotated[Settings, BeforeValidator(lambda value: dotted(value) if isinstance(value, dict) else value)]
# Settings that follow from the methods, budget, seeds and points of a comparison.
_DECIDED = ("algorithm", "seed", "steps", "evaluation.points", "evaluation.every")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]*")
_log = logging.getLogger(__name__)


@functools.cache
def _announce(old: str, new: str) -> None:
    _log.warning("the key %s of a protocol's methods is now %s", old, new)


class Method(Section):
    """One method of a protocol."""

    like: str | None = Field(None, description="built-in method it starts from; default: that of its name")
    settings: Dotted = Field(default_factory=dict, description="settings on top of that, dotted or nested")
    sweep: tuple[float, ...] = Field((), description="candidates of best-of-n, or scales of guided")
    trials: tuple[Dotted, ...] = Field((), description="settings to try in tuning, one mapping per trial")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="values to try, by key, in every combination")

    @property
    def tried(self) -> list[Settings]:
        """The settings of each tuning trial, in order."""
        if not self.grid:
            return [dict(trial) for trial in self.trials]
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "strengths" not in values:
            return values
        _announce("strengths", "sweep")
        return {"sweep" if key == "strengths" else key: value for key, value in values.items()}

    @model_validator(mode="after")
    def _trials_or_grid(self) -> Method:
        if self.trials and self.grid:
            raise ValueError("trials and grid of a method are mutually exclusive")
        return self


class Tuning(Section):
    """Every method gets the same number of trials of the same budget; docs/compare.md."""

    budget: Budget = Field(..., description="budget of a trial, in the units of a run's")
    trials: Annotated[int, Field(ge=1)] = Field(..., description="number of trials of each method")
    seed: Seed = Field(1000, description="seed of the trials, not one of the reported seeds")
    points: Annotated[int, Field(ge=2)] = Field(2, description="number of evaluations of a trial")
    reward: str = Field("proxy_reward", description="score whose last value decides, eval_<reward> of the records")
    keep: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {"alignment": 0.9},
        description="by score, fraction of the base model's value that a trial has to keep",
    )

    @model_validator(mode="after")
    def _the_true_reward_decides_nothing(self) -> Tuning:
        if "true_reward" in (self.reward, *self.keep):
            raise ValueError("tuning may not look at true_reward: it is what the comparison is judged by")
        return self


class Protocol(Section):
    """Everything that decides a comparison."""

    preset: str | None = Field(None, description="named preset that the shared settings start from")
    settings: Dotted = Field(default_factory=dict, description="settings shared by all methods, dotted or nested")
    budget: Budget = Field(..., description="budget of a run: 20000 UNet evaluations, or seconds: 120s")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field((0, 1, 2), description="seeds of each method")
    points: Annotated[int, Field(ge=2)] = Field(6, description="evaluations per run, the first before training")
    methods: dict[str, Method] = Field(..., min_length=1)
    ablate: tuple[str, ...] = Field((), description="ablations of the method `ablated`")
    ablated: str = Field("sqdf", description="method that is ablated and that the others are compared with")
    ablate_seeds: tuple[Seed, ...] | None = Field(None, description="seeds of the variants; default: seeds")
    tuning: Tuning | None = Field(None, description="choice of each method's settings; default: as given")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        methods = values.get("methods")
        if isinstance(methods, list | tuple):
            methods = dict.fromkeys(methods)
        if isinstance(methods, dict):
            methods = {name: {} if method is None else method for name, method in methods.items()}
            return {**values, "methods": methods}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        _refuse_repeated("seeds", self.seeds)
        _refuse_repeated("ablate", self.ablate)
        for name, method in self.methods.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"method name {name!r} cannot name a folder; use letters, digits, '-', '_' and '.'")
            builtin(method.like or name)
            _check_sweep(name, method)
        for axis in self.ablate:
            if axis not in ABLATIONS:
                raise ValueError(f"ablate: {axis!r} is unknown; allowed: {', '.join(ABLATIONS)}")
        ablated = self.methods.get(self.ablated)
        # Without an ablation, the default need not be among the methods.
        if ablated is None and (self.ablate or self.ablated != type(self).model_fields["ablated"].default):
            raise ValueError(
                f"ablated = {self.ablated!r} is not one of the methods ({', '.join(self.methods)}); add it"
            )
        if ablated and self.ablate:
            settings = {**builtin(ablated.like or self.ablated), **ablated.settings}
            if settings.get("algorithm") != "sqdf":
                raise ValueError(
                    f"ablate varies settings of SQDF, which the method {self.ablated!r} does not read; name a method "
                    "that is SQDF as `ablated`, or leave ablate out"
                )
        self._check_tuning()
        return self

    def _check_tuning(self) -> None:
        for name, method in self.methods.items():
            if self.tuning is None and method.tried:
                raise ValueError(f"method {name!r} has trials but the protocol has no tuning; add it")
            if self.tuning and not self.sweep_of(name) and len(method.tried) != self.tuning.trials:
                raise ValueError(
                    f"method {name!r} has {len(method.tried)} tuning trials and every method gets "
                    f"{self.tuning.trials}; give it as many (the budget for tuning is equal)"
                )
        if self.tuning and self.tuning.seed in (*self.seeds, *(self.ablate_seeds or ())):
            raise ValueError(f"tuning.seed = {self.tuning.seed} is one of the reported seeds; choose another")

    def base(self) -> Config:
        """The settings that all methods share, validated. Raises UserError."""
        for key in self.settings:
            if key in _DECIDED or key.startswith("limits"):
                raise UserError(
                    f"settings.{key} is decided by the comparison; set methods, budget, seeds and points instead"
                )
        return with_settings(make_config(self.preset), self.settings, shared=True)

    def settings_of(self, name: str) -> Settings:
        """A method's own settings, without what tuning chooses. Raises UserError."""
        method = self.methods[name]
        return {**builtin(method.like or name, self.base().policy.base), **method.settings}

    def sweep_of(self, name: str) -> tuple[float, ...]:
        """Candidates or scales of a method that trains nothing; empty for all others."""
        method = self.methods[name]
        return method.sweep or TRAINING_FREE.get(method.like or name, ())


def _refuse_repeated(key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{key}: {value} is given twice; give it once")


def _check_sweep(name: str, method: Method) -> None:
    kind = method.like or name
    if method.sweep and kind not in TRAINING_FREE:
        raise ValueError(f"method {name!r} has a sweep; only {' and '.join(TRAINING_FREE)} have one")
    _refuse_repeated(f"methods.{name}.sweep", method.sweep)
    for value in method.sweep:
        if kind == "best-of-n" and (value < 1 or value % 1):
            raise ValueError(f"methods.{name}.sweep: {value:g} candidates; give integers >= 1")
        if value < 0:
            raise ValueError(f"methods.{name}.sweep: a guidance scale of {value:g}; give numbers >= 0")


def make_protocol(values: dict[str, Any]) -> Protocol:
    """A protocol from plain values. Raises UserError: one line that names the key and what is allowed."""
    return validate(Protocol, values)


def read_protocol(path: Path) -> dict[str, Any]:
    """The values of a protocol file. Raises UserError when it cannot be read or is not a mapping."""
    try:
        return read_config_file(path)
    except UserError as error:
        raise UserError(str(error).replace("configuration file", "protocol").split("; see a run")[0]) from None


def dump_protocol(protocol: Protocol) -> str:
    """The protocol as YAML that :func:`read_protocol` reads."""
    return yaml.safe_dump(protocol.model_dump(mode="json"), sort_keys=False)


def grown(known: Protocol, given: Protocol, folder: Path) -> Protocol:
    """A folder's protocol with the seeds, methods and ablations of another one added.

    Raises:
        UserError: any other difference, which would mix incomparable figures; the first one is named.
    """

    def refuse_difference(key: str, old: Any, new: Any) -> None:
        if old != new:
            shown = [str(value.model_dump() if isinstance(value, Section) else value) for value in (old, new)]
            was, now = (text if len(text) <= 120 else text[:117] + "..." for text in shown)
            raise UserError(
                f"{folder} belongs to another comparison: its {key} is {was}, not {now}; choose another --output, or "
                f"continue it with --resume {folder}"
            )

    for key in type(known).model_fields:
        if key not in ("seeds", "methods", "ablate", "ablate_seeds"):
            refuse_difference(key, getattr(known, key), getattr(given, key))
    for name in known.methods:
        refuse_difference(f"methods.{name}", known.methods[name], given.methods.get(name, known.methods[name]))
    # None stands for all seeds.
    of_variants = [one.ablate_seeds for one in (known, given) if one.ablate] or [known.ablate_seeds]
    return known.model_copy(
        update={
            "seeds": _union(known.seeds, given.seeds),
            "methods": {**known.methods, **given.methods},
            "ablate": _union(known.ablate, given.ablate),
            "ablate_seeds": None if None in of_variants else _union(*filter(None, of_variants)),
        }
    )


def _union(*values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(itertools.chain(*values)))
