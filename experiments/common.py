"""What every experiment repeats: a stage's starting point, the mesh, the train state, checkpoints and the loop."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import reading, replay, speed, teach
from experiments.optimizers import OPTIMIZERS
from experiments.resume import restored
from jaxllm import launch
from jaxllm.adapt import lora
from jaxllm.core import ops, sharding, spec, tree
from jaxllm.core.types import TrainState, UserError
from jaxllm.data import chat
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.loader import make_loader
from jaxllm.data.pairs import normalise_pair
from jaxllm.data.text import checked_rows
from jaxllm.losses import lm
from jaxllm.models import families
from jaxllm.report.console import progress
from jaxllm.report.files import flatten
from jaxllm.train import checkpoint, faults, gates, guard, loop, moments, optim, processes, profile
from jaxllm.train.compiled import counted
from jaxllm.train.step import make_train_step, split_trainable, trained_roots
from jaxllm.train.watchdog import watchdog

# what runs the steps; `replay` puts something else here
LOOP: ContextVar[Callable | None] = ContextVar("loop", default=None)
NEEDS = {"sft": "pretrain", "pairs": "sft", "reward": "sft", "dpo": "sft", "kto": "sft", "ppo": "sft"}


def need(stage: str, given: str, config: Any, run: Any, **overrides: Any) -> str:
    """The run that a stage starts from: what the config gives, or a run of its own at CPU size under <workdir>/<stage>."""
    if given:
        return given
    run.note(f"no run given for {stage}: training one in {run.path(stage)}")
    main = importlib.import_module(f"experiments.{stage}").main
    if "init" not in overrides and stage in NEEDS:
        overrides["init"] = need(NEEDS[stage], "", config, run)
    launch.start(main, stage, {"seed": config.seed, **overrides}, run.path(stage))
    return str(run.path(stage))


@contextlib.contextmanager
def open_mesh(config: Any) -> Iterator[Any]:
    """The mesh of the config under its rules, and the bug that config.teach_bug asks for."""
    mesh, rules = sharding.make_mesh(dict(config.mesh)), sharding.make_rules(config.rules)
    processes.barrier()  # some have prepared their data sooner than others
    with teach.taught(config), sharding.use(mesh, rules):
        yield mesh


def model_config(config: Any, kind: Any, vocab_size: int) -> Any:
    """The model's config record of a class, from the settings under config.model."""
    record = families.build(kind, {**config.model.to_dict(), "vocab_size": vocab_size})
    if getattr(record, "remat", "") != "auto":
        return record
    from experiments import auto_remat  # it compiles steps as the functions below make them

    return auto_remat.resolve(config, record)


def born_sharded(specs: Any, seed: int, mesh: Any) -> Any:
    """Fresh parameters, made on the devices where they stay."""
    where = spec.shardings(specs, mesh, sharding.current_rules())
    return jax.jit(partial(spec.init, specs), out_shardings=where)(jax.random.key(seed))


class Adapted(NamedTuple):
    """What a stage trains. model: reads parameters with and without adapters; params: the root's, to be trained in part or whole;
    trainable: which of them (a regular expression on paths); reference: the frozen start, in the base's own buffers; merge:
    params -> plain ones for the base model, for long generations."""

    model: Any
    params: Any
    trainable: str
    reference: Any
    merge: Callable


def adapted(config: Any, model: Any, params: Any, mesh: Any, *, root: str = "policy", kept: bool = True) -> Adapted:
    """The parameters of `root` as config.lora says: adapters beside weights that stay, or, at rank 0, all weights.

    kept: the start is read later on (a live reference), so that weights which are trained, and donated, must be copies. With
    adapters nothing is ever copied. A scalar head is trained beside the adapters.
    """
    model = teach.at("model", model)
    settings = config.lora.to_dict() if "lora" in config else {"rank": 0}
    if not settings["rank"]:
        own = jax.tree.map(jax.numpy.copy, params) if kept else params
        return Adapted(model, own, f"^{root}/", params, lambda x: x)
    settings = launch.lora_settings(settings)
    model = lora.with_lora(model, **settings)
    own = {**params, "lora": born_sharded(model.specs["lora"], config.seed, mesh)}
    merge = partial(lora.merge, alpha=settings["alpha"], scaling=settings["scaling"])
    return Adapted(model, own, f"^{root}/(lora|scalar)/", params, merge)


