"""A comparison from its protocol to its report: tune, choose, run, read, write."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqdf_fast.algorithms import ALGORITHMS
from sqdf_fast.compare.curves import Curve, read_curve
from sqdf_fast.compare.jobs import Job, TrainingFreeSpec, check_settings, job_config
from sqdf_fast.compare.launch import open_launcher, run_jobs
from sqdf_fast.compare.methods import ablation, method_config
from sqdf_fast.compare.names import look_up
from sqdf_fast.compare.page import write_page
from sqdf_fast.compare.progress import CompareProgress
from sqdf_fast.compare.protocol import Protocol, dump_protocol, grown, make_protocol, read_protocol
from sqdf_fast.compare.results import Results, Runs, make_results, write_results
from sqdf_fast.compare.table import as_text
from sqdf_fast.compare.tuning import UNJUDGED, Choice, Trial, choose
from sqdf_fast.compare.worker import FAILURE, failure
from sqdf_fast.config import Config, dotted, refuse_without_effect
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors, write_text
from sqdf_fast.runs import environment, read_run

PROTOCOL = "protocol.yaml"


@dataclass(frozen=True)
class Variant:
    """A method as it is run for the report.

    Attributes:
        label: display name within its group.
        group: axis of an ablation; "" for the methods.
        settings: settings on top of the shared ones.
    """

    name: str
    label: str
    group: str
    settings: dict[str, Any]
    config: Config


class Comparison:
    """A folder and its protocol, which extends the one stored there.

    The folder holds protocol.yaml, tuning/METHOD/trial-N/ and runs/METHOD/seed-N/ (run folders with a log beside
    each), results.json, report.html and plots/.

    Raises:
        UserError: the folder belongs to another comparison, or a method or setting is unknown.
    """

    def __init__(self, protocol: Protocol, folder: Path) -> None:
        known = folder / PROTOCOL
        if known.exists():
            protocol = grown(make_protocol(read_protocol(known)), protocol, folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not a comparison; choose another --output")
        self.protocol, self.folder = protocol, folder
        self.base = protocol.base()
        self.own = {name: protocol.settings_of(name) for name in protocol.methods}
        for name, method in protocol.methods.items():
            # A mistake in the last trial must show before the first run.
            for trial in ({}, *method.tried):
                method_config(self.base, name, {**self.own[name], **trial})
        self.untuned = self._expand({name: {} for name in protocol.methods})
        refuse_without_effect(protocol.settings, *(variant.config for variant in self.untuned))

    def run(
        self, jobs: int | None = None, launcher: str = "local", slurm: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Results, dict[str, str]]:
        """Start the runs that are not finished, and write results and report.

        Args:
            jobs: number of concurrent runs; None: one per GPU, one on the CPU, all on a cluster.
            launcher: "local", "slurm" or "debug"; see `launch.open_launcher`.
            slurm: parameters of `sbatch` by submitit's names.

        Returns:
            the results, and name and reason of each run that failed.

        Raises:
            UserError: a model, prompt file, reward, judge or device is missing; another process uses the folder; the
                launcher is not available; the disk refuses.
            Interrupted: the user stopped it; finished runs stay.
        """
        trials = self._trials()
        later = [job for variant in self.untuned for job in self._jobs(variant)]
        if not all(job.ended for job in (*trials, *later)):
            look_up(self.base, [name for name in self.own if self._follows_the_gradient(name)])
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder), open_launcher(launcher, self.folder, jobs, self.base.device, slurm) as started:
            write_text(self.folder / PROTOCOL, dump_protocol(self.protocol))
            with CompareProgress(len(trials) + len(later)) as progress:
                progress.message(f"Comparing in {self.folder}")
                progress.known([job for job in trials if job.ended])
                failed = run_jobs(trials, started, progress)
                wanted = [job for variant in self._variants(self._choices(failed)) for job in self._jobs(variant)]
                # Seed by seed, so that the finished runs can be compared at any time.
                seeds = (*self.protocol.seeds, *(self.protocol.ablate_seeds or ()))
                wanted.sort(key=lambda job: seeds.index(job.seed))
                progress.total = len(trials) + len(wanted)
                progress.known([job for job in wanted if job.ended])
                for job in wanted:
                    if job.ended:
                        check_settings(job)
                failed |= run_jobs(wanted, started, progress)
            return self.report(failed), failed

    def report(self, failed: Mapping[str, str] = MappingProxyType({})) -> Results:
        """Write results and report of the finished runs, with the reasons of those that failed. Raises UserError."""
        choices = self._choices(failed)
        runs = [self._read(variant, failed) for variant in self._variants(choices)]
        results = make_results(self.protocol, runs, choices, environment())
        write_results(results, self.folder)
        write_page(results, self.folder)
        return results

    def _trials(self) -> list[Job]:
        tuning = self.protocol.tuning
        if tuning is None:
            return []
        jobs = []
        for name, method in self.protocol.methods.items():
            for index, trial in enumerate(method.tried):
                config = method_config(self.base, name, {**self.own[name], **trial})
                config = job_config(config, tuning.seed, tuning.budget, tuning.points)
                folder = self.folder / "tuning" / name / f"trial-{index}"
                jobs.append(Job(name, tuning.seed, config, folder, trial=index))
        return jobs

    def _choices(self, failed: Mapping[str, str]) -> dict[str, Choice]:
        tuning = self.protocol.tuning
        if tuning is None:
            return {}
        trials: dict[str, list[Trial]] = {name: [] for name in self.protocol.methods}
        for job in self._trials():
            tried = self.protocol.methods[job.method].tried[job.trial or 0]
            curve = _curve(job) if job.ended else None
            trials[job.method].append(Trial(tried, curve, "" if curve else _unfinished(job, failed)))
        return {name: choose(found, tuning) for name, found in trials.items() if found}

    def _variants(self, choices: Mapping[str, Choice]) -> list[Variant]:
        chosen: dict[str, dict[str, Any]] = {}
        for name, method in self.protocol.methods.items():
            choice = choices.get(name)
            if choice is None or self.protocol.sweep_of(name):
                chosen[name] = {}
            elif choice.index is not None:
                chosen[name] = method.tried[choice.index]
        return self._expand(chosen)

    def _expand(self, chosen: Mapping[str, dict[str, Any]]) -> list[Variant]:
        """The methods that have a choice, with its settings, and the variants of the ablated one."""
        found = []
        for name, choice in chosen.items():
            settings = {**self.own[name], **choice}
            found.append(Variant(name, name, "", settings, method_config(self.base, name, settings)))
        for ablated in [variant for variant in found if variant.name == self.protocol.ablated]:
            for axis in self.protocol.ablate:
                for label, changes in ablation(axis, ablated.config).items():
                    name, config = f"{ablated.name}.{label}", method_config(ablated.config, label, changes)
                    if config == ablated.config:
                        # The runs of the ablated method are those of this variant too.
                        name, label = ablated.name, f"{label} ({ablated.name} itself)"
                    found.append(Variant(name, label, axis, {**ablated.settings, **changes}, config))
        return found

    def _jobs(self, variant: Variant) -> list[Job]:
        """The runs of a method or variant; those of the ablated method are not repeated in its groups."""
        if variant.group and variant.name == self.protocol.ablated:
            return []
        protocol, spec = self.protocol, None
        seeds = protocol.seeds if not variant.group or protocol.ablate_seeds is None else protocol.ablate_seeds
        if sweep := protocol.sweep_of(variant.name) if not variant.group else ():
            # Nothing is trained and all runs are judged on the same noise: all seeds would give the same.
            seeds = seeds[:1]
            spec = TrainingFreeSpec("guided" if self._kind(variant.name) == "guided" else "best-of-n", sweep)
        return [
            Job(
                variant.name,
                seed,
                job_config(variant.config, seed, protocol.budget, protocol.points),
                self.folder / "runs" / variant.name / f"seed-{seed}",
                training_free=spec,
            )
            for seed in seeds
        ]

    def _kind(self, name: str) -> str:
        return self.protocol.methods[name].like or name

    def _follows_the_gradient(self, name: str) -> bool:
        if self.protocol.sweep_of(name):
            return self._kind(name) == "guided"
        return ALGORITHMS[method_config(self.base, name, self.own[name]).algorithm].needs_gradient

    def _read(self, variant: Variant, failed: Mapping[str, str]) -> Runs:
        curves, folders, unfinished = [], [], {}
        # The ablated method is in its groups with its own runs.
        jobs = self._jobs(replace(variant, group="") if variant.name == self.protocol.ablated else variant)
        for job in jobs:
            curve = _curve(job) if job.ended else None
            if curve is None:
                unfinished[job.seed] = _unfinished(job, failed)
            elif len(curve.points) < 2:
                unfinished[job.seed] = UNJUDGED
            else:
                curves.append(curve)
                folders.append(job.folder)
        free = any(job.training_free is not None for job in jobs)
        return Runs(variant.name, variant.label, variant.group, variant.settings, curves, folders, unfinished, free)


def _unfinished(job: Job, failed: Mapping[str, str]) -> str:
    """Why a run is not finished, in one line: `failed` has reasons that no log has, such as a killed process."""
    if reason := failed.get(job.name) or failure(job.log):
        return f"{FAILURE}{reason}"
    return "interrupted or running" if job.log.exists() else "not run yet"


def _curve(job: Job) -> Curve:
    return replace(read_curve(read_run(job.folder)), seed=job.seed)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    path = folder / ".lock"
    with disk_errors(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another compare is using it; wait for it, or choose another --output") from None
        yield


def compare(
    protocol: Protocol,
    folder: Path,
    jobs: int | None = None,
    launcher: str = "local",
    slurm: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[str, dict[str, str]]:
    """The tables of :meth:`Comparison.run`, and name and reason of each run that failed."""
    results, failed = Comparison(protocol, folder).run(jobs, launcher, slurm)
    return as_text(results), failed


def stored_protocol(folder: Path) -> Protocol:
    """The protocol of a comparison's folder. Raises UserError when the folder holds none."""
    if not (folder / PROTOCOL).is_file():
        raise UserError(f"{folder} is not a comparison: it has no {PROTOCOL}; give the folder that `compare` wrote")
    return make_protocol(read_protocol(folder / PROTOCOL))


def protocol_of(
    values: Mapping[str, Any], settings: Mapping[str, Any], methods: Sequence[str], **given: Any
) -> Protocol:
    """A protocol from a file's values and those of the command line, which win. Raises UserError.

    Args:
        settings: nested settings for all methods, added to the file's.
        methods: methods of the file, or built-in ones; empty: all of the file.
        given: further keys of a protocol; the file decides those that are None or empty.
    """
    merged = dict(values) | {key: value for key, value in given.items() if value}
    if settings:
        merged["settings"] = {**dotted(merged.get("settings") or {}), **dotted(settings)}
    if methods:
        defined = merged.get("methods") or {}
        merged["methods"] = {name: defined.get(name) if isinstance(defined, Mapping) else None for name in methods}
    return make_protocol(merged)
