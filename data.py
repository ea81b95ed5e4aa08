"""Chapter 1, data: from audio files to waveforms, and from waveforms to patches.

For the method alone, stop at `patchify` and go on to masking.py. The rest turns any folder of
audio into batches. Source: Audio-JEPA (arXiv 2507.02915), section 3.

Letters in all shapes:
    B   clips per batch              S   samples per clip, at 32 kHz
    M   mel bands (128)              T   frames of a spectrogram (256)
    N   patches per clip (128)       E   values per patch (16 bands x 16 frames = 256)
    C   visible patches per clip     K   hidden patches per clip
    D   width of the encoder         P   width of the predictor
    T'  columns of patches           D'  = 8 D, the 8 patches of a column side by side
"""

import functools
import hashlib
import itertools
import math
import os
import sys

import numpy as np
import soundfile
import torch
import torchaudio
from einops import rearrange
from torch import nn
from torch.nn import functional as F

SAMPLE_RATE = 32_000                  # Hz
N_MELS, N_FRAMES = 128, 256           # M, T: the same for clips of any length
PATCH = 16                            # bands and frames of a patch
ROWS, COLUMNS = N_MELS // PATCH, N_FRAMES // PATCH      # the grid of patches: frequency x time
N_PATCHES = ROWS * COLUMNS
MEL_FLOOR = 1e-6                      # added before the logarithm: about the noise of a quiet room
EXTENSIONS = (b".wav", b".flac", b".ogg", b".opus", b".mp3", b".aif", b".aiff")
PATIENCE = 20                         # failures in a row that stop a run
MAX_PEAK = 100                        # audio is -1 to 1; larger floats may be unscaled integers


class UserError(Exception):
    """An error that the user can fix, with a one-line message. Any function may raise it."""


# ---- from waveforms to patches -----------------------------------------------------------------


