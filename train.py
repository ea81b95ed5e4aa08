"""Chapter 4, training: recipes, schedules, the loop, and what keeps a night's run alive.

In: a folder of audio (--data), or nothing (built-in sounds). Out: a checkpoint, which probe.py and
--resume read, and a log beside it as .csv. Source: Audio-JEPA (arXiv 2507.02915), section 3.

    python train.py                              a first run, on built-in sounds; the README tells
                                                 what it costs and reaches
    python train.py --data /path/audioset        the paper's run on a GPU, a laptop's elsewhere
"""

import argparse
import contextlib
import csv
import datetime
import math
import os
import shutil
import signal
import sys
import time
import uuid

import torch
from torch.nn import functional as F

from data import (N_FRAMES, STOP_SIGNALS, AudioFiles, BuiltInSounds, Crops, InputError, LogMel,
                  default_workers, hop_samples, load_batches, patchify, to_columns)
from masking import MASKS, make_masks
from model import SIZES, AudioJEPA, select

# The paper's learning rate is 3e-4 for base at batch 256. Short runs of a narrow encoder want more.
RECIPES = {
    "sounds": dict(model="tiny", seconds=1.28, mask="columns", batch_size=16, lr=2e-3, steps=1200,
                   log_every=100, save_every=100),
    "laptop": dict(model="tiny", seconds=1.28, mask="columns", batch_size=32, lr=1e-3, steps=1000,
                   log_every=50, save_every=100),
    "paper": dict(model="base", seconds=10.0, mask="random", batch_size=256, lr=3e-4,
                  steps=100_000, log_every=50, save_every=1000)}
FREE_ON_RESUME = {"data", "out", "device", "compile", "workers", "save_every", "log_every"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
FORMAT = "audio-jepa 3"               # of the checkpoints
COLLAPSED = 0.1                       # the spread of a healthy run soon rises above 0.5
LOG_HEAD = "    step / of       loss       lr  spread  explained   kNN  clips/s  waiting      left"
LOG_LINE = ("{step:8} / {0:<8} {loss:7.4f}  {lr:7.1e}  {spread:6.2f}  {explained:9.2f}  {knn:>4}  "
            "{clips_per_second:7,.0f}  {waiting:7.0%}  {1!s:>8}")

# ---- schedules: pure functions of the step, so a resumed run cannot drift ----------------------

def learning_rate(step, config):
    """Linear warm-up over a twentieth of the run, then half a cosine down to 0. That is 5,000 of
    the paper's 100,000 steps. It took 1,000; later its authors found 5,000 better."""
    warmup = 0.05 * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))

def momentum(step, config):
    """The share of the target encoder that a step keeps: it reaches back 1 / (1 - momentum) steps.
    At first that is a tenth of the run, so short and long runs behave alike. The share rises to 1
    by half a cosine (BYOL, arXiv 2006.07733, section 3), so late targets hold still."""
    return 1 - 0.5 * (1 + math.cos(math.pi * step / config.steps)) / (1 + 0.1 * config.steps)

# ---- meters: the loss does not tell whether a run learns ---------------------------------------

def spread(all_targets):
    """The standard deviation of all targets (B, N, D) over the clips at each patch and feature, and
    averaged: 0 means that all clips have the same targets (collapse); it is 1 at most."""
    return all_targets.std(0, correction=0).mean().item()

def explained(predictions, all_targets, hidden):
    """The share of the targets' variance about the batch's mean at their patch that predictions
    explain. 0: they are no better than that mean; 1: they are the targets. Shapes: (B, M, K, D),
    (B, N, D), (B, M, K)."""
    targets, means = select(all_targets, hidden), all_targets.mean(0)[hidden]       # (B, M, K, D)
    return 1 - (F.mse_loss(predictions, targets) / F.mse_loss(means, targets)).item()

