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
import functools
import math
import os
import shutil
import signal
import sys
import time
import uuid

import torch
from torch.nn import functional as F

import data
from data import InputError, patchify
from masking import MASKS, make_masks
from model import SIZES, AudioJEPA, select

RECIPES = {
    "sounds": dict(model="tiny", seconds=1.28, mask="block", optimizer="muon", batch_size=16,
                   lr=0.01, steps=1000, log_every=100, save_every=100),
    "laptop": dict(model="tiny", seconds=1.28, mask="block", optimizer="muon", batch_size=16,
                   lr=0.005, steps=2000, log_every=100, save_every=100),
    "paper": dict(model="base", seconds=10.0, mask="random", optimizer="adamw", batch_size=256,
                  lr=3e-4, steps=100_000, log_every=50, save_every=1000)}
FREE_ON_RESUME = {"data", "out", "device", "compile", "workers", "save_every", "log_every"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
FORMAT = "audio-jepa 4"               # of the checkpoints
COLLAPSED = 0.1                       # the spread of a healthy run stays above 0.4
LOG_HEAD = "    step / of       loss       lr  spread  explained   kNN  clips/s  waiting      left"
LOG_LINE = ("{step:8} / {of:<8} {loss:7.4f}  {lr:7.1e}  {spread:6.2f}  {explained:9.2f}  {knn:>4}  "
            "{clips_per_second:7,.0f}  {waiting:7.0%}  {left!s:>8}")


# ---- schedules and optimisers ------------------------------------------------------------------


def learning_rate(step, config):
    """A pure function of the step, so a resumed run cannot drift: a linear warm-up over a twentieth
    of the run, then half a cosine down to 0. In the paper's run that is 5,000 of 100,000 steps. The
    paper has 1,000, and its authors later found 5,000 better."""
    warmup = 0.05 * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def ema_momentum(step, config):
    """The share of the target encoder that a step keeps. So the target encoder is an average of the
    encoder over about the last 1 / (1 - momentum) steps. At first that is a tenth of the run, so
    short and long runs behave alike. The share rises to 1 by half a cosine (BYOL, arXiv 2006.07733,
    section 3), so late targets hold still."""
    return 1 - 0.5 * (1 + math.cos(math.pi * step / config.steps)) / (1 + 0.1 * config.steps)


def make_optimizers(model, config):
    """Two optimisers: one for the matrices of the layers, which decay, and one for the rest
    (embeddings, biases, norms, mask token), which does not. `share` is their part of --lr.

    Not in the paper: it has AdamW for all. Muon moves a matrix by as much in all directions (it
    sets the singular values of an update to about 1), so weak signals are learned as fast as
    strong ones such as loudness. It is made for matrices between hidden features, so everything
    else stays with AdamW, at a tenth of the rate. From 2,000 to 8,000 steps the same rate is best.
    Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); AdamW, arXiv 1711.05101."""
    matrices, others = [], []
    for name, weights in model.named_parameters():
        if weights.requires_grad:
            in_layer = ".layers." in name and weights.ndim == 2
            (matrices if in_layer else others).append(weights)
    adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True)
    first, share = (torch.optim.Muon, 0.1) if config.optimizer == "muon" else (adamw, 1.0)
    return [first([{"params": matrices, "share": 1.0}], weight_decay=0.05),     # `train` sets lr
            adamw([{"params": others, "share": share}], weight_decay=0.0)]


# ---- the run -----------------------------------------------------------------------------------


def use_fast_arithmetic(config):
    """Allow arithmetic that is faster and rounds a little differently, but none known to fail."""
    torch.set_float32_matmul_precision("high")       # TF32 on CUDA
    # cuDNN's attention in 16 bits can have NaN gradients on a Hopper GPU, for 64 tokens such as our
    # visible ones (github.com/pytorch/pytorch/issues/196678). Flash attention is used instead.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # In bf16 on a CPU the backward pass of fused attention takes far longer than that of the plain
    # one. Despite their names, these two switches rule CPUs, too.
    plain = config.device == "cpu" and config.amp == "bf16"
    torch.backends.cuda.enable_flash_sdp(not plain)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)


