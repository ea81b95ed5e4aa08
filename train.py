"""Chapter 4, training: settings, schedules, optimisers, the loop and checkpoints.

Reads a folder of audio (--data) or the built-in sounds. Writes a checkpoint for probe.py and
--resume, and a log beside it (.csv). Source: Audio-JEPA (arXiv 2507.02915), section 3.

    python train.py                              a first run, on built-in sounds
    python train.py --data /path/audioset        recipe `paper` on CUDA, else `laptop`
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import math
import os
import sys
import time

import torch
from torch.nn import functional as F

from data import (Crops, LogMel, UserError, load_batches, make_output_printable, open_source,
                  patchify)
from masking import MASKS, make_masks
from model import POSITIONS, SIZES, TARGETS, AudioJEPA, select
from probe import (DTYPES, FORMAT, check_finite, find_amp, find_device, knn_of_orders,
                   load_checkpoint)

# Every setting: its value in each recipe (or one value for all), its type or choices, help.
RECIPES = ("sounds", "laptop", "paper")
METHOD = {                            # --resume keeps these
    "size": ("tiny", "tiny", "base", SIZES, "encoder; base is ViT-B"),
    "seconds": (1.28, 1.28, 10.0, float, "length of a clip"),
    "mask": ("block", "block", "random", MASKS, "which patches to hide"),
    "positions": ("rotary", "rotary", "fixed", POSITIONS, "rotary: in addition to the fixed ones"),
    "targets": ("all", "all", "last", TARGETS, "layers of the target encoder to predict"),
    "ema": (0.99, 0.995, 0.996, float, "momentum of the target encoder at the start; it ends at 1"),
    "optimizer": ("muon", "muon", "adamw", ("muon", "adamw"), "for the matrices of the layers"),
    "lr": (0.01, 0.005, 3e-4, float, "peak learning rate"),
    "warmup": (0.05, 0.05, 0.01, float, "rise of the learning rate, as a share of the run"),
    "batch_size": (16, 16, 256, int, "clips per step"),
    "steps": (1000, 2000, 100_000, int, "length of the run; every schedule depends on it"),
    "seed": (0, int, "random seed"),
    "amp": ("auto", ("auto", *DTYPES), "mixed precision; auto: what the hardware supports")}
MACHINE = {                           # --resume may change these
    "data": (None, str, "folder of audio; without it, built-in sounds"),
    "out": ("ckpt.pt", str, "checkpoint to write, with the log beside it"),
    "device": ("auto", ("auto", "cuda", "mps", "cpu"), "auto: the first of these that exists"),
    "compile": ("auto", ("auto", "on", "off"), "torch.compile; auto: on with CUDA"),
    "workers": (min(16, (os.cpu_count() or 1) - 1), int, "processes that read audio"),
    "log_every": (100, 100, 50, int, "steps between lines of the log"),
    "save_every": (100, 100, 1000, int, "steps between checkpoints")}
DEFAULTS = {recipe: {name: values[i] if len(values) > 1 else values[0] for name, (*values, _, _)
                     in (METHOD | MACHINE).items()} for i, recipe in enumerate(RECIPES)}
MAY_BE_ZERO = ("ema", "warmup", "seed", "workers")
CROPS_TO_FIT = 256                    # for the mean and standard deviation of the log-mel
MIN_SPREAD = 0.1                      # healthy runs stay above 0.4


# ---- schedules and optimisers ------------------------------------------------------------------


def learning_rate(step, config):
    """A linear warm-up, then half a cosine down to 0."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def ema_momentum(step, config):
    """Momentum of the target encoder: from --ema to 1 by half a cosine. It averages about the last
    1 / (1 - momentum) encoders. Source: BYOL (arXiv 2006.07733), section 3."""
    return 1 - (1 - config.ema) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def make_optimizers(jepa, config):
    """Two optimisers: one for the matrices of the layers, with weight decay, and one for all other
    weights, without. The learning rate of each is `share` * lr.

    Not in the paper, which uses AdamW for all weights: Muon. It sets all singular values of an
    update to about 1, so weak directions learn as fast as strong ones such as loudness. It is meant
    for hidden-layer matrices; AdamW trains the rest, at a tenth of the rate.
    Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); AdamW, arXiv 1711.05101."""
    matrices, others = [], []
    for name, weights in jepa.named_parameters():
        if weights.requires_grad:
            is_matrix = ".layers." in name and weights.ndim == 2
            (matrices if is_matrix else others).append(weights)
    adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True)
    for_matrices, share = (torch.optim.Muon, 0.1) if config.optimizer == "muon" else (adamw, 1.0)
    return [for_matrices([{"params": matrices, "share": 1.0}], weight_decay=0.05),
            adamw([{"params": others, "share": share}], weight_decay=0.0)]


# ---- the loop ----------------------------------------------------------------------------------


