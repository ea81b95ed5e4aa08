"""Chapter 5, the probe: what did the encoder learn?

Prints how well a linear classifier and kNN do on frozen features of labelled audio. Baselines: the
log-mel, and the run's encoder before training. On the built-in sounds compare kNN; the linear probe
solves them even with an untrained encoder.
Sources: linear probes, arXiv 1610.01644; kNN, X-ARES (2505.16369); mAP, AudioSet (1609.09430).

    python probe.py ckpt.pt                       on the training data, if it has labels
    python probe.py ckpt.pt --data ESC-50         label formats: README
    python probe.py ckpt.pt --data FOLDER --vectors out.npz     one vector per file; needs no labels
"""

import argparse
import collections
import csv
import functools
import math
import os
import sys
import unicodedata

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from data import (EXTENSIONS, MAX_PEAK, PATCH, ROWS, SAMPLE_RATE, BuiltInSounds, LogMel, UserError,
                  make_output_printable, open_source, patchify, resampler)
from model import SIZES, Encoder, to_columns

FORMAT = "audio-jepa 5"                              # of the checkpoints
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
L2_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3)               # tried by the linear probe, in this order
WINDOWS_AT_ONCE = 32                                 # windows of a clip per encoder call
AUDIOSET = {"balanced_train_segments.csv": "train", "eval_segments.csv": "test"}
to_nfc = functools.partial(unicodedata.normalize, "NFC")    # a Mac splits accents from letters
SPLITS = {"train": "train", "training": "train", "valid": "valid", "val": "valid",
          "validation": "valid", "test": "test", "testing": "test"}


# ---- machine and checkpoints -------------------------------------------------------------------


def find_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> one that this machine has."""
    best = ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")
    if name not in ("auto", "cpu", best):
        raise UserError(f"no {name} on this machine; use --device {best}")
    return best if name == "auto" else name


def find_amp(device):
    """The mixed precision that a device has in hardware: 'bf16', 'fp16' or 'off'."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"


def check_finite(where, tensors):
    """Raise UserError if any value in `tensors` is NaN or infinite."""
    if not math.isfinite(torch.nn.utils.get_total_norm(tensors)):
        raise UserError(f"the weights {where} are NaN or infinite; try a lower --lr or --amp off")