def set_up(config, checkpoint):
    """Make all that a run needs, at its start or as a checkpoint left it. Raises InputError."""
    torch.manual_seed(config.seed)                   # of the weights; all else has generators
    use_fast_arithmetic(config)
    source = data.BuiltInSounds() if config.data is None else data.AudioFiles(config.data)
    run = argparse.Namespace(
        config=config, step=0, log=Log(config),
        crops=data.Crops(source, data.hop_samples(config.seconds) * data.N_FRAMES, config.seed),
        mel=data.LogMel(config.seconds).to(config.device),
        model=AudioJEPA(config.model).to(config.device),
        autocast=torch.autocast(config.device, DTYPES[config.amp], enabled=config.amp != "off"),
        scaler=torch.amp.GradScaler(config.device, enabled=config.amp == "fp16"))
    run.optimizers = make_optimizers(run.model, config)
    if checkpoint:
        if checkpoint["fingerprint"] != source.fingerprint:
            raise InputError(f"--data {config.data}: not the files that this run began with")
        for name, part in parts(run).items():
            part.load_state_dict(checkpoint[name])
        run.step, run.log.rows = checkpoint["step"], checkpoint["log"]
    else:
        run.mel.fit(run.crops)
        save(run)                                    # if it cannot be written, fail now
    if config.compile:
        run.model.compile()                          # in place: parameters keep their names
    print(f"{len(source):,} clips; log-mel {run.mel.mean:.2f} +- {run.mel.std:.2f}; encoder of "
          f"{sum(p.numel() for p in run.model.encoder.parameters()) / 1e6:.1f} M weights\n"
          f"{LOG_HEAD}", flush=True)
    run.log.start = time.perf_counter()
    return run


def train(config, checkpoint=None):
    """Run the training that `config` describes, from the start or from where a checkpoint ends.
    Returns the number of the signal that ended it early, or None. Raises InputError."""
    run, device, stop = set_up(config, checkpoint), config.device, Stop()
    mel, model, scaler, log = run.mel, run.model, run.scaler, run.log
    steps = range(run.step, config.steps)
    batches = data.load_batches(run.crops, config.batch_size, steps, config.workers,
                                pin_memory=device == "cuda")
    with contextlib.closing(batches):
        for step in steps:
            waveforms = log.next_batch(batches).to(device, non_blocking=True)
            visible, hidden = make_masks(config.mask, config.batch_size, config.seed, step)
            visible, hidden = visible.to(device), hidden.to(device)
            with run.autocast:
                loss, predictions, all_targets = model(patchify(mel(waveforms)), visible, hidden)
            model.zero_grad()
            scaler.scale(loss).backward()
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["share"] * learning_rate(step, config)
                scaler.step(optimizer)               # in fp16, not if a gradient overflowed
            scaler.update()
            model.update_target_encoder(ema_momentum(step, config))
            run.step = step + 1
            is_last = run.step == config.steps or stop.signum
            if run.step % config.log_every == 0 or run.step == config.steps:
                log.write(meters(run, loss, predictions, all_targets, hidden))
            if run.step % config.save_every == 0 or is_last:
                save(run)
            if is_last:
                break
    print(f"saved {config.out} at step {run.step}", flush=True)
    return stop.signum if run.step < config.steps else None


# ---- meters: the loss does not tell whether a run learns ---------------------------------------


def spread(all_targets):
    """The standard deviation of all targets (B, N, D) over the clips, averaged over patches and
    features. 0 means that all clips have the same targets (collapse); it is about 1 at most."""
    return all_targets.std(0, correction=0).mean().item()


