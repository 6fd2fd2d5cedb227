"""``cki-rec <pipeline> key=value ...``: compose, parse, run. Heavy imports wait until needed."""

from __future__ import annotations

import errno
import importlib
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cki_rec import COMMAND_VARIABLE, JOB_VARIABLE
from cki_rec.search_path import (
    CONF,
    SEARCH_PATH,
    config_groups,
    folders,
    hidden_choice,
    with_folders,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

PIPELINES = {
    "prepare": "encode a data set and print its summary",
    "train": "train one model",
    "assess": "compare models before a merge: compatibility, distances, seen rows, the barrier",
    "merge": "make one model out of several; trains sources that are missing",
    "finetune": "merge, then train briefly on all rows",
    "evaluate": "all of the above as configured, then metrics and intervals on test rows",
    "export": "write a trained or merged model as one file that serves without this package",
    "report": "tables, figures and an HTML page from the records of a name",
    "inspect": "describe the columns of your file, and draft its conf/data/NAME.yaml",
}
EXAMPLES = {
    "prepare": "data=movielens_1m data.raw=ml-1m.zip",
    "train": "model=deepfm seed=2 train.epochs=5",
    "assess": "'merge.sources=[{seed: 1},{seed: 2}]' assess.barrier=5",
    "merge": "merge=evidence 'merge.sources=[{seed: 1},{seed: 2}]'",
    "finetune": "merge=evidence finetune=one_epoch",
    "evaluate": "-m suite=seeds,shards seed=1,2,3 merge=average,evidence",
    "export": "run=train-0123456789abcdef format=onnx",
    "report": "name=quickstart",
    "inspect": "my.csv",
}
RENAMED = {"integrate": ["merge"]}
"""Present names of commands of earlier releases."""
ON_SEVERAL_PROCESSES = ("train", "merge")
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
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(config_groups(folders(with_folders(words)))))
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
        print(_pipeline_help(pipeline, config_groups(folders(with_folders(options)))))
        return 0
    os.environ[COMMAND_VARIABLE] = shlex.join(["cki-rec", *words])
    return _run(pipeline, options)