class LogMel(nn.Module):
    """Waveforms (B, S) -> normalised log-mel spectrograms (B, M, T), one frame per hop.

    The bands are evenly spaced on Slaney's mel scale from 20 Hz to 16 kHz. A hop is 1/256 of a
    clip, a window 2.5 hops. With 10 s clips a hop is 39 ms, as in the paper."""

    def __init__(self, seconds):
        super().__init__()
        self.hop = round(seconds * SAMPLE_RATE / N_FRAMES)
        self.clip_samples = N_FRAMES * self.hop                                     # S
        window = torch.hann_window(int(2.5 * self.hop))
        self.n_fft = max(1024, 2 ** math.ceil(math.log2(len(window))))  # below 1024: empty bands
        filters = torchaudio.functional.melscale_fbanks(
            self.n_fft // 2 + 1, 20, SAMPLE_RATE // 2, N_MELS, SAMPLE_RATE, mel_scale="slaney")
        # Division by the window's L2 norm gives noise the same level at every window length.
        self.register_buffer("window", window / window.norm(), persistent=False)
        self.register_buffer("filters", filters.T, persistent=False)      # (M, frequencies)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def log_mel(self, waveforms):
        """Waveforms (B, any length) -> log-mel before normalisation (B, M, frames)."""
        with torch.autocast(waveforms.device.type, enabled=False):        # logarithms need float32
            spectrum = torch.stft(waveforms, self.n_fft, self.hop, len(self.window), self.window,
                                  pad_mode="constant", return_complex=True)
            power = spectrum.real.square() + spectrum.imag.square()       # (B, frequencies, frames)
            frames = math.ceil(waveforms.shape[1] / self.hop)  # torch returns one more
            return (self.filters @ power + MEL_FLOOR).log()[..., :frames]

    def forward(self, waveforms):
        return (self.log_mel(waveforms) - self.mean) / self.std

    def fit(self, waveforms):
        """Set `mean` and `std` from a list of waveforms (any length,)."""
        values = torch.cat([self.log_mel(x[None].to(self.mean.device)).ravel() for x in waveforms])
        self.mean.copy_(values.mean())
        self.std.copy_(values.std().clamp(min=1e-3))


def patchify(spectrograms):
    """Cut spectrograms (B, M, T) into patches (B, N, E), row by row. Row 0 has the lowest bands."""
    return rearrange(spectrograms, "b (row m) (column t) -> b (row column) (m t)", m=PATCH, t=PATCH)


# ---- where clips come from ---------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def resampler(rate):
    """A module that resamples (..., samples) from `rate` Hz to 32 kHz. Refuses rates whose kernel
    exceeds 4 million weights (44,100 Hz: 0.1 million; 44,101 Hz: 1,400 million)."""
    common = math.gcd(rate, SAMPLE_RATE)
    if rate < 1_000 or rate // common * (SAMPLE_RATE // common) > 4_000_000:
        raise UserError(f"cannot resample {rate} Hz; convert it to {SAMPLE_RATE} Hz")
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


class AudioFiles:
    """The audio files below a folder, in the same order on every machine. Follows links; skips
    hidden files and folders."""

    def __init__(self, root):
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder")
        self.root = os.fsencode(root)                # bytes: names need not be valid UTF-8
        paths, n_others, visited = [], 0, set()
        for folder, subfolders, names in os.walk(self.root, followlinks=True, onerror=print):
            if (real := os.path.realpath(folder)) in visited:    # a link led here again
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(b"."))
            audio = sorted(name for name in names if name.lower().endswith(EXTENSIONS)
                           and not name.startswith(b"."))
            paths += [os.path.join(folder, name) for name in audio]
            n_others += len(names) - len(audio)
        print(f"{root}: {len(paths):,} audio files; {n_others:,} other files ignored", flush=True)
        if not paths:
            raise UserError(f"{root}: no audio files ({b' '.join(EXTENSIONS).decode()})")
        # One array, because a list of two million strings would be copied into every worker.
        start = len(os.path.join(self.root, b""))
        self.paths = np.array([path[start:] for path in paths])
        self.fingerprint = hashlib.sha256(self.paths.tobytes()).hexdigest()

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        """The path of a file, relative to the folder."""
        return os.fsdecode(bytes(self.paths[index]))

    def windows(self, index, n_samples, start=0.0):
        """Yield consecutive windows (n_samples,) of a file, mono at 32 kHz; the last may be short.
        start: where the first begins, from 0 (file start) to below 1 (the last whole window)."""
        try:
            with soundfile.SoundFile(os.path.join(self.root, bytes(self.paths[index]))) as file:
                resample = resampler(file.samplerate)
                n = math.ceil(n_samples * file.samplerate / SAMPLE_RATE)
                if file.seekable():
                    file.seek(int(start * max(0, file.frames - n + 1)))
                samples = file.read(n, "float32", always_2d=True)          # (n, channels)
                if len(samples) == 0:
                    raise UserError("no samples")
                while len(samples) > 0:
                    if not np.abs(samples).max() < MAX_PEAK:     # NaN fails every comparison
                        raise UserError(f"samples that are NaN or beyond {MAX_PEAK}")
                    yield resample(torch.from_numpy(samples.mean(axis=1)))[:n_samples]
                    samples = file.read(n, "float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            raise UserError(str(error)) from error


class BuiltInSounds:
    """Melodies for a first run, labelled by the order of their four notes. A clip repeats one of
    six orders, in a random key, timbre and tempo. All orders use the same notes, so the
    time-averaged spectrum does not reveal the order. Clip i is a pure function of i."""
    timbres = [                                      # {partial: amplitude}, and decay in 1 / s
        ({1: 1.0}, 0), ({1: 1.0, 2.76: 0.7, 5.4: 0.5, 8.93: 0.4}, 30),
        ({k: k ** -0.5 for k in (1, 3, 5, 7, 9)}, 0), ({k: k ** -0.5 for k in range(1, 11)}, 0)]
    orders = np.array([(0, *rest) for rest in itertools.permutations((5, 10, 15))])    # semitones
    labels = np.arange(2400) % 6                     # the order of clip i
    fingerprint = "built-in sounds"

    def __init__(self, clip_samples):
        self.clip_samples = clip_samples

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"clip {index}"

    def windows(self, index, n_samples, start=0.0):
        """Yield the clip. A note lasts 1.1 to 1.5 columns, so notes do not align with patches."""
        rng, time = np.random.default_rng([12, int(index)]), np.arange(self.clip_samples)
        partials, decay = self.timbres[index // 6 % 4]
        note_samples = self.clip_samples / COLUMNS * rng.uniform(1.1, 1.5)
        offset = 4 * note_samples * rng.random()
        note, within = np.divmod(time + offset, note_samples)
        note, within = note.astype(int), within / SAMPLE_RATE                        # in seconds
        pitch = self.orders[self.labels[index]][note % 4] + rng.uniform(-3, 3)       # semitones
        phase = 2 * np.pi * (300 * 2 ** (pitch / 12)).cumsum() / SAMPLE_RATE         # from 300 Hz
        tone = sum(a * np.sin(k * phase + rng.uniform(0, 6)) for k, a in partials.items())
        fade = np.minimum(within, note_samples / SAMPLE_RATE - within).clip(0, 0.005) / 0.005
        level = 10 ** rng.uniform(-1, 0, note.max() + 1)[note]                       # of each note
        melody = tone * fade * level * np.exp(-decay * within)
        melody *= 10 ** rng.uniform(-1.6, -0.6) / np.sqrt(np.mean(melody ** 2))
        noise = 10 ** rng.uniform(-2.6, -1.6) * rng.standard_normal(self.clip_samples)
        yield torch.from_numpy((melody + noise).astype(np.float32))[:n_samples]


def open_source(folder, clip_samples):
    """The audio files below a folder, or the built-in sounds if it is None."""
    return BuiltInSounds(clip_samples) if folder is None else AudioFiles(folder)


# ---- crops and batches -------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)                      # a batch can span two epochs
def epoch_order(seed, epoch, n_clips):
    """All clips in the random order of one epoch, (n_clips,)."""
    return np.random.default_rng([seed, epoch]).permutation(n_clips)


class Crops(torch.utils.data.Dataset):
    """Random crops (S,) of a source's clips. Each epoch takes one of each clip, in a new order.
    Crop i depends only on (source, seed, i), so resuming is exact, with any number of workers.

    With probability 1/2 a short clip is filled with random other clips, else padded with silence.
    With silence only, the encoder mostly learns where the sound ends."""

    def __init__(self, source, n_samples, seed):
        self.source, self.n_samples, self.seed, self.reported = source, n_samples, seed, set()

    def read(self, i, fill=True):
        """Crop i before padding (at most S,), and one line for each file that could not be read."""
        epoch, position = divmod(i, len(self.source))
        index = int(epoch_order(self.seed, epoch, len(self.source))[position])
        rng = np.random.default_rng([self.seed, 1 << 32, i])     # independent of epoch_order
        fill = rng.random() < 0.5 and fill
        crop, failed = torch.zeros(0), []
        while len(failed) < PATIENCE:
            missing = self.n_samples - len(crop)
            try:
                window = next(self.source.windows(index, missing, rng.random()))
                if len(window) < min(missing, self.n_samples // N_FRAMES):
                    raise UserError("shorter than one frame")
                crop = torch.cat([crop, window])
                if not fill or len(crop) == self.n_samples:
                    break
            except UserError as error:
                failed.append(f"{self.source.name(index)!r}: {error}")
                if len(crop) > 0:                    # the rest of the crop is silence
                    break
            index = int(rng.integers(len(self.source)))
        return crop, failed

    def __getitem__(self, i):
        crop, failed = self.read(i)
        return F.pad(crop, (0, self.n_samples - len(crop))), failed

    def report(self, failed):
        """Print each failed file once. Raises UserError if 20 files failed for one crop."""
        for line in failed:
            if line not in self.reported:
                print(f"skipped {line}", flush=True)
                self.reported.add(line)
        if len(failed) == PATIENCE:
            raise UserError(f"{PATIENCE} files in a row cannot be read (reasons above)")


def collate(crops):
    """Crops of a batch -> waveforms (B, S), and the failed files of each crop."""
    waveforms, failed = zip(*crops, strict=True)
    return torch.stack(waveforms), failed


def load_batches(crops, batch_size, steps, workers, pin_memory):
    """Yield the waveforms (B, S) of each step in `steps`, a range. Prints the files that failed."""
    loader = torch.utils.data.DataLoader(
        crops, batch_size, sampler=range(steps.start * batch_size, steps.stop * batch_size),
        num_workers=workers, collate_fn=collate, pin_memory=pin_memory)
    for waveforms, failures in loader:
        for failed in failures:
            crops.report(failed)
        yield waveforms


def make_output_printable():
    """Let print() write any file name, to any terminal or pipe."""
    if hasattr(sys.stdout, "reconfigure"):           # missing in notebooks and if stdout is closed
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
