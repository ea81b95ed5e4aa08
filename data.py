"""Chapter 1, data: from files on disk to batches of waveforms, and from waveforms to log-mel spectrograms.

In: a folder, a text file of paths, or nothing (built-in sounds). Out: waveforms (B, S) at 32 kHz from the loader's
workers, and from `LogMel`, on the training device, spectrograms (B, F, T). The letters are explained in model.py.
Source: Audio-JEPA (arXiv 2507.02915), section 3. Batch number `step` is a pure function of (seed, step), so a resumed run
sees exactly what an undisturbed one sees, however many workers read for it.
"""

import atexit
import functools
import math
import multiprocessing
import os
import signal
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn

SAMPLE_RATE = 32_000                  # Hz, of every waveform that leaves this file
N_MELS, N_FRAMES = 128, 256           # F, T: the spectrogram of one clip, whatever time it covers
MEL_FLOOR = 1e-6                      # added before the logarithm: about the noise floor of a quiet recording
EXTENSIONS = (b".wav", b".flac", b".ogg", b".opus", b".mp3", b".aif", b".aiff")


class InputError(Exception):
    """Bad input, told in one line that says what is wrong and what to do; the commands print it and exit with 1."""


def hop_samples(seconds):
    """Samples between two frames when a clip of 256 frames covers about `seconds`; 10 s gives the paper's 1250."""
    return round(seconds * SAMPLE_RATE / N_FRAMES)


# ---- reading audio ----------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=16)
def resampler(rate):
    """Makes (..., samples at `rate` Hz) into (..., samples at 32 kHz), with a kernel computed once.

    A rate that shares few factors with 32,000 would need a giant kernel, so odd ones are rounded, to 25 Hz below 20 kHz, 50 Hz
    below 40 kHz and so on: the pitch of a 4,013 Hz file moves by a third of a per cent, that of usual rates not at all.
    """
    step = 25 * 2 ** max(0, int(math.log2(rate / 10_000)))
    return torchaudio.transforms.Resample(step * round(rate / step), SAMPLE_RATE)


def read_audio(path, position=0.0, n_samples=None):
    """Read a crop by seeking to it, so long recordings cost no more: mono float32 at 32 kHz, (at most n_samples,).

    position: 0 takes the earliest crop, just under 1 the latest. n_samples: at 32 kHz, None for the whole file.
    Raises InputError with the reason if there is no sound to be had.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not 1_000 <= rate <= 1_000_000:
                raise InputError(f"its header says {rate} Hz")
            wanted = file.frames if n_samples is None else math.ceil(n_samples * rate / SAMPLE_RATE)
            file.seek(int(position * max(0, file.frames - wanted + 1)))
            samples = file.read(wanted, dtype="float32", always_2d=True)           # (samples, channels)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:   # whatever a header may claim
        raise InputError(str(error)) from error
    if len(samples) == 0:
        raise InputError("no samples")
    if not -1e4 < samples.min() <= samples.max() < 1e4:                            # NaN fails every comparison
        raise InputError("samples that are NaN, infinite or absurdly large")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    return resampler(rate)(torch.from_numpy(mono))[:n_samples]


# ---- where clips come from ----------------------------------------------------------------------------------------------

class AudioFiles:
    """The audio files under a folder, or those that a text file lists one a line (relative paths: relative to it).

    One array of bytes: reference counts would make each worker copy two million Python strings.
    Raises InputError if there is nothing to read.
    """

    def __init__(self, root):
        top, paths = os.fsencode(root), []
        if os.path.isdir(top):
            for folder, subfolders, names in os.walk(top, followlinks=True):
                here = os.path.join(os.path.realpath(folder), b"")
                subfolders[:] = sorted(name for name in subfolders                 # one order; follow no link back up
                                       if not here.startswith(os.path.join(os.path.realpath(os.path.join(folder, name)), b"")))
                paths += [os.path.join(folder, name) for name in sorted(names)
                          if name.lower().endswith(EXTENSIONS) and not name.startswith(b"._")]       # macOS's own notes
        elif os.path.isfile(top) and not top.lower().endswith(EXTENSIONS):
            with open(top, "rb") as file:
                lines = file.read().removeprefix(b"\xef\xbb\xbf").splitlines()     # with which Windows begins some lists
            paths = [os.path.join(os.path.dirname(top), line) for line in lines if line]
        else:
            raise InputError(f"{root}: no such folder, nor a text file with one path a line")
        if not paths:
            raise InputError(f"{root}: no audio here (looked for {b' '.join(EXTENSIONS).decode()})")
        self.paths = np.array(paths)                                               # (n,), all as wide as the longest

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        """The path of file `index`, as bytes: names need not be valid UTF-8."""
        return bytes(self.paths[index])

    def name(self, index):
        """The path as printable text for messages."""
        return self.path(index).decode(errors="backslashreplace").replace("\n", "\\n")

    def crop(self, index, position, n_samples):
        """See read_audio."""
        return read_audio(self.path(index), position, n_samples)


def colored_noise(n, rng):
    """Noise (n,) of unit deviation whose spectrum falls as 1 / f ** tilt, tilt drawn from white (0) to brown (1)."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, n)
    return noise / noise.std()


