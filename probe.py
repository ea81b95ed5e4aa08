"""Chapter 5, the probe: what did the encoder learn?

In: a checkpoint and labelled audio. Out: a table of how well the labels can be read off frozen
features, by a linear classifier and by the nearest neighbours. Two rows that learned nothing stand
beside the trained encoder: the plain log-mel, and an untrained encoder of the same shape. The
latter is the same run without its prediction, because the loss has no other term.
Sources: linear probes, arXiv 1610.01644; kNN, X-ARES (2505.16369); mAP, AudioSet (1609.09430).

    python probe.py ckpt.pt                       on the data of the training, if it has labels
    python probe.py ckpt.pt --data ESC-50-master  the README lists the layouts of labelled folders
"""

import argparse
import collections
import csv
import itertools
import json
import math
import os
import sys

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from data import (COLUMNS, PATCH, ROWS, SAMPLE_RATE, AudioFiles, BuiltInSounds, InputError, LogMel,
                  patchify, resampler, to_columns)
from model import SIZES, Encoder
from train import DTYPES, find_device, knn_scores, load_checkpoint

L2_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)               # of the linear probe, to choose from
SPLITS = ("train", "valid", "test")
AUDIOSET = (("balanced_train_segments.csv", "train"), ("eval_segments.csv", "test"))

# ---- a trained encoder for use -----------------------------------------------------------------

class FrozenEncoder(nn.Module):
    """Waveforms in, embeddings over time out: one of `output_dim` numbers (D') every `hop_seconds`.
    It holds the 8 patches of a column side by side, because their average would mix high
    frequencies with low ones (Riou et al., arXiv 2405.08679)."""

    def __init__(self, config):
        super().__init__()
        self.mel, self.encoder = LogMel(config["seconds"]), Encoder(*SIZES[config["model"]])
        self.config, self.dtype = config, DTYPES[config["amp"]]
        self.column_samples = PATCH * self.mel.hop
        self.window_samples = COLUMNS * self.column_samples      # the length of a training clip
        self.output_dim = ROWS * self.encoder.norm.weight.numel()
        self.hop_seconds = self.column_samples / SAMPLE_RATE

    def embed(self, spectrograms):
        """Log-mel spectrograms (B, F, T) of a window each -> embeddings (B, T', D')."""
        with torch.autocast(spectrograms.device.type, self.dtype, self.dtype != torch.float32):
            return to_columns(self.encoder(patchify(spectrograms)).float())

    @torch.no_grad()
    def forward(self, waveform, sample_rate):
        """Floats (S,) or (B, S) at `sample_rate` Hz -> (B, T', D'), for all columns with sound.
        Long audio goes through in windows that know nothing of one another. Raises InputError."""
        waveform = torch.atleast_2d(torch.as_tensor(waveform))
        if waveform.shape[1] == 0 or not waveform.is_floating_point():
            raise InputError("a waveform must hold floats between -1 and 1, and at least one")
        waveform = resampler(sample_rate)(waveform.float().cpu())
        padded = F.pad(waveform, (0, -waveform.shape[1] % self.window_samples))
        windows = rearrange(padded, "b (w s) -> (b w) s", s=self.window_samples)
        embeddings = torch.cat([self.embed(self.mel(part.to(self.mel.mean.device)))
                                for part in windows.split(32)])
        embeddings = rearrange(embeddings, "(b w) t d -> b (w t) d", b=len(waveform))
        return embeddings[:, :math.ceil(waveform.shape[1] / self.column_samples)]

def load_encoder(path, trained=True):
    """A checkpoint's target encoder, or an untrained one like it, on the CPU. Raises InputError."""
    checkpoint = load_checkpoint(path)
    torch.manual_seed(0)                             # the weights of the untrained one
    encoder = FrozenEncoder(checkpoint["config"])
    encoder.mel.load_state_dict(checkpoint["mel"])
    if trained:
        encoder.encoder.load_state_dict(checkpoint["target_encoder"])
    return encoder.eval()

# ---- labels ------------------------------------------------------------------------------------

