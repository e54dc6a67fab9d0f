"""From a command line to a run: config, compile cache, processes, run directory, exit codes.

`launch.run(main, "sft")` is `python -m experiments.sft`; `launch.start` is the same inside a process.
Exit codes: 0 done, 2 user error, 70 bug, 74 disk, 75 stopped and resumable, 130 interrupted by hand.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm import cluster, exits, settings
from jaxllm.core.types import UserError
from jaxllm.report import run as runs
from jaxllm.report.console import say, unread
from jaxllm.report.resume import check_resume
from jaxllm.report.secrets import remember
from jaxllm.train import signals

# whether checkpoints whose weights have another dtype are converted: --cast
CAST: ContextVar[bool] = ContextVar("cast", default=False)

# No device is touched before prepare_jax: a mistyped setting is answered at once.


def run(main: Callable, experiment: str, *, flags: Mapping[str, Any] | None = None, argv: list | None = None) -> None:
    """Parse the command line and call main(config, run, **flags); exits with a code unless all went well."""
    argv, flags = list(sys.argv[1:] if argv is None else argv), dict(flags or {})
    remember(arguments=argv)
    about = sys.modules[main.__module__].__doc__ if main.__module__ in sys.modules else main.__doc__
    try:
        if text := _help(argv, experiment, experiment, about, flags):
            return _exit(exits.guard(lambda: print(text), None, ""))
        command = settings.parse(argv, experiment, flags)
    except ValueError as error:
        if "--debug" in argv:
            exits.say_traceback()
        _exit(exits.user_error(error))
    os.environ.update(command.processes)
    CAST.set(command.cast)

    def work() -> None:
        _check_shared(argv)
        with signals.of_command(command.text, alone=_distributed(os.environ) is None):
            execute(main, experiment, command.config, command.workdir, command.text, command.extra, allow=command.allow)

    _exit(exits.guard(work, command.workdir, command.text, debug=command.debug))


def tool(
    main: Callable, name: str, flags: Mapping[str, Any], *, argv: list | None = None, config: str = "", before: Any = None
) -> None:
    """For experiments that read a run instead of making one: main(**flags), no run directory.

    config: the experiment whose config is the default; then main(config, **flags). before(flags): what must be set before jax
    looks for devices.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    remember(arguments=argv)
    try:
        if text := _help(argv, name, config, sys.modules[main.__module__].__doc__, flags):
            return _exit(exits.guard(lambda: print(text), None, ""))
        command = settings.parse(argv, config, flags) if config else None
        own = settings.parse_flags(argv, flags) if command is None else (command.extra, command.debug, command.cast)
        given, debug, cast = own
    except ValueError as error:
        _exit(exits.user_error(error))
    CAST.set(cast)

    def work() -> None:
        if before is not None:
            before(given)
        prepare_jax()
        main(*([command.config] if command else []), **given)

    _exit(exits.guard(work, None, settings.command_text(name, argv), debug=debug))


def _help(argv: list[str], name: str, config: str, about: str | None, flags: Mapping[str, Any]) -> str:
    """What --help, or --help-config of the experiment `config`, asks for; "" when neither is there."""
    if any(arg in ("-h", "--help", "--helpfull") for arg in argv):
        return settings.help_text(name, about, flags, configured=bool(config))
    if config and any(arg.partition("=")[0] == "--help-config" for arg in argv):
        return settings.help_config(argv, config)
    return ""


def start(
    main: Callable,
    experiment: str,
    overrides: Mapping[str, Any] | None = None,
    workdir: Path | str | None = None,
    *,
    variant: str | None = None,
    stage_of: Path | str | None = None,
) -> dict[str, Any]:
    """The same inside a process: configs/<experiment>.py with overrides {"optim.lr": 1e-3}; result.json.

    A finished run directory gives its result without running; {} when main did not finish. Raises UserError.
    """
    try:
        config = settings.load_config(settings.config_path(experiment), variant)
        values, errors = settings.check_overrides(config, overrides or {})
        if errors:
            raise ValueError("\n".join(errors))
    except ValueError as error:
        raise UserError(str(error)) from error
    with config.unlocked():
        config.update_from_flattened_dict(values)
    config.lock()
    workdir = Path(workdir or settings.default_workdir(experiment))
    words = [f"--config={settings.config_path(experiment)}:{variant}"] if variant else []
    words += [f"--config.{key}={value}" for key, value in values.items() if value is not None]
    text = settings.command_text(experiment, [*words, f"--workdir={workdir}"])
    return execute(main, experiment, config, workdir, text, {}, stage_of=stage_of) or {}


