"""Chapter 5, the probe: what did the encoder learn?

In: a checkpoint and labelled audio. Out: a table of how well the labels can be read off the frozen features, by a linear
classifier and by the nearest neighbours, beside two baselines that learned nothing: an untrained encoder of the same
shape, and the plain log-mel. A trained encoder that does not beat both has learned nothing useful.
Sources: linear probes, arXiv 1610.01644; neighbours' votes, X-ARES (arXiv 2505.16369); AudioSet's metrics, arXiv 1609.09430.

    python probe.py ckpt.pt                       the data it was trained on, if that has labels
    python probe.py ckpt.pt --data ESC-50-master  see README.md for the layouts
"""

import argparse
import collections
import copy
import csv
import dataclasses
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F

from data import SAMPLE_RATE, AudioFiles, BuiltInSounds, InputError
from masking import ROWS
from model import load_encoder
from train import BUILT_IN_CLIPS, DTYPES, find_device

L2_GRID = (1e-3, 1e-2, 1e-1, 1.0)     # strengths of the linear probe's regularisation to choose from
NEIGHBOURS, TEMPERATURE = 10, 0.07
SPLITS = ("test", "valid", "train")
AUDIOSET = {"balanced_train_segments.csv": "train", "eval_segments.csv": "test", "unbalanced_train_segments.csv": None}


# ---- labels and splits --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Labelled:
    """Clips with labels, as torch's DataLoader wants a data set."""
    source: object                    # AudioFiles or BuiltInSounds
    indices: list                     # of the clips in `source`
    labels: torch.Tensor              # (clips, classes) 0 or 1
    groups: list                      # of each clip: its fold, or 'train', 'valid', 'test', or None

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        """Clip i, whole: a waveform (S,), or None if it cannot be read, which is said."""
        try:
            return self.source.crop(self.indices[i], 0.0, None)
        except InputError as error:
            print(f"unusable, left out: {self.source.name(self.indices[i])}: {error}", flush=True)
            return None

    def subset(self, keep):
        """The clips for which `keep` (one bool a clip) is true."""
        kept = [i for i, wanted in enumerate(keep) if wanted]
        return Labelled(self.source, [self.indices[i] for i in kept], self.labels[kept], [self.groups[i] for i in kept])


def read_csv(path, columns, header=None):
    """Yields the rows of a CSV file as dicts, none if it is not there. Raises InputError if a row lacks one of `columns`.

    header: the names of the columns, for a file that begins with comments (#) instead of them.
    """
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            lines = (line for line in file if not (header and line.startswith("#")))
            for row in csv.DictReader(lines, header, skipinitialspace=True):
                if None in row or any(row.get(column) is None for column in columns):
                    raise InputError(f"{path}: no column {', '.join(columns)}, or more cells than columns, in {row}")
                yield row


def from_audioset(folder, files):
    """AudioSet's official files (Gemmeke 2017): {file: (machine ids, 'train' or 'test')}, by the YTID in a file's name.

    If class_labels_indices.csv is there, only the classes that it names count.
    """
    by_id = {os.path.basename(file)[1:12]: file for file in files if os.path.basename(file).startswith("Y")}    # YYTID.wav
    by_id |= {os.path.basename(file)[:11]: file for file in files}                 # YTID.wav, YTID_30.000.flac
    known = {row["mid"] for row in read_csv(os.path.join(folder, "class_labels_indices.csv"), ["mid"])}
    table = {}
    for name, group in AUDIOSET.items():
        path, rows, found = os.path.join(folder, name), 0, 0
        for row in read_csv(path, ["labels"], header=["YTID", "start", "end", "labels"]):
            file = by_id.get(row["YTID"])
            labels = [label for label in row["labels"].split(",") if not known or label in known]
            rows, found = rows + 1, found + (file is not None)
            if file is not None and group and labels:
                table[file] = (labels, group)
        if rows:
            print(f"{path}: {found} of {rows} rows have a clip here" + ("" if group else "; not used: the balanced set trains"))
    return table


def from_table(path, files):
    """A CSV with columns filename, category and perhaps split or fold: {file: ([class], group or None)}."""
    by_name = {os.path.basename(file): file for file in files} | {file: file for file in files}
    same_name = collections.Counter(map(os.path.basename, files))
    rows, table = list(read_csv(path, ["filename", "category"])), {}
    for row in rows:
        file, split = by_name.get(row["filename"]), (row.get("split") or "").lower()
        if split and split not in SPLITS:
            raise InputError(f"{path}: the split of {row['filename']} is {split}; it may be train, valid or test")
        if file in table or row["filename"] not in files and same_name[row["filename"]] > 1:
            raise InputError(f"{path}: {row['filename']} stands for several files, or in several rows")
        if file:
            table[file] = ([row["category"]], split or row.get("fold") or None)
    if rows:
        print(f"{path}: {len(table)} of {len(rows)} rows name a file here")
        if not table:
            raise InputError(f"{path}: no filename in it is that of an audio file in the folder to probe, with its ending")
    return table