def check_sampler(config: Any, run: Any, model: Any, params: Any, record: Any, *, temperature: float = 1.0, transform=None):
    """The gate on a rollout's record: its log-probabilities are those of the loss, at its temperature and top-p (transform)."""
    if not config.gates:
        return
    logps = jax.jit(lambda p, r: ops.model_logps(model, p, r, None, temperature, transform).logp)(params, record)
    where = gates.TOLERANCE[model.config.dtype]
    run.note(gates.sampler(*processes.on_host((record["logps"], logps, record["mask"])), where))


def check_batch(config: Any, rows: int) -> None:
    """UserErrors about batch sizes and taught bugs, before anything is trained or compiled."""
    teach.of(config)
    mesh = sharding.make_mesh(dict(config.mesh))
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch_size % shards:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over mesh.data x mesh.fsdp x accumulate = {shards}: "
            f"use a multiple of {shards}"
        )
    if config.batch_size > rows:
        raise UserError(f"config.batch_size={config.batch_size} is more than the {rows} rows of the data: lower it")


def check_length(model: Any, length: int, names: str) -> None:
    """UserError when sequences would be empty, or longer than the model's context."""
    if length < 1:
        raise UserError(f"{names}={length}: it must be 1 or more")
    if length > model.config.max_length:
        raise UserError(f"{names}={length} is longer than the model's context of {model.config.max_length} tokens: lower it")


def check_columns(columns: Any, vocab_size: int) -> None:
    """UserError when any token id is outside the vocabulary: JAX would clamp it silently."""
    for path, leaf in tree.flatten(columns).items():
        if path.rpartition("/")[2] in ("tokens", "targets"):
            tokenizers.check_ids(leaf, vocab_size, f"column {path}")


def optimizer(config: Any, updates: int | None = None, around: Callable | None = None) -> Any:
    """(The guarded optimizer of config.optim, its schedule: warm-up and a cosine over `updates`, default config.steps).

    around(tx): what a stage puts around the optimizer, within the guard.
    """
    o = config.optim
    for name, table in (("name", OPTIMIZERS), ("moments", moments.DTYPES)):
        if o[name] not in table:
            raise UserError(f"optim.{name}={o[name]!r}: choose one of {', '.join(table)}")
    schedule = optim.warmup_cosine(o.lr, updates or config.steps, warmup=o.warmup, final=o.final)
    tx = OPTIMIZERS[o.name](schedule, o)
    tx = guard.guarded(around(tx) if around else tx, sigma=config.spike_sigma)
    if o.moments != "float32":
        moments.check_b2(o.moments, o.b2)
        tx = moments.stored(tx, o.moments)
    return (moments.offloaded(tx) if o.offload else tx), schedule


def jit_step(loss_fn: Any, tx: Any, state: Any, accumulate: int) -> Any:
    """The compiled train step: it donates the state and leaves it where it was."""
    where = jax.tree.map(lambda x: x.sharding, state)
    loss_fn = teach.at("loss", loss_fn)
    step = jax.jit(make_train_step(loss_fn, tx, accumulate=accumulate), donate_argnums=0, out_shardings=(where, None))
    return processes.together(step)