def read_csv(path, columns, header=None):
    """The rows of a CSV file as dicts; none if it is not there. Raises InputError if a row lacks
    one of `columns`. header: the names of the columns, for a file that begins with comments."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = [line for line in file if not (header and line.startswith("#"))]
    rows = list(csv.DictReader(lines, header, skipinitialspace=True))
    for row in rows:
        if any(row.get(column) is None for column in columns):
            raise InputError(f"{path}: no column {' or '.join(columns)} in {row}")
    return rows

def from_audioset(folder, files):
    """AudioSet's official CSVs -> {file: (labels, split)}. The name of a file begins with its
    YTID, or with Y and that. If class_labels_indices.csv is there, only its classes count."""
    names = {os.path.basename(file): file for file in files}
    by_id = {name[1:12]: file for name, file in names.items() if name.startswith("Y")}
    by_id |= {name[:11]: file for name, file in names.items()}
    classes = read_csv(os.path.join(folder, "class_labels_indices.csv"), ["mid"])
    known, table = {row["mid"] for row in classes}, {}
    for name, split in AUDIOSET:
        path, header = os.path.join(folder, name), ["YTID", "start", "end", "labels"]
        for row in read_csv(path, ["labels"], header):
            labels = [x for x in row["labels"].split(",") if not known or x in known]
            if row["YTID"] in by_id and labels:
                table[by_id[row["YTID"]]] = labels, split
    return table

def from_table(path, files):
    """A CSV with columns filename, category, and perhaps split or fold -> {file: ([class], group)}.
    A filename is a path below the folder, or a name that only one file there has."""
    by_name, table = collections.defaultdict(set), {}
    for file in files:
        by_name[file].add(file)
        by_name[os.path.basename(file)].add(file)
    for row in read_csv(path, ["filename", "category"]):
        found, split = list(by_name[row["filename"]]), (row.get("split") or "").lower()
        if split not in ("", *SPLITS):
            raise InputError(f"{path}: the split {split!r}; it can be {', '.join(SPLITS)}")
        if len(found) > 1 or found and found[0] in table:
            raise InputError(f"{path}: {row['filename']!r} stands for several files or rows")
        if found:
            table[found[0]] = [row["category"]], split or row.get("fold") or None
    return table

def from_folders(files):
    """A folder for each class, perhaps below train/, valid/, test/ -> {file: ([class], group)}."""
    table = {}
    for file in files:
        *folders, _ = file.split(os.sep)
        group = folders.pop(0) if len(folders) > 1 and folders[0] in SPLITS else None
        if folders:
            table[file] = [folders[0]], group
    return table

def load_labelled(folder):
    """The source of the clips; the index there of each labelled one; each one's fold, split or
    None; and for every question that can be asked, the classes of each one. Folders answer one
    question, the built-in sounds two. Raises InputError."""
    if folder is None:
        source = BuiltInSounds()
        orders, timbres = zip(*map(source.labels, range(len(source))))
        questions = {"order": [[str(x)] for x in orders], "timbre": [[x] for x in timbres]}
        groups = ["train"] * 1920 + ["test"] * 480           # as many of each class in both
        return source, range(len(source)), groups, questions
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: not a folder; name one with labelled audio by --data")
    source = AudioFiles(folder)
    files = {os.fsdecode(bytes(path)): i for i, path in enumerate(source.paths)}
    table = (from_audioset(folder, files)
             or from_table(os.path.join(folder, "meta", "esc50.csv"), files)
             or from_table(os.path.join(folder, "labels.csv"), files) or from_folders(files))
    print(f"{len(table):,} of the {len(files):,} files in {folder} have a label")
    if not table:
        raise InputError(f"{folder}: no labels; they can be in AudioSet's CSVs, meta/esc50.csv, "
                         "labels.csv (columns filename and category), or a folder for each class")
    classes, groups = zip(*table.values())
    return source, [files[file] for file in table], groups, {"class": classes}

def make_rounds(labels, groups):
    """Rounds of evaluation as (train, valid, test) clip indices: one for a given split, else one
    for each fold. `valid` chooses the regularisation; if it is not given, it is a tenth of the
    clips that are not for testing. Raises InputError."""
    kinds = set(groups)
    split = bool(kinds & set(SPLITS))
    if None in kinds and len(kinds) > 1 or split and not {"train", "test"} <= kinds <= set(SPLITS):
        raise InputError("every clip needs a fold, or every clip a split of train, valid or test; "
                         f"here are {', '.join(sorted(map(str, kinds)))}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if len(kinds) == 1:                              # none given: deal out each class to five folds
        by_class = order[labels[order].argmax(1).argsort(stable=True)]
        groups = (by_class.argsort() % 5).tolist()
    rounds = []
    for name in ["test"] if split else sorted(set(groups)):
        test = torch.tensor([groups[i] == name for i in order.tolist()])
        rest = order[~test]
        valid = torch.tensor([groups[i] == "valid" for i in rest.tolist()])
        if not valid.any():
            valid = torch.arange(len(rest)) % 10 == 0
        rounds.append((rest[~valid], rest[valid], order[test]))
    if min(len(clips) for parts in rounds for clips in parts) == 0:
        raise InputError("too few clips to train on, to choose by and to test on")
    return rounds

# ---- features ----------------------------------------------------------------------------------

@torch.no_grad()
def compute_features(source, indices, encoders):
    """Features of the clips of `source` that can be read, {name: (n, features)}, and which can:
    the mean and the standard deviation over the time in which a clip holds sound, (n, 2 D') for the
    encoders and (n, 2 F) for the log-mel. Clips are read by windows, to bound the memory."""
    encoder = encoders["trained"]
    features, readable = collections.defaultdict(list), []
    for index in indices:
        sums = collections.defaultdict(float)        # of 1, x and x ** 2 over time
        try:
            for window in source.windows(index, encoder.window_samples):
                padded = F.pad(window, (0, encoder.window_samples - len(window)))
                spectrogram = encoder.mel(padded[None].to(encoder.mel.mean.device))
                series = {"log-mel": spectrogram.mT}
                series |= {name: each.embed(spectrogram) for name, each in encoders.items()}
                for name, x in series.items():       # (1, frames or T', features)
                    x = x[0, :math.ceil(x.shape[1] * len(window) / encoder.window_samples)].cpu()
                    sums[name] += torch.stack([x ** 0, x, x ** 2]).sum(1)
        except InputError as error:
            print(f"unusable: {source.name(index)}: {error}", flush=True)
            sums.clear()
        readable.append(bool(sums))
        for name, (n, total, squares) in sums.items():
            mean, std = total / n, (squares / n - (total / n) ** 2).clamp(min=0).sqrt()
            features[name].append(torch.cat([mean, std]))
        if len(readable) % 1000 == 0:
            print(f"features of {len(readable):,} of {len(indices):,} clips", flush=True)
    return {name: torch.stack(rows) for name, rows in features.items()}, readable

# ---- the two probes ----------------------------------------------------------------------------

def binary_cross_entropy(scores, labels):
    """The loss for several labels a clip: a mean over clips, but a sum over classes."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / len(labels)

def linear_scores(train, labels, test, l2, loss_function):
    """Fit one linear layer to features (n, D') with labels (n, classes); scores (m, classes) of
    `test`. Minimises loss + l2 / 2 * |weights|^2 on standardised features, by L-BFGS."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weights = torch.zeros(train.shape[1], labels.shape[1], requires_grad=True)
    bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_function(train @ weights + bias, labels) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (test @ weights + bias).detach()

def accuracy(scores, labels):
    """The share of clips whose highest score is that of their class."""
    return (scores.argmax(1) == labels.argmax(1)).float().mean().item()

def mean_average_precision(scores, labels):
    """The mean over classes of the average precision at the clips that have the class. Clips of the
    same score share a rank. Source: AudioSet (arXiv 1609.09430), section 4."""
    precisions = []
    for score, truth in zip(scores.T, labels.T.double()):
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
        l2, known = min(losses, key=losses.get), torch.cat([train, valid])
        scores = linear_scores(features[known], labels[known], features[test], l2, loss)
        results["linear"].append(metric(scores, labels[test]))
        scores = knn_scores(features[known], labels[known], features[test])
        results["kNN"].append(metric(scores, labels[test]))
    return results

# ---- the command -------------------------------------------------------------------------------

def run_probe(args):
    """What the command does; prints the table. Raises InputError."""
    device = find_device(args.device)
    encoders = {"untrained": load_encoder(args.checkpoint, trained=False).to(device),
                "trained": load_encoder(args.checkpoint).to(device)}
    folder = args.data or encoders["trained"].config["data"]
    source, indices, groups, questions = load_labelled(folder)
    features, readable = compute_features(source, indices, encoders)
    groups = list(itertools.compress(groups, readable))
    table = {}
    for question, answers in questions.items():
        answers = list(itertools.compress(answers, readable))
        classes = sorted({name for names in answers for name in names})
        if len(classes) < 2:
            raise InputError("fewer than two classes have a clip that can be read")
        labels = torch.tensor([[float(name in names) for name in classes] for names in answers])
        rounds = make_rounds(labels, groups)
        table[question] = {name: evaluate(x, labels, rounds) for name, x in features.items()}
        metric = "mAP" if (labels.sum(1) != 1).any() else "accuracy"
        print(f"{question}: {len(labels):,} clips, {len(classes)} classes; {metric} in %, mean +- "
              f"deviation over {len(rounds)} round(s)\n{'':10}{'linear':>14}{'kNN':>14}")
        for name, scores in table[question].items():
            print(f"{name:10}" + "".join(
                f"{100 * torch.tensor(x).mean():7.1f} +- "
                f"{100 * torch.tensor(x).std(correction=0):3.1f}" for x in scores.values()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"checkpoint": args.checkpoint, "data": folder, "results": table}, file,
                      indent=1, allow_nan=False)

def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="labelled audio; without it, the data of the training")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
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
