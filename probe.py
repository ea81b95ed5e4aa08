"""Chapter 5, the probe: what did the encoder learn?

In: a checkpoint and labelled audio. Out: a table of how well the labels can be read off frozen
features, by a linear classifier and by the nearest neighbours. Two rows that learned nothing stand
beside the trained encoder: the plain log-mel, and the untrained encoder with which the run began.
On the built-in sounds look at kNN: a linear probe finds the order even in random features.
Sources: linear probes, arXiv 1610.01644; kNN, X-ARES (2505.16369); mAP, AudioSet (1609.09430).

    python probe.py ckpt.pt                       on the data of the training, if it has labels
    python probe.py ckpt.pt --data ESC-50-master  the README lists the layouts of labelled folders
"""

import argparse
import collections
import csv
import glob
import json
import math
import os
import sys

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

import data
from data import InputError
from model import AudioJEPA
from train import DTYPES, accuracy, find_amp, find_device, knn_scores, load_checkpoint, standardize

L2_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)               # of the linear probe, to choose from
WINDOWS_AT_ONCE = 32                                 # that go through the encoder together
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
AUDIOSET = {"balanced_train_segments.csv": "train", "eval_segments.csv": "test"}


# ---- a trained encoder for use -----------------------------------------------------------------


class FrozenEncoder(nn.Module):
    """Waveforms in, embeddings over time out: one of `output_dim` numbers (D') every `hop_seconds`.
    It holds the 8 patches of a column side by side, because their average would mix high
    frequencies with low ones (Riou et al., arXiv 2405.08679). They are those of the last layer,
    which know more words than any earlier one, or than the sum. `requires_grad_(True)` thaws it."""

    def __init__(self, config):
        super().__init__()
        with torch.random.fork_rng(devices=[]):      # leaves the caller's random numbers alone
            torch.manual_seed(config["seed"])        # the weights with which the run began
            self.encoder = AudioJEPA(config["model"]).encoder
        self.mel = data.LogMel(config["seconds"])
        self.config = config
        self.column_samples = data.PATCH * self.mel.hop
        self.window_samples = data.COLUMNS * self.column_samples   # the length of a training clip
        self.output_dim = data.ROWS * self.encoder.norm.weight.numel()
        self.hop_seconds = self.column_samples / data.SAMPLE_RATE

    def embed(self, spectrograms):
        """Log-mel spectrograms (B, M, T) of a window each -> embeddings (B, T', D')."""
        device = spectrograms.device.type
        amp = find_amp(device)
        with torch.autocast(device, DTYPES[amp], enabled=amp != "off"):
            return data.to_columns(self.encoder(data.patchify(spectrograms)).float())

    def forward(self, waveform, sample_rate):
        """Floats (S,) or (B, S) at `sample_rate` Hz -> (B, T', D'), for all columns with sound.
        Long audio goes through in windows that know nothing of one another. Raises InputError."""
        waveform = torch.atleast_2d(torch.as_tensor(waveform))
        if (waveform.ndim > 2 or waveform.numel() == 0 or len(waveform) > waveform.shape[1]
                or not waveform.is_floating_point()
                or not waveform.abs().max() < 1e4):              # NaN fails any comparison
            raise InputError("a waveform has finite floats, about -1 to 1, and the shape (samples,)"
                             " or (clips, samples); average channels by waveform.mean(1). This is "
                             f"{waveform.dtype} {[*waveform.shape]}")
        if self.mel.mean.dtype != torch.float32 or sample_rate != int(sample_rate):
            raise InputError("the encoder must stay in float32, which logarithms need (mixed "
                             "precision is on by itself), and the rate must be a whole number")
        waveform = data.resampler(int(sample_rate))(waveform.float().cpu())
        padded = F.pad(waveform, (0, -waveform.shape[1] % self.window_samples))
        windows = rearrange(padded, "b (w s) -> (b w) s", s=self.window_samples)
        embeddings = torch.cat([self.embed(self.mel(part.to(self.mel.mean.device)))
                                for part in windows.split(WINDOWS_AT_ONCE)])
        embeddings = rearrange(embeddings, "(b w) t d -> b (w t) d", b=len(waveform))
        return embeddings[:, :math.ceil(waveform.shape[1] / self.column_samples)]