def from_folders(files):
    """One sub-folder a class, with or without train/, valid/, test/ above them: {file: ([class], group or None)}."""
    table = {}
    for file in files:
        *folders, _ = file.split(os.sep)
        group = folders.pop(0) if len(folders) > 1 and folders[0] in SPLITS else None
        if folders:
            table[file] = ([folders[0]], group)
    return table


def load_labelled(folder):
    """The clips of a folder that have a label, by the first layout that is there. Raises InputError if none is."""
    if os.path.isfile(folder):
        raise InputError(f"{folder}: the probe needs a folder with labels; name one with --data")
    source = AudioFiles(folder)
    files = {os.path.relpath(os.fsdecode(source.path(i)), folder): i for i in range(len(source))}
    table = (from_audioset(folder, files) or from_table(os.path.join(folder, "meta", "esc50.csv"), files)
             or from_table(os.path.join(folder, "labels.csv"), files) or from_folders(files))
    if not table:
        raise InputError(f"{folder}: no labels here; the probe needs a folder with AudioSet's segment files, meta/esc50.csv, "
                         "a labels.csv with columns filename and category, or one sub-folder a class")
    if len(table) < len(files):
        print(f"{folder}: {len(files) - len(table)} of {len(files)} clips have no label (that is used); left out")
    classes = {name: i for i, name in enumerate(sorted({name for names, _ in table.values() for name in names}))}
    labels = torch.zeros(len(table), len(classes))
    for row, (names, _) in zip(labels, table.values()):
        row[[classes[name] for name in names]] = 1
    return Labelled(source, [files[file] for file in table], labels, [group for _, group in table.values()])


def load_built_in(seconds):
    """The built-in sounds with their classes."""
    source = BuiltInSounds(BUILT_IN_CLIPS, seconds)
    labels = F.one_hot(torch.arange(len(source)) % len(source.classes)).float()
    return Labelled(source, list(range(len(source))), labels, [None] * len(source))


def drop_rare(data):
    """Leave out the clips of classes that have fewer than two: a lone clip is never trained on or never tested."""
    rare = data.labels.sum(0) < 2
    if rare.any():
        print(f"{int(rare.sum())} of {len(rare)} classes have fewer than two clips; left out")
        data = data.subset(data.labels[:, ~rare].sum(1) > 0)
        data.labels = data.labels[:, ~rare]
    if data.labels.shape[1] < 2:
        raise InputError("fewer than two classes with two clips each: there is nothing to tell apart")
    return data


def make_rounds(data):
    """Evaluation rounds as (train, valid, test) clip indices: one for a given split, one a fold otherwise.

    `valid` chooses the regularisation: the given part, or the fold after the test fold; where that leaves nothing to choose
    by or to train on, a tenth of the clips that are not for testing. Test clips choose nothing. Raises InputError.
    """
    def shuffled(clips):
        return clips[torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))]

    groups, everything = set(data.groups), torch.arange(len(data))
    is_split = bool(groups & set(SPLITS))
    if None in groups and len(groups) > 1:
        raise InputError("some clips have a split or fold and some have none")
    if is_split and not {"train", "test"} <= groups <= set(SPLITS):
        raise InputError(f"a split has the parts 'train', 'test' and perhaps 'valid', but here: {', '.join(sorted(groups))}")
    if len(groups) == 1:                                                           # no folds given: deal each class out in turn
        order = shuffled(everything)
        order = order[data.labels[order].argmax(1).argsort(stable=True)]
        fold = order.argsort() % min(5, len(data))
    else:                                                                          # a split: test is fold 0, valid 1, train 2
        names = SPLITS if is_split else sorted(groups)
        fold = torch.tensor([names.index(group) for group in data.groups])
    n_folds, rounds = int(fold.max()) + 1, []
    for i in range(1 if is_split else n_folds):
        is_test, is_valid = fold == i, fold == (i + 1) % n_folds
        train, valid = everything[~is_test & ~is_valid], everything[is_valid]
        if len(train) == 0 or len(valid) == 0:
            known = shuffled(torch.cat([train, valid]))
            tenth = torch.arange(len(known)) % 10 == 0
            train, valid = known[~tenth], known[tenth]
        if len(train) < 2:
            raise InputError("too few clips to train on: there must be two beside those for validation and test")
        rounds.append((train, valid, everything[is_test]))
    return rounds


# ---- features -----------------------------------------------------------------------------------------------------------

