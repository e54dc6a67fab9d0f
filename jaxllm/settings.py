"""The command line as a checked config: each mistake is one line with what was meant, before jax is imported.

absl and ml_collections do the parsing (`--config=file:variant --config.a.b=value`); before them stands what
they do not say: nearest names, leftover words (absl ignores `steps=3`), 1e3 and 2k for whole numbers.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm import cluster, ranges

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FLAGS = {"workdir": "", "debug": False, "allow": "", "cast": False, **cluster.FLAGS}
MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
EXPECTED = {
    bool: "true or false",
    int: "a whole number (100, 1e3, 2k, 3M)",
    float: "a number",
    tuple: "a tuple like (1, 2)",
}


class Command(NamedTuple):
    """A checked command line: the locked config, where to run, the experiment's flags, how to repeat it, the processes, the
    settings that may differ from those that a run began with, and whether weights of another dtype are converted."""

    config: Any
    workdir: Path
    debug: bool
    extra: dict[str, Any]
    text: str
    processes: dict[str, str]  # variables of the environment
    allow: tuple[str, ...]
    cast: bool


class Item(NamedTuple):
    """One argument: `--name=value` (value None when it has none) or, with name None, a leftover word."""

    name: str | None
    value: str | None
    raw: str


# ---- settings


def config_path(experiment: str) -> Path:
    """configs/dpo.py of "dpo", configs/studies/judging.py of "studies.judging"."""
    return CONFIGS / f"{experiment.replace('.', '/')}.py"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no system has a file of this name
        return False


def load_config(path: Path | str, variant: str | None = None) -> Any:
    """The ConfigDict of a config file; ValueError names the file and what is wrong with it."""
    path = Path(path)
    if not _is_file(path):
        beside = sorted(path.parent.glob("*.py")) or sorted(CONFIGS.glob("*.py"))
        near = difflib.get_close_matches(path.stem, [p.stem for p in beside], 1)
        hint = f" Did you mean configs/{near[0]}.py?" if near else f" Configs are in {CONFIGS}."
        raise ValueError(f"No config file {path}.{hint}")
    spec = importlib.util.spec_from_file_location(f"jaxllm_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(variant) if variant else module.get_config()
    except Exception as error:
        detail = str(error) if type(error) in (ValueError, KeyError) else f"{type(error).__name__}: {error}"
        name = f"{path}:{variant}" if variant else path
        raise ValueError(f"Config file {name} does not load: {detail}") from error


def settings_of(config: Any) -> dict[str, tuple[type, Any]]:
    """{"optim.lr": (float, 1e-3), ...}: every leaf of a ConfigDict with its declared type and its value."""
    found = {}
    for key in config:
        value = config[key]
        if isinstance(value, type(config)):
            found.update({f"{key}.{name}": leaf for name, leaf in settings_of(value).items()})
        else:
            found[key] = (config.get_type(key), value)
    return found


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The likeliest meant name: one with the same last part first, then by spelling."""
    names = list(names)
    leaf = name.rsplit(".", 1)[-1]
    same = [n for n in names if n.rsplit(".", 1)[-1] == leaf]
    if found := difflib.get_close_matches(name, same or names, 1, 0.0 if same else 0.55):
        return found[0]
    leaves = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    found = difflib.get_close_matches(leaf, leaves, 1, 0.6)
    return leaves[found[0]] if found else None


def whole_number(text: str) -> int | None:
    """1000, 1_000, 1e3, 2k, 1.5M as an int; None when the text is none."""
    match = re.fullmatch(r"([+-]?[\d_.]+(?:e[+-]?\d+)?)([kmgb]?)", text.strip().lower())
    if not match:
        return None
    try:
        number = Decimal(match[1].replace("_", "")) * MULTIPLES[match[2]]
    except ArithmeticError:  # not a number, or 1e999999999
        return None
    # the bound keeps 1e999999999 from being written out
    return int(number) if number.adjusted() < 19 and number == number.to_integral_value() else None