def explained(predictions, all_targets, hidden):
    """The share of the targets' variance about their mean over the batch, at the same patch, that
    the predictions (B, K, D) explain. 1: they are the targets. 0: they are as good as that mean,
    which knows the clip itself, so early in a run they are worse and this is negative."""
    targets = select(all_targets, hidden)                                           # (B, K, D)
    means = all_targets.mean(0)[hidden]      # of each hidden patch over the clips, (B, K, D)
    return 1 - (F.mse_loss(predictions, targets) / F.mse_loss(means, targets)).item()


def standardize(train, test):
    """Features of training (n, features) and of testing, shifted and scaled so that each feature
    has mean 0 and deviation 1 over the training ones."""
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    return (train - mean) / std, (test - mean) / std


def knn_scores(train, labels, test):
    """Votes (m, classes) of the 10 training features (n, features) nearest by cosine to each of
    `test` (m, features), weighted by softmax(similarity / 0.07). Source: X-ARES, 2505.16369."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T             # (m, n)
    nearest, indices = similarity.topk(min(10, len(train)))
    return ((nearest / 0.07).softmax(1)[..., None] * labels[indices]).sum(1)


def accuracy(scores, labels):
    """The share of clips whose highest score (n, classes) is that of their class."""
    return (scores.argmax(1) == labels.argmax(1)).float().mean().item()


@torch.no_grad()
def knn_of_orders(run, n=240):
    """Accuracy of kNN on n built-in sounds, of which half vote on the order of the others."""
    source = run.crops.source
    clips = torch.stack([next(source.windows(i, run.crops.n_samples)) for i in range(n)])
    patches = patchify(run.mel(clips.to(run.mel.mean.device)))
    columns = data.to_columns(torch.cat([run.model.target_encoder(part).float()
                                         for part in patches.split(32)])).cpu()       # (n, T', D')
    features = torch.cat(torch.std_mean(columns, dim=1, correction=0), dim=1)         # (n, 2 D')
    orders = torch.tensor([source.label(i) for i in range(n)])
    train, test = standardize(features[:n // 2], features[n // 2:])
    labels = F.one_hot(orders).float()
    return accuracy(knn_scores(train, labels[:n // 2], test), labels[n // 2:])


def meters(run, loss, predictions, all_targets, hidden):
    """The row of the log for a step, without its speed. Raises InputError if the loss or a weight
    is not finite."""
    check_finite(f"at step {run.step}", [loss, *run.model.parameters()])
    with run.autocast:
        knn = "" if run.config.data else f"{knn_of_orders(run):.0%}"
    return {"step": run.step, "loss": loss.item(), "lr": learning_rate(run.step - 1, run.config),
            "momentum": ema_momentum(run.step - 1, run.config), "spread": spread(all_targets),
            "explained": explained(predictions, all_targets, hidden), "knn": knn}


# ---- checkpoints, signals, log -----------------------------------------------------------------


def check_finite(where, tensors):
    """Raise InputError if any number in `tensors` is NaN or infinite."""
    if not math.isfinite(torch.nn.utils.get_total_norm(tensors)):
        raise InputError(f"the loss or the weights {where} are NaN or infinite; start again with a "
                         "lower --lr or with --amp off, and write to another --out")


def save(run):
    """Write a checkpoint beside `--out`, then rename it, so that the one there is always whole.
    Raises InputError."""
    check_finite(f"at step {run.step}", run.model.parameters())
    content = {"format": FORMAT, "config": vars(run.config), "step": run.step,
               "log": run.log.rows, "fingerprint": run.crops.source.fingerprint}
    content |= {name: part.state_dict() for name, part in parts(run).items()}
    temporary = f"{run.config.out}.{uuid.uuid4().hex[:8]}.tmp"       # no other run may write there
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, run.config.out)
    except (OSError, RuntimeError) as error:         # torch turns a full disk into the latter
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise InputError(f"cannot write {run.config.out}: {str(error).splitlines()[0]}") from error


def parts(run):
    """All that is saved and loaded by its state, by name."""
    return {"encoder": run.model.encoder, "target_encoder": run.model.target_encoder,
            "predictor": run.model.predictor, "mel": run.mel, "scaler": run.scaler,
            "matrix_optimizer": run.optimizers[0], "other_optimizer": run.optimizers[1]}


def load_checkpoint(path):
    """The content of a checkpoint, on the CPU. Executes nothing in the file. Raises InputError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                       # a damaged file can raise anything
        raise InputError(f"{path}: not a checkpoint that can be read "
                         f"({getattr(error, 'strerror', None) or type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this version of train.py")
    check_finite(f"in {path}", checkpoint["target_encoder"].values())
    return checkpoint


