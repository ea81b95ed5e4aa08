"""Chapter 1, data: from waveforms to patches, and from audio files to batches of waveforms.

In: a folder, a text file of paths, or nothing (built-in sounds). Out: waveforms (B, S) at 32 kHz
from the loader; on the training device, log-mel spectrograms (B, M, T) and their patches (B, N, E).
Source: Audio-JEPA (arXiv 2507.02915), section 3. Who wants to know the method first reads as far as
`to_columns` and goes on with masking.py; the rest tells how any folder becomes batches.

The letters of all shapes in this project:
    B   clips of a batch             S   samples of a clip, at 32 kHz
    M   mel bands (128)              T   frames of a spectrogram (256)
    N   patches of a clip (128)      E   values of a patch (16 bands x 16 frames = 256)
    C   visible patches of a clip    K   hidden patches of a clip
    D   width of the encoder         P   width of the predictor
    T'  columns of patches in time   D'  = 8 D, the 8 patches of a column side by side
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import math
import os
import signal

import numpy as np
import soundfile
import torch
import torchaudio
from einops import rearrange
from torch import nn
from torch.nn import functional as F

SAMPLE_RATE = 32_000                  # Hz, of every waveform once it has been read
N_MELS, N_FRAMES = 128, 256           # M, T: the spectrogram of a clip, however long the clip is
PATCH = 16                            # bands and frames of a patch
ROWS, COLUMNS = N_MELS // PATCH, N_FRAMES // PATCH      # the grid of patches: frequency x time
N_PATCHES = ROWS * COLUMNS
MEL_FLOOR = 1e-6                      # added before the logarithm: the noise of a quiet recording
EXTENSIONS = (b".wav", b".flac", b".ogg", b".opus", b".mp3", b".aif", b".aiff")
DECODED_AT_ONCE = 4096                # samples of a channel; a damaged block is lost as a whole
PATIENCE = 20                         # files that may fail one after the other
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class InputError(Exception):
    """Bad input, explained in one line; the commands print it and exit with code 1."""


# ---- from waveforms to patches -----------------------------------------------------------------


def hop_samples(seconds):
    """Samples between two of the 256 frames of a clip of `seconds`; 10 s gives the paper's 1250."""
    return round(seconds * SAMPLE_RATE / N_FRAMES)


class LogMel(nn.Module):
    """Waveforms (B, S) -> normalised log-mel spectrograms (B, M, one frame for each hop).

    The bands are evenly spaced in mel, as the ear hears pitch (Slaney's formula); the logarithm
    follows how it hears loudness. A hop is seconds / 256, a window 2.5 hops. At 10 s a hop has
    39 ms, as in the paper; at 2.56 s it has 10 ms, as in speech recognition."""

    def __init__(self, seconds):
        super().__init__()
        self.hop = hop_samples(seconds)
        window = int(2.5 * self.hop)
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, hop_length=self.hop, win_length=window,
            n_fft=max(1024, 2 ** math.ceil(math.log2(window))),  # with fewer, low bands are empty
            f_min=20, n_mels=N_MELS, mel_scale="slaney", pad_mode="constant",
            normalized="window")                     # divides by the root of the window's energy,
                                                     # so noise is as loud with any window
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def log_mel(self, waveforms):
        """Waveforms (B, any length) -> log-mel before normalisation (B, M, frames)."""
        frames = math.ceil(waveforms.shape[1] / self.hop)        # torch adds one around the end
        with torch.autocast(waveforms.device.type, enabled=False):          # logs need float32
            parts = [self.spectrogram(part) for part in waveforms.split(8)]     # fit a CPU's cache
            return (torch.cat(parts) + MEL_FLOOR).log()[..., :frames]

    def forward(self, waveforms):
        return (self.log_mel(waveforms) - self.mean) / self.std

    def fit(self, crops):
        """Set `mean` and `std` from the first 256 crops of a run, without what is added to short
        ones. Raises InputError if more than one in twenty files could not be read."""
        values, failures = [], []
        for i in range(256):
            crop, reports = crops.read(i, fill=False)
            failures += [report for report in reports if report.startswith("unusable")]
            if len(failures) > 0.05 * 256:
                raise InputError("more than one in twenty files cannot be read; the first: "
                                 + "; ".join(dict.fromkeys(failures[:3])))
            values.append(self.log_mel(crop[None].to(self.mean.device)).flatten())
        values = torch.cat(values)
        self.mean.copy_(values.mean())
        self.std.copy_(values.std().clamp(min=1e-3))