def knn_scores(train, labels, test):
    """Votes (m, classes) of the 10 training features (n, D') nearest by cosine to each of `test`
    (m, D'), weighted by softmax(similarity / 0.07) as in X-ARES. labels: (n, classes)."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T             # (m, n)
    nearest, index = similarity.topk(min(10, len(train)), dim=1)
    return torch.einsum("mk,mkc->mc", (nearest / 0.07).softmax(1), labels[index])

@torch.no_grad()
def knn_of_orders(model, mel, crops):
    """Accuracy of kNN on 240 built-in sounds, of which half vote on the order of the others. All
    are of one timbre, or far more would be needed."""
    numbers = [i for i in range(len(crops.source)) if crops.source.labels(i)[1] == "hollow"][:240]
    clips = [next(crops.source.windows(i, crops.n_samples)) for i in numbers]
    patches = patchify(mel(torch.stack(clips).to(mel.mean.device)))
    columns = to_columns(torch.cat([model.target_encoder(part).float()
                                    for part in patches.split(32)])).cpu()          # (240, T', D')
    features = torch.cat(torch.std_mean(columns, dim=1, correction=0), dim=1)       # (240, 2 D')
    orders = torch.tensor([crops.source.labels(i)[0] for i in numbers])
    votes = knn_scores(features[:120], F.one_hot(orders[:120]).float(), features[120:])
    return (votes.argmax(1) == orders[120:]).float().mean().item()

# ---- checkpoints, signals, log -----------------------------------------------------------------

def check_finite(where, tensors):
    """Raise InputError if any number in `tensors` is NaN or infinite."""
    if not math.isfinite(torch.nn.utils.get_total_norm(tensors)):
        raise InputError(f"the loss or the weights {where} are NaN or infinite; start again with a "
                         "lower --lr or with --amp off, and write to another --out")

def save_checkpoint(content, path):
    """Write beside `path`, then rename, so that it is always whole. Raises InputError."""
    aside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"     # no other run may write into the same file
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:         # torch turns a full disk into the latter
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise InputError(f"cannot write {path} ({str(error).splitlines()[0]}); an older one there "
                         "is whole, and --resume goes on from it") from error

def load_checkpoint(path):
    """The content of a checkpoint, on the CPU. Executes nothing in the file. Raises InputError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                       # a damaged file can raise anything
        raise InputError(f"{path}: not a checkpoint that can be read "
                         f"({getattr(error, 'strerror', None) or type(error).__name__})") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: made by an older version of this code; train anew with this one"
                         if str(found).startswith("audio-jepa") else
                         f"{path}: not a checkpoint of train.py")
    check_finite(f"in {path}", checkpoint["target_encoder"].values())
    return checkpoint

class Stop:
    """Answers the first SIGINT, SIGTERM or SIGHUP: the step is finished and saved, then we end. A
    wait for data is broken off by a KeyboardInterrupt. A second signal ends the process at once."""

    def __init__(self):
        self.signum, self.waiting = None, False
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:       # nohup has SIGHUP ignored
                signal.signal(signum, self.answer)

    def answer(self, signum, _):
        self.signum, name = signum, signal.Signals(signum).name
        signal.signal(signum, signal.SIG_DFL)
        if name == "SIGHUP":                         # the terminal is gone: nowhere to print to
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print(f"{name}: finishing this step, then saving", file=sys.stderr, flush=True)
        if self.waiting:
            raise KeyboardInterrupt

class Log:
    """A line on the screen and a row in the CSV file for every `log_every` steps."""

    def __init__(self, config):
        self.config, self.path, self.rows = config, os.path.splitext(config.out)[0] + ".csv", []
        self.start, self.waited, self.clips = time.perf_counter(), 0.0, 0

    def next_batch(self, batches, stop):
        """The next batch. Adds up the time spent waiting, in which a signal may break in."""
        start, stop.waiting = time.perf_counter(), True
        batch = next(batches)
        stop.waiting = False
        self.waited, self.clips = self.waited + time.perf_counter() - start, self.clips + len(batch)
        return batch

    def write(self, row):
        """Write the row of a step, and how fast the steps since the last row were."""
        passed, steps = time.perf_counter() - self.start, self.config.steps
        row |= {"clips_per_second": self.clips / passed, "waiting": self.waited / passed}
        left = (steps - row["step"]) * self.config.batch_size / row["clips_per_second"]
        self.rows.append(row)
        with open(self.path, "w", newline="") as file:
            table = csv.DictWriter(file, row)
            table.writeheader()
            table.writerows(self.rows)
        print(LOG_LINE.format(steps, datetime.timedelta(seconds=round(left)), **row), flush=True)
        low = [old for old in self.rows if old["spread"] < COLLAPSED]
        if low == [row] and self.config.batch_size > 1:          # a single clip has no spread
            print("warning: all clips have nearly the same targets. Either the clips are mostly "
                  "silence (choose a shorter --seconds), or the run has collapsed (try a lower "
                  "--lr or a larger --batch-size).", flush=True)
        self.start, self.waited, self.clips = time.perf_counter(), 0.0, 0