def make_sound(kind, time, rng):
    """One sound of a class over `time` (seconds), at any level."""
    sin, exp, pi, uniform = np.sin, np.exp, np.pi, rng.uniform
    pitch, rate = 110 * 2 ** uniform(0, 3), uniform(3, 12)                         # Hz; `rate` of everything that repeats
    swing = sin(2 * pi * rate * time + uniform(0, 6))
    steady, rolloff = 2 * pi * pitch * time, 1 / np.arange(1, 13) ** uniform(0.5, 1.5)
    cycle = time * rate % 1                                                        # how much of the present one is over
    voice, k = pitch / 3 + 60, np.arange(1, 31)                                    # Hz; harmonics of a low voice

    def harmonics(phase, amplitudes):                                              # sum of a_k sin(k phase), as a polynomial
        return np.polynomial.polynomial.polyval(exp(1j * phase), [0, *amplitudes]).imag

    def gliding(frequency):                                                        # harmonics of a pitch that changes
        return harmonics(2 * pi * np.cumsum(frequency) / SAMPLE_RATE, rolloff)

    def pulses(times):                                                             # a ringing click at each of `times`
        train = np.zeros(len(time))
        train[(times * SAMPLE_RATE).astype(int).clip(0, len(time) - 1)] = uniform(0.5, 1, len(times))
        ring = (exp(-time / 0.004) * sin(2 * pi * pitch * 4 * time + 0.5))[:640]
        return np.fft.irfft(np.fft.rfft(train, 2 * len(time)) * np.fft.rfft(ring, 2 * len(time)))[:len(time)]

    return {
        "harmonic": lambda: harmonics(steady, rolloff),
        "bell": lambda: sum(exp(-time * uniform(1, 6)) * sin(steady * ratio * uniform(0.97, 1.03))
                            for ratio in (1, 2.76, 5.4, 8.93, 11.34)),             # partials of no common pitch
        "chirp": lambda: gliding(pitch * 2 ** (rng.choice([-1, 1]) * uniform(1, 2) * time / time[-1])),
        "siren": lambda: gliding(pitch * 2 ** (0.5 * swing)),
        "clicks": lambda: pulses(np.arange(0, time[-1], 1 / rate)),                # even in time
        "crackle": lambda: pulses(uniform(0, time[-1], int(rate * time[-1]) + 2)),       # the same, at random times
        "noise burst": lambda: colored_noise(len(time), rng) * exp(-time * uniform(1, 6)),
        "pulsed noise": lambda: colored_noise(len(time), rng) * (1 + 0.9 * swing),
        "wobble": lambda: harmonics(steady, rolloff) * (1 + 0.9 * swing),          # a tone with the same tremolo
        "engine": lambda: harmonics(steady / 8, np.ones(24)) * (0.6 + 0.2 * colored_noise(len(time), rng)),
        "vowel": lambda: harmonics(2 * pi * voice * time, 0.01 + sum(              # three formants
            exp(-((k * voice - formant) / 120) ** 2) for formant in uniform([300, 900, 2200], [800, 2000, 3000]))),
        "bubbles": lambda: sin(2 * pi * pitch * 2 * cycle * (1 + cycle) / rate) * exp(-4 * cycle),     # short rising tones
    }[kind]()