def _run(pipeline: str, options: list[str]) -> int:
    """Compose and run one pipeline, or a sweep of it; turn known errors into one line."""
    from cki_rec.config import RankLost, ReportedElsewhere, Stopped, UserError
    from cki_rec.environment import EnvironmentMismatchError, check_versions
    from cki_rec.flags import SWEEP, print_configuration, split_flags, with_raw_file

    start_log()
    try:
        check_versions()
        if pipeline == "merge" and "--list" in options:
            from cki_rec.pipelines.method_list import method_table

            words = [o for o in with_folders(options) if o != "--list"]
            print(method_table(plugins=compose_config(words).merge.plugins if words else ()))
            return 0
        options = with_raw_file(options) if pipeline == "inspect" else options
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
        print(f"cki-rec: {loss}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cki-rec: interrupted; finished runs are kept, run again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output left, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from cki_rec.config import UserError, check_name, register_resolvers, texts_as_typed

    register_resolvers()
    overrides = texts_as_typed(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            first = _check_choices(overrides)
            composed = compose("config", first if is_sweep else overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain(error, overrides)) from None
    check_name("name", composed.name)  # before Hydra makes the folder of a sweep
    if not composed.merge.plugins:  # which may bring methods
        _check_method(composed.merge.method, (CONF, *folders(overrides)))
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
    from cki_rec.config import parse
    from cki_rec.plugins import load_class

    config = parse(composed)
    if config.model.module is not None:  # checkpoints may hold models of this class
        load_class(config.model.module)
    if pipeline not in ON_SEVERAL_PROCESSES and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from cki_rec.config import UserError

        raise UserError(
            f"{pipeline} runs in one process; start it without torchrun"
            f" ({', '.join(ON_SEVERAL_PROCESSES)} alone: several)"
        )
    value: float | None = importlib.import_module(f"cki_rec.pipelines.{pipeline}").run(config)
    return value


def _sweep(pipeline: str, overrides: list[str]) -> None:
    """Run a Hydra multirun: sweeper and launcher are Hydra's, as configured."""
    import hydra
    from hydra.errors import HydraException

    from cki_rec.config import UserError, register_resolvers, texts_as_typed

    overrides = texts_as_typed(overrides)
    compose_config(overrides, is_sweep=True)  # for a short error before Hydra starts
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main() as they are, and become one line

    def job(composed: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        register_resolvers()
        start_log()
        state = HydraConfig.get()
        if sweep := os.environ.get(JOB_VARIABLE, "").split():
            os.environ[JOB_VARIABLE] = f"{sweep[0]} {state.job.num}"
        log.info("%s %s", sweep_position(int(state.job.num)), state.job.override_dirname)
        try:
            return _run_job(pipeline, composed)
        except UserError as error:
            log.info("  failed: %s", error)  # now; Hydra goes on and reports it at the end
            raise

    arguments, sys.argv = sys.argv, ["cki-rec", "--multirun", *overrides]
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    finally:
        sys.argv = arguments
        os.environ.pop(JOB_VARIABLE, None)


class SweepProgress:
    """Hydra callback: counts the jobs of a sweep before they start."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Publish the number of jobs and the start time to this and to child processes."""
        total = num_jobs(config)
        os.environ[SWEEP_VARIABLE] = f"{total} {time.time()}"
        if shlex.split(os.environ[COMMAND_VARIABLE])[1] == "evaluate":
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
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("cki_rec")
    ours.handlers = [handler]
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes the first one speaks
    ours.setLevel(logging.INFO if is_first else logging.WARNING)
    ours.propagate = False


def _check_choices(overrides: list[str]) -> list[str]:
    """Return ``overrides`` with the first value of each swept one.

    Raises:
        UserError: A choice that its group does not have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from cki_rec.config import UserError, nearest

    search_path = folders(overrides)
    groups, first = config_groups(search_path), []
    for override in OverridesParser.create().parse_overrides(overrides):
        assert override.input_line is not None
        if override.is_interval_sweep():
            continue  # a search draws its values
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            first.append(f"{override.key_or_group}={values[0]}")
        else:
            values = [override.get_value_element_as_str()]
            first.append(override.input_line)
        for choice in values if override.key_or_group in groups else []:
            choices = groups[override.key_or_group]
            if choice not in (*choices, "null") and not override.is_delete():
                known = f"{nearest(choice, choices)}one of {', '.join(choices)}"
                raise UserError(f"{override.key_or_group}={choice}: {known}")
            if file := hidden_choice(override.key_or_group, choice, search_path):
                raise UserError(
                    f"{override.key_or_group}={choice}: conf/ of cki_rec has this choice too, so"
                    f" {file} would not be read; rename that file"
                )
    return first


def _explain(error: Exception, overrides: list[str]) -> str:
    """Return one line for an error of composition: the mistake and the nearest name."""
    from hydra import compose
    from omegaconf import OmegaConf

    from cki_rec.config import nearest

    groups = config_groups(folders(overrides))
    known: set[str] = set(groups)
    choices = [o for o in overrides if o.partition("=")[0] in {*groups, SEARCH_PATH}]
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(compose("config", choices)))]
    while pending:
        prefix, node = pending.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            known.add(prefix + str(key))
            pending.append((f"{prefix}{key}.", value))
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if "=" not in override:
            return f"'{override}': options are written key=value; see cki-rec --help"
        if key not in known and not key.startswith("hydra") and not override.startswith("+"):
            return f"no option '{key}': {nearest(key, known)}see cki-rec --help"
    return " ".join(str(error).split())


def _help(groups: dict[str, list[str]]) -> str:
    lines = ["cki-rec <pipeline> [group=choice] [key=value] [-m]", "", "pipelines"]
    lines += [f"  {name:10} {what}" for name, what in PIPELINES.items()]
    lines += ["", "groups"]
    lines += [f"  {group:10} {', '.join(choices)}" for group, choices in groups.items()]
    lines += ["", "examples"]
    lines += [f"  cki-rec {name} {EXAMPLES[name]}" for name in PIPELINES]
    lines += [
        "",
        "./conf and --config-dir DIR add folders like conf/, with more choices for its groups.",
        "--cfg job prints the composed configuration and runs nothing.",
        "-m sweeps over comma-separated values; hydra/launcher=joblib runs jobs in parallel.",
    ]
    lines += ["cki-rec <pipeline> --help lists its options. Values and their meaning: conf/."]
    lines += ["cki-rec merge --list shows all methods: summary, options, needs, cost, reference."]
    return "\n".join(lines)


READS = {
    "inspect": ["data"],
    "prepare": ["data"],
    "train": ["data", "model", "train"],
    "assess": ["data", "model", "train", "suite", "merge", "assess"],
    "merge": ["data", "model", "train", "suite", "merge"],
    "finetune": ["data", "model", "train", "suite", "merge", "finetune"],
    "evaluate": ["data", "model", "train", "suite", "merge", "finetune", "evaluate"],
    "export": [],
    "report": [],
}
"""The groups whose values a pipeline reads."""


def _pipeline_help(pipeline: str, groups: dict[str, list[str]]) -> str:
    """Return an example and the commented values of the groups that a pipeline reads."""
    lines = [f"cki-rec {pipeline}: {PIPELINES[pipeline]}", ""]
    lines += [f"  cki-rec {pipeline} {EXAMPLES[pipeline]}", ""]
    for group in [*READS[pipeline], "runtime"]:
        choices = groups[group]
        shown = "default" if "default" in choices else config_groups()[group][-1]
        text = (CONF / group / f"{shown}.yaml").read_text()
        lines += [f"{group}={'|'.join(choices)}; {group}.KEY=VALUE with, in {group}={shown}:"]
        lines += [f"    {x}" for x in text.splitlines() if x and x[0] != "#"] + [""]
    return "\n".join(lines).rstrip()


def _fail(message: str) -> int:
    print(f"cki-rec: {message}", file=sys.stderr)
    return 2