# ---- the run -----------------------------------------------------------------------------------

def make_optimizer(model, lr):
    """AdamW with the paper's constants. Matrices decay; biases and norms do not, as is usual."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.05},
         {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), fused=True)

def use_fast_arithmetic(config):
    """Allow arithmetic that is faster and rounds a little differently."""
    torch.set_float32_matmul_precision("high")       # TF32 on CUDA
    # In bf16 on a CPU the backward pass of fused attention takes six times as long as that of the
    # plain one. Despite their names, these two switches rule CPUs, too.
    plain = config.device == "cpu" and config.amp == "bf16"
    torch.backends.cuda.enable_flash_sdp(not plain)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)

def train(config, checkpoint=None):
    """Run the training that `config` describes, from the start or from where a checkpoint ends.
    Returns the number of the signal that ended it early, or None. Raises InputError."""
    torch.manual_seed(config.seed)
    use_fast_arithmetic(config)
    device = config.device
    source = AudioFiles(config.data) if config.data else BuiltInSounds()
    crops = Crops(source, hop_samples(config.seconds) * N_FRAMES, config.seed)
    mel, model = LogMel(config.seconds).to(device), AudioJEPA(config.model).to(device)
    autocast = torch.autocast(device, DTYPES[config.amp], enabled=config.amp != "off")
    optimizer = make_optimizer(model, config.lr)
    scaler = torch.amp.GradScaler(device, enabled=config.amp == "fp16")
    parts = {"encoder": model.encoder, "target_encoder": model.target_encoder,
             "predictor": model.predictor, "mel": mel, "optimizer": optimizer, "scaler": scaler}
    done, log, stop = 0, Log(config), Stop()

    def save():
        check_finite(f"at step {done}", model.parameters())
        save_checkpoint({"format": FORMAT, "config": vars(config), "step": done, "log": log.rows,
                         "failures": crops.failures, "fingerprint": source.fingerprint}
                        | {name: part.state_dict() for name, part in parts.items()}, config.out)

    if checkpoint:
        if checkpoint["fingerprint"] != source.fingerprint:
            raise InputError(f"--data {config.data}: not the files that this run began with")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        done, log.rows, crops.failures = (checkpoint[k] for k in ("step", "log", "failures"))
    else:
        mel.fit(crops)
        save()                                       # if it cannot be written, fail now
    if config.compile:
        model.compile()                              # in place: parameters keep their names
    print(f"{len(source):,} clips; log-mel {mel.mean:.2f} +- {mel.std:.2f}; encoder of "
          f"{sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f} M weights\n{LOG_HEAD}",
          flush=True)

    steps = range(done, config.steps)
    batches = load_batches(crops, config.batch_size, steps, config.workers, device == "cuda")
    with contextlib.closing(batches), contextlib.suppress(KeyboardInterrupt):
        for step in steps:
            waveforms = log.next_batch(batches, stop)
            visible, hidden = make_masks(config.mask, config.batch_size, config.seed, step)
            visible, hidden = visible.to(device), hidden.to(device)
            with autocast:
                patches = patchify(mel(waveforms.to(device, non_blocking=True)))
                loss, predictions, all_targets = model(patches, visible, hidden)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            scaler.step(optimizer)                   # in fp16, not if a gradient overflowed
            scaler.update()
            model.update_target_encoder(momentum(step, config))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                check_finite(f"at step {done}", [loss, *model.parameters()])
                with autocast:
                    knn = "" if config.data else f"{knn_of_orders(model, mel, crops):.0%}"
                log.write({"step": done, "loss": loss.item(), "lr": learning_rate(step, config),
                           "momentum": momentum(step, config), "spread": spread(all_targets),
                           "explained": explained(predictions, all_targets, hidden), "knn": knn,
                           "failures": crops.failures})
            if done % config.save_every == 0:
                save()
            if stop.signum:
                break
    save()
    print(f"saved {config.out} at step {done}", flush=True)
    return stop.signum if done < config.steps else None

# ---- the command -------------------------------------------------------------------------------

def at_least(low, kind=int):
    """A type for argparse: a finite number of this kind that is not below `low`."""
    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return kind(text)
    return number

def parse(argv):
    """The command line -> a dictionary of the settings that were given there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, epilog="recipes:\n" + "\n".join(
            f"  {name}: {', '.join(f'{key} {value}' for key, value in recipe.items())}"
            for name, recipe in RECIPES.items()))
    add = parser.add_argument
    add("--data", help="folder of audio, or text file of paths; without it, built-in sounds")
    add("--recipe", choices=RECIPES, help="settings to start from, each of which a flag overrides "
        "(without --data sounds, with it paper on CUDA, laptop elsewhere)")
    add("--out", help="checkpoint to write, with the log beside it as .csv (ckpt.pt)")
    add("--resume", metavar="CKPT", help="go on with this checkpoint, with its settings")
    add("--model", choices=SIZES, help="size of the encoder; base is ViT-B")
    add("--seconds", type=at_least(0.25, float), help="length of a clip")
    add("--mask", choices=MASKS, help="which patches to hide")
    add("--batch-size", type=at_least(1), help="clips in a step")
    add("--steps", type=at_least(1), help="length of the run; every schedule depends on it")
    add("--lr", type=at_least(0, float), help="peak learning rate")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), help="auto: the first that is there")
    add("--amp", choices=("auto", *DTYPES), help="mixed precision; auto: bf16 where the hardware "
        "computes in it, else fp16 on CUDA, else off")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on with CUDA)")
    add("--workers", type=at_least(0), help="processes that read audio (cores - 1, at most 16)")
    add("--seed", type=at_least(0), help="of weights, order, crops and masks (0)")
    add("--save-every", type=at_least(1), help="steps between checkpoints")
    add("--log-every", type=at_least(1), help="steps between lines of the log")
    return vars(parser.parse_args(argv))