def _from_text(text: str, kind: type) -> Any:
    """The value that a text means for a setting of this type; ValueError or KeyError when it means none."""
    if kind is bool:
        return TRUTH[text.strip().lower()]
    if kind is int:
        return whole_number(text)
    if kind is float:
        number = whole_number(text)
        return float(text) if number is None else float(number)
    if kind in (tuple, list):
        value = ast.literal_eval(text)
        return kind(value) if isinstance(value, (tuple, list)) else kind([value])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def coerce(value: Any, kind: type) -> Any:
    """`value` (text or a Python value) as a setting of type `kind`; ValueError when it does not fit."""
    if isinstance(value, Path):
        value = str(value)
    if value is None or kind is str:
        if value is not None and not isinstance(value, str):
            raise ValueError("expected text")
        return value
    try:
        if isinstance(value, str):
            value = _from_text(value, kind)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif kind in (tuple, list) and isinstance(value, (tuple, list)):
            value = kind(value)
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError):  # the last two: of ten thousand brackets
        value = None
    fits = kind is type(None) or (isinstance(value, kind) and not (kind is int and isinstance(value, bool)))
    if not fits or value != value:
        raise ValueError(f"expected {EXPECTED.get(kind, kind.__name__)}")
    return value


def _unknown(key: str, value: Any, settings: Mapping[str, Any], shown: str, prefix: str) -> str:
    if inside := [name for name in settings if name.startswith(f"{key}.")]:
        return f"{prefix}{key} is a group of settings: {', '.join(prefix + name for name in inside[:8])}"
    near = nearest(key, settings)
    section = near.split(".")[0] if near and "." in near else ""
    see = f"See all: --help-config {section}".strip()
    if not near:
        return f"Unknown setting {shown}. {see}"
    attempt = f"{prefix}{near}" if value is None else f"{prefix}{near}={value}"
    return f"Unknown setting {shown}. Did you mean {prefix}{near}? (try {attempt}). {see}"


def check_overrides(config: Any, overrides: Mapping[str, Any], prefix: str = "") -> tuple[dict, list[str]]:
    """Overrides with the types of the config, and one line for each that is wrong."""
    settings, values, errors = settings_of(config), {}, []
    for key, value in overrides.items():
        shown = f"{prefix}{key}" if value is None and prefix else f"{prefix}{key}={value}"
        if key not in settings:
            errors.append(_unknown(key, value, settings, shown, prefix))
            continue
        kind, now = settings[key]
        try:
            values[key] = coerce("true" if value is None and kind is bool else value, kind)
            if prefix and value is None and kind is not bool:
                raise ValueError("expected a value")
        except ValueError as error:
            errors.append(f"{shown}: {error}; it is {now!r} by default")
    return values, errors + ranges.mistakes({name: values.get(name, now) for name, (_, now) in settings.items()}, prefix)


# ---- the command line


def split_arguments(argv: list[str], booleans: set[str]) -> list[Item]:
    """Arguments as items: `--a=1`, `--a 1` and `-a=1` alike; flags in `booleans` take no word after them."""
    items, rest = [], list(argv)
    while rest:
        raw = rest.pop(0)
        match = re.fullmatch(r"--?([A-Za-z][\w.\-]*)(?:=(.*))?", raw, re.DOTALL)
        if not match:
            items.append(Item(None, None, raw))
            continue
        name, value = match[1], match[2]
        if value is None and name not in booleans and rest and not re.match(r"--?[A-Za-z]", rest[0]):
            value = rest.pop(0)
        items.append(Item(name, value, raw if match[2] is not None or value is None else f"{raw}={value}"))
    return items


def _leftover(raw: str, settings: Mapping[str, Any]) -> str:
    key, equals, value = raw.partition("=")
    near = nearest(key.removeprefix("config."), settings) if equals else None
    hint = f" Did you mean --config.{near}={value} ?" if near else ""
    return f'"{raw}" is not a flag and would have been ignored.{hint}'