class BuiltInSounds:
    """Procedural sounds for a first run with no data at hand: clip i is a pure function of i, its class is i mod 12.

    The classes differ in how the sound is made. Level, onset, length, noise and three octaves of pitch are drawn alike for all.
    """

    classes = ("harmonic", "bell", "chirp", "siren", "clicks", "noise burst", "pulsed noise", "engine", "crackle",
               "vowel", "wobble", "bubbles")

    def __init__(self, n_clips, seconds):
        self.n_clips, self.n_samples = n_clips, hop_samples(seconds) * N_FRAMES

    def __len__(self):
        return self.n_clips

    def name(self, index):
        return f"built-in sound {index} ({self.classes[index % 12]})"

    def crop(self, index, position, n_samples):
        """The whole clip (S,): built-in clips are as long as a crop, so there is no position to choose."""
        rng = np.random.default_rng([12, int(index)])
        n_sound = self.n_samples // 256 * int(rng.uniform(77, 230))                # 0.3 to 0.9 of the clip
        onset = rng.integers(self.n_samples - n_sound)
        sound = make_sound(self.classes[index % 12], np.arange(n_sound) / SAMPLE_RATE, rng)
        sound *= np.minimum(1, np.minimum(np.arange(n_sound), np.arange(n_sound)[::-1]) / 320)       # no clicks at the ends
        level, noise_level = 10 ** rng.uniform(-1.6, -0.6), 10 ** rng.uniform(-2.6, -1.6)
        clip = noise_level * colored_noise(self.n_samples, rng)
        clip[onset:onset + n_sound] += level * sound / (np.sqrt(np.mean(sound ** 2)) + 1e-9)
        return torch.from_numpy(clip.astype(np.float32))


# ---- batches ------------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    waveforms: torch.Tensor           # (B, S) float32 at 32 kHz, padded with zeros; None after 20 unusable files in a row
    filled: torch.Tensor              # (B,) samples of each clip that are not padding; fewer clips if waveforms is None
    failures: list                    # (name, reason) of every file that could not be used


@functools.lru_cache(maxsize=1)
def epoch_order(seed, epoch, n_clips):
    """All clips in the random order of one epoch, (n_clips,)."""
    order = np.arange(n_clips, dtype=np.int32)
    np.random.default_rng([seed, epoch]).shuffle(order)                            # in place: every worker holds one of these
    return order