def new_state(params: Any, tx: Any, mesh: Any, trainable: str = ".*") -> tuple[Any, Any]:
    """(state, frozen) with every leaf on the mesh: the optimizer's moments lie like their parameters, counters everywhere."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = lambda x: x if isinstance(x.sharding, jax.sharding.NamedSharding) else jax.device_put(x, everywhere)  # noqa: E731
    chosen, frozen = split_trainable(params, trainable)
    chosen = jax.tree.map(place, chosen)
    return TrainState(jax.device_put(np.int32(0), everywhere), chosen, moments.init(tx, chosen, everywhere)), frozen


def fit(
    config: Any, run: Any, *, mesh: Any, columns: Any, tokenizer: Any, model: Any, state: Any, frozen: Any, step_fn: Any,
    schedule: Callable, evaluate: Callable | None = None, tokens_per_step: int = 0, last: dict | None = None, turns: int = 1,
    meta: dict | None = None, checks: Sequence[gates.Gate] | None = None,
) -> Any:  # fmt: skip
    """Restore or begin, then run the loop to config.steps with logs, checkpoints and a live line; the trained state.

    Checkpoints hold the frozen parameters of a root that is trained in part too, so that a run can be loaded without the one
    that it started from, and `evaluate` gets such a root whole; frozen roots (a reference, a judge) are left out. `last`, when
    given, receives the last logged metrics; `turns` is how many user turns the longest conversation in training had, which chat
    keeps to; `meta` is added to what checkpoints say of themselves; `checks` are the gates of the first steps (default: what is
    trained moves, the rest does not), unless config.gates is False. A step_fn that is jitted may compile once.
    """
    given, columns, step_fn = columns, teach.at("data", columns, tokenizer), teach.at("step", step_fn, frozen)
    teach.announce(config, run, given, columns)
    window = profile.window(config.profile, config.steps)
    check_columns(columns, model.config.vocab_size)
    part, parts = sharding.process_rows(mesh)
    loader = make_loader(columns, config.batch_size, config.seed, process_index=part, process_count=parts)
    processes.check_same({
        **dict(flatten({"config": run.config})), "data": loader.state(0), "tokenizer": tokenizers.fingerprint(tokenizer),
    })  # fmt: skip
    processes.first_only(lambda: keep_tokenizer(run, tokenizer))
    meta = _meta(config, run, model, state, tokenizer, turns) | (meta or {})
    one_program, step_fn = hasattr(step_fn, "lower"), counted(step_fn, "the train step")
    if config.gates:
        asked = (gates.moved(),) if checks is None else checks
        step_fn = gates.guarded(step_fn, asked, lr=schedule, dtype=getattr(model.config, "dtype", "float32"), passed=run.note)
    store = checkpoint.open_checkpoints(run.workdir, keep=config.keep, warn=run.warn)
    whole = lambda s: s.replace(params=trained_roots(s.params, frozen))  # noqa: E731
    judge = evaluate and (lambda step, params: evaluate(step, trained_roots(params, frozen)))
    state = restored(store, run, loader, state, whole, config.steps)
    if config.show_sharding:
        speed.show_sharding(run, mesh, model, state, frozen)
    rates = speed.meter(run, mesh, model, state, frozen, columns, config.batch_size, tokens_per_step, whole=one_program)
    line, index = progress(config.steps, run.experiment), jax.process_index()
    with watchdog(run.workdir / "crash", config.watchdog, process=index, warn=run.warn) as enter:
        watch = profile.Stopwatch(enter=enter)
        traced = profile.traced(step_fn, window if run.writes else None, int(state.step), run.path("profile"), run.note)
        try:
            with traced as step_fn:
                state = (LOOP.get() or loop.fit)(
                    step_fn, state, frozen, lambda i: sharding.put_batch(loader.batch(i), mesh), jax.random.key(config.seed),
                    steps=config.steps, log=speed.logger(run, schedule, rates, line, tokens_per_step, last),
                    log_every=config.log_every, evaluate=judge, eval_every=config.eval_every or config.steps,
                    save=lambda s: store.save(whole(s), loader.state(int(s.step)), meta), save_every=config.save_every,
                    save_seconds=config.save_seconds, again=store.again, watch=watch,
                )  # fmt: skip
        except guard.NonFinite as error:
            error.add_note(replay.keep(run, config, error, make_loader(columns, config.batch_size, config.seed)))
            raise
        finally:  # a run that is stopped leaves by an exception, and its last checkpoint may still be on the way
            line.close()
            with watch.part("save"):
                store.close()
            speed.keep_times(run, watch.take())
    if last is not None and not last:
        last.update(speed.logged(run, config.steps))
    faults.point("before:result")
    return state


def _meta(config: Any, run: Any, model: Any, state: Any, tokenizer: Any, turns: int) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "experiment": run.experiment, "model": families.to_dict(model.config), "roots": sorted(state.params),
        "tokenizer": tokenizers.fingerprint(tokenizer), "template": chat.template_hash(tokenizer), "config": run.config,
        "turns": turns, "versions": {"jax": jax.__version__},
        "lora": {root: config.lora.to_dict() for root, leaves in state.params.items() if "lora" in leaves},
    }  # fmt: skip


def keep_tokenizer(run: Any, tokenizer: Any) -> None:
    """The tokenizer's files and its chat template, in the run directory."""
    tokenizers.save(tokenizer, run.path("tokenizer"))
    run.path("tokenizer", "chat_template.txt").write_text(chat.template_text(tokenizer), encoding="utf-8")