def patchify(spectrograms):
    """Cut spectrograms (B, M, T) into patches (B, N, E), all columns of the lowest row first."""
    return rearrange(spectrograms, "b (row m) (column t) -> b (row column) (m t)", m=PATCH, t=PATCH)


def to_columns(tokens):
    """Put the 8 patches of a column side by side: tokens (B, N, D) -> (B, T', D')."""
    return rearrange(tokens, "b (row column) d -> b column (row d)", row=ROWS)


# ---- where clips come from ---------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def resampler(rate):
    """A function from (..., samples at `rate` Hz) to (..., samples at 32 kHz). Raises InputError
    for a kernel too large: 44,100 Hz needs 0.1 million numbers, 44,101 Hz needs 1,400 million."""
    common = math.gcd(rate, SAMPLE_RATE)
    if rate < 1_000 or rate // common * (SAMPLE_RATE // common) > 4_000_000:
        raise InputError(f"cannot resample {rate} Hz; convert it to {SAMPLE_RATE} Hz")
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def decode(file, n):
    """The next n samples (n, channels) of an open file, or what is left of them before its end or
    before a damaged block."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    with contextlib.suppress(soundfile.SoundFileError):
        for done in range(0, n, DECODED_AT_ONCE):
            blocks.append(file.read(min(DECODED_AT_ONCE, n - done), "float32", always_2d=True))
    return np.concatenate(blocks)


class AudioFiles:
    """The audio files under a folder, or those that a text file lists, one path a line, relative to
    its folder. Raises InputError if there is no audio. The paths are one array of bytes, because a
    list of two million strings would be copied into every worker."""

    def __init__(self, root):
        self.root = os.fsencode(root)
        if os.path.isdir(self.root):
            paths = self.find(self.root)
        elif os.path.isfile(self.root):
            with open(self.root, "rb") as file:
                start = file.read(4096)
                if b"\0" in start:
                    raise InputError(f"{root}: neither a folder nor a text file of paths")
                text = (start + file.read()).removeprefix(b"\xef\xbb\xbf")      # Windows' mark
            self.root, paths = os.path.dirname(self.root), list(filter(None, text.splitlines()))
        else:
            raise InputError(f"{root}: no such folder, nor a text file with one path a line")
        if not paths:
            raise InputError(f"{root}: no audio here ({b' '.join(EXTENSIONS).decode()})")
        self.paths = np.array(paths)                 # (n,) bytes, all as wide as the longest
        self.fingerprint = hashlib.sha256(self.paths.tobytes()).hexdigest()

    @staticmethod
    def find(root):
        """The audio files below a folder, relative to it, in one order on every machine. Says how
        many other files there are, and which folders cannot be read."""
        paths, others, visited, top = [], collections.Counter(), set(), os.path.realpath(root)
        for folder, subfolders, names in os.walk(
                root, followlinks=True, onerror=lambda error: print(f"unusable: {error}")):
            here = os.path.realpath(folder)
            is_above = here != top and top.startswith(os.path.join(here, b""))
            if here in visited or is_above:          # a link led here again, or above the top
                subfolders.clear()
                continue
            visited.add(here)
            subfolders.sort()                        # os.walk goes on in this order
            for name in sorted(names):
                if name.lower().endswith(EXTENSIONS) and not name.startswith(b"._"):
                    paths.append(os.path.relpath(os.path.join(folder, name), root))
                else:
                    others[os.fsdecode(os.path.splitext(name)[1].lower()) or "no extension"] += 1
        if others:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5))
            print(f"left out as no audio that we can read: {kinds}", flush=True)
        return paths

    def __len__(self):
        return len(self.paths)

    def path(self, index):                           # bytes: names need not be valid UTF-8
        return os.path.join(self.root, bytes(self.paths[index]))

    def name(self, index):
        """The path for messages, with control characters escaped."""
        return repr(os.fsdecode(self.path(index)))

    def windows(self, index, n_samples, start=0.0):
        """Yield one window of file `index` after another, mono float32 at 32 kHz: (n_samples,), the
        last perhaps shorter. Raises InputError if the file cannot be used; and, after all that
        could be decoded, if that is less than the header of the file claims.

        start: where the first begins, as a share of the places that leave a whole window, from 0 to
        just under 1. Seeking there makes a long file as cheap as a short one."""
        try:
            if not os.path.isfile(self.path(index)):             # to open a named pipe would block
                raise InputError("not there, or not a regular file")
            with soundfile.SoundFile(self.path(index)) as file:
                resample, heard = resampler(file.samplerate), 0
                wanted = math.ceil(n_samples * file.samplerate / SAMPLE_RATE)
                claimed = file.frames - file.seek(int(start * max(0, file.frames - wanted + 1)))
                samples = decode(file, wanted)
                while len(samples):
                    if not -1e4 < samples.min() <= samples.max() < 1e4:  # NaN fails any comparison
                        raise InputError("samples that are NaN, infinite or absurdly large")
                    heard += len(samples)
                    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
                    yield resample(torch.from_numpy(mono))[:n_samples]
                    samples = decode(file, wanted) if len(samples) == wanted else samples[:0]
                if heard < max(1, claimed - DECODED_AT_ONCE):    # MP3 headers are a little off
                    raise InputError(f"{heard / file.samplerate:.1f} s decoded of the "
                                     f"{claimed / file.samplerate:.4g} s that its header claims")
        except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
            raise InputError(str(error)) from error  # a broken header can promise anything


class BuiltInSounds:
    """Melodies for a first run, with a question about each: in which order do its four notes come?

    A clip plays one of the six orders over and over, in a key, a timbre and a tempo of its own, and
    begins anywhere in it. All orders have the same notes, so the spectrum averaged over time does
    not know the order. Clip i is a pure function of i."""
    timbres = [                                      # {partial: amplitude}, and decay in 1 / s
        ({1: 1.0}, 0), ({1: 1.0, 2.76: 0.7, 5.4: 0.5, 8.93: 0.4}, 30),
        ({k: k ** -0.5 for k in (1, 3, 5, 7, 9)}, 0), ({k: k ** -0.5 for k in range(1, 11)}, 0)]
    orders = np.array([(0, *rest) for rest in itertools.permutations((5, 10, 15))])    # semitones
    fingerprint = "built-in sounds"

    def __len__(self):
        return 2400

    def label(self, index):
        """The number of the order in which the notes of a clip come, 0 to 5."""
        return index % 6

    def windows(self, index, n_samples, start=0.0):
        """Yield the clip, which is one window long. A note takes 1.1 to 1.5 columns of patches, so
        neither notes nor melodies lie on the grid of patches."""
        rng, time = np.random.default_rng([12, int(index)]), np.arange(n_samples)
        partials, decay = self.timbres[index // 6 % 4]
        samples = n_samples / COLUMNS * rng.uniform(1.1, 1.5)                        # of a note
        beginning = 4 * samples * rng.random()       # anywhere in the melody
        note, within = np.divmod(time + beginning, samples)
        note, within = note.astype(int), within / SAMPLE_RATE                        # in seconds
        pitch = self.orders[self.label(index)][note % 4] + rng.uniform(-3, 3)        # semitones
        phase = 2 * np.pi * (300 * 2 ** (pitch / 12)).cumsum() / SAMPLE_RATE         # from 300 Hz
        tone = sum(a * np.sin(k * phase + rng.uniform(0, 6)) for k, a in partials.items())
        fade = np.minimum(within, samples / SAMPLE_RATE - within).clip(0, 0.005) / 0.005
        level = 10 ** rng.uniform(-1, 0, note.max() + 1)[note]                       # of each note
        melody = tone * fade * level * np.exp(-decay * within)
        melody *= 10 ** rng.uniform(-1.6, -0.6) / np.sqrt(np.mean(melody ** 2))
        noise = 10 ** rng.uniform(-2.6, -1.6) * rng.standard_normal(n_samples)
        yield torch.from_numpy((melody + noise).astype(np.float32))


# ---- crops and batches -------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)                      # a batch can hold the seam of two epochs
def epoch_order(seed, epoch, n_clips):
    """All clips in the random order of one epoch, (n_clips,)."""
    order = np.arange(n_clips, dtype=np.int32)       # half the memory of int64, in every worker
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


class Crops(torch.utils.data.Dataset):
    """Crop i of a run is a pure function of (source, seed, i), so a resumed run sees what an
    undisturbed one sees, however many workers read. An epoch takes one random crop of every clip,
    in a new order. A file that cannot be used is replaced by a random other one, and reported.

    If a file is shorter than a crop, a coin decides what follows: silence, or sounds of random
    other files until the crop is full. With silence alone, a set of short files would teach the
    encoder where sound ends, and little else."""

    def __init__(self, source, n_samples, seed):
        self.source, self.n_samples, self.seed = source, n_samples, seed

    def window(self, index, n_samples, start):
        """A window of a file, and a list of reports. If the file holds nothing at `start`, because
        its header lies about its length, the window is that of its beginning."""
        try:
            return next(self.source.windows(index, n_samples, start)), []
        except InputError as error:
            beginning = next(self.source.windows(index, n_samples))
            return beginning, [f"cut short: {self.source.name(index)}: {error}"]

    def read(self, i, fill=True):
        """Crop i, a waveform (at most S,), and a list of reports: lines that begin with "unusable"
        for each file that failed on the way, or with "cut short". If 20 files fail, the crop is
        what there is, perhaps nothing; `fit` and `load_batches` then end the run. fill: whether
        other files may follow a short one."""
        epoch, place = divmod(i, len(self.source))
        index = int(epoch_order(self.seed, epoch, len(self.source))[place])
        rng = np.random.default_rng([self.seed, 1 << 32, i])     # numbers that no epoch draws
        fill = rng.random() < 0.5 and fill
        crop, reports, failures = torch.zeros(0), [], 0
        while failures < PATIENCE:
            try:
                window, report = self.window(index, self.n_samples - len(crop), rng.random())
                crop, reports = torch.cat([crop, window]), reports + report
                if not fill or len(crop) == self.n_samples:
                    break
            except InputError as error:
                reports.append(f"unusable: {self.source.name(index)}: {error}")
                failures += 1
            index = int(rng.integers(len(self.source)))
        return crop, reports

    def __getitem__(self, i):
        """Crop i padded with silence to (S,), and its reports as one string."""
        crop, reports = self.read(i)
        return F.pad(crop, (0, self.n_samples - len(crop))), "\n".join(reports)


def default_workers():
    """Processes to read with: the cores that we may use less one, but at most 16."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, ours - 1)


