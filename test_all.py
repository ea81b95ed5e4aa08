"""Tests in the order of the chapters. Each rule is held against something independent: a closed
form, a slow loop, or a case worked by hand. No GPU, no network and no data set is needed.
`pytest -q test_all.py -k "not command"` leaves out the tests that start the real commands."""

import argparse
import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import data
import masking
import model
import probe
import train

HIDDEN = {"block": 64, "random": 77}                 # patches that each kind of mask hides
N = 20_480                                           # samples of 0.64 s, the length of our clips
TOY = dict(model="toy", seconds=0.64, mask="block", optimizer="muon", batch_size=5, steps=3,
           lr=0.01, seed=3, device="cpu", amp="off", workers=0, log_every=1, save_every=1)
model.SIZES["toy"] = 64, 4                           # an encoder small enough to test by hand
for number in data.STOP_SIGNALS:                     # nohup has some ignored
    signal.signal(number, signal.default_int_handler)


# ---- helpers -----------------------------------------------------------------------------------


class Numbers(data.BuiltInSounds):
    """A source of 50 clips. A window of a clip holds two numbers: its index and its start."""
    bad = ()

    def __len__(self):
        return 50

    def name(self, index):
        return f"clip {index}"

    def windows(self, index, n_samples, start=0.0):
        if index in self.bad:
            raise data.InputError("no sound")
        yield torch.tensor([index, start])


def tone(pitch, seconds, rate):
    return 0.1 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


def write_tone(path, pitch=400, seconds=0.5, rate=32_000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([tone(pitch, seconds, rate)] * channels, axis=1), rate)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """12 short recordings in three folders, of several formats, rates and numbers of channels."""
    folder = tmp_path_factory.mktemp("some recordings")
    forms = (("0.wav", 0.3, 8000), ("1.flac", 0.9, 44_100, 2), ("2.OGG", 1.5),
             ("3.mp3", 0.6, 16_000))
    for kind, pitch in (("low", 200), ("mid", 900), ("high", 3000)):
        for name, *form in forms:
            write_tone(folder / kind / name, pitch, *form)
    return folder


def flags(**changes):
    """The settings of a small run, as the arguments of train.py."""
    pairs = (TOY | changes).items()
    return ["--no-compile", *(f"--{key.replace('_', '-')}={value}" for key, value in pairs)]


@pytest.fixture
def go(recordings, tmp_path, monkeypatch):
    """A function that runs train.py on the recordings, but spares fitting the log-mel."""
    monkeypatch.setattr(data.LogMel, "fit", lambda mel, _: mel.mean.fill_(-8) and mel.std.fill_(3))
    return lambda *given, out="ckpt.pt", **changes: train.main(
        [*flags(data=recordings, out=tmp_path / out, **changes), *given])