def execute(
    main: Callable,
    experiment: str,
    config: Any,
    workdir: Path,
    command: str,
    extra: Mapping[str, Any],
    *,
    stage_of: Path | str | None = None,
    allow: tuple[str, ...] | None = None,
) -> dict[str, Any] | None:
    """Open the run directory and call main, unless the run is finished; result.json if there is one."""
    plain = config.to_dict()
    chosen, changed = check_resume(workdir, experiment, plain, allow)
    if not changed and (result := runs.finished(workdir)):
        say(f"{workdir} is finished: nothing to do. Report: {runs.report_of(workdir)}")
        return result
    with config.unlocked():
        config.update_from_flattened_dict(chosen)
    runs.make_dir(workdir)
    first = prepare_jax() == 0
    from jaxllm.train import faults, processes

    with runs.lock(workdir) if first else _silent():
        opened = runs.open_run(
            workdir, experiment, config.to_dict(), command=command, stage_of=stage_of, writes=first, allow=allow
        )
        faults.point("opened")
        main(config, opened, **extra)
        faults.point("after:result")
        processes.barrier()  # result.json is there when any of them reads it
    return runs.finished(workdir)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Only the first of several processes prints; errors and warnings of all are seen."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ---- processes and caches


def _check_shared(argv: list[str]) -> None:
    """Several processes must agree on the run directory; its default name holds the time."""
    named = any(arg.lstrip("-").partition("=")[0] == "workdir" for arg in argv)
    if not named and _distributed(os.environ) is not None:
        raise UserError("Several processes share one run directory: name it with --workdir=DIR")