def _unknown_flag(item: Item, known: Iterable[str], settings: Mapping[str, Any]) -> str:
    leaf = [name for name in settings if item.name in (name, name.rsplit(".", 1)[-1])]
    near = difflib.get_close_matches(item.name, list(known), 1)
    value = "" if item.value is None else f"={item.value}"
    hint = f" Did you mean --{near[0]}{value} ?" if near else ""
    if leaf:
        hint = f" Did you mean --config.{leaf[0]}{value} ?"
    return f"Unknown flag {item.raw}.{hint}"


def _flag_values(known: Mapping[str, Any], config_file: str, argv: list[str]) -> Any:
    """The parsed absl flags; own FlagValues, so that nothing global changes and a process may do it twice."""
    from absl import flags as absl_flags
    from ml_collections import config_flags

    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", config_file, lock_config=True, flag_values=values, sys_argv=["run", *argv]
    )
    define = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float}
    for name, default in known.items():
        define.get(type(default), absl_flags.DEFINE_string)(name, default, "", flag_values=values)
    values(["run", *argv])
    return values


def _check_flags(items: list[Item], known: Mapping, settings: Mapping) -> tuple[dict[str, Any], list[str]]:
    """Values of the plain flags and one line for each unknown, leftover or mistyped argument."""
    given, errors = {}, []
    for item in items:
        if item.name is None:
            errors.append(_leftover(item.raw, settings))
        elif item.name in known:
            kind = str if known[item.name] is None else type(known[item.name])
            try:
                if item.value is None and kind is not bool:
                    raise ValueError("expected a value")
                given[item.name] = coerce("true" if item.value is None else item.value, kind)
            except ValueError as error:
                errors.append(f"{item.raw}: {error}")
        elif item.name != "config" and not re.match(r"(no)?config\.", item.name):
            errors.append(_unknown_flag(item, ["config", *known], settings))
    return given, errors


def _config_of(items: list[Item], experiment: str) -> tuple[Any, str]:
    given = [item.value or "" for item in items if item.name == "config"]
    text = given[-1] if given else str(config_path(experiment))
    path, _, variant = os.path.expanduser(text).partition(":")
    if not _is_file(Path(path)) and _is_file(CONFIGS.parent / path):
        path = str(CONFIGS.parent / path)  # configs/sft.py is meant from wherever the command runs
    return load_config(path, variant or None), f"{path}:{variant}" if variant else path