def same(a, b):
    """Whether two things that can be saved are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def outcome(path):
    """All that a run computed, from its checkpoint, but not how fast it was."""
    checkpoint = torch.load(path, weights_only=True) | {"config": None}
    for row in checkpoint["log"]:
        del row["clips_per_second"], row["waiting"]
    return checkpoint


def command(cwd, name, *given):
    """Start a command in the folder `cwd` as a user would, with a group of processes of its own."""
    arguments = [sys.executable, "-u", os.path.join(os.path.dirname(__file__), name), *given]
    return subprocess.Popen(arguments, cwd=cwd, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


# ---- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 32_000, 44_100])
def test_a_tone_has_the_same_pitch_length_and_purity_at_any_rate(tmp_path, rate):
    write_tone(tmp_path / "a.wav", pitch=1000, seconds=2, rate=rate)
    waveform = torch.cat([*data.AudioFiles(tmp_path).windows(0, 16_000)])
    power = torch.fft.rfft(waveform[8000:56_000] * torch.hann_window(48_000)).abs() ** 2
    assert len(waveform) == 64_000 and 48_000 * 1000 // 32_000 == power.argmax()
    assert power[1480:1520].sum() > 0.99 * power.sum(), "there is more than the tone"


@pytest.mark.parametrize("rate", [8000, 32_000])
def test_a_crop_is_the_slice_of_the_file_that_its_start_names(tmp_path, rate):
    ramp = np.linspace(0, 0.9, 3 * rate, dtype=np.float32)           # samples that tell their place
    soundfile.write(tmp_path / "a.wav", np.stack([ramp, 0 * ramp], 1), rate, subtype="FLOAT")
    files = data.AudioFiles(tmp_path)                                # two channels, to be averaged
    for start in (0.0, 0.5, 0.999999):
        crop = next(files.windows(0, 8000, start))                   # a quarter of a second
        first = int(start * (2.75 * rate + 1)) / (3 * rate - 1) * 0.45
        assert crop[4000].item() == pytest.approx(first + 0.45 * 0.125 / 3, abs=1e-4)
    assert torch.cat([*files.windows(0, 7001)])[-100] == pytest.approx(0.45, abs=1e-3)


def test_files_are_found_once_in_any_spelling_and_through_links(tmp_path, capsys):
    names = ["a.wav", "b/x.FLAC", "b/c/y z.Opus", "new\nline.aiff", "\udcff.mp3"]
    for name in [*names, "no.m4a", "b/wav", "b/._x.FLAC", "../side/1/once.wav", "../side/2/no"]:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).touch()
    links = [("top/b/again", "top"), ("top/b/root", "/"), ("top/elsewhere", "side")]
    for link, goal in links + [(f"side/{n}/{i}", "side") for n in (1, 2) for i in range(9)]:
        (tmp_path / link).symlink_to(tmp_path / goal)          # followed blindly, 9 ** depth paths
    files = data.AudioFiles(tmp_path / "top")
    found = {os.path.relpath(os.fsdecode(files.path(i)), files.root.decode()) for i in range(6)}
    assert found == {*names, "elsewhere/1/once.wav"} and len(files) == 6
    assert all(files.name(i).isprintable() for i in range(6)), "a name is not escaped"
    assert "left out as no audio that we can read: 2 no extension, 1 .m4a" in capsys.readouterr().out


def test_a_list_of_paths_is_relative_to_its_own_folder(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.wav\n\n\r\nsub/b \xff.wav\r\n/abs/c.wav")
    files, root = data.AudioFiles(tmp_path / "list.txt"), os.fsencode(tmp_path)
    expected = [root + b"/a.wav", root + b"/sub/b \xff.wav", b"/abs/c.wav"]
    assert [files.path(i) for i in range(len(files))] == expected


def test_a_file_is_either_read_or_refused(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    for name, samples, rate in (
            ("good zeros", noise * 0, 32_000), ("good eight", np.stack([noise] * 8, 1), 192_000),
            ("good sample", noise[:1], 32_000), ("none", noise[:0], 32_000), ("slow", noise, 1),
            ("NaN", noise + np.nan, 32_000), ("big", noise * 1e30, 32_000), ("odd", noise, 44_101)):
        soundfile.write(tmp_path / f"{name}.wav", samples, rate, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    os.mkfifo(tmp_path / "pipe.wav")                 # to open it would block for ever
    files = data.AudioFiles(tmp_path)
    for i in range(10):
        try:
            good = next(files.windows(i, N)).isfinite().all()
        except data.InputError:
            good = False
        assert good == ("good" in files.name(i)), files.name(i)


def lying_flac(path, claimed, cut=1.0):
    """Write 4 s of noise as FLAC with a header that claims another number of samples, and of the
    bytes only the share `cut`."""
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 128_000), 32_000)
    content = bytearray(path.read_bytes())
    content[21] = content[21] & 0xF0 | claimed >> 32             # STREAMINFO: the 36 bits of the
    content[22:26] = (claimed & 0xFFFFFFFF).to_bytes(4, "big")   # number of samples
    path.write_bytes(content[:int(cut * len(content))])


@pytest.mark.parametrize("claimed, cut, heard", [(0, 1, 4), (900_000, 1, 4), (128_000, 0.4, 1.6)])
def test_a_file_whose_header_lies_gives_what_it_holds(tmp_path, claimed, cut, heard):
    lying_flac(tmp_path / "a.flac", claimed, cut)
    files, windows = data.AudioFiles(tmp_path), []
    with pytest.raises(data.InputError, match="decoded of the .* s that its header claims"):
        for window in files.windows(0, N):
            windows.append(window)
    assert heard - 0.3 < sum(map(len, windows)) / 32_000 <= heard
    for i in range(20):                              # most crops begin beyond the end
        crop, reports = data.Crops(files, N, seed=0).read(i)
        assert len(crop) > 4000 and all(line.startswith("cut short") for line in reports)


def test_half_of_the_short_clips_are_followed_by_other_clips_until_the_crop_is_full(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", np.full(100, i / 8 + 0.125), 32_000, subtype="FLOAT")
    crops = [data.Crops(data.AudioFiles(tmp_path), 250, seed=0).read(i)[0] for i in range(400)]
    assert {len(crop) for crop in crops} == {100, 250}
    assert 150 < sum(len(crop) == 100 for crop in crops) < 250
    assert {*sum((crop[::50].tolist() for crop in crops), [])} == {0.125, 0.25, 0.375, 0.5}
    assert any(crop[0] != crop[100] for crop in crops if len(crop) == 250)


def drawn(seed, crops):
    """The indices and starts of some crops of a run over 50 clips."""
    return [tuple(data.Crops(Numbers(), 2, seed).read(i)[0].tolist()) for i in crops]


def test_every_epoch_takes_every_clip_once_in_an_order_of_its_own():
    first, second, other = ([index for index, _ in drawn(seed, range(start, start + 50))]
                            for seed, start in ((1, 0), (1, 50), (2, 0)))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second, "every epoch has the same order"
    assert first != other, "the epoch's order ignores the seed"


def test_crops_start_anywhere_and_depend_on_seed_and_number_alone():
    starts = [start for _, start in drawn(1, range(400))]
    counts, _ = np.histogram(starts, bins=4, range=(0, 1))
    assert counts.min() > 60 and max(starts) < 1, "crops do not start evenly along a file"
    assert drawn(1, range(90, 110)) == drawn(1, range(200))[90:110]
    assert not {start for _, start in drawn(2, range(400))} & {*starts}, "crops ignore the seed"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_crops_of_their_steps_padded_with_silence(recordings, workers):
    crops = data.Crops(data.AudioFiles(recordings), N, seed=3)
    batches = torch.stack([*data.load_batches(crops, 5, range(2, 5), workers, False)])
    for i, waveform in enumerate(batches.view(15, N), start=10):
        crop, _ = crops.read(i)
        assert torch.equal(waveform[:len(crop)], crop) and not waveform[len(crop):].any()


@pytest.mark.parametrize("bad, batches", [(1, 40), (4, None), (50, 0)])
def test_files_that_fail_are_replaced_and_told_once_and_many_stop_the_run(
        bad, batches, capsys, monkeypatch):
    monkeypatch.setattr(Numbers, "bad", range(bad))
    crops, clips = data.Crops(Numbers(), 2, seed=0), []
    try:
        clips += data.load_batches(crops, 50, range(40), 0, False)
        assert bad == 1 and torch.cat(clips)[:, 0].min() == 1, "a bad file was used"
    except data.InputError as error:
        assert bad > 1 and "too many files cannot be read" in str(error)
    assert len(clips) == batches or batches is None
    told = capsys.readouterr().out.splitlines()
    assert "unusable: clip " in told[0] and len(told) == len({*told})


@pytest.mark.parametrize("bad, fits", [(1, True), (4, False), (50, False)])
def test_the_log_mel_is_fitted_to_no_file_that_fails(bad, fits, monkeypatch):
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((50, N)).astype(np.float32))

    def windows(_, index, n_samples, start=0.0):
        if index < bad:
            raise data.InputError("no sound")
        yield noise[index, :n_samples]

    monkeypatch.setattr(Numbers, "windows", windows)
    mel = data.LogMel(0.64)
    if fits:
        mel.fit(data.Crops(Numbers(), N, seed=0))
        assert abs(mel(noise[bad:]).mean()) < 0.01 and abs(mel(noise[bad:]).std() - 1) < 0.01
    else:
        with pytest.raises(data.InputError, match="one in twenty.*unusable: clip .*: no sound"):
            mel.fit(data.Crops(Numbers(), N, seed=0))
        assert (mel.mean, mel.std) == (0, 1)


def mels(hertz):                                     # Slaney: linear to 1 kHz, then logarithmic
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)


@pytest.mark.parametrize("seconds", [0.64, 10.0])
def test_the_log_mel_is_the_logarithm_of_a_short_time_spectrum_in_triangular_bands(seconds):
    mel, rng = data.LogMel(seconds), np.random.default_rng(0)
    hop = mel.hop
    waveform = 0.01 * rng.standard_normal(256 * hop).astype(np.float32)
    spectrogram, = mel.log_mel(torch.from_numpy(waveform)[None]).numpy()
    assert spectrogram.shape == (128, 256) and hop == round(seconds * 125)
    size, n_fft = int(2.5 * hop), mel.spectrogram.n_fft
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    centre = 100 * hop                               # of frame 100
    piece = waveform[centre - size // 2:centre - size // 2 + size] * window
    power = np.abs(np.fft.rfft(piece, n_fft)) ** 2 / (window ** 2).sum()
    edges = np.linspace(mels(20), mels(16_000), 130)
    bins = np.array([mels(k * 32_000 / n_fft) for k in range(n_fft // 2 + 1)])
    hertz = np.arange(n_fft // 2 + 1) * 32_000 / n_fft
    points = np.interp(edges, bins, hertz)           # the edges of the bands in Hz
    for band in (5, 40, 90, 127):
        low, middle, high = points[band:band + 3]
        triangle = np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
        expected = math.log((power * triangle.clip(0)).sum() + 1e-6)
        assert spectrogram[band, 100] == pytest.approx(expected, abs=0.05)
    assert np.allclose(mel.log_mel(torch.zeros(1, N)), math.log(1e-6)), "the floor is not 1e-6"
    assert mel.spectrogram.mel_scale.fb.sum(0).all(), "a band is empty"


def test_the_log_mel_stays_in_float32_under_autocast():
    mel, waveforms = data.LogMel(0.64), torch.randn(2, N)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mel(waveforms)
    assert torch.equal(inside, mel(waveforms)), "autocast is on inside"


def notes_of(waveform):
    """The notes of a clip in semitones above its lowest, as they follow one another, and the
    lowest in semitones above 300 Hz: the loudest frequency of frames of 40 ms, every 10 ms."""
    frames = waveform.double().unfold(0, 1280, 320) * torch.hann_window(1280)
    peaks = torch.fft.rfft(frames, 16_384).abs().argmax(1) * 32_000 / 16_384
    pitches = (12 * (peaks / 300).log2()).tolist()
    lowest = min(pitches)
    runs = [(note, len([*run])) for note, run in
            itertools.groupby(round(pitch - lowest) for pitch in pitches)]
    return [note for note, length in runs if length >= 3], lowest


def test_built_in_sounds_play_their_order_in_a_key_of_their_own():
    source, keys = data.BuiltInSounds(), []
    for i in [*range(6), *range(24, 30)]:            # sines, whose loudest frequency is the pitch
        notes, key = notes_of(next(source.windows(i, 40_960)))
        first, order = notes.index(0), [*source.orders[i % 6]]
        expected = (order * 4)[:len(notes) - first]
        assert len(notes) >= 9 and notes[first:] == expected and source.label(i) == i % 6
        keys.append(key)
    assert len({tuple(order) for order in source.orders}) == 6 and np.std(keys) > 1
    clips = [next(source.windows(i, 40_960)) for i in (0, 24, 0)]    # of one order and timbre
    assert torch.equal(clips[0], clips[2]) and not torch.allclose(clips[0], clips[1], atol=0.01)
    high = torch.fft.rfft(torch.stack(clips))[:, 15_000:].abs()      # above 11.7 kHz: noise alone
    assert high.median() > 0.1, "there is no noise"


def test_patches_lie_row_by_row():
    spectrogram = torch.arange(128 * 256.).view(1, 128, 256)
    for row, column in ((0, 0), (3, 5), (7, 15)):
        square = spectrogram[0, row * 16:row * 16 + 16, column * 16:column * 16 + 16]
        assert torch.equal(data.patchify(spectrogram)[0, row * 16 + column], square.flatten())


# ---- masking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HIDDEN)
def test_every_patch_is_visible_or_hidden_and_can_be_either(kind):
    visible, hidden = masking.make_masks(kind, 1000, seed=0, step=0)
    assert hidden.shape == (1000, HIDDEN[kind]) and visible.shape == (1000, 128 - HIDDEN[kind])
    both = torch.cat([visible, hidden], dim=1)
    assert torch.equal(both.sort(1).values, torch.arange(128).expand(1000, -1))
    assert {*visible.flatten().tolist()} == {*hidden.flatten().tolist()} == {*range(128)}


def test_blocks_are_two_columns_of_all_rows_and_every_arrangement_is_as_likely():
    _, hidden = masking.make_masks("block", 10_000, seed=0, step=0)
    grid = torch.zeros(10_000, 128).scatter_(1, hidden, 1).view(-1, 8, 16)
    assert (grid == grid[:, :1]).all(), "a block lacks a row"
    columns = ["".join(map(str, row)) for row in grid[:, 0].int().tolist()]
    runs = {len(run) for text in columns for run in re.findall("1+", text)}
    assert runs == {2, 4, 6, 8}, "a block is not two columns long"
    # Of the 495 ways to place 4 blocks among 8 single columns, 165 begin with a block.
    assert sum(text[0] == "1" for text in columns) / 10_000 == pytest.approx(1 / 3, abs=0.02)
    assert len({*columns}) == 495


def test_random_masks_hide_every_patch_as_often():
    _, hidden = masking.make_masks("random", 4000, seed=0, step=0)
    shares = hidden.flatten().bincount(minlength=128) / 4000
    assert (shares - 77 / 128).abs().max() < 0.04


@pytest.mark.parametrize("kind", HIDDEN)
def test_masks_are_a_pure_function_of_seed_and_step(kind):
    first = masking.make_masks(kind, 8, seed=1, step=2)
    assert same(first, masking.make_masks(kind, 8, seed=1, step=2))
    seen = {tuple(masking.make_masks(kind, 8, seed, step)[1].flatten().tolist())
            for seed in range(6) for step in range(6)}
    assert len(seen) == 36, "two steps, or two seeds, share their masks"


# ---- model -------------------------------------------------------------------------------------


@pytest.fixture
def jepa():
    """A small model without trivial weights, whose target encoder is not its encoder."""
    torch.manual_seed(0)
    jepa = model.AudioJEPA("toy")
    for weights in jepa.parameters():
        weights.data += 0.1 * torch.randn_like(weights)
    return jepa


def positions(width):
    """The codes of the places of all patches, number by number: (128, width)."""
    return torch.tensor([[wave(place / 10_000 ** (k / (width // 4))) for place in divmod(n, 16)
                          for wave in (math.sin, math.cos) for k in range(width // 4)]
                         for n in range(128)])


def standardize(x, dim):
    return (x - x.mean(dim, True)) / (x.var(dim, correction=0, keepdim=True) + 1e-5).sqrt()


def targets_by_hand(jepa, patches):
    encoder, sums = jepa.target_encoder, 0
    x = encoder.embed(patches) + encoder.positions
    for layer in encoder.layers:
        x = layer(x, encoder.rotations[None])
        sums = sums + standardize(x, dim=1)          # every feature over the patches of a clip
    return standardize(sums, dim=2).detach()


def loss_by_hand(jepa, patches, visible, hidden):
    """The loss, written out. A change of the loss must be made here, too."""
    predictions = jepa.predictor(jepa.encoder(patches, visible), visible, hidden)
    targets = targets_by_hand(jepa, patches)[torch.arange(len(patches))[:, None], hidden]
    gap = (predictions - targets).abs()
    return torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean()


@pytest.mark.parametrize("kind", HIDDEN)
def test_the_loss_by_hand(jepa, kind):
    inputs = torch.randn(2, 128, 256), *masking.make_masks(kind, 2, seed=0, step=0)
    assert torch.allclose(jepa(*inputs)[0], loss_by_hand(jepa, *inputs), rtol=1e-5)


def test_the_loss_stays_in_float32_under_autocast(jepa):
    inputs = torch.randn(2, 128, 256), *masking.make_masks("block", 2, seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, predictions, targets = jepa(*inputs)
    assert {loss.dtype, predictions.dtype, targets.dtype} == {torch.float32}
    wanted = targets.double()[torch.arange(2)[:, None], inputs[2]]
    assert loss.item() == pytest.approx(F.smooth_l1_loss(predictions.double(), wanted).item(), 1e-5)


def test_targets_are_the_normalised_layers_of_the_target_encoder(jepa):
    inputs = torch.randn(2, 128, 256), *masking.make_masks("block", 2, seed=0, step=0)
    targets = jepa(*inputs)[2]
    assert not targets.requires_grad, "the targets have a gradient"
    assert torch.allclose(targets, targets_by_hand(jepa, inputs[0]), atol=1e-4)


def turned(x, places):
    """Queries or keys (n, 2 k) of patches, as complex numbers turned according to their columns."""
    k = x.shape[1] // 2
    angles = torch.tensor([[n % 16 * 10_000 ** (-i / k) for i in range(k)] for n in places])
    pairs = (x[:, :k] + 1j * x[:, k:]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=1)


def test_a_layer_is_attention_head_by_head_and_then_an_mlp():
    torch.manual_seed(0)
    layer, x, places = model.Layer(24, 3), torch.randn(1, 5, 24), [0, 3, 17, 90, 127]
    q, k, v = (part[0].split(8, dim=-1) for part in layer.qkv(layer.norm1(x)).split(24, dim=-1))
    heads = [(turned(q[h], places) @ turned(k[h], places).T / math.sqrt(8)).softmax(-1) @ v[h]
             for h in range(3)]
    y = x + layer.project(torch.cat(heads, dim=-1))
    up, _, down = layer.mlp
    inner = up(layer.norm2(y))
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2        # GELU
    z = layer(x, model.rotations(8, 16, 8)[None, places])
    assert up.out_features == 4 * 24 and torch.allclose(z, y + down(inner), atol=1e-5)


def test_the_encoder_gives_every_patch_its_own_position_in_any_order(jepa):
    patches, encoder, codes = torch.randn(2, 128, 256), jepa.encoder, positions(64)
    visible, _ = masking.make_masks("random", 2, seed=0, step=0)
    visible = visible[:, torch.randperm(visible.shape[1])]
    for latents, seen in ((encoder(patches, visible), visible),
                          (encoder(patches), torch.arange(128).expand(2, -1))):
        x = torch.stack([encoder.embed(x[n]) + codes[n]
                         for x, n in zip(patches, seen, strict=True)])
        for layer in encoder.layers:
            x = layer(x, model.rotations(8, 16, 64)[seen])
        expected = encoder.norm(x)
        assert torch.allclose(latents, expected, atol=1e-4), "a patch lacks its own position"


@pytest.mark.parametrize("kind", HIDDEN)
def test_the_predictor_by_a_slow_loop_over_clips(jepa, kind):
    (visible, hidden), net = masking.make_masks(kind, 2, seed=0, step=0), jepa.predictor
    latents, codes = torch.randn(2, visible.shape[1], 64), positions(32)
    predictions = net(latents, visible, hidden)
    for b in range(2):
        x = torch.cat([net.mask_token + codes[hidden[b]],            # attention minds no order
                       net.embed(latents[b]) + codes[visible[b]]])[None]
        for layer in net.layers:
            x = layer(x, model.rotations(8, 16, 32)[None, torch.cat([hidden[b], visible[b]])])
        expected = net.project(net.norm(x[0, :hidden.shape[1]]))
        assert torch.allclose(predictions[b], expected, atol=1e-4), "wrong tokens or positions"


def test_the_base_model_has_the_size_of_the_papers_and_all_of_it_learns():
    with torch.device("meta"):
        jepa = model.AudioJEPA("base")
    millions = {name: sum(p.numel() for p in net.parameters()) / 1e6
                for name, net in jepa.named_children()}
    assert millions["encoder"] == pytest.approx(85.4, abs=0.3)
    assert millions["predictor"] == pytest.approx(11.3, abs=0.3)
    learning = {name.split(".")[0]: p.requires_grad for name, p in jepa.named_parameters()}
    assert learning == {"encoder": True, "predictor": True, "target_encoder": False}
    assert jepa.predictor.mask_token.requires_grad


def test_weights_are_xaviers_and_of_the_seed():
    torch.manual_seed(1)
    jepa = model.AudioJEPA("toy")
    for module in [*jepa.encoder.modules(), *jepa.predictor.modules()]:
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any()
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert same(jepa.encoder.state_dict(), jepa.target_encoder.state_dict())


def test_all_tensors_of_the_method_are_on_the_device_of_its_inputs():
    """On CUDA, without CUDA: fake tensors have a device and a shape, but no numbers."""
    mel, jepa, fake = data.LogMel(0.64), model.AudioJEPA("toy"), FakeTensorMode()
    with fake, torch.device("cuda"):
        for module in [*mel.modules(), *jepa.modules()]:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = torch.nn.Parameter(torch.empty(tensor.shape))
        visible, hidden = (torch.zeros(2, 64, dtype=torch.int64) for _ in range(2))
    with fake:
        patches = data.patchify(mel(torch.empty(2, N, device="cuda")))
        assert {tensor.device.type for tensor in jepa(patches, visible, hidden)} == {"cuda"}
        jepa.update_target_encoder(0.9)
        with pytest.raises(RuntimeError, match="[Dd]evice"):
            jepa(patches, visible.cpu(), hidden)


# ---- train -------------------------------------------------------------------------------------


def test_spread_and_explained_at_their_ends():
    targets, hidden = torch.randn(6, 8, 5), torch.arange(12).view(6, 2) % 7
    wanted, places = model.select(targets, hidden), targets.mean(0)[hidden]
    shares = [train.explained(x, targets, hidden) for x in (wanted, places, (wanted + places) / 2)]
    assert shares == pytest.approx([1, 0, 0.75], abs=1e-6)
    assert train.spread(torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]])) == (1 + 0) / 2


def test_the_ten_most_similar_of_twelve_clips_vote_whatever_their_length():
    angles = torch.linspace(0, 3, 12)
    features = torch.stack([angles.cos(), angles.sin()], 1) * (1 + 5 * angles[:, None])
    weights = (angles[:10].cos() / 0.07).exp()
    expected = torch.stack([weights[k::3].sum() for k in range(3)]) / weights.sum()
    votes = train.knn_scores(features, torch.eye(3).repeat(4, 1), torch.tensor([[7.0, 0.0]]))
    assert torch.allclose(votes[0], expected, rtol=1e-4), "kNN does not compare by cosine"


@pytest.mark.parametrize("telling, low, high", [(True, 1, 1), (False, 0.08, 0.26)])
def test_the_knn_of_the_log_asks_other_clips_for_what_the_target_encoder_tells(telling, low, high):
    source, clips, rng = data.BuiltInSounds(), itertools.count(), np.random.default_rng(0)

    def target_encoder(patches):                     # latents (B, 128, 2) that tell the order or not
        rows = []
        for i in itertools.islice(clips, len(patches)):
            order = source.label(i) / 6 if telling else rng.random()
            rows.append([math.cos(6.28 * order), math.sin(6.28 * order)])
        return torch.tensor(rows)[:, None].repeat(1, 128, 1)

    run = argparse.Namespace(crops=data.Crops(source, 1000, 0), mel=data.LogMel(0.64),
                             model=argparse.Namespace(target_encoder=target_encoder))
    with mock.patch.object(data.LogMel, "forward", lambda mel, x: torch.zeros(len(x), 128, 256)):
        assert low <= train.knn_of_orders(run) <= high


@pytest.fixture(scope="module")
def run(recordings, tmp_path_factory):
    """Three steps of the real loop: its checkpoints, what reached log-mel and model, and what the
    model returned."""
    path, write, saves = tmp_path_factory.mktemp("run") / "ckpt.pt", torch.save, []
    calls = {data.LogMel: [], model.AudioJEPA: []}
    results = {data.LogMel: [], model.AudioJEPA: []}

    def remember(module, inputs, output):
        calls.get(type(module), []).append(inputs)
        results.get(type(module), []).append(output)

    def save(content, file):
        saves.append(copy.deepcopy(content))
        write(content, file)

    hook = torch.nn.modules.module.register_module_forward_hook(remember)
    with mock.patch.object(torch, "save", save):
        assert train.main(flags(data=recordings, out=path)) == 0
    hook.remove()
    return argparse.Namespace(path=path, saves=saves, heard=calls[data.LogMel],
                              seen=calls[model.AudioJEPA], results=results[model.AudioJEPA])


def weights_of(checkpoint):
    """All weights in a checkpoint, by their names in AudioJEPA."""
    return {f"{part}.{name}": weights for part in ("encoder", "predictor", "target_encoder")
            for name, weights in checkpoint[part].items()}


def test_every_step_of_a_run_takes_its_own_crops_and_masks(run, recordings):
    crops = data.Crops(data.AudioFiles(recordings), N, seed=3)
    for step in range(3):
        (waveforms,), (_, *masks) = run.heard[step], run.seen[step]
        expected = torch.stack([crops[5 * step + i][0] for i in range(5)])
        assert torch.equal(waveforms, expected), f"step {step} has wrong crops"
        assert same(masks, [*masking.make_masks("block", 5, 3, step)]), f"step {step}: wrong masks"


def test_the_log_mel_of_a_run_is_fitted_to_the_sound_of_256_crops_not_to_padding(run, recordings):
    crops, mel = data.Crops(data.AudioFiles(recordings), N, seed=3), data.LogMel(0.64)
    mel.load_state_dict(run.saves[0]["mel"])
    values = torch.cat([mel(crops.read(i)[0][None]).flatten() for i in range(256)])
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4, "the log-mel is not fitted"
    assert torch.equal(run.seen[0][0], data.patchify(mel(*run.heard[0])))


def test_the_rows_of_the_log_are_those_of_their_steps(run):
    rows = (run.path.parent / "ckpt.csv").read_text().splitlines()
    names = rows[0].split(",")
    assert names[:7] == ["step", "loss", "lr", "momentum", "spread", "explained", "knn"]
    for step, (row, (loss, predictions, targets)) in enumerate(
            zip(rows[1:], run.results, strict=True)):
        hidden, clips = run.seen[step][2], torch.arange(5)[:, None]
        wanted, means = targets[clips, hidden], targets.mean(0)[hidden]
        shown = dict(zip(names, row.split(","), strict=True))
        expected = {"step": step + 1, "loss": loss.item(),
                    "lr": 0.01 / 1.15 if step == 0 else late_rate(step),
                    "momentum": 1 - 0.5 * (1 + math.cos(math.pi * step / 3)) / 1.3,
                    "spread": targets.var(0, correction=0).sqrt().mean().item(),
                    "explained": 1 - ((predictions - wanted).square().sum()
                                      / (means - wanted).square().sum()).item()}
        assert {name: float(shown[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_run_whose_targets_are_alike_is_warned_once(tmp_path, capsys):
    config = argparse.Namespace(out=str(tmp_path / "a.pt"), steps=9, batch_size=4)
    log, row = train.Log(config), dict(lr=1, momentum=1, loss=1, explained=0, knn="")
    for step, spread in enumerate((0.5, 0.05, 0.05)):
        log.clips = 4
        log.write(row | {"step": step, "spread": spread})
        assert ("warning: all clips" in capsys.readouterr().out) == (step == 1)


def late_rate(step):
    return 0.005 * (1 + math.cos(math.pi * (step - 0.15) / 2.85))


def test_the_learning_rates_of_a_run_follow_its_schedule(run):
    peaks = argparse.Namespace(steps=1000, lr=1)
    assert train.learning_rate(24, peaks) == pytest.approx(25 / 51)
    for save, rate in zip(run.saves[1:4], (0.01 / 1.15, late_rate(1), late_rate(2)), strict=True):
        for name, share in (("matrix_optimizer", 1), ("other_optimizer", 0.1)):
            assert save[name]["param_groups"][0]["lr"] == pytest.approx(share * rate), name


def test_the_target_encoder_of_a_run_follows_by_the_momentum_of_each_step(run):
    assert same(run.saves[0]["target_encoder"], run.saves[0]["encoder"])
    for step in range(3):
        before, after = run.saves[step:step + 2]
        keep = 1 - 0.5 * (1 + math.cos(math.pi * step / 3)) / 1.3
        for name, new in after["target_encoder"].items():
            expected = keep * before["target_encoder"][name] + (1 - keep) * after["encoder"][name]
            assert torch.allclose(new, expected, atol=1e-5), f"the EMA of step {step} is wrong"


def adamw_by_hand(w, grad, t, state, last, lr, decay):
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    assert torch.allclose(mean, 0.9 * last.get("exp_avg", 0) + 0.1 * grad, atol=1e-5)
    assert torch.allclose(square, 0.95 * last.get("exp_avg_sq", 0) + 0.05 * grad ** 2, atol=1e-5)
    move = mean / (1 - 0.9 ** t) / ((square / (1 - 0.95 ** t)).sqrt() + 1e-8)
    return w - lr * decay * w - lr * move


def check_muon(w, moved, grad, state, last, lr, decay):
    """The step has the singular vectors of the gradient's average, and singular values near 1."""
    mean = state["momentum_buffer"]
    assert torch.allclose(mean, 0.95 * last.get("momentum_buffer", 0) + 0.05 * grad, atol=1e-5)
    left, _, right = torch.linalg.svd(0.05 * grad + 0.95 * mean)
    step = (w * (1 - lr * decay) - moved) / lr / max(1, len(w) / w.shape[1]) ** 0.5
    core = left[:, :4].T @ step @ right[:4].T        # of the four largest directions
    assert 0.6 < core.diag().min() and core.diag().max() < 1.3, core.diag()
    assert (core - core.diag().diag()).abs().max() < 0.2


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_step_of_a_run_is_its_optimizer_on_the_gradient_of_the_loss(
        run, kind, go, tmp_path, monkeypatch):
    saves, seen = run.saves, run.seen
    if kind == "adamw":
        saves, write = [], torch.save
        monkeypatch.setattr(torch, "save", lambda content, file: (
            saves.append(copy.deepcopy(content)), write(content, file)))
        assert go(optimizer="adamw") == 0
        mel = data.LogMel(0.64)
        mel.load_state_dict(saves[0]["mel"])
        seen = [(data.patchify(mel(*run.heard[t])), *run.seen[t][1:]) for t in range(3)]
    jepa, groups = model.AudioJEPA("toy"), {"matrix_optimizer": [], "other_optimizer": []}
    for name, weights in jepa.named_parameters():
        if weights.requires_grad:
            matrix = weights.ndim == 2 and "layers" in name
            groups["matrix_optimizer" if matrix else "other_optimizer"].append((name, weights))
    for t in range(1, 4):
        before, after = saves[t - 1:t + 1]
        jepa.load_state_dict(weights_of(before))
        jepa.zero_grad()
        loss_by_hand(jepa, *seen[t - 1]).backward()
        for part, learned in groups.items():
            lr = after[part]["param_groups"][0]["lr"]
            decay = 0.05 if part == "matrix_optimizer" else 0
            assert after[part]["param_groups"][0]["weight_decay"] == decay
            for i, (name, w) in enumerate(learned):
                last, state = before[part]["state"].get(i, {}), after[part]["state"][i]
                moved = weights_of(after)[name]
                if (kind, part) == ("muon", "matrix_optimizer"):
                    check_muon(w.detach(), moved, w.grad, state, last, lr, decay)
                else:
                    expected = adamw_by_hand(w, w.grad, t, state, last, lr, decay)
                    assert torch.allclose(moved, expected, atol=1e-6), (t, name)