def fit_lm(
    config: Any, run: Any, *, mesh: Any, model: Any, params: Any, tokenizer: Any, rows: Any, eval_rows: Any, turns: int = 1,
    loss_fn: Any = None, eval_loss: Any = None, tx: Any = None, trainable: str = ".*", root: str = "policy",
) -> dict:  # fmt: skip
    """Training of one model, `root`, on packed rows, evaluated on others: pretraining and SFT. The last evaluation.

    loss_fn: next-token prediction unless given; eval_loss: loss_fn unless given (without dropout, say); tx: (optimizer,
    schedule), AdamW as config.optim says unless given; trainable: which parameters move.
    """
    check_length(model, config.data.length, "config.data.length")
    check_batch(config, len(rows["tokens"]))
    from experiments import auto_remat, memory  # they trace and compile steps as the functions here make them

    auto_remat.note(config, run)
    step = memory.Step(model, root, trainable, loss_fn, rows, tx and tx[0], {root: params})
    tx, schedule = tx or optimizer(config)
    loss_fn = loss_fn or lm.loss(teach.at("model", model))
    state, frozen, step_fn = memory.begin(config, step, loss_fn, tx, mesh)
    # the same draws (masking, say) at every evaluation, so that two of them can be compared
    key = jax.random.key(config.seed)
    evaluator = jax.jit(lambda params, batch: (eval_loss or loss_fn)(params, batch, key)[1])
    evaluator = counted(processes.together(evaluator), "the evaluation")
    size = _eval_size(config, run, mesh, len(eval_rows["tokens"]))
    final: dict[str, float] = {}

    def evaluate(step: int, params: Any) -> None:
        values = loop.evaluate_means(evaluator, {**frozen, **params}, eval_batches(eval_rows, size, mesh))
        final.update({f"eval/{k}": v for k, v in values.items()})
        run.log(step, final)

    fit(
        config, run, mesh=mesh, columns=rows, tokenizer=tokenizer, model=model, state=state, frozen=frozen,
        step_fn=step_fn, schedule=schedule, evaluate=evaluate if size else None,
        tokens_per_step=config.batch_size * config.data.length, turns=turns,
    )  # fmt: skip
    return final or speed.logged(run, config.steps, "eval/")