class Stop:
    """Answers SIGINT, SIGTERM and SIGHUP by a flag, so that the step is finished and saved before
    the run ends. The same signal again ends the process at once."""

    def __init__(self):
        self.signum = None
        for signum in data.STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:       # nohup has SIGHUP ignored
                signal.signal(signum, self.answer)

    def answer(self, signum, _):
        self.signum, name = signum, signal.Signals(signum).name
        signal.signal(signum, signal.SIG_DFL)
        if name == "SIGHUP":                         # the terminal is gone: nowhere to print to
            sys.stdout = sys.stderr = open(os.devnull, "w")      # noqa: SIM115
        print(f"{name}: finishing this step, then saving; {name} again ends at once",
              file=sys.stderr, flush=True)


class Log:
    """A line on the screen and a row in the CSV file for every `log_every` steps."""

    def __init__(self, config):
        self.config, self.path, self.rows = config, os.path.splitext(config.out)[0] + ".csv", []
        self.start, self.waited, self.clips = time.perf_counter(), 0.0, 0

    def next_batch(self, batches):
        """The next batch. Adds up the time spent waiting for it."""
        start, batch = time.perf_counter(), next(batches)
        self.waited, self.clips = self.waited + time.perf_counter() - start, self.clips + len(batch)
        return batch

    def write(self, row):
        """Write the row of a step, and how fast the steps since the last row were."""
        passed, of = time.perf_counter() - self.start, self.config.steps
        row |= {"clips_per_second": self.clips / passed, "waiting": self.waited / passed}
        left = (of - row["step"]) * self.config.batch_size / row["clips_per_second"]
        self.rows.append(row)
        with open(self.path, "w", newline="") as file:
            table = csv.DictWriter(file, row)
            table.writeheader()
            table.writerows(self.rows)
        left = datetime.timedelta(seconds=round(left))
        print(LOG_LINE.format(of=of, left=left, **row), flush=True)
        collapsed = [old for old in self.rows if old["spread"] < COLLAPSED]
        if collapsed == [row] and self.config.batch_size > 1:    # a single clip has no spread
            print("warning: all clips have nearly the same targets. Either the clips are mostly "
                  "silence (choose a shorter --seconds), or the run has collapsed (try a lower "
                  "--lr or a larger --batch-size).", flush=True)
        self.start, self.waited, self.clips = time.perf_counter(), 0.0, 0


# ---- the command -------------------------------------------------------------------------------