def load_encoder(path, trained=True):
    """The target encoder of a checkpoint, or the untrained encoder with which its run began, on the
    CPU, frozen. Raises InputError."""
    checkpoint = load_checkpoint(path)
    encoder = FrozenEncoder(checkpoint["config"])
    encoder.mel.load_state_dict(checkpoint["mel"])
    if trained:
        encoder.encoder.load_state_dict(checkpoint["target_encoder"])
    return encoder.requires_grad_(False).eval()


# ---- features ----------------------------------------------------------------------------------


def batches_of_windows(source, indices, n_samples):
    """Yield lists of the windows of clips, one clip after another, as (index of the clip, waveform
    (S,), samples before the padding). Prints which clips cannot be read, or only in part."""
    windows = []
    for index in indices:
        try:
            for window in source.windows(index, n_samples):
                windows.append((index, F.pad(window, (0, n_samples - len(window))), len(window)))
                if len(windows) == WINDOWS_AT_ONCE:
                    yield windows
                    windows = []
        except InputError as error:
            print(f"unusable from here on: {source.name(index)}: {error}", flush=True)
    if windows:
        yield windows


@torch.no_grad()
def compute_features(source, indices, encoders):
    """One vector for each clip: the mean and the standard deviation over the time in which it holds
    sound. Clips are read by windows, so that memory does not grow with their length.

    encoders: {name: FrozenEncoder}, of one checkpoint. Returns {name: {index: (2 D',)}}, without
    the clips that cannot be read; under "log-mel" are those of the spectrogram itself, (2 M,).
    Raises InputError if the encoders do not hear the same log-mel."""
    encoder = next(iter(encoders.values()))
    if len({(each.mel.hop, each.mel.mean.item(), each.mel.std.item())
            for each in encoders.values()}) > 1:
        raise InputError("the encoders are of several checkpoints; compute their features apart")
    features, sums = collections.defaultdict(dict), {}           # sums over time of 1, x and x ** 2

    def finish(open_clip=None):
        """Turn the sums of all clips but `open_clip`, whose windows are not over, into features."""
        for name, index in [key for key in sums if key[1] != open_clip]:
            n, total, squares = sums.pop((name, index))
            mean = total / n
            std = (squares / n - mean ** 2).clamp(min=0).sqrt()
            features[name][index] = torch.cat([mean, std]).float()

    for windows in batches_of_windows(source, indices, encoder.window_samples):
        clips, waveforms, samples = zip(*windows, strict=True)
        spectrograms = encoder.mel(torch.stack(waveforms).to(encoder.mel.mean.device))
        series = {"log-mel": spectrograms.mT}
        series |= {name: each.embed(spectrograms) for name, each in encoders.items()}
        for name, batch in series.items():           # (B, frames or T', features)
            batch = batch.double().cpu()             # for the squares
            for index, x, n in zip(clips, batch, samples, strict=True):
                x = x[:math.ceil(len(x) * n / encoder.window_samples)]
                new = torch.stack([torch.ones_like(x), x, x ** 2]).sum(1)
                sums[name, index] = sums.get((name, index), 0) + new
        finish(open_clip=clips[-1])
    finish()
    return features


# ---- the two probes ----------------------------------------------------------------------------


