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
from sqdf_fast.compare.protocol import Protocol, dotted, dump_protocol, grown, make_protocol, read_protocol
from sqdf_fast.compare.results import Results, Runs, make_results, write_results
from sqdf_fast.compare.table import as_text
from sqdf_fast.compare.tuning import UNJUDGED, Choice, Trial, choose
from sqdf_fast.compare.worker import FAILURE, failure
from sqdf_fast.config import Config, refuse_without_effect
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors, write_text
from sqdf_fast.runs import environment, read_run

PROTOCOL = "protocol.yaml"


@dataclass(frozen=True)
class Variant:
    """A method as it is run for the report.

    Attributes:
        group: the axis of the ablation that it belongs to; "" for the methods.
        settings: on top of the shared ones.
        label: for people; within its group.
    """

    name: str
    label: str
    group: str
    settings: dict[str, Any]
    config: Config


class Comparison:
    """A folder and its protocol: the stored one, where there is one, with what the given one adds.

    protocol.yaml, tuning/METHOD/trial-N/ and runs/METHOD/seed-N/ (run folders, a log beside each), results.json,
    report.html, plots/.

    Raises:
        UserError: the folder belongs to another comparison, or a method or setting is unknown.
    """

    def __init__(self, protocol: Protocol, folder: Path) -> None:
        known = folder / PROTOCOL
        if known.exists():
            protocol = grown(make_protocol(read_protocol(known)), protocol, folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no comparison; choose another --output")
        self.protocol, self.folder = protocol, folder
        self.base = protocol.base()
        self.own = {name: protocol.settings_of(name) for name in protocol.methods}
        for name, method in protocol.methods.items():
            # A mistake in the last trial of the last method is to be seen now, not in an hour.
            method_config(self.base, name, self.own[name])
            for trial in method.tried:
                method_config(self.base, name, {**self.own[name], **trial})
        variants = self._expand({name: {} for name in protocol.methods})
        refuse_without_effect(protocol.settings, *(variant.config for variant in variants))

    def run(
        self, jobs: int | None = None, launcher: str = "local", slurm: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Results, dict[str, str]]:
        """Start the runs that are not finished, and write results and report.

        Args:
            jobs: number of runs at a time; None: one per GPU, one on the CPU, all on a cluster.
            launcher: "local", "slurm" or "debug"; see `launch.open_launcher`.
            slurm: parameters of `sbatch` by submitit's names.

        Returns:
            the results, and name and reason of each run that failed.

        Raises:
            UserError: a run's model, prompts, reward, judge or device is missing; another process works in the folder;
                the launcher cannot be used; the disk refuses.
            Interrupted: the user stopped it; what is finished stays finished.
        """
        trials = self._trials()
        later = [job for variant in self._expand({name: {} for name in self.own}) for job in self._jobs(variant)]
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
                choices = self._choices(failed)
                variants = self._variants(choices)
                wanted = [job for variant in variants for job in self._jobs(variant)]
                # Seed by seed: what is finished when time is up can be compared.
                wanted.sort(key=lambda job: self._position(job.seed))
                progress.total = len(trials) + len(wanted)
                progress.known([job for job in wanted if job.ended])
                for job in wanted:
                    if job.ended:
                        check_settings(job)
                failed |= run_jobs(wanted, started, progress)
            return self._report(variants, choices, failed), failed

    def report(self) -> Results:
        """Results and report of what the folder holds now. Raises UserError."""
        choices = self._choices({})
        return self._report(self._variants(choices), choices, {})

    def _report(self, variants: list[Variant], choices: dict[str, Choice], failed: dict[str, str]) -> Results:
        runs = [self._read(variant, failed) for variant in variants]
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
        """Methods with their chosen settings, and the variants of the ablated one. A method without a choice is out."""
        found = [self._variant(name, name, "", {**self.own[name], **settings}) for name, settings in chosen.items()]
        ablated = next((variant for variant in found if variant.name == self.protocol.ablated), None)
        for axis in self.protocol.ablate if ablated else ():
            assert ablated is not None
            for name, changes in ablation(axis, ablated.config).items():
                settings = {**ablated.settings, **changes}
                config = method_config(ablated.config, name, changes)
                variant = Variant(f"{ablated.name}.{name}", name, axis, settings, config)
                if variant.config == ablated.config:
                    # Its runs stand for this variant too.
                    variant = replace(variant, name=ablated.name, label=f"{name} ({ablated.name} itself)")
                found.append(variant)
        return found

    def _variant(self, name: str, label: str, group: str, settings: dict[str, Any]) -> Variant:
        return Variant(name, label, group, settings, method_config(self.base, name, settings))

    def _jobs(self, variant: Variant) -> list[Job]:
        protocol = self.protocol
        if variant.group and variant.name == protocol.ablated:
            return []
        if sweep := protocol.sweep_of(variant.name) if not variant.group else ():
            # Nothing is trained and all runs are judged on the same noise: every seed would give the same.
            config = job_config(variant.config, protocol.seeds[0], protocol.budget, protocol.points)
            spec = TrainingFreeSpec("guided" if self._kind(variant.name) == "guided" else "best-of-n", sweep)
            folder = self.folder / "runs" / variant.name / f"seed-{protocol.seeds[0]}"
            return [Job(variant.name, protocol.seeds[0], config, folder, training_free=spec)]
        seeds = protocol.seeds if not variant.group or protocol.ablate_seeds is None else protocol.ablate_seeds
        return [
            Job(
                variant.name,
                seed,
                job_config(variant.config, seed, protocol.budget, protocol.points),
                self.folder / "runs" / variant.name / f"seed-{seed}",
            )
            for seed in seeds
        ]

    def _kind(self, name: str) -> str:
        return self.protocol.methods[name].like or name

    def _follows_the_gradient(self, name: str) -> bool:
        if self.protocol.sweep_of(name):
            return self._kind(name) == "guided"
        return ALGORITHMS[method_config(self.base, name, self.own[name]).algorithm].needs_gradient

    def _position(self, seed: int) -> int:
        return (*self.protocol.seeds, *(self.protocol.ablate_seeds or ())).index(seed)

    def _read(self, variant: Variant, failed: Mapping[str, str]) -> Runs:
        curves, folders, unfinished = [], [], {}
        # The ablated method stands in its groups with its own runs.
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
        return Runs(
            variant.name,
            variant.label,
            variant.group,
            variant.settings,
            curves,
            folders,
            unfinished,
            training_free=any(job.training_free is not None for job in jobs),
        )


def _unfinished(job: Job, failed: Mapping[str, str]) -> str:
    """Why a run is not finished, in one line; `failed` knows what a log cannot, such as a process that was killed."""
    if reason := failed.get(job.name) or failure(job.log):
        return f"{FAILURE}{reason}"
    return "broken off, or under way" if job.log.exists() else "not run yet"


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
            raise UserError(f"{folder}: another compare works in it; wait for it, or choose another --output") from None
        yield


def compare(
    protocol: Protocol,
    folder: Path,
    jobs: int | None = None,
    launcher: str = "local",
    slurm: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[str, dict[str, str]]:
    """Run or continue a comparison: its table, and name and reason of each run that failed.

    Arguments and exceptions as of :meth:`Comparison.run`.
    """
    results, failed = Comparison(protocol, folder).run(jobs, launcher, slurm)
    return as_text(results), failed


def stored_protocol(folder: Path) -> Protocol:
    """The protocol of a comparison's folder. Raises UserError when the folder holds none."""
    if not (folder / PROTOCOL).is_file():
        raise UserError(f"{folder} is no comparison: it has no {PROTOCOL}; give the folder that `compare` wrote")
    return make_protocol(read_protocol(folder / PROTOCOL))


def protocol_of(
    values: Mapping[str, Any], settings: Mapping[str, Any], methods: Sequence[str], **given: Any
) -> Protocol:
    """A protocol from a file's values and the command line's, which win.

    Args:
        settings: shared by all methods, nested; added to the file's.
        methods: to keep of the file's, or built-in ones; empty: the file's.
        given: further keys of a protocol; None and empty ones are left to the file.

    Raises:
        UserError: one line.
    """
    merged = dict(values) | {key: value for key, value in given.items() if value}
    if settings:
        merged["settings"] = {**(dotted(merged.get("settings")) or {}), **dotted(dict(settings))}
    if methods:
        defined = merged.get("methods") or {}
        merged["methods"] = {name: defined.get(name) if isinstance(defined, Mapping) else None for name in methods}
    return make_protocol(merged)
