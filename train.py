"""Chapter 4, training: the loop, its schedules, its log, and how a run survives the night.

In: a folder of audio (`--data`), or nothing (built-in sounds). Out: a checkpoint that `probe.py` and `--resume` read, and
a CSV log beside it. Source: Audio-JEPA (arXiv 2507.02915), section 3.

    python train.py                              a first run, a few minutes on a laptop, no data needed
    python train.py --data /path/audioset        the paper's size and length, not its masks
"""

import argparse
import collections
import csv
import dataclasses
import datetime
import itertools
import math
import os
import signal
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import N_FRAMES, AudioFiles, Batches, BuiltInSounds, InputError, LogMel, hop_samples, make_loader
from masking import MASKS, N_PATCHES, make_masks
from model import PATCH, WIDTHS, AudioJEPA, load_checkpoint, patchify, restore

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.05     # of AdamW, as in the paper
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
MAX_FAILED = 0.05                     # of the last 1,000 reads: more failed ones than this end the run
COLLAPSED = 0.1                       # a spread of the goals below this gets a warning; healthy runs rise above 0.5


def setting(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """The settings of a run that have a flag on the command line; all are saved in the checkpoint."""
    data: str = setting("", "folder of audio (wav flac ogg opus mp3 aiff), or a text file of paths; none: built-in sounds")
    out: str = setting("ckpt.pt", "the checkpoint to write; the log goes beside it as .csv")
    model: str = setting("base", "size of the encoder: tiny, small or base (ViT-B)")
    seconds: float = setting(10.0, "length of a clip: 10 as in the paper; 0.64 to 1.28 suits speech and short sounds")
    steps: int = setting(100_000, "length of the run; all schedules stretch with it")
    batch_size: int = setting(256, "clips a step")
    lr: float = setting(0.0, "peak learning rate; 0.0: 3e-4 * sqrt(batch size / 256) * 768 / width")
    mask: str = setting("block", "block (I-JEPA's multi-block masks) or random (3 of 5 patches)")
    device: str = setting("auto", "cuda, mps or cpu; auto: the first of these that is there")
    amp: str = setting("auto", "mixed precision: bf16, fp16 or off (TF32 on CUDA); auto: bf16 or else fp16 on CUDA, else off")
    compile: bool = setting(None, "torch.compile the model; the default is on for CUDA, off elsewhere")
    workers: int = setting(-1, "processes that read audio; -1: cores less one, but 1 to 16; 0: none")
    seed: int = setting(0, "of the weights, the order of the clips, the crops and the masks")
    save_every: int = setting(1000, "steps between checkpoints")
    log_every: int = setting(50, "steps between log lines")


BUILT_IN = dict(model="tiny", seconds=1.28, steps=250, batch_size=32, log_every=25, save_every=50)
BUILT_IN_CLIPS = 2400
FREE_ON_RESUME = {"data", "out", "device", "compile", "workers", "save_every", "log_every"}  # at most rounding changes


# ---- schedules: pure functions of the step, so a resumed run cannot drift -----------------------------------------------

def peak_learning_rate(config):
    """The paper's 3e-4 for base at batch 256; more for larger batches (less noise) and for narrower encoders.

    By the root of the batch, as suits Adam (arXiv 2205.10287), and the inverse of the width (arXiv 2203.03466).
    """
    return 3e-4 * math.sqrt(config.batch_size / 256) * 768 / WIDTHS[config.model]


def learning_rate(step, config):
    """Linear warm-up over a twentieth of the run, then half a cosine down to 0.

    Of 100,000 steps that is 5,000. The paper took 1,000; in its authors' later sweeps 5,000 beat both that and 10,000.
    """
    warmup = 0.05 * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def momentum(step, config):
    """Share of the old target kept at a step: the target averages the encoder over about 1 / (1 - momentum) steps.

    At first that is a fiftieth of the run, so short and long runs behave alike; the share then rises to 1 by half a cosine,
    as in BYOL (arXiv 2006.07733), section 3: late in training the goals hold still.
    """
    replaced = 1 / (1 + 0.02 * config.steps)
    return 1 - replaced * 0.5 * (1 + math.cos(math.pi * step / config.steps))


# ---- the step -----------------------------------------------------------------------------------------------------------

class Trainer:
    """All that a step needs, made from the settings; only `mel` must still be fitted to the sound, or restored."""

    def __init__(self, config):
        torch.manual_seed(config.seed)
        self.config, self.device = config, torch.device(config.device)
        self.model, self.mel = AudioJEPA(config.model).to(self.device), LogMel(config.seconds).to(self.device)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in learned if p.ndim > 1]},                       # matrices decay, biases and norms do not
             {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0}],
            lr=config.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        # On CPUs in bf16 the fused attention's backward pass takes six times as long as the plain one's.
        plain = self.device.type == "cpu" and config.amp == "bf16"
        torch.backends.cuda.enable_flash_sdp(not plain)                            # despite their names, both rule CPUs too
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)              # the plain one's sums in bf16
        self.parts = {"encoder": self.model.encoder, "target": self.model.target, "predictor": self.model.predictor,
                      "mel": self.mel, "optimizer": self.optimizer, "scaler": self.scaler}       # what a checkpoint holds
        if config.compile:
            self.model.compile()                                                   # in place: parameter names stay plain

    def to_device(self, tensor):
        """A copy that a GPU fetches by itself, from pinned memory, while we go on."""
        on_cuda = self.device.type == "cuda"
        return (tensor.pin_memory() if on_cuda and not tensor.is_cuda else tensor).to(self.device, non_blocking=on_cuda)

    def gradients(self, waveforms, step):
        """The first half of a training step, for waveforms (B, S): masks, patches, loss, gradients. `update` is the second;
        between them a bad loss can still stop the run.

        Returns, on the device (to read one is to wait for it): loss (), norm of its gradient (), which is not clipped,
        predictions and goals (B, M, K, D), targets (B, M, K).
        """
        context, targets = map(self.to_device, make_masks(self.config.mask, len(waveforms), self.config.seed, step))
        with torch.autocast(self.device.type, DTYPES[self.config.amp], enabled=self.config.amp != "off"):
            patches = patchify(self.mel(self.to_device(waveforms)))                # (B, S) -> (B, F, T) -> (B, N, E)
            loss, predictions, goals = self.model(patches, context, targets)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        return loss.detach(), norm, predictions.detach(), goals, targets

    def update(self, step):
        """The second half: the optimiser moves the encoder and the predictor, then the target follows the encoder."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        self.scaler.step(self.optimizer)                                           # fp16: skips a step that overflowed
        self.scaler.update()
        self.model.update_target(momentum(step, self.config))


def spread(vectors, targets):
    """How much vectors (B, M, K, D) differ between clips where they belong to the same patch: their deviation, averaged.

    The collapse meter: goals have unit variance over their features, so 1 says "they vary with the clip alone", 0 "not
    at all". Predictions vary with the mask, too. Small batches read low: at a patch that one clip alone has in two
    blocks there is nothing to differ.
    """
    where = torch.nn.functional.one_hot(targets.flatten(), N_PATCHES).float()      # (B M K, N)
    vectors, count = vectors.float().flatten(0, 2), where.sum(0)[:, None]          # (B M K, D), (N, 1)
    mean, square = (where.T @ x / count.clamp(min=1) for x in (vectors, vectors ** 2))
    return (square - mean ** 2).clamp(min=0).sqrt()[count[:, 0] > 1].mean().item()


# ---- the run ------------------------------------------------------------------------------------------------------------

def save_checkpoint(content, path):
    """Write to one side, then rename: whatever happens, `path` is a whole checkpoint, the old one or the new one."""
    aside = path + ".tmp"
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:                                       # torch turns a full disk into the latter
        if os.path.exists(aside):
            os.remove(aside)
        raise InputError(f"cannot write {path} ({str(error).splitlines()[0]}); the last checkpoint there, if any, is "
                         "whole: make room, then use --resume") from error


def log_path(out):
    return os.path.splitext(out)[0] + ".csv"


def write_log(rows, path):
    """The log so far as CSV; a reader never finds half a file."""
    with open(path + ".tmp", "w", newline="") as file:
        log = csv.DictWriter(file, rows[0])
        log.writeheader()
        log.writerows(rows)
    os.replace(path + ".tmp", path)


def make_batches(config):
    """The batches of a run. Raises InputError if there is no audio."""
    source = AudioFiles(config.data) if config.data else BuiltInSounds(BUILT_IN_CLIPS, config.seconds)
    return Batches(source, config.batch_size, hop_samples(config.seconds) * N_FRAMES, config.seed)


def check_finite(losses, step, batches):
    """Raise InputError, naming the clips, at the first of `losses` (of the last steps, up to `step`) that is not finite."""
    for number, loss in enumerate(torch.stack(losses).tolist(), start=step - len(losses) + 1):
        if not math.isfinite(loss):
            clips = ", ".join(batches.source.name(index) for index in batches.clips(number))
            raise InputError(f"the loss or gradient of step {number + 1} is {loss}; stopped before it reached the checkpoint. "
                             "Try a new run (another --out) with a lower --lr or --amp off, or without a bad clip. The clips "
                             f"of this step: {clips}")


class FailedReads:
    """Keeps count of the files that could not be used: each is told once, and too many of them end the run."""

    def __init__(self, total, batch_size, data):
        self.total, self.data, self.told = total, data, set()
        self.recent = collections.deque(maxlen=math.ceil(1000 / batch_size))       # of each batch: failures, reads

    def add(self, batch):
        for name, reason in batch.failures:
            if name not in self.told:
                print(f"unusable: {name}: {reason}", flush=True)
                self.told.add(name)
        self.total += len(batch.failures)
        self.recent.append((len(batch.failures), len(batch.failures) + len(batch.filled)))
        failed, reads = map(sum, zip(*self.recent))
        if batch.waveforms is None or reads >= 1000 and failed > MAX_FAILED * reads:
            raise InputError(f"{failed} of the last {reads} reads from {self.data} failed (reasons above); is it whole and "
                             "mounted? The last checkpoint, if any, is good; --resume goes on from it")


def train(config, checkpoint=None):
    """Run the training that `config` describes, from the start or from where a loaded checkpoint ends.

    Returns the number of the signal that ended it early, or None. Raises InputError.
    """
    batches, trainer = make_batches(config), Trainer(config)
    n_clips, mel = len(batches.source), trainer.mel
    first, rows, unusable = (checkpoint[key] for key in ("step", "log", "unusable")) if checkpoint else (0, [], 0)
    failed = FailedReads(unusable, config.batch_size, config.data)

    def save(step):
        save_checkpoint({"format": "audio-jepa 1", "config": dataclasses.asdict(config), "step": step, "log": rows,
                         "unusable": failed.total, "n_clips": n_clips,
                         **{name: part.state_dict() for name, part in trainer.parts.items()}}, config.out)

    if checkpoint:
        if checkpoint["n_clips"] != n_clips:
            raise InputError(f"--data {config.data}: {n_clips} clips now, {checkpoint['n_clips']} when the run began")
        for name, part in trainer.parts.items():
            restore(part, checkpoint, name)
    else:
        mel.fit(batches)
        save(0)                                                                    # if it cannot be written, fail now
    print(f"{n_clips:,} clips; encoder of {sum(p.numel() for p in trainer.model.encoder.parameters()) / 1e6:.1f} M "
          f"parameters; log-mel {mel.mean:.2f} +- {mel.deviation:.2f}", flush=True)

    stopped = []
    def stop(signum, _):
        stopped.append(signum)
        signal.signal(signum, signal.SIG_DFL)                                      # the same again ends us at once
        print(f"{signal.Signals(signum).name}: finishing this step, then saving", flush=True)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    losses, warned = [], False                                                     # losses: those not looked at yet
    wait_start = line_start = time.perf_counter()
    seconds_waited = clips_done = 0                                                # since the last log line
    steps = range(first, config.steps)
    for step, batch in zip(steps, make_loader(batches, steps, config.workers, trainer.device)):
        seconds_waited += time.perf_counter() - wait_start
        failed.add(batch)
        loss, norm, predictions, goals, targets = trainer.gradients(batch.waveforms, step)
        losses.append(loss if config.amp == "fp16" else loss + 0 * norm)           # NaN if either is bad; fp16 skips bad steps
        done, clips_done = step + 1, clips_done + config.batch_size
        stopping = bool(stopped)                                                   # a later signal waits for the next step
        logs = done % config.log_every == 0 or done == config.steps
        saves = done % config.save_every == 0 or done == config.steps or stopping
        if logs or saves or trainer.device.type == "cpu":                          # a GPU would have to wait for each look
            check_finite(losses, step, batches)
            losses.clear()
        trainer.update(step)

        if logs:
            passed = time.perf_counter() - line_start
            row = {"step": done, "loss": loss.item(), "lr": learning_rate(step, config), "momentum": momentum(step, config),
                   "goal_spread": spread(goals, targets), "prediction_spread": spread(predictions, targets),
                   "gradient_norm": norm.item(), "unusable": failed.total,
                   "clips_per_second": clips_done / passed, "waiting": seconds_waited / passed,
                   "seconds_left": (config.steps - done) * config.batch_size * passed / clips_done}
            rows.append(row)
            write_log(rows, log_path(config.out))
            print("step {step}/{0}  loss {loss:.4f}  lr {lr:.1e}  momentum {momentum:.4f}  goal spread {goal_spread:.2f}  "
                  "prediction spread {prediction_spread:.2f}  gradient {gradient_norm:.2f}  unusable {unusable}  "
                  "{clips_per_second:.0f} clips/s  waiting {waiting:.0%}  left {1}".format(
                      config.steps, datetime.timedelta(seconds=round(row["seconds_left"])), **row), flush=True)
            if row["goal_spread"] < COLLAPSED and config.batch_size > 1 and not warned:
                warned = True
                print(f"warning: the goals hardly differ between clips (spread under {COLLAPSED}): this is collapse. Try a "
                      "lower --lr or a larger --batch-size, and check by ear that the clips are not all alike", flush=True)
            line_start, seconds_waited, clips_done = time.perf_counter(), 0, 0
        if saves:
            save(done)
        if stopping:
            break
        wait_start = time.perf_counter()
    print(f"saved {config.out} at step {done}", flush=True)
    return stopped[0] if stopped and done < config.steps else None


# ---- the bench: is the accelerator starved? -----------------------------------------------------------------------------

def step_flop(config):
    """Arithmetic of one training step in FLOP, matrix products alone: that of one clip, counted as it runs, times B."""
    masks = make_masks(config.mask, 1, config.seed, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):    # the attention whose products it sees
        AudioJEPA(config.model)(torch.randn(1, N_PATCHES, PATCH ** 2), *masks)[0].backward()
    return config.batch_size * counter.get_total_flops()


def laps(n, warm_up, items, work, device):
    """Do work(i, item) for some items, then for n more: [(seconds waited for it, seconds waited and worked)] of the n."""
    times, start = [], time.perf_counter()
    for i, item in zip(range(warm_up + n), items):
        waited = time.perf_counter() - start
        work(i, item)
        torch.get_device_module(device).synchronize()
        times.append((waited, time.perf_counter() - start))
        start = time.perf_counter()
    return times[warm_up:]


def bench(config, n):
    """Time at least n steps of the training that `config` describes, without a checkpoint: loader, step, both together.

    Rates are those of all steps together, for batches come in bursts, one from each worker.
    """
    import resource                                                                # here, not above: Windows has none
    from torch._dynamo.utils import counters                                       # and this costs a second
    batches, trainer, workers = make_batches(config), Trainer(config), max(1, config.workers)
    trainer.mel.fit(batches)
    failed = FailedReads(0, config.batch_size, config.data)
    n = workers * math.ceil(n / workers)                                           # whole rounds: batches come one from each
    n_read = n + 4 * workers                                                       # 2 each to warm up, 2 ahead to the end
    loaders = [make_loader(batches, steps, config.workers, trainer.device)         # two: a disk remembers what it has read
               for steps in (range(n_read), range(n_read, 2 * n_read))]
    batch = batches[0]
    batch = batch._replace(waveforms=batch.waveforms.to(trainer.device), failures=[])

    def step(i, batch):
        failed.add(batch)
        trainer.gradients(batch.waveforms, i)
        trainer.update(i)

    step(0, batch)
    compiled, seconds = counters["stats"]["unique_graphs"], {}
    for name, warm_up, items, work in (("loader", 2 * workers, loaders[0], lambda i, batch: failed.add(batch)),
                                       ("step", 2, itertools.repeat(batch), step), ("both", 2 * workers, loaders[1], step)):
        waits, wholes = zip(*laps(n, warm_up, items, work, trainer.device))
        seconds[name] = sum(wholes) / n
        low, high = (1000 * statistics.quantiles(wholes, n=10)[i] for i in (0, -1))
        print(f"{name:8} {config.batch_size / seconds[name]:10,.1f} clips/s   waiting for data {sum(waits) / sum(wholes):4.0%}"
              f"   a step {1000 * statistics.median(wholes):,.1f} ms (80 % of them {low:,.1f} to {high:,.1f})", flush=True)
    print(f"loader   {config.batch_size / seconds['loader'] / workers:10,.1f} clips/s for each of {workers} worker(s)")

    side = 8192 if trainer.device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=trainer.device, dtype=DTYPES[config.amp])
    products = [whole for _, whole in laps(10, 2, range(12), lambda i, item: a @ b, trainer.device)]
    flop, best = step_flop(config), 2 * side ** 3 / statistics.median(products)
    rate = flop / seconds["step"]
    print(f"arithmetic: {flop / 1e9:,.1f} GFLOP a step, {rate / 1e9:,.0f} GFLOP/s in the step alone; one large matrix "
          f"product in {config.amp}: {best / 1e9:,.0f} GFLOP/s; utilisation {rate / best:.2f}")
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20                        # macOS counts bytes, Linux KiB
    own, worker = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    gpu = torch.cuda.max_memory_allocated() / 2 ** 30 if trainer.device.type == "cuda" else 0
    print(f"peak memory: {own:.2f} GiB here, {worker:.2f} in the largest worker (shared pages in both), {gpu:.2f} on the GPU")
    print(f"compilations after the first step: {counters['stats']['unique_graphs'] - compiled}")


# ---- the command --------------------------------------------------------------------------------------------------------

def flag(name):
    """The flag of a setting, as the user types it."""
    return "--" + name.replace("_", "-")


def parse(argv):
    """Command line -> (the settings given there, the checkpoint to resume or None, steps to benchmark or None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --data the defaults are " + " ".join(f"{flag(name)} {value}" for name, value in BUILT_IN.items()))
    for field in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        default = "" if field.default in ("", None) else f" ({field.default})"
        parser.add_argument(flag(field.name), help=field.metadata["help"] + default, **kind)
    parser.add_argument("--resume", metavar="CKPT", help="go on with this checkpoint, with its settings")
    parser.add_argument("--bench", metavar="N", type=int, nargs="?", const=50,
                        help="time N steps (50) of this training instead of training")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume", None), given.pop("bench", None)


def find_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> torch.device. Raises InputError if this machine has no such device."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    kind = here[0] if name == "auto" else name
    if kind not in here:
        raise InputError(f"--device {name}: not on this machine, which has {', '.join(here)}")
    return torch.device(kind)


def resolve(config):
    """Check every setting, and replace each 'auto' by what it means on this machine. Raises InputError."""
    def need(ok, name, message):
        if not ok:
            raise InputError(f"{flag(name)} {getattr(config, name)}: {message}")
    for name, choices in (("model", WIDTHS), ("mask", MASKS)):
        need(getattr(config, name) in choices, name, f"choose one of {', '.join(choices)}")
    for name, low, high in (("steps", 1, 10 ** 9), ("batch_size", 1, 10 ** 6), ("save_every", 1, 10 ** 9),
                            ("log_every", 1, 10 ** 9), ("workers", -1, 1000), ("seed", 0, 2 ** 32 - 1), ("lr", 0, 1),
                            ("seconds", 0.25, 60)):                                # below, the windows of the spectrum are 2 ms
        need(low <= getattr(config, name) <= high, name, f"must lie between {low} and {high}")
    folder = os.path.dirname(config.out) or "."
    need(os.path.isdir(folder) and os.access(folder, os.W_OK), "out", f"{folder} is no folder to write to")
    need(log_path(config.out) != config.out, "out", "that is where the log goes; choose a name that ends in .pt")
    device = find_device(config.device).type
    on_cuda = device == "cuda"
    amps = ["off", "bf16"]                                                         # what the device can do, 'auto' first
    if on_cuda:
        amps = ["bf16"] * torch.cuda.is_bf16_supported(including_emulation=False) + ["fp16", "off"]
    need(config.amp in ("auto", *amps), "amp", f"on {device} choose auto or one of {', '.join(amps)}")
    return dataclasses.replace(
        config, device=device, lr=config.lr or peak_learning_rate(config), amp=amps[0] if config.amp == "auto" else config.amp,
        compile=on_cuda if config.compile is None else config.compile,
        workers=config.workers if config.workers >= 0 else max(1, min(16, (os.cpu_count() or 1) - 1)))


def main(argv=None):
    """The command line; returns the exit code."""
    given, resume, n_bench = parse(argv)
    try:
        if n_bench is not None and n_bench < 2:
            raise InputError(f"--bench {n_bench}: must be at least 2")
        if given.get("data") == "":
            raise InputError("--data is empty; leave it out for the built-in sounds")
        checkpoint = load_checkpoint(resume) if resume else None
        if checkpoint:
            saved = checkpoint["config"]
            changed = [f"{flag(name)} {value} (it has {saved[name]})" for name, value in given.items()
                       if name not in FREE_ON_RESUME and value != saved[name]]
            if changed:
                raise InputError(f"{resume} began with other settings, which --resume keeps: {', '.join(changed)}")
            settings = saved | {"out": resume} | given
            if checkpoint["step"] >= settings["steps"]:
                raise InputError(f"{resume} is complete: {settings['steps']} of {settings['steps']} steps")
        else:
            settings = given if "data" in given else BUILT_IN | given
        config = resolve(Config(**settings))
        for path in (config.out, log_path(config.out)):
            if os.path.exists(path) and config.out != resume and not n_bench:
                raise InputError(f"{path} exists: go on with --resume {config.out}, or choose another --out")
        print("\n".join(f"{name:11} {value}" for name, value in dataclasses.asdict(config).items()), flush=True)
        signum = bench(config, n_bench) if n_bench else train(config, checkpoint)
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:        # memory, or a dead worker
        words = "out of memory", "allocate memory", "DataLoader worker (pid"
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        print(f"train.py: out of memory, or a worker died ({reason}). --resume with fewer --workers may go on; else start anew "
              "with another --out and a lower --batch-size or --model", file=sys.stderr)
        return 1
    except (InputError, OSError) as error:                                         # OSError: the disk of the log, say
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:                                                      # before the first step: nothing to save
        return 130
    return 128 + signum if signum else 0


if __name__ == "__main__":
    sys.exit(main())