def train(run):
    """Train to the last step."""
    config, device, jepa, log = run.config, run.config.device, run.jepa, run.log
    autocast = torch.autocast(device, DTYPES[config.amp], enabled=config.amp != "off")
    steps = range(run.step, config.steps)
    batches = load_batches(run.crops, config.batch_size, steps, config.workers, device == "cuda")
    for step in steps:
        waveforms = log.next_batch(batches).to(device, non_blocking=True)
        lr, momentum = learning_rate(step, config), ema_momentum(step, config)

        patches = patchify(run.mel(waveforms))                                      # (B, N, E)
        visible, hidden = make_masks(config.mask, config.batch_size, config.seed, step)
        visible, hidden = visible.to(device), hidden.to(device)
        with autocast:                   # latents, predictions, targets, loss: AudioJEPA.forward
            loss, predictions, all_targets = jepa(patches, visible, hidden)
        jepa.zero_grad()
        run.scaler.scale(loss).backward()
        for optimizer in run.optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = group["share"] * lr
            run.scaler.step(optimizer)   # in fp16, skipped if a gradient overflowed
        run.scaler.update()
        jepa.update_target_encoder(momentum)

        run.step = step + 1
        is_last = run.step == config.steps
        if run.step % config.log_every == 0 or is_last:
            meters = {"loss": loss.item(), "lr": lr, "ema": momentum}
            if config.batch_size > 1:    # the mean of one clip is the clip
                meters["spread"] = spread(all_targets)
                meters["explained"] = explained(predictions, all_targets, hidden)
            if config.data is None:
                with autocast:
                    meters["kNN"] = knn_of_orders(run.mel, jepa.target_encoder)
            log.write(run.step, meters)
        if run.step % config.save_every == 0 or is_last:
            save(run)
    print(f"{config.out} holds step {run.step} of {config.steps}", flush=True)


# ---- meters: the loss does not tell whether a run learns ---------------------------------------


def spread(all_targets):
    """Standard deviation of the targets (B, N, D) over the clips, averaged over patches and
    features: 0 if all clips have the same targets (collapse), 1 at most."""
    return all_targets.std(0, correction=0).mean().item()


def explained(predictions, all_targets, hidden):
    """R^2 of the predictions (B, K, D), against the mean target of the batch at each position.
    1: perfect. 0: no better than that mean. Negative: worse, as at the start of a run."""
    targets = select(all_targets, hidden)                                           # (B, K, D)
    means = all_targets.mean(0)[hidden]      # at each hidden position, over the clips: (B, K, D)
    return 1 - (F.mse_loss(predictions, targets) / F.mse_loss(means, targets)).item()


class Log:
    """A line on the screen and a row in the CSV file every `log_every` steps and at the end."""

    def __init__(self, config):
        self.config, self.rows, self.header = config, [], None
        self.start, self.waited, self.clips = time.perf_counter(), 0.0, 0

    def next_batch(self, batches):
        """The next batch. Adds up the time spent waiting for it."""
        start, batch = time.perf_counter(), next(batches)
        self.waited += time.perf_counter() - start
        self.clips += len(batch)
        return batch

    def write(self, step, meters):
        """Write the meters of a step, and the speed since the last row or the start."""
        passed, config = time.perf_counter() - self.start, self.config
        left = (config.steps - step) * config.batch_size * passed / self.clips
        row = {"step": step, **meters, "clips/s": self.clips / passed,
               "waiting": self.waited / passed, "left": str(datetime.timedelta(0, round(left)))}
        if self.header != [*row]:
            self.header = [*row]
            print("".join(f"{name:>10}" for name in row))
        print("".join(f"{value:10.3g}" if isinstance(value, float) else f"{value!s:>10}"
                      for value in row.values()), flush=True)
        self.rows.append(row)
        collapsed = [old.get("spread", 1) < MIN_SPREAD for old in self.rows]
        if collapsed[-1] and sum(collapsed) == 1:    # the first such row
            print("warning: all clips have nearly the same targets. The run has collapsed (try a "
                  "lower --lr), or the clips are mostly silence (a shorter --seconds).", flush=True)
        with open(config.out + ".csv", "w", newline="") as file:
            table = csv.DictWriter(file, dict.fromkeys(name for old in self.rows for name in old))
            table.writeheader()
            table.writerows(self.rows)
        self.start, self.waited, self.clips = time.perf_counter(), 0.0, 0


# ---- set-up and checkpoints --------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """The state of a run."""
    config: argparse.Namespace
    crops: Crops
    mel: LogMel
    jepa: AudioJEPA
    optimizers: list
    scaler: torch.amp.GradScaler
    log: Log
    step: int = 0                     # steps done
    saved: int = 0                    # the step of the checkpoint on the disk

    def parts(self):
        """Everything that is saved and loaded by its state_dict."""
        return {"mel": self.mel, "encoder": self.jepa.encoder, "predictor": self.jepa.predictor,
                "target_encoder": self.jepa.target_encoder, "scaler": self.scaler,
                "matrix_optimizer": self.optimizers[0], "other_optimizer": self.optimizers[1]}