def binary_cross_entropy(scores, labels):
    """The loss for several labels a clip: a mean over clips, but a sum over classes."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / len(labels)


def linear_scores(train, labels, test, l2, loss_function):
    """Fit one linear layer to features (n, features) with labels (n, classes); scores (m, classes)
    of `test`. Minimises loss + l2 / 2 * |weights|^2 on standardised features, by L-BFGS."""
    train, test = standardize(train, test)
    # The best weights are sums of training clips, so a fit in the span of the clips is enough.
    basis = torch.linalg.qr(train.T).Q               # (features, at most n)
    train, test = train @ basis, test @ basis
    weights = torch.zeros(labels.shape[1], train.shape[1], requires_grad=True)
    bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = F.linear(train, weights, bias)
        loss = loss_function(scores, labels) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(test, weights, bias).detach()


def mean_average_precision(scores, labels):
    """The mean over classes of the average precision at the clips that have the class. Clips of the
    same score share a rank. Source: AudioSet (arXiv 1609.09430), section 4."""
    precisions = []
    for score, truth in zip(scores.T, labels.T.double(), strict=True):
        if truth.any():
            rank = score.unique(return_inverse=True)[1]          # 0 is the lowest score
            hits = rank.bincount(truth).flip(0)                  # from the highest score down
            precision = hits.cumsum(0) / rank.bincount().flip(0).cumsum(0)
            precisions.append((hits * precision).sum() / hits.sum())
    return torch.stack(precisions).mean().item()


def evaluate(features, labels, rounds):
    """Both probes in every round: {'linear': [score a round], 'kNN': [score a round]}."""
    several = bool((labels.sum(1) != 1).any())       # labels a clip
    metric = mean_average_precision if several else accuracy
    loss = binary_cross_entropy if several else F.cross_entropy
    results = {"linear": [], "kNN": []}
    for train, valid, test in rounds:
        losses = {}                                  # finer than scores, which tie on few clips
        for l2 in L2_STRENGTHS:
            scores = linear_scores(features[train], labels[train], features[valid], l2, loss)
            losses[l2] = loss(scores, labels[valid])
        l2, both = min(losses, key=losses.get), torch.cat([train, valid])
        scores = linear_scores(features[both], labels[both], features[test], l2, loss)
        results["linear"].append(metric(scores, labels[test]))
        known, asked = standardize(features[both], features[test])
        scores = knn_scores(known, labels[both], asked)
        results["kNN"].append(metric(scores, labels[test]))
    return results


def make_rounds(labels, folds):
    """Rounds of evaluation as (train, valid, test) clip indices: one for a given split, else one
    for each fold. `valid` chooses the regularisation; if it is not given, it is a tenth of the
    clips that are not for testing. Raises InputError."""
    kinds = set(folds)
    is_split = bool(kinds & {*SPLITS.values()})
    if None in kinds and len(kinds) > 1 or is_split and not (
            {"train", "test"} <= kinds <= {*SPLITS.values()}):
        raise InputError("every clip needs a fold, or every clip a split of train, valid or test; "
                         f"here are {', '.join(sorted(map(str, kinds)))}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if len(kinds) == 1:                              # none given: deal out each class to five folds
        by_class = order[labels[order].argmax(1).argsort(stable=True)]
        folds = (by_class.argsort() % 5).tolist()    # the place of each clip in by_class
    rounds = []
    for name in ["test"] if is_split else sorted(set(folds)):
        test = torch.tensor([folds[i] == name for i in order.tolist()])
        rest = order[~test]
        valid = torch.tensor([folds[i] == "valid" for i in rest.tolist()])
        if not valid.any():
            valid = torch.arange(len(rest)) % 10 == 0
        rounds.append((rest[~valid], rest[valid], order[test]))
        if min(map(len, rounds[-1])) == 0:
            raise InputError("too few clips to train on, to choose by and to test on")
        unseen = (labels[order[test]].any(0) & ~labels[rest].any(0)).sum()
        if unseen:
            print(f"warning: {unseen} classes of test fold {name} have no clip to train on")
    return rounds


# ---- labels ------------------------------------------------------------------------------------


def read_csv(path, columns, header=None):
    """The rows of a CSV file as dicts. Raises InputError if a row lacks one of `columns`. header:
    the names of the columns, for a file that begins with comments."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = [line for line in file if not (header and line.startswith("#"))]
    rows = list(csv.DictReader(lines, header, skipinitialspace=True))
    for row in rows:
        if any(row.get(column) is None for column in columns):
            raise InputError(f"{path}: no column {' or '.join(columns)} in {row}")
    return rows