def load_checkpoint(path):
    """The content of a checkpoint, on the CPU. Runs no code from the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                       # a damaged file can raise anything
        raise UserError(f"{path}: not a checkpoint that can be read "
                        f"({getattr(error, 'strerror', None) or type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of train.py")
    check_finite(f"in {path}", checkpoint["target_encoder"].values())
    return checkpoint


# ---- a trained encoder for use -----------------------------------------------------------------


class FrozenEncoder(nn.Module):
    """Waveforms in, embeddings out: one of `output_dim` values (D') every `hop_seconds`.

    An embedding concatenates the 8 patches of a column, because their average would mix low and
    high frequencies (Riou et al., arXiv 2405.08679). It is taken after the final norm, unlike
    `--targets all`: the last layer probes better than earlier ones or their sum."""

    def __init__(self, config):
        super().__init__()
        with torch.random.fork_rng(devices=[]):      # leaves the caller's random numbers alone
            torch.manual_seed(config["seed"])        # repeats the run's initial weights
            self.vit = Encoder(*SIZES[config["size"]], config["positions"])
        self.mel = LogMel(config["seconds"])
        self.config = config
        self.column_samples = PATCH * self.mel.hop
        self.output_dim = ROWS * self.vit.norm.weight.numel()
        self.hop_seconds = self.column_samples / SAMPLE_RATE

    def forward(self, waveform, sample_rate):
        """Floats (S,) or (B, S) at `sample_rate` Hz -> embeddings (B, T', D'). A long waveform is
        cut into windows of one training clip's length, each encoded on its own."""
        waveform = torch.atleast_2d(torch.as_tensor(waveform))
        if (waveform.ndim > 2 or not 0 < len(waveform) <= waveform.shape[1]
                or not waveform.is_floating_point() or not waveform.abs().max() < MAX_PEAK):
            raise UserError("a waveform holds floats of about -1 to 1, shape (samples,) or (clips, "
                            f"samples); this one is {waveform.dtype} {[*waveform.shape]}")
        waveform = resampler(int(sample_rate))(waveform.float().cpu()).to(self.mel.mean.device)
        n_columns = math.ceil(waveform.shape[1] / self.column_samples)
        padded = F.pad(waveform, (0, -waveform.shape[1] % self.mel.clip_samples))
        windows = rearrange(padded, "b (w s) -> (b w) s", s=self.mel.clip_samples)
        amp = find_amp(windows.device.type)
        with torch.autocast(windows.device.type, DTYPES[amp], enabled=amp != "off"):
            columns = torch.cat([to_columns(self.vit(patchify(self.mel(batch))).float())
                                 for batch in windows.split(WINDOWS_AT_ONCE)])
        return rearrange(columns, "(b w) t d -> b (w t) d", b=len(waveform))[:, :n_columns]


def load_encoder(path, trained=True):
    """The target encoder of a checkpoint, or its run's untrained encoder: on the CPU, frozen."""
    checkpoint = load_checkpoint(path)
    encoder = FrozenEncoder(checkpoint["config"])
    encoder.mel.load_state_dict(checkpoint["mel"])
    encoder.step = checkpoint["step"] if trained else 0
    if trained:
        encoder.vit.load_state_dict(checkpoint["target_encoder"])
    return encoder.requires_grad_(False).eval()


# ---- features ----------------------------------------------------------------------------------


def pool(x):
    """Mean and standard deviation over time: (B, time, features) -> (B, 2 features)."""
    std, mean = torch.std_mean(x, dim=1, correction=0)
    return torch.cat([mean, std], dim=1)


@torch.no_grad()
def compute_features(source, indices, encoders):
    """One vector per clip: its embeddings, pooled over time. Prints the clips that cannot be read.

    encoders: {name: FrozenEncoder} of one checkpoint. Returns the positions in `indices` of the
    clips that were read, and {name: (clips, 2 D')}, plus "log-mel": (clips, 2 M)."""
    mel = next(iter(encoders.values())).mel
    read, features = [], {name: [] for name in ("log-mel", *encoders)}
    for i, index in enumerate(indices):
        series = {name: [] for name in features}
        try:
            for piece in source.windows(index, WINDOWS_AT_ONCE * mel.clip_samples):
                series["log-mel"].append(mel(piece[None].to(mel.mean.device)).mT)
                for name, encoder in encoders.items():
                    series[name].append(encoder(piece, SAMPLE_RATE))
        except UserError as error:
            how = "cut short" if series["log-mel"] else "skipped"
            print(f"{how} {source.name(index)!r}: {error}", flush=True)
        if series["log-mel"]:
            read.append(i)
            for name, pieces in series.items():
                features[name].append(pool(torch.cat(pieces, dim=1))[0].cpu())
    if not read:
        raise UserError("no clip can be read")
    return read, {name: torch.stack(vectors) for name, vectors in features.items()}


# ---- the two probes ----------------------------------------------------------------------------


def standardize(reference, query):
    """Scale features (n, features) and (m, features) to mean 0 and standard deviation 1 over the
    first set. Deviations are at least 5 % of their 90th percentile: otherwise a feature that is
    nearly constant in the first set could dominate the second."""
    std, mean = torch.std_mean(reference, dim=0, correction=0)
    std = std.clamp(min=(0.05 * std.quantile(0.9)).clamp(min=1e-6))
    return (reference - mean) / std, (query - mean) / std


def knn_scores(reference, labels, query):
    """For each clip of `query` (m, features), the votes (m, classes) of its 10 nearest clips in
    `reference` (n, features) by cosine, weighted by softmax(similarity / 0.07).
    Source: X-ARES, 2505.16369."""
    similarity = F.normalize(query, dim=1) @ F.normalize(reference, dim=1).T        # (m, n)
    nearest, indices = similarity.topk(min(10, len(reference)))
    return ((nearest / 0.07).softmax(1)[..., None] * labels[indices]).sum(1)


def binary_cross_entropy(scores, labels):
    """The loss for several labels per clip: mean over clips, sum over classes."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / len(labels)


def fit(weights, reference, labels, l2, loss_function):
    """Minimise loss + l2 / 2 * |weights without bias|^2 by L-BFGS, starting at `weights` (classes,
    features + 1), of which the last is the bias. reference: (n, features + 1)."""
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, history_size=10, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = l2 / 2 * weights[:, :-1].square().sum()
        loss = loss_function(reference @ weights.T, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear_scores(reference, labels, query, n_valid, loss_function):
    """Scores (m, classes) of `query` by a linear layer fitted to standardised features (n,
    features) with labels (n, classes). The L2 strength is chosen by the loss on the last n_valid
    clips after a fit to the others."""
    if len(reference) < reference.shape[1]:
        # With L2, the optimum lies in the span of the features, so the fit happens there.
        basis = torch.linalg.qr(reference.T).Q       # (features, n)
        reference, query = reference @ basis, query @ basis
    reference, query = (F.pad(x, (0, 1), value=1.0) for x in (reference, query))     # for the bias
    weights, tried = reference.new_zeros(labels.shape[1], reference.shape[1]), []
    for l2 in L2_STRENGTHS:                          # each fit starts where the last one ended
        weights = fit(weights, reference[:-n_valid], labels[:-n_valid], l2, loss_function)
        loss = loss_function(reference[-n_valid:] @ weights.T, labels[-n_valid:])
        tried.append((loss.item(), l2, weights))     # accuracies tie on few clips
    _, l2, weights = min(tried)
    return query @ fit(weights, reference, labels, l2, loss_function).T


def accuracy(scores, labels):
    """Share of clips whose highest score (n, classes) is that of their class."""
    return (scores.argmax(1) == labels.argmax(1)).float().mean().item()


def mean_average_precision(scores, labels):
    """Mean over classes of the average precision. Clips with the same score share a rank.
    Source: AudioSet (arXiv 1609.09430), section 4."""
    precisions = []
    for score, truth in zip(scores.T, labels.T.double(), strict=True):
        if truth.any():
            level = score.unique(return_inverse=True)[1]         # 0 is the lowest score
            hits = level.bincount(truth).flip(0)                 # from the highest score down
            precision = hits.cumsum(0) / level.bincount().flip(0).cumsum(0)
            precisions.append((hits * precision).sum() / hits.sum())
    return torch.stack(precisions).mean().item()


def evaluate(features, labels, rounds, several):
    """Run both probes on features (n, features) with labels (n, classes). Returns two lists, kNN
    and linear, with the metric of each round. several: whether clips have several labels (mAP)."""
    metric, loss = ((mean_average_precision, binary_cross_entropy) if several
                    else (accuracy, F.cross_entropy))
    knn, linear = [], []
    for train, valid, test in rounds:
        both = torch.cat([train, valid])
        reference, query = standardize(features[both], features[test])
        knn.append(metric(knn_scores(reference, labels[both], query), labels[test]))
        scores = linear_scores(reference, labels[both], query, len(valid), loss)
        linear.append(metric(scores, labels[test]))
    return knn, linear


@torch.no_grad()
def knn_of_orders(mel, vit, n=240):
    """kNN accuracy on n built-in sounds for the log: half are the reference for the other half."""
    source = BuiltInSounds(mel.clip_samples)
    clips = torch.stack([next(source.windows(i, mel.clip_samples)) for i in range(n)])
    patches = patchify(mel(clips.to(mel.mean.device)))
    columns = torch.cat([to_columns(vit(batch)).float() for batch in patches.split(32)])
    reference, query = standardize(*pool(columns.cpu()).chunk(2))
    labels = F.one_hot(torch.from_numpy(source.labels[:n])).float()
    return accuracy(knn_scores(reference, labels[:n // 2], query), labels[n // 2:])


# ---- labels ------------------------------------------------------------------------------------


def one_hot(names):
    """Label names per clip -> labels (n, classes), and the names of the classes."""
    classes = sorted({name for each in names for name in each})
    return torch.tensor([[float(name in each) for name in classes] for each in names]), classes


def make_rounds(labels, groups):
    """Clip indices (train, valid, test): one round for a given split, else one for each fold.
    `valid` chooses the L2 strength; if not given, it is a tenth of the clips outside the test set.
    groups: the fold or split of every clip. If all are None: five random stratified folds."""
    kinds, splits = set(groups), {*SPLITS.values()}
    is_split = bool(kinds & splits)
    if None in kinds and len(kinds) > 1 or is_split and not {"train", "test"} <= kinds <= splits:
        raise UserError("give every clip a fold, or every clip a split with at least train and "
                        f"test; found: {', '.join(sorted(map(str, kinds)))}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if kinds == {None}:
        by_class = order[labels[order].argmax(1).argsort(stable=True)]
        groups = (by_class.argsort() % 5).tolist()    # the place of each clip in by_class
    rounds = []
    for name in ["test"] if is_split else sorted(set(groups)):
        test = torch.tensor([groups[i] == name for i in order.tolist()])
        rest = order[~test]
        valid = torch.tensor([groups[i] == "valid" for i in rest.tolist()])
        if not valid.any():
            valid = torch.arange(len(rest)) % 10 == 0
        rounds.append((rest[~valid], rest[valid], order[test]))
        if min(map(len, rounds[-1])) == 0 or labels.shape[1] < 2:
            raise UserError("too few clips or classes: train, validation and test need a clip "
                            "each, and labels two classes")
        if unseen := (labels[order[test]].any(0) & ~labels[rest].any(0)).sum():
            print(f"warning: {unseen} classes of test fold {name} have no clip to train on")
    return rounds


def read_csv(path, columns, header=None):
    """The rows of a CSV file as dicts. columns: those that every row must have. header: the names
    of all columns, for a file without a header row (lines with # are skipped)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [to_nfc(line) for line in file if not (header and line.startswith("#"))]
        rows = list(csv.DictReader(lines, header, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if bad := [row for row in rows if any(row.get(column) is None for column in columns)]:
        raise UserError(f"{path}: no column {' or '.join(columns)} in {bad[0]}")
    return rows


def from_audioset(folder):
    """AudioSet's official CSVs -> rows of (YTID, labels, split)."""
    columns = ["YTID", "start", "end", "labels"]
    return [(row["YTID"], row["labels"].split(","), split) for name, split in AUDIOSET.items()
            for row in read_csv(os.path.join(folder, name), columns, columns)]


def from_table(path):
    """A CSV with filename, category (`;` between labels) and perhaps split or fold -> rows of
    (name, labels, fold or split or None)."""
    rows = []
    for row in read_csv(path, ["filename", "category"]):
        labels = [label.strip() for label in row["category"].split(";") if label.strip()]
        group = (row.get("split") or row.get("fold") or "").strip()
        group = SPLITS.get(group.lower(), group.removesuffix(".0"))      # spreadsheets write 1.0
        rows.append((row["filename"], labels, group or None))
    return rows


def from_folders(files):
    """CLASS/... or SPLIT/CLASS/... -> rows of (name, labels, split or None)."""
    rows = []
    for file in files:
        *folders, _ = file.split(os.sep)
        split = SPLITS.get(folders[0].lower()) if len(folders) > 1 else None
        if folders:
            rows.append((file, [folders[1 if split else 0]], split))
    return rows


def stem(path):
    """A path without the extension of an audio file, if it has one."""
    root, extension = os.path.splitext(path)
    return root if os.fsencode(extension.lower()) in EXTENSIONS else path


def match(rows, files, is_audioset):
    """Rows of (name, labels, group) -> {index: (labels, group)}, and the names of rows without a
    file or a label. A row names a file by its path in the folder, or else by its base name, with or
    without extension. AudioSet: the base name starts with the YouTube id, or with Y and the id.
    files: {path: index}."""
    by_path, by_base = collections.defaultdict(set), collections.defaultdict(set)
    matched, unused = {}, []
    for path, index in files.items():
        base = os.path.basename(path)
        for name in (path, stem(path)):
            by_path[name].add(index)
        for name in (base[:11], base.removeprefix("Y")[:11]) if is_audioset else (base, stem(base)):
            by_base[name].add(index)
    for name, labels, group in rows:
        found = next((table[key] for table in (by_path, by_base) for key in (name, stem(name))
                      if key in table), set())
        if len(found) > 1 or matched.keys() & found:
            raise UserError(f"{name!r} fits several files, or a file that another row has")
        if found and labels:
            matched |= {index: (labels, group) for index in found}
        else:
            unused.append(name)
    return matched, unused


def load_labelled(folder, clip_samples):
    """Returns the source, the indices of the labelled clips, and for each of them its labels and
    its group (a fold, a split or None). Prints which labels were used."""
    source = open_source(folder, clip_samples)
    if folder is None:                               # the built-in sounds
        labels = [[str(label)] for label in source.labels]
        return source, [*range(len(source))], labels, ["train"] * 1920 + ["test"] * 480
    files = {to_nfc(source.name(i)): i for i in range(len(source))}
    tables = ("labels.csv", "esc50.csv", "meta/esc50.csv", *AUDIOSET)
    found = [name for name in tables if os.path.exists(os.path.join(folder, name))]
    used = found[0] if found else "folder names (no labels.csv)"
    rows = (from_folders(files) if not found else from_audioset(folder) if used in AUDIOSET
            else from_table(os.path.join(folder, used)))
    matched, unused = match(rows, files, used in AUDIOSET)
    if not matched:
        raise UserError(f"{folder}: no label fits an audio file; labels from {used}, such as "
                        f"{rows[:1]}; files such as {next(iter(files))!r}")
    labels, groups = map(list, zip(*matched.values(), strict=True))
    classes = one_hot(labels)[1]
    print(f"labels from {used}: {len(matched):,} clips, {len(classes)} classes such as "
          f"{', '.join(classes[:4])}; {len(files) - len(matched):,} files without a label, "
          f"{len(unused):,} rows without a file or a class {unused[:3] or ''}")
    if len({name.lower() for name in classes}) < len(classes):
        print("warning: some classes differ only in upper and lower case")
    if {*groups} == {None}:
        print("warning: no folds or splits given. Random folds can put one speaker or device on "
              "both sides, which inflates scores.")
    return source, [*matched], labels, groups


# ---- the command -------------------------------------------------------------------------------


def run_probe(args):
    """Run the command."""
    if args.vectors and (os.path.exists(args.vectors) or
                         not os.path.isdir(os.path.dirname(args.vectors) or ".")):
        raise UserError(f"--vectors {args.vectors}: choose a new file in an existing folder")
    device = find_device(args.device)
    encoders = {"untrained": load_encoder(args.checkpoint, trained=False).to(device),
                "trained": load_encoder(args.checkpoint).to(device)}
    encoder = encoders["trained"]
    print(f"{args.checkpoint}: step {encoder.step:,} of {encoder.config['steps']:,}")
    if encoder.step == 0:
        print("warning: this encoder is untrained")
    folder = args.data or encoder.config["data"]
    if args.vectors:
        source = open_source(folder, encoder.mel.clip_samples)
        read, features = compute_features(source, range(len(source)), {"trained": encoder})
        with open(args.vectors, "xb") as file:
            np.savez(file, names=[source.name(i) for i in read], vectors=features["trained"])
        print(f"{args.vectors}: names and vectors of {len(read):,} files")
        return
    source, indices, names, groups = load_labelled(folder, encoder.mel.clip_samples)
    labels, classes = one_hot(names)
    rounds = make_rounds(labels, groups)             # fails before the features take an hour
    read, features = compute_features(source, indices, encoders)
    if len(read) < len(indices):
        labels, classes = one_hot([names[i] for i in read])
        rounds = make_rounds(labels, [groups[i] for i in read])
    several = int((labels.sum(1) > 1).sum())         # clips with several labels
    metric = f"{several:,} have several labels; mAP" if several else "accuracy"
    print(f"{len(labels):,} clips, {len(classes)} classes, the largest with "
          f"{labels.mean(0).max():.0%} of the clips; {metric} in %, mean +- standard deviation "
          f"over {len(rounds)} round(s)\n{'':10}{'kNN':>15}{'linear':>15}")
    fits_on = "cuda" if device == "cuda" else "cpu"
    for name, x in features.items():
        print(f"{name:10}" + "".join(
            f"{100 * np.mean(scores):7.1f} +- {100 * np.std(scores):4.1f}"
            for scores in evaluate(x.to(fits_on), labels.to(fits_on), rounds, several)), flush=True)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="labelled audio; without it, the training data")
    parser.add_argument("--vectors", metavar="FILE", help="write a vector per file there, and exit")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    make_output_printable()
    try:
        run_probe(parser.parse_args(argv))
    except (UserError, OSError) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