def _eval_size(config: Any, run: Any, mesh: Any, rows: int) -> int:
    """Rows of a batch of held-out ones: what the mesh can split, 0 with a warning when they are too few for that."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < shards:
        run.warn(
            f"nothing is evaluated: {rows} held-out rows cannot be split over mesh.data x mesh.fsdp = {shards}: hold out more "
            "with config.data.held_out, or use a smaller mesh"
        )
    return min(config.batch_size, rows // shards * shards)


def print_report(run: Any, what: str, report: dict) -> None:
    """One line on how data became rows, with everything that was cut or left out; kept in data_report.json."""
    reading.keep_report(run, what, report)
    if report["truncated"] > reading.MOST_CUT * report["examples"]:
        run.warn(
            f"{what}: {report['truncated']:,} of {report['examples']:,} examples are longer than config.data.length and were "
            "cut: raise it, or shorten them"
        )
    run.note(
        f"{what}: {report['examples']:,} examples in {report['rows']:,} rows, {report['tokens']:,} tokens "
        f"({report['trained_tokens']:,} trained), fill {report['fill']:.0%}, truncated {report['truncated']}, "
        f"dropped {report['dropped']}, without a trained token {report['untrained']}"
        + (f", equal sides {report['identical']}" if report.get("identical") else "")
    )


def hold_out(rows: list, share: float, seed: int) -> tuple[list, list]:
    """A seeded split of rows into (train, held out), at least one row held out."""
    order = np.random.default_rng(seed).permutation(len(rows))
    n = max(1, int(len(rows) * share))
    return [rows[i] for i in order[n:]], [rows[i] for i in order[:n]]


def take(columns: Any, index: Any) -> Any:
    """Some rows of nested columns."""
    return jax.tree.map(lambda x: x[index], columns)


def trimmed(columns: Any, multiple: int = 8) -> Any:
    """Columns [n, l] without the padding at the end that no row uses: less to compute, and nothing else changes."""
    used = max(int(side["segments"].any(axis=0).sum()) for side in columns.values() if isinstance(side, dict))
    length = -(-used // multiple) * multiple
    return jax.tree.map(lambda x: x[:, :length] if x.ndim == 2 else x, columns)


def eval_batches(columns: Any, batch_size: int, mesh: Any, most: int = 16):
    """The first whole batches of host columns, on the devices; each process puts its own rows."""
    rows = jax.tree.leaves(columns)[0].shape[0]
    part, parts = sharding.process_rows(mesh)
    share = batch_size // parts
    for start in range(part * share, min(rows // batch_size, most) * batch_size, batch_size):
        yield sharding.put_batch(take(columns, slice(start, start + share)), mesh)


def preference_rows(config: Any, run: Any) -> tuple[list, list, str, str]:
    """(train rows, held-out rows, where they come from, the SFT run to start from). The user's file is read first."""
    where = config.data.path
    rows = reading.checked(config, run, where, normalise_pair) if where else []
    kept = reading.checked(config, run, config.data.eval_path, normalise_pair) if config.data.eval_path else []
    check_batch(config, len(rows) or config.batch_size)
    start = need("sft", config.init, config, run)
    if where:
        return *((rows, kept) if kept else hold_out(rows, 0.1, config.seed)), where, start
    collected = Path(need("pairs", "", config, run, init=start))
    return (
        named_pairs(collected / "train.jsonl"),
        named_pairs(collected / "held_out.jsonl"),
        str(collected / "train.jsonl"),
        start,
    )


def named_pairs(path: str | Path) -> list[dict]:
    """Preference rows of a file; errors name the file and the row."""
    return checked_rows(path, normalise_pair)[0]


def same_tokenizer(policy: Any, judge: Any) -> None:
    """UserError when two checkpoints do not read the same ids."""
    a, b = policy.meta["tokenizer"], judge.meta["tokenizer"]
    if a != b:
        raise UserError(
            f"{judge.workdir} was trained with tokenizer {b[:12]} ({judge.tokenizer.vocab_size} ids), {policy.workdir} with "
            f"{a[:12]} ({policy.tokenizer.vocab_size} ids): train the reward model from the same run"
        )


def rows_of(config: Any, run: Any, check: Callable[[Any, str], Any], own: Callable[[], list[dict]]) -> tuple[list[Any], str]:
    """(check(row, where) of every row, where they come from): the file of config.data.path, or the built-in ones."""
    if not config.data.path:
        return [check(row, f"the instr world, row {i + 1}") for i, row in enumerate(own())], "the instr world"
    return reading.checked(config, run, config.data.path, check), str(config.data.path)