def ignore_signals(_):
    """In a worker: a terminal sends Ctrl-C to all processes, but the main one decides."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def load_batches(crops, batch_size, steps, workers, pin_memory):
    """Yield the waveforms (B, S) of `steps` (a range), and print every report once. Closing this
    generator ends its workers. Raises InputError if 20 files fail one after the other."""
    loader = torch.utils.data.DataLoader(
        crops, batch_size, sampler=range(steps.start * batch_size, steps.stop * batch_size),
        num_workers=workers, worker_init_fn=ignore_signals, pin_memory=pin_memory,
        timeout=600 if workers else 0)
    printed = set()
    try:
        for waveforms, reports in loader:
            for lines in map(str.splitlines, reports):
                for line in lines:
                    if line not in printed:
                        print(line, flush=True)
                        printed.add(line)
                if sum(line.startswith("unusable") for line in lines) == PATIENCE:
                    raise InputError(f"{PATIENCE} files in a row cannot be read (reasons above): "
                                     "mend or remove them, or look whether a drive is gone")
            yield waveforms
    except (ConnectionError, EOFError):              # while the worker handed over a batch
        raise RuntimeError("a DataLoader worker died.") from None
    except Exception as error:
        # After a bug in a worker, the traceback would hold the loader, whose workers would then
        # keep the command from ending. The worker's own traceback is in the message.
        raise error.with_traceback(None) from None