def set_up(config, checkpoint):
    """A run at its first step, or where a checkpoint left it."""
    torch.manual_seed(config.seed)                   # weights; all else has its own generator
    torch.set_float32_matmul_precision("high")       # TF32 on CUDA
    mel = LogMel(config.seconds).to(config.device)
    source = open_source(config.data, mel.clip_samples)
    crops = Crops(source, mel.clip_samples, config.seed)
    if checkpoint is None:
        first = [crops.read(i, fill=False) for i in range(CROPS_TO_FIT)]
        for _, failed in first:
            crops.report(failed)
        mel.fit([waveform for waveform, _ in first])
    jepa = AudioJEPA(config.size, config.positions, config.targets).to(config.device)
    scaler = torch.amp.GradScaler(config.device, enabled=config.amp == "fp16")
    run = Run(config, crops, mel, jepa, make_optimizers(jepa, config), scaler, Log(config))
    if checkpoint:
        if checkpoint["fingerprint"] != source.fingerprint:
            raise UserError(f"--data {config.data}: not the files of this run")
        for name, part in run.parts().items():
            part.load_state_dict(checkpoint[name])
        run.step = run.saved = checkpoint["step"]
        run.log.rows = checkpoint["log"]
    if config.compile == "on" or config.compile == "auto" and config.device == "cuda":
        jepa.compile()                               # in place: parameters keep their names
    print(f"{len(source):,} clips; log-mel {mel.mean:.2f} +- {mel.std:.2f}; encoder of "
          f"{sum(p.numel() for p in jepa.encoder.parameters()) / 1e6:.1f} M weights", flush=True)
    return run


def save(run):
    """Write the checkpoint to a temporary file, then rename it: a complete one always exists."""
    check_finite(f"at step {run.step}", run.jepa.parameters())
    content = {"format": FORMAT, "config": vars(run.config), "step": run.step,
               "log": run.log.rows, "fingerprint": run.crops.source.fingerprint}
    content |= {name: part.state_dict() for name, part in run.parts().items()}
    path = os.path.realpath(run.config.out)          # write through a link
    try:
        torch.save(content, path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:         # torch reports a full disk as the latter
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    run.saved = run.step


# ---- the command -------------------------------------------------------------------------------


def parse(argv):
    """The command line -> a dictionary of the settings given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, epilog="In brackets: sounds / laptop / paper, or all.")
    parser.add_argument("--recipe", choices=RECIPES, help="settings to start from; default: sounds "
                        "without --data, else paper on CUDA, laptop elsewhere")
    parser.add_argument("--resume", metavar="CKPT", help="continue this run with its settings")
    for name, (*values, kind, text) in (METHOD | MACHINE).items():
        rule = {"type": kind} if isinstance(kind, type) else {"choices": [*kind]}
        parser.add_argument("--" + name.replace("_", "-"), **rule,
                            help=f"{text} ({' / '.join(map(str, values))})")
    return vars(parser.parse_args(argv))


def resolve(given, resumed):
    """All settings of a run from those given, and the checkpoint at the path `resumed` or None."""
    checkpoint = None if resumed is None else load_checkpoint(resumed)
    kept = checkpoint["config"] | {"out": resumed} if checkpoint else {}
    if kept and (fixed := given.keys() - MACHINE.keys()):
        raise UserError(f"{resumed} keeps the settings that it began with; leave out --"
                        + ", --".join(sorted(fixed)).replace("_", "-"))
    given = kept | given
    device = find_device(given.get("device", "auto"))
    recipe = "sounds" if "data" not in given else "paper" if device == "cuda" else "laptop"
    given = {"recipe": recipe} | given
    config = argparse.Namespace(**(DEFAULTS[given["recipe"]] | given | {"device": device}))
    if config.amp == "auto":
        config.amp = find_amp(device)
    if wrong := [name for name, value in vars(config).items() if isinstance(value, (int, float))
                 and not (value > 0 or value == 0 and name in MAY_BE_ZERO)]:
        raise UserError(f"{', '.join(wrong)}: must be positive")
    return config, checkpoint


@contextlib.contextmanager
def claimed(out):
    """Reserve the file of the checkpoint for this run; release it if the block fails."""
    path = os.path.realpath(out)
    if os.path.exists(path) or os.path.exists(out + ".csv"):
        raise UserError(f"{out} or its log exists: choose another --out, or --resume it")
    open(path, "x").close()
    try:
        yield
    except BaseException:
        os.remove(path)
        raise


def main(argv=None):
    """The command line; returns the exit code."""
    make_output_printable()
    given, run = parse(argv), None
    resumed = given.pop("resume", None)
    try:
        config, checkpoint = resolve(given, resumed)
        print("\n".join(f"{name:11} {value}" for name, value in vars(config).items()), flush=True)
        with contextlib.nullcontext() if config.out == resumed else claimed(config.out):
            new_run = set_up(config, checkpoint)
            save(new_run)                            # fails early if it cannot be written
        run = new_run
        train(run)
    except (UserError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if run:
            print(f"stopped: {run.config.out} holds step {run.saved} of {run.config.steps}; to "
                  f"continue: python train.py --resume {run.config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