def find_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> one that this machine has. Raises InputError."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name not in ("auto", "cpu", *here):
        raise InputError(f"--device {name}: this machine has {', '.join([*here, 'cpu'])}")
    return [*here, "cpu"][0] if name == "auto" else name

def find_amp(device):
    """The mixed precision that the hardware of a device computes in: 'bf16', 'fp16' or 'off'."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"

def resolve(given, resumed):
    """All settings of a run, from those given on the command line, and the checkpoint at `resumed`,
    or None. Raises InputError if such a run cannot be made, or not be saved."""
    if resumed is None:
        checkpoint, device = None, find_device(given.get("device", "auto"))
        recipe = "sounds" if "data" not in given else "paper" if device == "cuda" else "laptop"
        recipe = given.get("recipe", recipe)
        usual = dict(data=None, recipe=recipe, out="ckpt.pt", amp="auto", seed=0,
                     compile=device == "cuda", workers=default_workers()) | RECIPES[recipe]
    else:
        checkpoint = load_checkpoint(resumed)
        usual = checkpoint["config"] | {"out": resumed}
        device = find_device(given.get("device", usual["device"]))
        if fixed := given.keys() - FREE_ON_RESUME:
            raise InputError(f"{resumed} keeps the settings that it began with; leave out --"
                             + ", --".join(sorted(fixed)).replace("_", "-"))
        if checkpoint["step"] == usual["steps"]:
            raise InputError(f"{resumed} is complete: it has all of its {usual['steps']} steps")
    config = argparse.Namespace(**(usual | given | {"device": device}))
    if config.amp == "auto":
        config.amp = find_amp(device)
    folder, log = os.path.dirname(config.out) or ".", Log(config).path
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)) or log == config.out:
        raise InputError(f"--out {config.out}: choose a file, not a .csv, in a folder to write to")
    for path in (config.out, log):
        if os.path.exists(path) and config.out != resumed:
            raise InputError(f"{path} exists: --resume {config.out}, or choose another --out")
    if config.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("torch.compile needs a C++ compiler: apt install g++, or --no-compile")
    return config, checkpoint

def main(argv=None):
    """The command line; returns the exit code."""
    given = parse(argv)
    resumed = given.pop("resume", None)
    try:
        if "" in (resumed, given.get("data")):
            raise InputError("--data and --resume need a path")
        config, checkpoint = resolve(given, resumed)
        print("\n".join(f"{name:11} {value}" for name, value in vars(config).items()), flush=True)
        signum = train(config, checkpoint)
    except (InputError, OSError) as error:           # OSError: a disk that is gone, say
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:                        # before the first step: nothing to save
        return 130
    return 128 + signum if signum else 0

if __name__ == "__main__":
    sys.exit(main())