class Batches(torch.utils.data.Dataset):
    """Batch number `step`, a pure function of (source, seed, step): the clips, their crops, and the stand-ins.

    Clips come in a fresh random order each epoch, one random crop of each; a batch may span two epochs. A file that
    cannot be used is replaced by a random other one, and reported.
    """

    def __init__(self, source, batch_size, n_samples, seed):
        self.source, self.batch_size, self.n_samples, self.seed = source, batch_size, n_samples, seed

    def clips(self, step):
        """The indices of the clips of one batch, (B,)."""
        n, places = len(self.source), range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(epoch_order(self.seed, place // n, n)[place % n]) for place in places]

    def __getitem__(self, step):
        waveforms = torch.zeros(self.batch_size, self.n_samples)
        filled, failures = torch.zeros(self.batch_size, dtype=torch.long), []
        rng = np.random.default_rng([self.seed, 1 << 32, step])                   # 1 << 32: not the epochs' stream
        positions = rng.random(self.batch_size)
        for i, index in enumerate(self.clips(step)):
            for _ in range(20):
                try:
                    clip = self.source.crop(index, positions[i], self.n_samples)
                    break
                except InputError as error:
                    failures.append((self.source.name(index), str(error)))
                    index = int(rng.integers(len(self.source)))
            else:
                return Batch(None, filled[:i], failures)
            waveforms[i, :len(clip)] = clip
            filled[i] = len(clip)
        return Batch(waveforms, filled, failures)


def start_worker(_):
    """In a worker: no answer to signals, which often go to all processes. The main one saves, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """At the exit of the program. After an error, Python would send workers SIGTERM and wait; ours ignore it."""
    for worker in multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):                                             # Windows has none
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)                          # or the DataLoader would raise for each
        worker.kill()


def make_loader(batches, steps, workers, device):
    """A DataLoader over the batches numbered `steps`; each worker makes whole batches, in order, ahead of time."""
    atexit.register(end_workers)
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers,
                                       worker_init_fn=start_worker, pin_memory=device.type == "cuda")


# ---- from waveform to spectrogram -----------------------------------------------------------------------------------------

class LogMel(nn.Module):
    """Waveforms (B, S) -> normalised log-mel spectrograms (B, F, one frame a hop), on whatever device holds them.

    Power in 128 bands, evenly spaced in mel, as the ear hears pitch (Slaney's formula), and as a logarithm, for the ear hears
    ratios of loudness. One frame a hop; a hop is seconds / 256, a window 2.5 hops: the paper's geometry at 10 s (hop 39 ms), a
    speech recogniser's at 2.56 s (10 ms). Short windows are padded to 1024 points, or bands would fall between two points of
    the spectrum. `normalized`: else the power, and so MEL_FLOOR's meaning, would grow with the window.
    """

    def __init__(self, seconds):
        super().__init__()
        self.hop = hop_samples(seconds)
        window = int(2.5 * self.hop)
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=max(1024, 2 ** math.ceil(math.log2(window))), win_length=window, hop_length=self.hop,
            f_min=20, n_mels=N_MELS, mel_scale="slaney", normalized="window", pad_mode="constant")
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def log_mel(self, waveforms):
        """Waveforms (B, S) of any length -> log-mel, not yet normalised, one frame around every hop (B, F, S // hop + 1)."""
        with torch.autocast(waveforms.device.type, enabled=False):                 # a logarithm needs float32
            parts = [self.spectrogram(part) for part in waveforms.split(8)]        # 8 short clips fit the CPU's cache:
            return (torch.cat(parts) + MEL_FLOOR).log()                            # twice as fast

    def forward(self, waveforms):
        frames = math.ceil(waveforms.shape[1] / self.hop)                          # not the one centred on the clip's end
        return (self.log_mel(waveforms)[..., :frames] - self.mean) / self.deviation

    def fit(self, batches):
        """Set `mean` and `deviation` from the first 256 clips or more of the training, over the frames that hold sound."""
        frames, device = [], self.mean.device
        for step in range(math.ceil(256 / batches.batch_size)):
            batch = batches[step]
            if batch.waveforms is None:
                raise InputError("20 unusable files in a row, the last " + ": ".join(batch.failures[-1]))
            held = torch.arange(N_FRAMES, device=device) * self.hop < batch.filled.to(device)[:, None]       # (B, T)
            log_mel = self.log_mel(batch.waveforms.to(device))[..., :N_FRAMES]
            frames.append(log_mel.transpose(1, 2)[held])                           # (frames, F)
        values = torch.cat(frames)
        self.mean.copy_(values.mean())
        self.deviation.copy_(values.std().clamp(min=1e-3))