def compute_features(data, encoders, mel, workers, pool="time", amp="off"):
    """Features of every clip: {'log-mel': (clips, 2 F), name: (clips, D' or D)}, and which clips could be read.

    A clip's feature is the mean of its embeddings over the columns that hold sound; for the log-mel baseline mean and
    deviation of its frames. `pool` "time" keeps the 8 patches of a column apart; "mean" averages them too, as the published
    code does, and loses where in frequency a sound was.
    """
    features, readable, told = {name: [] for name in ("log-mel", *encoders)}, [], time.monotonic()
    for batch in torch.utils.data.DataLoader(data, batch_size=32, num_workers=workers, collate_fn=list):
        readable += [clip is not None for clip in batch]
        clips = [clip for clip in batch if clip is not None]
        if not clips:
            continue
        for clip in clips:
            frames = mel(clip[None])[0]                                            # (F, frames of the clip)
            features["log-mel"].append(torch.cat([frames.mean(1), frames.std(1, correction=0)]))
        for name, encoder in encoders.items():
            # One behind the other, each padded to whole windows: so one long clip does not pad all the others to its length.
            padded = [F.pad(clip, (0, -len(clip) % encoder.window_samples)) for clip in clips]
            with torch.autocast(encoder.mel.mean.device.type, DTYPES[amp], enabled=amp != "off"):
                embeddings = encoder(torch.cat(padded), SAMPLE_RATE)[0].cpu()      # (columns of all clips, D')
            if pool == "mean":
                embeddings = embeddings.unflatten(1, (ROWS, -1)).mean(1)
            for clip, columns in zip(clips, embeddings.split([len(whole) // encoder.column_samples for whole in padded])):
                features[name].append(columns[:math.ceil(len(clip) / encoder.column_samples)].mean(0))
        if time.monotonic() - told > 10:
            print(f"features of {len(readable):,} of {len(data):,} clips", flush=True)
            told = time.monotonic()
    if not any(readable):
        raise InputError("none of the labelled clips could be read")
    return {name: torch.stack(vectors) for name, vectors in features.items()}, readable


class AudioJEPAEncoder(torch.nn.Module):
    """The encoder as the benchmark X-ARES wants it, from the checkpoint that the environment variable AUDIO_JEPA_CKPT names
    (ckpt.pt). X-ARES makes an instance of the one name in this file that ends in "Encoder", without arguments."""

    def __init__(self):
        super().__init__()
        self.encoder = load_encoder(os.environ.get("AUDIO_JEPA_CKPT", "ckpt.pt"))
        self.sampling_rate, self.output_dim = SAMPLE_RATE, self.encoder.output_dim
        self.hop_size_in_ms = 1000 * self.encoder.hop_seconds

    def forward(self, audio):
        """Audio (B, S) at 32 kHz -> embeddings (B, T', D')."""
        return self.encoder(audio, SAMPLE_RATE)


# ---- the two probes -----------------------------------------------------------------------------------------------------

def cross_entropy(scores, labels, multi_label):
    """The loss of a linear probe, a mean over clips; for several labels a clip, binary and summed over the classes."""
    if multi_label:
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / len(labels)
    return F.cross_entropy(scores, labels)


def linear_scores(train, labels, test, l2, multi_label):
    """Fit one linear layer to standardised features (n, D') with labels (n, classes); scores (m, classes) of `test`.

    Minimises cross-entropy + l2 / 2 * |weights|^2 by L-BFGS.
    """
    center, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - center) / scale, (test - center) / scale
    weights = torch.zeros(train.shape[1], labels.shape[1], requires_grad=True)
    bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(train @ weights + bias, labels, multi_label) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (test @ weights + bias).detach()


def knn_scores(train, labels, test):
    """Votes (m, classes) of the 10 most similar training clips by cosine, weighted by softmax(similarity / 0.07)."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T            # (m, n)
    nearest, index = similarity.topk(min(NEIGHBOURS, len(train)), dim=1)
    return torch.einsum("mk,mkc->mc", (nearest / TEMPERATURE).softmax(1), labels[index])


def accuracy(scores, labels):
    """Share of the clips whose highest score is that of their class."""
    return (scores.argmax(1) == labels.argmax(1)).float().mean().item()


def ranking_metrics(scores, labels):
    """Mean average precision, mean area under the ROC curve, and d' = sqrt(2) * probit(AUC), over the classes that have
    both positive and negative clips. Ties count half in the AUC, and share their precision in the mAP.

    Source: AudioSet's own evaluation, Hershey et al. 2017 (arXiv 1609.09430), section 4.
    """
    present = (labels.sum(0) > 0) & (labels.sum(0) < len(labels))
    if not present.any():
        raise InputError("no class has both clips with and without it in the part to test on")
    precisions, areas = [], []
    for score, truth in zip(scores.T[present].double(), labels.T[present].double()):
        rank = score.unique(return_inverse=True)[1]                                # equal scores share a rank; 0 is the lowest
        positives, negatives = rank.bincount(truth).flip(0), rank.bincount(1 - truth).flip(0)
        hits, misses = positives.cumsum(0), negatives.cumsum(0)
        precisions.append((positives * hits / (hits + misses)).sum() / hits[-1])
        areas.append((negatives * (hits - positives / 2)).sum() / (hits[-1] * misses[-1]))
    area = torch.stack(areas).mean()
    return {"mAP": torch.stack(precisions).mean().item(), "AUC": area.item(),
            "d'": math.sqrt(2) * torch.special.ndtri(area).item()}


def evaluate(features, data, rounds):
    """Both probes on every round: {'linear': {metric: [value a round]}, 'knn': {...}}."""
    multi_label = bool((data.labels.sum(1) != 1).any())
    metrics = ranking_metrics if multi_label else lambda scores, labels: {"accuracy": accuracy(scores, labels)}
    results = {"linear": [], "knn": []}
    for train, valid, test in rounds:
        def loss_on_valid(l2):                                                     # of few clips, accuracies would tie
            scores = linear_scores(features[train], data.labels[train], features[valid], l2, multi_label)
            return cross_entropy(scores, data.labels[valid], multi_label)
        l2, known = min(L2_GRID, key=loss_on_valid), torch.cat([train, valid])
        linear = linear_scores(features[known], data.labels[known], features[test], l2, multi_label)
        neighbours = knn_scores(features[known], data.labels[known], features[test])
        results["linear"].append(metrics(linear, data.labels[test]))
        results["knn"].append(metrics(neighbours, data.labels[test]))
    return {probe: {metric: [row[metric] for row in rows] for metric in rows[0]} for probe, rows in results.items()}


def print_table(results):
    """One row an encoder; per cent, mean +- deviation over the folds (d' as it is)."""
    columns = [(probe, metric) for probe in ("linear", "knn") for metric in results["log-mel"][probe]]
    print(" " * 10 + "".join(f"{f'{probe} {metric}':>18}" for probe, metric in columns))
    for name, scores in results.items():
        cells = ""
        for probe, metric in columns:
            factor, digits = (1, 2) if metric == "d'" else (100, 1)
            values = factor * torch.tensor(scores[probe][metric])
            deviation = f" +- {values.std():.{digits}f}" if len(values) > 1 else ""
            cells += f"{f'{values.mean():.{digits}f}{deviation}':>18}"
        print(f"{name:10}{cells}")


# ---- the command --------------------------------------------------------------------------------------------------------

def run_probe(args):
    """What the command does with its arguments; prints the table. Raises InputError."""
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be at least 0")
    if args.json:
        open(args.json, "a").close()                                               # what cannot be written shows now, not last
    torch.manual_seed(0)                                                           # the weights of the untrained one
    untrained = load_encoder(args.checkpoint, "untrained", args.layer)
    trained = load_encoder(args.checkpoint, args.encoder, args.layer)
    config, mel, device = trained.config, copy.deepcopy(trained.mel), find_device(args.device)       # this mel stays on the CPU
    encoders = {"untrained": untrained.to(device), "trained": trained.to(device)}

    folder = args.data or config["data"]
    data = drop_rare(load_labelled(folder) if folder else load_built_in(config["seconds"]))
    features, readable = compute_features(data, encoders, mel, args.workers, args.pool, args.amp)
    data = data.subset(readable)
    row = {index: i for i, index in enumerate(data.indices)}                       # of a clip in `features`
    data = drop_rare(data)                                                         # unreadable clips can make a class rare
    rounds, rows = make_rounds(data), [row[index] for index in data.indices]
    print(f"{len(data):,} clips, {data.labels.shape[1]} classes, {len(rounds)} round(s) of training and testing")
    results = {name: evaluate(values[rows], data, rounds) for name, values in features.items()}
    print_table(results)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"checkpoint": args.checkpoint, "data": folder or "built-in sounds", "results": results}, file, indent=1)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="labelled audio; without it, the data of the training")
    parser.add_argument("--encoder", choices=("target", "context"), default="target",
                        help="the EMA target (default), or the encoder that saw the context")
    parser.add_argument("--layer", type=int, help="features after this layer, counted from 1 (default: after the last, normed)")
    parser.add_argument("--pool", choices=("time", "mean"), default="time",
                        help="keep the 8 patches of a column apart (default), or average them")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first that is there)")
    parser.add_argument("--amp", choices=DTYPES, default="off", help="mixed precision (off)")
    parser.add_argument("--workers", type=int, default=min(8, max(0, (os.cpu_count() or 1) - 1)), help="reading processes")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    try:
        run_probe(args)
    except (InputError, OSError, csv.Error) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
