"""``cki-rec <pipeline> key=value ...``: compose, parse, run. Heavy imports wait until needed."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cki_rec import COMMAND_VARIABLE, JOB_VARIABLE, processes, sweep_jobs
from cki_rec.help_text import PIPELINES, help_text, pipeline_help
from cki_rec.overrides import (
    check_method_options,
    explain,
    parse_options,
    sweep_mistake,
    unprintable,
    with_open_options,
)
from cki_rec.search_path import (
    CONF,
    config_groups,
    folders,
    hidden_choice,
    with_folders,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

RENAMED = {"integrate": ["merge"]}
"""Present names of commands of earlier releases."""
CHECKED = ("merge", "finetune", "evaluate")
"""Pipelines that check_only=true checks the merge of."""
SWEEP_VARIABLE = "CKI_REC_SWEEP"
"""Number of jobs and start time of the running sweep, for its jobs in other processes."""
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
)
"""Errors of the operating system that a user can fix."""

SHARE_BEFORE_ESTIMATE = 0.05
"""Share of a sweep's jobs: the first ones train all sources, so they take longer."""

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 failed, 2 the user's mistake, 130."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if mistake := unprintable(words):
        return _fail(mistake)
    try:
        code = _main(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _main(words: list[str]) -> int:
    """Print a help text or run a pipeline; return the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(config_groups(folders(with_folders(words)))))
        return 0
    if words[0] == "--version":
        from cki_rec import __version__

        print(__version__)
        return 0
    pipeline, options = words[0], words[1:]
    if pipeline not in PIPELINES:
        close = get_close_matches(pipeline, PIPELINES, n=1) or RENAMED.get(pipeline, [])
        hint = f"did you mean '{close[0]}'? " if close else ""
        return _fail(f"no pipeline '{pipeline}': {hint}one of {', '.join(PIPELINES)}")
    if {"-h", "--help"} & set(options):
        print(pipeline_help(pipeline, config_groups(folders(with_folders(options)))))
        return 0
    os.environ[COMMAND_VARIABLE] = shlex.join(["cki-rec", *words])
    return _run(pipeline, options)


def _run(pipeline: str, options: list[str]) -> int:
    """Compose and run one pipeline, or a sweep of it; turn known errors into one line."""
    from cki_rec.config import RankLost, ReportedElsewhere, Stopped, UserError
    from cki_rec.environment import EnvironmentMismatchError, check_versions
    from cki_rec.flags import SWEEP, inspected, print_configuration, split_flags

    start_log()
    try:
        check_versions()
        if pipeline == "merge" and "--list" in options:
            from cki_rec.pipelines.method_list import method_table

            words = [o for o in with_folders(options) if o != "--list"]
            print(method_table(plugins=compose_config(words).merge.plugins if words else ()))
            return 0
        if pipeline == "runs" and "--json" in options:
            from cki_rec.pipelines.run_list import listed

            words = [o for o in with_folders(options) if o != "--json"]
            print(json.dumps(listed(Path(compose_config(words).runtime.out)), indent=1))
            return 0
        if pipeline == "inspect":
            pipeline, options = inspected(options)
        printing, options = split_flags(with_folders(options))
        _check_folders(folders(options))
        if printing:
            compose_config([o for o in options if o not in SWEEP], is_sweep=True)
            print_configuration(printing, options)
        elif set(SWEEP) & set(options):
            _sweep(pipeline, [o for o in options if o not in SWEEP])
        else:
            _run_job(pipeline, compose_config(options))
    except ReportedElsewhere:
        return 2
    except (UserError, EnvironmentMismatchError) as error:
        return _fail(str(error))
    except Stopped as stop:
        print(f"cki-rec: {stop}", file=sys.stderr)
        return 0
    except RankLost as loss:
        if processes.reports_loss():
            print(f"cki-rec: {loss}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("cki-rec: interrupted; finished runs are kept, run again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = f" {error.filename}" if error.filename else ""
        return _fail(
            f"cannot write{where}: {error.strerror}; free space there or choose other folders:"
            " runtime.out, runtime.encoded, runtime.reports"
        )
    return 0


def compose_config(overrides: list[str], is_sweep: bool = False) -> DictConfig:
    """Return the composed tree, of a sweep that of its first job.

    Raises:
        UserError: A mistake in ``overrides``: one line with the nearest name.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from cki_rec.config import UserError, check_name, register_resolvers, texts_as_typed

    register_resolvers()
    words = with_open_options(texts_as_typed(overrides))
    search_path = folders(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        first = _check_choices(words, is_sweep)
        try:
            composed = compose("config", first if is_sweep else words)
            method = str(OmegaConf.select(composed, "merge.method"))
        except Exception as error:  # of Hydra and OmegaConf; many kinds, all about the options
            raise UserError(explain(error, first, config_groups(search_path))) from None
    check_name("name", composed.name)  # before Hydra makes the folder of a sweep
    if not OmegaConf.select(composed, "merge.plugins"):  # which may bring methods
        _check_method(method, (CONF, *search_path))
        check_method_options(method, words, (CONF, *search_path))
    return composed


def _check_folders(search_path: Sequence[Path]) -> None:
    """Check that the folders of ``--config-dir`` exist.

    Raises:
        UserError: A folder is missing.
    """
    from cki_rec.config import UserError

    for folder in search_path:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: no such folder; name one that is like conf/")


def _check_method(name: str, roots: Sequence[Path]) -> None:
    """Check the name of a merge method by the files of ``merge/``, before torch is imported.

    Raises:
        UserError: No file has this method.
    """
    from cki_rec.config import UserError, nearest

    texts = [path.read_text() for root in roots for path in (root / "merge").glob("*.yaml")]
    known = {w for text in texts for w in re.findall(r"^method: (\w+)", text, re.M)}
    if registry := sys.modules.get("cki_rec.merging.registry"):  # with those of a notebook's cells
        known |= set(registry.METHODS)
    if name not in known:
        listed = ", ".join(sorted(known))
        raise UserError(f"merge.method={name}: {nearest(name, known)}one of {listed}")


def _run_job(pipeline: str, composed: DictConfig) -> float | None:
    """Parse and run one pipeline; return its validation AUC if it has one, for searches."""
    from cki_rec.config import UserError, parse
    from cki_rec.plugins import load_class

    config = parse(composed)
    if config.model.module is not None:  # checkpoints may hold models of this class
        load_class(config.model.module)
    if config.check_only and pipeline not in CHECKED:
        raise UserError(f"check_only=true: {pipeline} has no check; {', '.join(CHECKED)} have it")
    pipeline = "merge" if config.check_only else pipeline  # the check is that of their merge
    from cki_rec.pipelines.names import resolved

    run = importlib.import_module(f"cki_rec.pipelines.{pipeline}").run
    value: float | None = processes.run_pipeline(pipeline, run, resolved(config))
    return value


def _sweep(pipeline: str, overrides: list[str]) -> None:
    """Run a Hydra multirun: sweeper and launcher are Hydra's, as configured."""
    import hydra
    from hydra.errors import HydraException

    from cki_rec.config import (
        RankLost,
        ReportedElsewhere,
        UserError,
        register_resolvers,
        texts_as_typed,
    )

    overrides = texts_as_typed(overrides)
    first = compose_config(overrides, is_sweep=True)  # for a short error before Hydra starts
    swept = {o.key_or_group for o in parse_options(overrides) if o.is_sweep_override()}
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main() as they are, and become one line

    def job(composed: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        register_resolvers()
        start_log()
        state = HydraConfig.get()
        if sweep := os.environ.get(JOB_VARIABLE, "").split():
            os.environ[JOB_VARIABLE] = f"{sweep[0]} {state.job.num}"
        keys = {*swept, *(state.sweeper.get("params") or {})}
        title = sweep_jobs.title(state.overrides.task, keys)
        log.info("%s %s", sweep_position(int(state.job.num)), title)
        folder, sweep_id = sweep_jobs.folder_of(composed), _sweep_id()
        with sweep_jobs.running(folder, sweep_id, int(state.job.num), title):
            try:
                return _run_job(pipeline, composed)
            except ReportedElsewhere:
                return None
            except UserError as error:
                is_new = sweep_jobs.add_failure(folder, sweep_id, title, str(error))
                log.info("  failed: %s", error if is_new else "the same mistake")
                if "n_trials" in state.sweeper:  # a search needs the value of every trial
                    raise
                return None  # the sweep goes on

    arguments, sys.argv = sys.argv, ["cki-rec", "--multirun", *with_open_options(overrides)]
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    except BrokenProcessPool as error:
        jobs = sweep_jobs.unfinished(sweep_jobs.folder_of(first), _sweep_id())
        raise RankLost(sweep_jobs.killed(jobs, error)) from None
    finally:
        sys.argv = arguments
        sweep = os.environ.pop(JOB_VARIABLE, "").split()
    if failed := sweep_jobs.failures(sweep_jobs.folder_of(first), _sweep_id()):
        total = int(os.environ[SWEEP_VARIABLE].split()[0])
        if sweep and len(failed) == total:
            from cki_rec.engine.sweeps import drop_sweep

            drop_sweep(Path(first.runtime.out), first.name, sweep[0])
        raise UserError(sweep_jobs.summary(failed, total))


class SweepProgress:
    """Hydra callback: counts the jobs of a sweep before they start."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Publish the number of jobs and the start time to this and to child processes."""
        total = num_jobs(config)
        os.environ[SWEEP_VARIABLE] = f"{total} {time.time()}"
        sweep_jobs.begin(sweep_jobs.folder_of(config), _sweep_id())
        if shlex.split(os.environ[COMMAND_VARIABLE])[1] == "evaluate" and processes.is_first():
            from cki_rec.engine.sweeps import start_sweep

            os.environ[JOB_VARIABLE] = start_sweep(Path(config.runtime.out), config.name, total)

    def __getattr__(self, name: str) -> Any:
        """Accept every other event of Hydra's callback protocol, and do nothing."""
        if name.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(name)


def num_jobs(config: DictConfig) -> int:
    """Return how many jobs a sweep has: all combinations, or the trials of a search."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    words = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*words, *config.hydra.overrides.task])
    latest = {override.key_or_group: override for override in overrides}.values()
    return math.prod(len(list(o.sweep_string_iterator())) for o in latest if o.is_sweep_override())


def _sweep_id() -> str:
    """Return the id of the running sweep: its start time."""
    return os.environ.get(SWEEP_VARIABLE, "0 0").split()[1]


def sweep_position(number: int) -> str:
    """Return ``[3/12, 4.0 a minute, 2 min left]`` for the job ``number`` (from 0) of a sweep."""
    total, start = (float(word) for word in os.environ.get(SWEEP_VARIABLE, "0 0").split())
    elapsed = time.time() - start
    position = f"{number + 1}/{total:.0f}"
    if not total or number < max(1, SHARE_BEFORE_ESTIMATE * total):
        return f"[{position}]"
    left = elapsed / number * (total - number)
    clock = f"{left // 60:.0f} min {left % 60:.0f} s" if left >= 60 else f"{left:.0f} s"
    return f"[{position}, {60 * number / elapsed:.1f} a minute, {clock} left]"


def start_log() -> None:
    """Print the messages of cki_rec on standard output, and only warnings of other packages."""
    handler = _Lines(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("cki_rec")
    ours.handlers = [handler]
    is_first = processes.is_first()
    ours.setLevel(logging.INFO if is_first else logging.ERROR)
    ours.propagate = False
    if not is_first:
        warnings.simplefilter("ignore")


class _Lines(logging.StreamHandler[TextIO]):
    """Handler that ends the program when the reader of its lines has left, as ``head`` does."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise an error about a closed pipe; report others as logging does."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


def _check_choices(overrides: list[str], is_sweep: bool) -> list[str]:
    """Return ``overrides`` with the first value of each swept one.

    Raises:
        UserError: A word that is no option, or a choice that its group does not have.
    """
    from cki_rec.config import UserError, nearest

    search_path = folders(overrides)
    groups, first = config_groups(search_path), []
    for override in parse_options(overrides):
        assert override.input_line is not None
        if override.is_sweep_override() and not is_sweep:
            raise UserError(sweep_mistake(override, override.key_or_group in groups))
        if override.is_interval_sweep():
            continue  # a search draws its values
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            prefix = "++" if override.is_force_add() else ""
            first.append(f"{prefix}{override.key_or_group}={values[0]}")
        else:
            values = [override.get_value_element_as_str()]
            first.append(override.input_line)
        for choice in values if override.key_or_group in groups else []:
            choices = groups[override.key_or_group]
            is_none = choice == "null" and override.key_or_group == "experiment"
            if choice not in choices and not is_none and not override.is_delete():
                is_data = override.key_or_group == "data"
                own = " (cki-rec inspect FILE drafts one)" if is_data else ""
                known = f"{nearest(choice, choices)}one of {', '.join(choices)}{own}"
                raise UserError(f"{override.key_or_group}={choice}: {known}")
            if file := hidden_choice(override.key_or_group, choice, search_path):
                raise UserError(
                    f"{override.key_or_group}={choice}: conf/ of cki_rec has this choice too, so"
                    f" {file} would not be read; rename that file"
                )
    return first


def _fail(message: str) -> int:
    """Print a mistake, once for all processes of a machine, and return the exit code."""
    processes.wait_for_first()  # it has failed too, if it is like most
    print(f"cki-rec: {message}", file=sys.stderr)
    return 2