def from_audioset(tables):
    """AudioSet's official CSVs -> rows of (YTID, labels, split). If class_labels_indices.csv is
    there, only its classes count. Raises InputError if only one of the two is there."""
    classes, rows = tables.get("class_labels_indices.csv"), []
    wanted = {row["mid"] for row in read_csv(classes, ["mid"])} if classes else None
    for name, split in AUDIOSET.items():
        if name not in tables:
            raise InputError(f"of AudioSet's tables {' and '.join(AUDIOSET)}, one is not there")
        for row in read_csv(tables[name], ["labels"], ["YTID", "start", "end", "labels"]):
            labels = [x for x in row["labels"].split(",") if wanted is None or x in wanted]
            rows.append((row["YTID"], labels, split))
    return rows


def from_table(path):
    """A CSV with columns filename, category (several labels with `;` between them), and perhaps
    split or fold -> rows of (name, labels, fold or split or None)."""
    rows = []
    for row in read_csv(path, ["filename", "category"]):
        split, fold = (row.get("split") or "").strip().lower(), (row.get("fold") or "").strip()
        if split and split not in SPLITS:
            raise InputError(f"{path}: the split {split!r}; it can be {', '.join(SPLITS)}")
        labels = [label.strip() for label in row["category"].split(";") if label.strip()]
        rows.append((row["filename"], labels,
                     SPLITS.get(split) or fold.removesuffix(".0") or None))
    return rows


def from_folders(files):
    """A folder for each class, perhaps below train/, valid/, test/ -> rows of (name, labels, split
    or None)."""
    rows = []
    for file in files:
        *folders, _ = file.split(os.sep)
        is_split = len(folders) > 1 and folders[0].lower() in SPLITS
        split = SPLITS[folders.pop(0).lower()] if is_split else None
        if folders:
            rows.append((file, folders[:1], split))
    return rows


def path_ends(name):
    """All ends of a path, the longest first, with forward slashes, and without the extension if it
    is that of an audio file: "a\\b.wav" -> ["a/b", "b"]."""
    name, extension = os.path.splitext(name.replace("\\", "/"))
    if os.fsencode(extension.lower()) not in data.EXTENSIONS:
        name += extension
    folders = name.split("/")
    return ["/".join(folders[i:]) for i in range(len(folders))]


def match(rows, files, is_audioset):
    """Rows of (name, labels, fold) -> {file: (labels, fold)}. A name stands for the one file whose
    path it is, or the end of whose path it is, or whose path is its end; AudioSet's for the one
    that begins with it, or with Y and it. Raises InputError."""
    by_end, table = collections.defaultdict(set), {}
    wholes = {path_ends(file)[0] for file in files}
    for file in files:
        *_, base = ends = path_ends(file)
        for end in ends + is_audioset * [base[:11], base.removeprefix("Y")[:11]]:
            by_end[end].add(file)
    for name, labels, fold in rows:
        whole, *ends = path_ends(name)
        end = whole if whole in by_end else next((end for end in ends if end in wholes), None)
        found = {name} & files.keys() or by_end.get(end, set())
        if len(found) > 1 or found & table.keys():
            raise InputError(f"the label of {name!r}: it stands for several files or rows")
        table |= {file: (labels, fold) for file in found if labels}
    return table