def test_fp16_is_used_and_a_step_that_overflows_is_skipped(go, monkeypatch):
    saves, attention, dtypes = [], F.scaled_dot_product_attention, set()
    scaler = torch.amp.GradScaler("cpu", init_scale=2. ** 60, backoff_factor=2. ** -50)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v: dtypes.add(q.dtype) or attention(q, k, v))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, enabled: enabled and scaler)
    monkeypatch.setattr(torch, "save", lambda content, _: saves.append(copy.deepcopy(content)))
    assert go(amp="fp16", steps=2) == 0
    assert dtypes == {torch.float16}, "--amp is ignored"
    assert [same(a["encoder"], b["encoder"]) for a, b in itertools.pairwise(saves)] == [True, False]


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_compiled_model_is_one_graph_for_all_steps(go, monkeypatch, kind):
    graphs, torch_compile = [], torch.nn.Module.compile
    monkeypatch.setattr(model, "range", lambda n: range(1), raising=False)     # a layer is enough
    monkeypatch.setenv("CXX", sys.executable)        # train.py looks for a compiler
    monkeypatch.setattr(model.AudioJEPA, "compile", lambda jepa: torch_compile(
        jepa, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    torch.compiler.reset()
    assert go("--compile", mask=kind) == 0 and len(graphs) == 1, f"compiled {len(graphs)} times"


def test_seeds_give_other_weights_crops_and_masks(go, run, tmp_path):
    assert go(seed=4, steps=1) == 0
    other = train.load_checkpoint(tmp_path / "ckpt.pt")
    assert not torch.equal(other["encoder"]["embed.weight"], run.saves[1]["encoder"]["embed.weight"])
    assert other["log"][0]["loss"] != run.saves[1]["log"][0]["loss"]


@pytest.mark.parametrize("signums, workers, changes", [
    ([signal.SIGINT], 0, {"amp": "fp16"}), ([signal.SIGTERM], 2, {"mask": "random"}),
    ([signal.SIGINT, signal.SIGHUP], 1, {"optimizer": "adamw"})])
def test_a_signal_saves_and_resuming_is_exact(go, tmp_path, monkeypatch, signums, workers, changes):
    read, starts, pid, armed = data.AudioFiles.windows, [], os.getpid(), tmp_path / "armed"

    def watched(files, index, n_samples, start=0.0):
        starts.append(start)
        if armed.exists() and start == starts[12]:   # in the third batch
            armed.unlink()
            for signum in signums:
                os.kill(pid, signum)
        return read(files, index, n_samples, start)

    monkeypatch.setattr(data.AudioFiles, "windows", watched)
    monkeypatch.setattr(sys, "stdout", sys.stdout)   # SIGHUP closes both
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert go(steps=5, out="whole.pt", **changes) == 0
    armed.touch()
    code = go(steps=5, workers=workers, save_every=99, **changes)
    assert code - 128 in signums
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] in range(1, 5)
    assert train.main(["--resume", str(tmp_path / "ckpt.pt")]) == 0
    assert same(outcome(tmp_path / "whole.pt"), outcome(tmp_path / "ckpt.pt")), "it is not exact"


def test_a_worker_that_dies_ends_the_run_in_one_line(go, monkeypatch, capsys):
    read, reads, pid = data.AudioFiles.windows, [], os.getpid()

    def mortal(files, index, n_samples, start=0.0):
        reads.append(index)
        if os.getpid() != pid and len(reads) == 23:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(files, index, n_samples, start)

    monkeypatch.setattr(data.AudioFiles, "windows", mortal)
    assert go(workers=1, steps=50) == 1
    error, = capsys.readouterr().err.splitlines()
    assert "DataLoader worker" in error and "fewer --workers" in error
    assert re.search(r"ckpt.pt holds step \d+: --resume goes on", error)


def test_a_nan_stops_the_run_and_the_last_checkpoint_is_good(go, tmp_path, monkeypatch, capsys):
    factors, smooth_l1 = iter((1, math.nan)), F.smooth_l1_loss
    monkeypatch.setattr(F, "smooth_l1_loss", lambda *a: next(factors) * smooth_l1(*a))
    assert go() == 1 and "at step 2 are NaN" in capsys.readouterr().err
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(go, tmp_path, monkeypatch, capsys):
    write, files = torch.save, []

    def save(content, file):
        files.append(file.name)
        if content["step"] == 2:
            raise RuntimeError("disk full")
        write(content, file)

    monkeypatch.setattr(torch, "save", save)
    assert go() == 1 and "disk full (" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["ckpt.csv", "ckpt.pt"] and len({*files}) == 3
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1


def test_a_checkpoint_of_no_step_may_be_overwritten(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            go()
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 0 and go(steps=1) == 0
    (tmp_path / "ckpt.pt").unlink()
    assert go(steps=1) == 1, "the log of another run was overwritten"


@pytest.mark.parametrize("cuda, given, recipe", [
    (False, {}, "sounds"), (False, {"data": "x"}, "laptop"), (True, {"data": "x"}, "paper"),
    (True, {"data": "x", "recipe": "laptop"}, "laptop")])
def test_the_recipe_is_that_of_the_machine_and_the_data(cuda, given, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config, _ = train.resolve(given | {"amp": "off"}, None)
    assert config.recipe == recipe and config.batch_size == train.RECIPES[recipe]["batch_size"]
    assert (config.model == "base") == (recipe == "paper") == (config.optimizer == "adamw")


@pytest.fixture(scope="module")
def bad(run):
    """The folder of the run, with another checkpoint, of step 1, and much that is none."""
    folder, sick = run.path.parent, copy.deepcopy(run.saves[1])
    sick["target_encoder"]["norm.bias"][0] = math.nan
    cuda = run.saves[1] | {"config": run.saves[1]["config"] | {"device": "cuda"}}
    for name, content in (("empty", b""), ("text", b"no.wav\n" * 12), ("binary", b"RIFF\0\0\0\0"),
                          ("cut", run.path.read_bytes()[:100_000]),
                          ("pickle", b"cbuiltins\nopen\n(S'executed'\nS'w'\ntR.")):
        (folder / name).write_bytes(content)
    for name, content in (("half", run.saves[1]), ("sick", sick), ("other", {}), ("cuda", cuda),
                          ("old", {"format": "audio-jepa 1"})):
        torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize("given, says", [
    ("", "ckpt.pt exists"), ("--resume=ckpt.pt", "no run can be made longer"),
    ("--resume=ckpt.pt --steps=9", "no run can be made longer"), ("--resume=", "need a path"),
    ("--resume=half --mask=random --lr=1", "leave out --lr, --mask"), ("--data=", "need a path"),
    ("--resume=half --data=text", "not the files"), ("--resume=absent", "No such file"),
    ("--resume=cuda", "--device cpu --no-compile"), ("--out=no/a.pt", "choose"),
    ("--out=a.csv", "choose"), ("--out=a.pt --compile", "apt install"),
    ("--out=a.pt --data=absent", "no such folder"), ("--out=a.pt --data=text", "one in twenty"),
    ("--out=a.pt --data=empty", "no audio here"), ("--out=a.pt --data=binary", "neither a folder"),
    ("--resume=empty", "not a ch"), ("--resume=text", "not a ch"), ("--resume=cut", "not a ch"),
    ("--resume=other", "not a ch"), ("--resume=pickle", "not a ch"), ("--resume=sick", "NaN"),
    ("--resume=old", "not a ch")])
def test_what_cannot_work_is_refused_in_one_line(bad, monkeypatch, capsys, given, says):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("CXX", "no compiler")
    assert train.main(given.split()) == 1
    error, = capsys.readouterr().err.splitlines()
    assert says in error and not {"a.pt", "a.csv", "executed"} & {*os.listdir()}


# ---- probe -------------------------------------------------------------------------------------


def test_the_encoder_in_one_call(run):
    encoder, other = (probe.load_encoder(run.path, trained) for trained in (True, False))
    assert same(dict(encoder.encoder.named_parameters()), run.saves[-1]["target_encoder"])
    assert same(dict(other.encoder.named_parameters()), run.saves[0]["encoder"])
    assert same(dict(encoder.mel.named_buffers()), dict(other.mel.named_buffers()))
    assert encoder.mel.mean == run.saves[-1]["mel"]["mean"] != 0
    long = torch.randn(2, 50_000)                    # 3 windows of 20,480, 39.06 columns of 1,280
    embeddings, patches = encoder(long, 32_000), data.patchify(encoder.mel(long[:, N:2 * N]))
    assert embeddings.shape == (2, 40, encoder.output_dim) == (2, 40, 8 * 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=train.find_amp("cpu") == "bf16"):
        latents = encoder.encoder(patches)[0].view(8, 16, 64)[:, 4].flatten().float()
    assert torch.allclose(embeddings[0, 20], latents, atol=0.05), "column 4 of window 1 is wrong"
    assert encoder(np.random.randn(800), 8000).shape == (1, 3, 512)             # 2.5 columns


def test_the_encoder_hears_the_same_at_any_rate(run):
    encoder = probe.load_encoder(run.path)
    low, high = (encoder(tone(3000, 0.64, rate), rate)[0, 2:-2] for rate in (8000.0, 32_000))
    assert F.cosine_similarity(low, high).mean() > 0.95, "not resampled, or not well"


@pytest.mark.parametrize("waveform, rate, says", [
    (torch.zeros(64_000, 2), 44_100, "waveform.mean"), (torch.zeros(0, 9), 44_100, "finite floats"),
    (torch.full((900,), math.nan), 44_100, "finite floats"), (torch.zeros(900), 0.5, "whole number"),
    (torch.full((900,), 1e9), 44_100, "finite"), (torch.zeros(1, 1, 900), 44_100, "finite floats"),
    (torch.zeros(900, dtype=torch.int16), 44_100, "finite"), (torch.zeros(900), 44_101, "resample")])
def test_a_waveform_that_cannot_be_meant_is_refused(run, waveform, rate, says):
    with pytest.raises(data.InputError, match=says):
        probe.load_encoder(run.path)(waveform, rate)


def test_the_encoder_is_frozen_until_it_is_thawed(run):
    encoder, waveform = probe.load_encoder(run.path), torch.randn(2, N)
    assert not encoder(waveform, 32_000).requires_grad
    encoder.requires_grad_(True)
    before = copy.deepcopy(encoder.encoder.state_dict())
    encoder(waveform, 32_000).square().mean().backward()
    torch.optim.SGD(encoder.parameters(), lr=1.0).step()
    for name, weights in encoder.encoder.state_dict().items():
        assert not torch.equal(weights, before[name]), f"no gradient reached {name}"
    with pytest.raises(data.InputError, match="float32"):
        encoder.half()(waveform, 32_000)


def test_features_are_mean_and_std_over_sound_alone_read_by_windows(
        run, tmp_path, monkeypatch, capsys):
    for i in range(40):
        write_tone(tmp_path / f"{i:02}.wav", pitch=100 + 50 * i, seconds=0.2 + 0.05 * (i % 9))
    write_tone(tmp_path / "long.wav", seconds=30)
    (tmp_path / "text.wav").write_text("no sound")
    lying_flac(tmp_path / "zcut.flac", 128_000, 0.4)
    source, read, asked = data.AudioFiles(tmp_path), data.decode, set()
    monkeypatch.setattr(data, "decode", lambda file, n: asked.add(n) or read(file, n))
    encoders = {"untrained": probe.load_encoder(run.path, trained=False),
                "trained": probe.load_encoder(run.path)}
    features = probe.compute_features(source, range(43), encoders)
    said = capsys.readouterr().out
    assert said.count("unusable from here on") == 2 and "text.wav" in said and "zcut" in said
    assert asked == {N}, "more than a window was read at once"
    assert {*features["trained"]} == {*range(43)} - {41} and [*features] == [
        "log-mel", "untrained", "trained"]
    for index in (0, 7, 33, 40):
        waveform = torch.cat([*source.windows(index, N)])
        series = {"log-mel": torch.cat([encoders["trained"].mel(part[None])[0].mT
                                        for part in waveform.split(N)])}
        series |= {name: encoder(waveform, 32_000)[0] for name, encoder in encoders.items()}
        for name, x in series.items():
            x = x.double()
            expected = torch.cat([x.mean(0), x.std(0, correction=0)]).float()
            assert torch.allclose(features[name][index], expected, atol=0.03), (name, index)
    assert not torch.allclose(features["trained"][0], features["untrained"][0], atol=0.01)


def test_deviations_of_loud_steady_features_are_not_lost(run, monkeypatch):
    ripple = torch.linspace(-1e-3, 1e-3, 256).expand(1, 128, 256)
    monkeypatch.setattr(data.LogMel, "forward", lambda mel, x: -50 + ripple.repeat(len(x), 1, 1))
    source, encoder = data.BuiltInSounds(), probe.load_encoder(run.path)
    features = probe.compute_features(source, [0], {"trained": encoder})["log-mel"][0]
    assert features[128:] == pytest.approx(ripple[0, 0].std(correction=0).item(), rel=1e-3)


TABLE = "\ufefffilename,fold,category\n{0}0.wav,1.0,a\n{0}1,2,b\n{0}2.wav,1,a\n{0}3.wav,2,b\n"
LAYOUTS = {
    "esc": {"meta/esc50.csv": TABLE.format("")},
    "table": {"labels.csv": TABLE.format("D:\\\\rec\\\\audio\\\\")},
    "several": {"labels.csv": "filename,category,split\n0,a;b,Train\n1,b,TEST\n2,a,val\n3,b,test\n"},
    "folders": {}, "split": {},
    "set": {"csv/balanced_train_segments.csv": '# YTID\n-b-d_f-h_jk, 0, 9, "a,b"\n',
            "csv/eval_segments.csv": 'YYYYYYYYYYY, 0, 9, "b,c"\nabsent, 0, 9, "a"\n',
            "csv/class_labels_indices.csv": "index,mid\n0,a\n1,b\n"}}
FOUND = {
    "esc": [(["a"], "1"), (["b"], "2"), (["a"], "1"), (["b"], "2")],
    "several": [(["a", "b"], "train"), (["b"], "test"), (["a"], "valid"), (["b"], "test")],
    "folders": [(["a"], None), (["b"], None), (["a"], None), (["b"], None)],
    "split": [(["a"], "train"), (["b"], "valid"), (["a"], "test"), (["b"], "test")],
    "set": [(["a", "b"], "train"), (["b"], "test")]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_are_found_in_every_layout(tmp_path, layout, capsys):
    names = {"folders": "{1}/{0}", "split": "{2}/{1}/{0}"}.get(layout, "audio/{0}")
    for path, text in LAYOUTS[layout].items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(text)
    clips = [names.format(i, "ab"[i % 2], ("Train", "validation", "test", "TEST")[i])
             for i in range(4)]
    if layout == "set":
        clips = ["-b-d_f-h_jk_30.0", "YYYYYYYYYYYY", "zzzzzzzzzzz", "z"]
    for clip in clips:
        write_tone(tmp_path / f"{clip}.wav")
    source, indices, labels, folds = probe.load_labelled(str(tmp_path))
    found = {os.path.basename(source.path(i)): (names, fold)
             for i, names, fold in zip(indices, labels, folds, strict=True)}
    expected = FOUND.get(layout, FOUND["esc"])
    assert found == {os.path.basename(f"{clip}.wav").encode(): row
                     for clip, row in zip(clips, expected, strict=False)}
    said = capsys.readouterr().out
    assert f"{len(expected)} clips, 2 classes (a, b)" in said
    assert ("2 files without a label, 1 rows without a file" in said) == (layout == "set")


@pytest.mark.parametrize("name, text, says", [
    ("labels.csv", "filename,category\nx.wav,a\n", "'x.wav'.*'0.wav'"),
    ("labels.csv", "filename,category\n0.wav,a\n0,b\n", "several files or rows"),
    ("labels.csv", "name,category\n0.wav,a\n", "no column filename"),
    ("labels.csv", "filename,category,split\n0.wav,a,dev\n", "the split 'dev'"),
    ("eval_segments.csv", "YYYYYYYYYYY, 0, 9, b\n", "balanced_train_segments.csv and eval"),
    ("README.txt", "", "no label fits an audio file")])
def test_labels_that_do_not_fit_are_refused(tmp_path, name, text, says):
    write_tone(tmp_path / "0.wav")
    (tmp_path / name).write_text(text)
    with pytest.raises(data.InputError, match=says):
        probe.load_labelled(str(tmp_path))


@pytest.mark.parametrize("folds, rounds", [
    ([None] * 20, 5), ([*"1223"] * 5, 3), (["train"] * 9 + ["valid"] * 3 + ["test"] * 8, 1)])
def test_the_parts_of_a_round_share_no_clip_and_every_fold_is_tested_once(folds, rounds):
    made = probe.make_rounds(torch.eye(2).repeat(10, 1), folds)
    tested = sum((test.tolist() for *_, test in made), [])
    assert len(made) == rounds and len(tested) == len({*tested}) == (20 if rounds > 1 else 8)
    for parts in made:
        assert sorted(torch.cat(parts).tolist()) == [*range(20)] and all(map(len, parts))
        kinds = [{folds[i] for i in part.tolist()} for part in parts]
        assert rounds == 5 or not (kinds[0] | kinds[1]) & kinds[2], "a test clip is trained on"
        assert rounds > 1 or kinds == [{"train"}, {"valid"}, {"test"}]
        assert rounds < 5 or sum(i % 2 for i in parts[2].tolist()) == 2, "a class lacks in a fold"


def test_what_is_too_little_to_probe_is_said(capsys):
    with pytest.raises(data.InputError, match="too few clips"):
        probe.make_rounds(torch.eye(2), ["train", "test"])
    probe.make_rounds(torch.eye(3).repeat(4, 1)[:10], [*"1212121213"])
    assert "warning: 1 classes of test fold 3 have no clip" not in capsys.readouterr().out
    probe.make_rounds(torch.eye(2)[[0] * 8 + [1]], [*"111222113"])
    assert "warning: 1 classes of test fold 3 have no clip" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [F.cross_entropy, probe.binary_cross_entropy])
def test_the_linear_probe_ends_where_the_gradient_on_the_training_clips_is_zero(loss):
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5) * 3 + 1, torch.eye(3).repeat(20, 1)
    labels[::2, 0] = labels[::2, 0] if loss is F.cross_entropy else 1
    units = x.mean(0) + torch.cat([torch.zeros(1, 5), torch.diag(x.std(0))])
    scores = probe.linear_scores(x, labels, torch.cat([x, units]), 0.1, loss)
    p = scores[:60].softmax(1) if loss is F.cross_entropy else scores[:60].sigmoid()
    gradient = ((x - x.mean(0)) / x.std(0)).T @ (p - labels) / 60 + 0.1 * (scores[61:] - scores[60])
    assert gradient.abs().max() < 2e-4 and (p - labels).mean(0).abs().max() < 2e-4
    alone = probe.linear_scores(x, labels, x[:3], 0.1, loss)
    assert torch.allclose(alone, scores[:3], atol=1e-4), "test clips enter the standardisation"


def test_average_precision_by_a_slow_loop_with_ties():
    scores, labels = torch.randint(6, (50, 4)), torch.randint(2, (50, 4)).float()
    labels[:, 3] = 0                                 # a class without clips does not count
    expected = np.mean([np.mean([y[s >= value].mean().item() for value in s[y == 1]])
                        for s, y in zip(scores.T[:3], labels.T[:3], strict=True)])
    assert probe.mean_average_precision(scores, labels) == pytest.approx(expected)


def test_the_regularisation_is_chosen_on_the_valid_clips_alone(monkeypatch):
    torch.manual_seed(0)
    x, labels, chosen = torch.randn(90, 20), torch.eye(2).repeat(45, 1), []
    x[:60, 0] += 2 * labels[:60, 0]                  # a rule that does not hold for the test clips
    parts, fit, loss = torch.arange(90).split(30), probe.linear_scores, F.cross_entropy

    def best(part):
        return min(probe.L2_STRENGTHS, key=lambda l2: loss(
            fit(x[:30], labels[:30], x[part], l2, loss), labels[part]))

    monkeypatch.setattr(probe, "linear_scores", lambda *a: chosen.append(a[3]) or fit(*a))
    probe.evaluate(x, labels, [parts])
    assert chosen[-1] == best(parts[1]) != best(parts[2]), "chosen on the test clips"


@pytest.mark.parametrize("several", [False, True])
def test_the_table_shows_what_is_known_of_each_row(run, tmp_path, monkeypatch, capsys, several):
    """The labels are written into one row, and nothing into the others, which must be at chance;
    one row tells them among features so large that only standardised ones can be compared."""
    rng, rows = np.random.default_rng(0), []
    kinds = [0, 1, 2] * 40
    for i, kind in enumerate(kinds):
        (tmp_path / f"{i:03}.wav").touch()
        rows.append(f"{i:03}.wav,{'abc'[kind] + ';d' * (several and i % 2)},{i // 3 % 4}\n")
    (tmp_path / "labels.csv").write_text("filename,category,fold\n" + "".join(rows))
    noise = torch.from_numpy(rng.standard_normal((120, 8))).float()
    truth = F.one_hot(torch.tensor(kinds)).float()
    odd = torch.arange(120)[:, None] % 2.
    values = {"log-mel": noise, "untrained": torch.cat([truth, odd], 1),
              "trained": torch.cat([truth, odd, 1000 * torch.ones(120, 1)], 1)}
    monkeypatch.setattr(probe, "compute_features", lambda *_: {
        name: {i: x[i] for i in range(1, 120)} for name, x in values.items()})  # 0 was unreadable
    assert probe.main([str(run.path), "--data", str(tmp_path), "--json", f"{tmp_path}/a"]) == 0
    said, results = capsys.readouterr().out, json.loads((tmp_path / "a").read_text())["results"]
    assert f"119 clips, {3 + several} classes; {'mAP' if several else 'accuracy'}" in said
    assert [*results] == ["log-mel", "untrained", "trained"]
    for name, scores in results.items():
        assert [len(x) for x in scores.values()] == [4, 4], "a round for each fold"
        linear, knn = (np.mean(scores[column]) for column in ("linear", "kNN"))
        shown, = re.findall(rf"(?m)^{name} +([\d.]+) \+- +[\d.]+ +([\d.]+) \+-", said)
        assert [*map(float, shown)] == pytest.approx([100 * linear, 100 * knn], abs=0.051)
        chance = (0.2, 0.65) if several else (0.2, 0.48)
        low, high = chance if name == "log-mel" else (0.99, 1)
        assert low < linear <= high and low < knn <= high, (name, linear, knn)
    assert probe.main([str(run.path), "--data", str(tmp_path), "--json", str(run.path)]) == 1
    assert "choose a new file" in capsys.readouterr().err


# ---- the README --------------------------------------------------------------------------------

README = open(os.path.join(os.path.dirname(__file__), "README.md"), encoding="utf-8").read()


def test_the_snippets_of_the_readme_run_as_they_stand(run, monkeypatch):
    monkeypatch.chdir(run.path.parent)               # where a ckpt.pt is
    names = {"waveform": torch.randn(2, 50_000), "sample_rate": 32_000}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, names)
    assert names["embeddings"].shape == names["AudioJEPAEncoder"]()(torch.randn(2, 50_000)).shape


def test_the_diagram_and_the_commands_of_the_readme_name_what_exists():
    diagram, = re.findall(r"```mermaid\nflowchart(.*?)```", README, re.S)
    boxes = re.findall(r'[\[(]"(\w+)', diagram)
    known = {*dir(data), *dir(masking), *dir(model), *dir(model.AudioJEPA), *dir(F), "waveform"}
    assert len(boxes) > 6 and {*boxes} <= known, {*boxes} - known
    commands = re.findall(r"python (train|probe)\.py([^`#\n]*)", README)
    assert len(commands) > 6
    for script, given in commands:
        if script == "train" and "--help" not in given:
            train.parse(given.split())               # exits if it does not know a flag
        else:
            assert {*re.findall("--[a-z]+", given)} <= {"--data", "--help"}, given


# ---- commands ----------------------------------------------------------------------------------


def test_the_commands_train_draw_and_probe_from_a_folder_with_odd_names(recordings, tmp_path):
    odd = tmp_path / "a folder \udcff"
    odd.mkdir()
    (odd / "recordings").symlink_to(recordings)
    for arguments, code, says in (
            (["train.py", *flags(model="tiny", steps=2, amp="bf16", data=odd / "recordings")], 0,
             "saved ckpt.pt at step 2"),
            (["train.py"], 1, "train.py: ckpt.pt exists"), (["masking.py"], 0, "are visible"),
            (["probe.py", "ckpt.pt", "--json=table"], 0, "12 clips")):
        process = command(odd, *arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code and says in output and "Traceback" not in output, output
    results = json.loads((odd / "table").read_text(), parse_constant=pytest.fail)
    assert [*results["results"]] == ["log-mel", "untrained", "trained"]
    assert len((odd / "ckpt.csv").read_text().splitlines()) == 3


def test_a_command_that_is_killed_or_stopped_at_any_moment_resumes_exactly(recordings, tmp_path):
    given = flags(model="tiny", data=recordings, steps=15, workers=1)
    assert train.main([*given, "--out", str(tmp_path / "whole.pt")]) == 0
    process = command(tmp_path, "train.py", *given)
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        assert any(" / 15 " in line for line in process.stdout), "it did not reach a step"
        os.killpg(process.pid, signum)               # as a terminal does: the worker gets it, too
        assert process.wait(timeout=300) == code
        process = command(tmp_path, "train.py", "--resume", "ckpt.pt")
    assert "Traceback" not in process.communicate(timeout=300)[0] and process.returncode == 0
    assert same(outcome(tmp_path / "whole.pt"), outcome(tmp_path / "ckpt.pt"))