def within(low, high, kind=int):
    """A type for argparse: a number of this kind from `low` to `high`."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
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
    add("--recipe", choices=RECIPES, help="settings to start from; flags override them (without "
        "--data sounds, with it paper on CUDA, laptop elsewhere)")
    add("--out", help="checkpoint to write, with the log beside it as .csv (ckpt.pt)")
    add("--resume", metavar="CKPT", help="go on with this checkpoint, with its settings")
    add("--model", choices=SIZES, help="size of the encoder; base is ViT-B")
    add("--seconds", type=within(0.25, 60, float), help="length of a clip")
    add("--mask", choices=MASKS, help="which patches to hide")
    add("--optimizer", choices=("muon", "adamw"), help="what moves the matrices of the layers")
    add("--batch-size", type=within(1, 100_000), help="clips in a step")
    add("--steps", type=within(1, 10 ** 9), help="length of the run; every schedule depends on it")
    add("--lr", type=within(0, 10, float), help="peak learning rate")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), help="auto: the first that is there")
    add("--amp", choices=("auto", *DTYPES), help="mixed precision; auto: what the hardware has")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on with CUDA)")
    add("--workers", type=within(0, 1000), help="processes to read (cores - 1, at most 16)")
    add("--seed", type=within(0, 2 ** 32 - 1), help="of weights, order, crops and masks (0)")
    add("--save-every", type=within(1, 10 ** 9), help="steps between checkpoints")
    add("--log-every", type=within(1, 10 ** 9), help="steps between lines of the log")
    return vars(parser.parse_args(argv))


def find_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> one that this machine has. Raises InputError."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    best = [*here, "cpu"][0]
    if name not in ("auto", "cpu", *here):
        raise InputError(f"no {name} on this machine; use --device {best} --no-compile")
    return best if name == "auto" else name


def find_amp(device):
    """The mixed precision that the hardware of a device computes in: 'bf16', 'fp16' or 'off'."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"


def steps_in(path):
    """The step of the checkpoint at `path`; None if there is none that can be read."""
    try:
        return load_checkpoint(path)["step"]
    except InputError:
        return None


def resolve(given, resumed):
    """All settings of a run, from those given on the command line, and the checkpoint at `resumed`,
    or None. Raises InputError if such a run cannot be made, or not be saved."""
    if resumed is None:
        checkpoint, device = None, find_device(given.get("device", "auto"))
        recipe = "sounds" if "data" not in given else "paper" if device == "cuda" else "laptop"
        recipe = given.get("recipe", recipe)
        defaults = dict(data=None, recipe=recipe, out="ckpt.pt", amp="auto", seed=0,
                        compile=device == "cuda", workers=data.default_workers()) | RECIPES[recipe]
    else:
        checkpoint = load_checkpoint(resumed)
        defaults = checkpoint["config"] | {"out": resumed}
        if checkpoint["step"] == defaults["steps"]:
            raise InputError(f"{resumed} is complete; no run can be made longer, because all its "
                             "schedules depend on --steps: train anew with more")
        if fixed := given.keys() - FREE_ON_RESUME:
            raise InputError(f"{resumed} keeps the settings that it began with; leave out --"
                             + ", --".join(sorted(fixed)).replace("_", "-"))
        device = find_device(given.get("device", defaults["device"]))
    config = argparse.Namespace(**(defaults | given | {"device": device}))
    if config.amp == "auto":
        config.amp = find_amp(device)
    folder, log = os.path.dirname(config.out) or ".", Log(config).path
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)) or log == config.out:
        raise InputError(f"--out {config.out}: choose a file, not a .csv, in a folder to write to")
    for path in (config.out, log):                   # one that holds no step may be overwritten
        if os.path.exists(path) and config.out != resumed and steps_in(path) != 0:
            raise InputError(f"{path} exists: --resume {config.out}, or choose another --out")
    if config.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("torch.compile needs a C++ compiler: apt install g++, or --no-compile")
    return config, checkpoint


def main(argv=None):
    """The command line; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")            # names need not be valid UTF-8
    given = parse(argv)
    resumed = given.pop("resume", None)
    try:
        config, checkpoint = resolve(given, resumed)
        print("\n".join(f"{name:11} {value}" for name, value in vars(config).items()), flush=True)
        signum = train(config, checkpoint)
        return 128 + signum if signum else 0
    except (InputError, OSError, RuntimeError) as error:         # OSError: a disk that is gone
        reason = str(error).splitlines()[0]
        if "DataLoader" in reason and "Caught" not in reason:    # a dead worker, not a bug in one
            reason += (" Use fewer --workers, or give them more memory (Docker: --shm-size 8g)."
                       f" {config.out} holds step {steps_in(config.out)}; --resume goes on there.")
        elif isinstance(error, RuntimeError):
            raise
    except KeyboardInterrupt:                        # before the first step: nothing to save
        return 130
    print(f"train.py: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