def load_labelled(folder):
    """The source of the clips, the index there of each labelled one, its labels, and its fold,
    split or None. Says which labels it took. Raises InputError."""
    if folder is None:
        source = data.BuiltInSounds()
        labels = [[str(source.label(i))] for i in range(len(source))]
        return source, [*range(len(source))], labels, ["train"] * 1920 + ["test"] * 480
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: not a folder; name one with labelled audio by --data")
    source = data.AudioFiles(folder)
    files = {os.fsdecode(bytes(path)): i for i, path in enumerate(source.paths)}
    tables, here = {}, glob.escape(folder)
    for path in glob.glob(f"{here}/*.csv") + glob.glob(f"{here}/*/*.csv"):
        name = os.path.basename(path)
        if name in tables and name in ("labels.csv", "esc50.csv", *AUDIOSET):
            raise InputError(f"{tables[name]} and {path}: name the folder of one of them by --data")
        tables[name] = path
    taken = tables.get("esc50.csv") or tables.get("labels.csv")
    if is_audioset := not tables.keys().isdisjoint(AUDIOSET):
        taken, rows = "AudioSet's tables", from_audioset(tables)
    elif taken:
        rows = from_table(taken)
    else:
        taken, rows = "names of folders", from_folders(files)
    table = match(rows, files, is_audioset)
    if not table:
        raise InputError(f"{folder}: no label fits an audio file (the README lists the layouts); "
                         f"tried {taken}, such as {[*rows[:1]]}, on files such as "
                         f"{next(iter(files))!r}")
    labels, folds = map(list, zip(*table.values(), strict=True))
    classes = sorted({label for each in labels for label in each})
    print(f"labels from {taken}: {len(table):,} clips, {len(classes)} classes "
          f"({', '.join(classes[:4])}{', ...' * (len(classes) > 4)}); {len(files) - len(table):,} "
          f"files without a label, {len(rows) - len(table):,} rows without a file or a class")
    return source, [files[file] for file in table], labels, folds


# ---- the command -------------------------------------------------------------------------------


def run_probe(args):
    """What the command does; prints the table. Raises InputError."""
    if args.json and (os.path.exists(args.json)
                      or not os.access(os.path.dirname(args.json) or ".", os.W_OK)):
        raise InputError(f"--json {args.json}: choose a new file in a folder to write to")
    device = find_device(args.device)
    encoders = {"untrained": load_encoder(args.checkpoint, trained=False).to(device),
                "trained": load_encoder(args.checkpoint).to(device)}
    folder = args.data or encoders["trained"].config["data"]
    source, indices, names, folds = load_labelled(folder)
    features = compute_features(source, indices, encoders)
    read = [i for i, index in enumerate(indices) if index in features["trained"]]
    classes = sorted({name for i in read for name in names[i]})
    if len(classes) < 2:
        raise InputError("fewer than two classes have a clip that can be read")
    labels = torch.tensor([[float(name in names[i]) for name in classes] for i in read])
    rounds = make_rounds(labels, [folds[i] for i in read])
    results = {name: evaluate(torch.stack([vectors[indices[i]] for i in read]), labels, rounds)
               for name, vectors in features.items()}
    metric = "mAP" if (labels.sum(1) != 1).any() else "accuracy"
    print(f"{len(labels):,} clips, {len(classes)} classes, {labels.mean(0).max():.0%} of the clips "
          f"have the largest; {metric} in %, mean +- deviation over {len(rounds)} round(s)\n"
          f"{'':10}{'linear':>14}{'kNN':>14}")
    for name, scores in results.items():
        print(f"{name:10}" + "".join(
            f"{100 * torch.tensor(x).mean():7.1f} +- "
            f"{100 * torch.tensor(x).std(correction=0):3.1f}" for x in scores.values()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"checkpoint": args.checkpoint, "data": folder, "results": results}, file,
                      indent=1, allow_nan=False)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="labelled audio; without it, the data of the training")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    sys.stdout.reconfigure(errors="backslashreplace")            # names need not be valid UTF-8
    try:
        run_probe(parser.parse_args(argv))
    except (InputError, OSError, csv.Error) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