def parse_flags(argv: list[str], extra: Mapping[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """The flags of an experiment without a config, --debug and --cast; ValueError holds a line for every mistake."""
    known = {"debug": False, "cast": False, **extra}
    items = split_arguments(argv, {name for name, default in known.items() if isinstance(default, bool)})
    given, errors = _check_flags(items, known, {})
    if errors:
        raise ValueError("\n".join(errors))
    values = {**known, **given}
    return {name: values[name] for name in extra}, values["debug"], values["cast"]


def _overrides(items: list[Item]) -> dict[str, str | None]:
    """{"optim.lr": "1e-3"} of --config.optim.lr=1e-3; --noconfig.x is x=false."""
    given = [(item.name, item.value) for item in items if item.name]  # of two the last one counts
    return {
        name.removeprefix("no").removeprefix("config."): "false" if name.startswith("no") else value
        for name, value in given
        if re.match(r"(no)?config\.", name)
    }


def _allowed(names: str, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """(The settings and groups of --allow=optim.lr,data; a line for each that is none)."""
    allow = tuple(name.strip().removeprefix("config.") for name in names.split(",") if name.strip())
    unknown = [name for name in allow if not any(known == name or known.startswith(f"{name}.") for known in settings)]
    hints = [f" Did you mean --allow={near}?" if (near := nearest(name, settings)) else "" for name in unknown]
    return allow, [f"--allow={name}: no such setting.{hint}" for name, hint in zip(unknown, hints, strict=True)]


def parse(argv: list[str], experiment: str, extra: Mapping[str, Any]) -> Command:
    """Check a command line whole, then parse it with absl; ValueError holds one line for every mistake."""
    config, config_file = _config_of(split_arguments(argv, set()), experiment)
    settings, known = settings_of(config), {**FLAGS, **extra}
    switches = {f"config.{name}" for name, (kind, _) in settings.items() if kind is bool}
    switches |= {f"no{name}" for name in switches}
    switches |= {name for name, default in known.items() if isinstance(default, bool)}
    items = split_arguments(argv, switches)
    values, errors = check_overrides(config, _overrides(items), "--config.")
    given, more = _check_flags(items, known, settings)
    allow, unknown = _allowed(str(given.get("allow", "")), settings)
    if errors or more or unknown:
        raise ValueError("\n".join(errors + more + unknown))
    typed = {k: v for k, v in values.items() if settings[k][0] is not type(None) and v is not None}
    clean = [f"--config={config_file}", *(f"--config.{key}={value}" for key, value in typed.items())]
    clean += [f"--{name}={value}" for name, value in given.items()]
    parsed = _flag_values(known, config_file, clean)
    processes = cluster.flag_environment(parsed.coordinator, parsed.processes, parsed.process)
    with parsed.config.unlocked():  # settings declared as None have no type for absl to parse by
        parsed.config.update_from_flattened_dict({k: v for k, v in values.items() if k not in typed})
    workdir = Path(os.path.expanduser(parsed.workdir) or default_workdir(experiment))  # no shell expands --workdir=~/run
    text = command_text(experiment, [*argv, *([] if parsed.workdir else [f"--workdir={workdir}"])])
    own = {name: parsed[name].value for name in extra}
    return Command(parsed.config, workdir, parsed.debug, own, text, processes, allow, parsed.cast)


def command_text(experiment: str, argv: list[str]) -> str:
    """The shell command that repeats a run."""
    return shlex.join(["python", "-m", f"experiments.{experiment}", *argv])


def default_workdir(experiment: str) -> Path:
    """runs/<date>_<time>_<experiment>, a number added when it is taken."""
    base = Path("runs") / time.strftime(f"%Y-%m-%d_%H%M%S_{experiment.rpartition('.')[2]}")
    names = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 1000))
    return next(path for path in names if not path.exists())


# ---- help


def comments_of(path: Path) -> dict[str, str]:
    """{"optim.lr": "peak rate", ...} from lines like `config.optim.lr = 1e-3  # peak rate`."""
    found = re.findall(r"([\w.]+)\s*=(?!=)[^#\n]*#\s*(.+)", path.read_text(encoding="utf-8"))
    return {name.removeprefix("config.").removeprefix("c."): comment.strip() for name, comment in found}


def help_config(argv: list[str], experiment: str) -> str:
    """Every setting (of the section that follows --help-config) with its value and its comment. ValueError: there is none."""
    items = split_arguments(argv, set())
    section = next(item.value for item in items if item.name == "help-config") or ""
    config, path = _config_of(items, experiment)
    settings, comments = settings_of(config), comments_of(Path(path.partition(":")[0]))
    if not any(name.startswith(section) for name in settings):
        near = nearest(section, settings)
        raise ValueError(f"No setting begins with {section!r}." + (f" Did you mean --help-config {near}?" if near else ""))
    lines = [
        f"--config.{name}={value}".ljust(48) + (f"  # {comment}" if comment else "")
        for name, (_, value) in settings.items()
        if name.startswith(section)
        for comment in [comments.get(name) or comments.get(name.rsplit(".", 1)[-1], "")]
    ]
    return "\n".join(line.rstrip() for line in [f"Settings of {path}:", *lines])


def help_text(experiment: str, about: str | None, extra: Mapping, *, configured: bool = True) -> str:
    """What the experiment does and which flags it takes."""
    shared = "[--config=FILE[:variant]] [--config.a.b=VALUE ...] [--workdir=DIR] [--help-config [section]] "
    shared += "[--allow=a.b,c] " + cluster.HELP + " "
    own = " ".join(f"[--{name}={default}]" for name, default in extra.items())
    usage = f"Usage: python -m experiments.{experiment} {shared if configured else ''}[--debug] [--cast] {own}"
    return f"{(about or '').strip()}\n\n{usage}".strip()