def _distributed(environ: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        return cluster.distributed_arguments(environ)
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare_jax() -> int:
    """Compile cache on, jax.distributed where the environment asks for it; the index of this process."""
    cache = compile_cache(os.environ)
    for name, value in cache.items():
        os.environ[name] = value
    import jax

    for name, value in cache.items():  # jax reads the environment when imported, maybe before
        option = name.lower()
        current = getattr(jax.config, option)
        jax.config.update(option, type(current)(value) if isinstance(current, (int, float)) else value)
    arguments = _distributed(os.environ)
    if arguments is not None and not jax.distributed.is_initialized():
        # its handler of SIGTERM only takes a note, and a process that is not in the loop yet must end
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(**{**cluster.TIMEOUTS, **arguments})
    return jax.process_index()


def compile_cache(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that switch jax's compile cache on; {} when its directory cannot be written."""
    try:
        default = Path.home() / ".cache" / "jaxllm" / "xla"
        path = Path(environ.get("JAX_COMPILATION_CACHE_DIR") or default)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home directory, or a read-only one
        return {}
    if not os.access(path, os.W_OK):
        return {}
    limits = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
    limits = {f"JAX_PERSISTENT_CACHE_{name}": value for name, value in limits.items()}
    return {"JAX_COMPILATION_CACHE_DIR": str(path), **{n: environ.get(n, v) for n, v in limits.items()}}


# ---- exit codes


def _exit(code: int) -> None:
    """Leave with a code; of several processes each with its own, and without waiting for those that cannot come."""
    unread(sys.stdout)
    if code and (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
        from jaxllm.train import processes

        processes.leave(code)
    if code:
        sys.exit(code)


# ---- finished stages

STAGES = ("pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo")  # in life-cycle order


class Loaded(NamedTuple):
    """A run's checkpoint joined: the model, params (every root), tokenizer, config, meta, where and which step."""

    model: Any
    params: Any
    tokenizer: Any
    config: dict
    meta: dict
    workdir: Path
    step: int


def find_stage(run: str | Path, stage: str | None = None, default: str | None = None) -> tuple[Path, int | None]:
    """(the directory with checkpoints, the step or None) of `<dir>[@step]`; `latest` is the newest run.

    A run directory holds its own checkpoints, or a stage's in <dir>/<stage>. Without `stage`: its own, else the stage
    `default`, else the last stage of the life cycle that can talk. UserError names what is there.
    """
    text, mark, at = str(run).rpartition("@")
    if not mark or "/" in at or os.path.isdir(run):  # the @ of a directory's own name
        text, at = str(run), ""
    root = (Path("runs") / "latest") if text == "latest" else Path(os.path.expanduser(text))
    if at and not at.isdigit():
        raise UserError(f"{run}: the step after @ must be a number, for example {text}@400")
    if not os.path.isdir(root):
        beside = sorted(p.name for p in root.parent.glob("*/")) if os.path.isdir(root.parent) else []
        near = difflib.get_close_matches(root.name, beside, 1)
        raise UserError(f"{text}: no such run directory" + (f"; did you mean {root.with_name(near[0])}?" if near else ""))
    have = [s for s in STAGES if (root / s / "checkpoints").is_dir()]
    own = (root / "checkpoints").is_dir()
    step = int(at) if at else None
    if stage and not (own and _experiment_of(root) in (stage, None)):
        if stage not in have:
            raise UserError(f"{text}: no stage {stage!r} with checkpoints; it has {', '.join(have) or 'none'}")
        return root / stage, step
    if own:
        return root, step
    if default in have:
        return root / str(default), step
    if not (talking := [s for s in have if s != "reward"]):
        raise UserError(f"{text}: no checkpoints here, and no stage with any")
    return root / talking[-1], step


def _experiment_of(workdir: Path) -> str | None:
    """What the newest checkpoint is of; None where that cannot be read, and loading it will say why."""
    newest = sorted((p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    meta = newest[-1] / "meta" / "metadata" if newest else workdir
    try:
        return json.loads(meta.read_text()).get("experiment")
    except (OSError, ValueError, AttributeError):
        return None


def lora_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `adapt.lora.with_lora` from the settings of a config or a checkpoint. UserError on an unknown scaling."""
    from jaxllm.adapt import lora

    if (name := settings["scaling"]) not in lora.SCALINGS:
        raise UserError(f"config.lora.scaling={name!r}: choose one of {', '.join(lora.SCALINGS)}")
    return {**settings, "scaling": lora.SCALINGS[name]}


def _merged(params: Any, adapters: Mapping[str, Any]) -> Any:
    """The params of a run with adapters as plain ones, each weight where it was."""
    import jax

    from jaxllm.adapt import lora

    def plain(tree: Any, given: Mapping[str, Any]) -> Any:
        base, low = lora.split(tree)
        merge = lambda base, low: lora.merge({**base, "lora": low}, alpha=given["alpha"], scaling=given["scaling"])  # noqa: E731
        where = jax.tree.map(lambda x: x.sharding, base)
        return jax.jit(merge, donate_argnums=0, out_shardings=where)(base, low)

    return {root: plain(x, adapters[root]) if root in adapters else x for root, x in params.items()}


def load(
    run: str | Path, stage: str | None = None, step: int | None = None, *, default: str | None = None, mesh: Any = None,
    merged: bool = True,
) -> Loaded:  # fmt: skip
    """Model, params, tokenizer and config of a run's checkpoint (`<dir>[@step]`), the params on `mesh` when given.

    Adapters are merged into the weights, so that every run is a plain model; with merged=False the model is the adapted one and
    its params hold them under `lora`.
    UserError when there is no such checkpoint, it is damaged, its weights have another dtype (and there is no --cast), or the
    tokenizer beside it is not the one it was trained with.
    """
    import jax

    from jaxllm.adapt import lora
    from jaxllm.core import sharding, spec
    from jaxllm.data import tokenizer as tokenizers
    from jaxllm.models import families, heads
    from jaxllm.train.checkpoint import restore_params, run_meta

    where, at = find_stage(run, stage, default)
    at = step if step is not None else at
    meta = run_meta(where, at)
    plain = families.make(families.from_dict(meta["model"]))
    models = {root: plain if root in ("policy", "classifier") else heads.with_scalar_head(plain) for root in meta["roots"]}
    adapters = {root: lora_settings(given) for root, given in meta.get("lora", {}).items()}
    whole = {root: lora.with_lora(m, **adapters[root]) if root in adapters else m for root, m in models.items()}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda s: spec.shardings(s, mesh, sharding.current_rules()) if mesh else jax.tree.map(lambda _: here, s)  # noqa: E731
    like = {root: spec.abstract(m.specs, place(m.specs)) for root, m in whole.items()}
    params, meta = restore_params(where, at, like, cast=CAST.get())
    if merged:
        params = _merged(params, adapters)
    else:
        models = whole
    tokenizer = tokenizers.load(where / "tokenizer")
    if (found := tokenizers.fingerprint(tokenizer)) != meta["tokenizer"]:
        raise UserError(
            f"{where / 'tokenizer'}: its hash {found[:12]} ({tokenizer.vocab_size} ids) is not the {meta['tokenizer'][:12]} "
            f"({meta['model']['vocab_size']} ids) that the checkpoint was trained with: put the run's own tokenizer back"
        )
    root = "policy" if "policy" in models else meta["roots"][0]
    return Loaded(models[root], params, tokenizer, meta["config"], meta, where, int(meta["step"]))
