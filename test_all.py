"""Tests: each invariant is held against something independent (a closed form, a slow loop, a case worked by hand), and
both commands run as a user would run them. No GPU, no network, no data set needed; under three minutes on two cores."""

import csv
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from einops import rearrange

import data
import masking
import model
import probe
import train

HERE = pathlib.Path(__file__).parent
REAL = HERE.parent / "shared" / "data"
TINY = dict(model="tiny", seconds=0.64, batch_size=4, device="cpu", amp="off", compile=False, workers=0)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A folder of 12 short recordings of three classes, of several formats, rates and widths."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for kind, pitch in (("low", 200), ("mid", 900), ("high", 3000)):
        (folder / kind).mkdir()
        for i, (suffix, rate, channels) in enumerate((("wav", 8000, 1), ("flac", 44100, 2), ("OGG", 32000, 1),
                                                      ("mp3", 16000, 1))):
            time_axis = np.arange(int(rate * rng.uniform(0.3, 1.5))) / rate
            tone = 0.3 * np.sin(2 * np.pi * pitch * time_axis)[:, None] + 0.02 * rng.standard_normal((len(time_axis), channels))
            soundfile.write(folder / kind / f"{i}.{suffix}", tone, rate)
    return folder


def run(command, cwd, timeout=120, **environment):
    """Run `python command...` in `cwd` as a user would; returns the finished process."""
    return subprocess.run([sys.executable, str(HERE / command[0]), *map(str, command[1:])], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, errors="replace", env=os.environ | environment)


def config(**changes):
    return train.resolve(train.Config(**(TINY | changes)))


# ---- data.py ------------------------------------------------------------------------------------------------------------

def write_ramp(path, rate=32_000, seconds=3.0, channels=1):
    """A file whose sample i is i / n: a sample tells its own position."""
    ramp = np.linspace(0, 0.9, int(rate * seconds), endpoint=False, dtype=np.float32)
    soundfile.write(path, np.stack([ramp] * channels, axis=1), rate, subtype="FLOAT")
    return torch.from_numpy(ramp)


def test_a_crop_is_the_slice_it_says(tmp_path):
    ramp = write_ramp(tmp_path / "a.wav")
    for position in (0.0, 0.5, 0.999999):
        start = int(position * (len(ramp) - 8000 + 1))
        assert torch.equal(data.read_audio(str(tmp_path / "a.wav"), position, 8000), ramp[start:start + 8000])
    assert torch.equal(data.read_audio(str(tmp_path / "a.wav")), ramp)


def test_stereo_is_mixed_and_other_rates_are_resampled(tmp_path):
    left = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros(48_000)], axis=1), 48_000, subtype="FLOAT")
    heard = data.read_audio(str(tmp_path / "a.wav"))
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(32_000) / 32_000)
    assert heard.shape == (32_000,)
    assert torch.allclose(heard[100:-100], expected[100:-100], atol=2e-3)


def test_a_long_file_costs_no_more_than_its_crop(tmp_path, monkeypatch):
    write_ramp(tmp_path / "long.wav", rate=8000, seconds=600)
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **k: asked.append(n) or read(self, n, **k))
    assert len(data.read_audio(str(tmp_path / "long.wav"), 0.7, 32_000)) == 32_000
    assert asked == [8000]


def test_files_are_found_in_every_spelling_and_in_one_order(tmp_path):
    names = ["b/x.FLAC", "a.wav", "b/c/y.Opus", "b/with space.mp3", "new\nline.aiff", "quote'\".ogg", "b/z.aif"]
    for name in names + ["no.txt", "b/wav", "x.wav.bak"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    open(os.path.join(os.fsencode(tmp_path), b"bad\xff.wav"), "w").close()
    files = data.AudioFiles(tmp_path)
    found = {os.path.relpath(files.path(i), os.fsencode(tmp_path)) for i in range(len(files))}
    assert found == {name.encode() for name in names} | {b"bad\xff.wav"}
    assert all(files.name(i).isprintable() for i in range(len(files)))


def test_a_list_of_paths_is_relative_to_itself(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.wav\n\nsub/b.wav\r\n/abs/c.wav")
    files = data.AudioFiles(tmp_path / "list.txt")
    root = os.fsencode(tmp_path)
    assert [files.path(i) for i in range(len(files))] == [root + b"/a.wav", root + b"/sub/b.wav", b"/abs/c.wav"]


@pytest.mark.parametrize("make, says", [
    (lambda p: p / "absent", "no such folder"), (lambda p: p, "no audio here"),
    (lambda p: (p / "empty.txt").touch() or p / "empty.txt", "empty"),
    (lambda p: (p / "a.wav").touch() or p / "a.wav", "one audio file")])
def test_data_that_is_not_there_is_told_in_a_line(tmp_path, make, says):
    with pytest.raises(data.DataError, match=says):
        data.AudioFiles(make(tmp_path))


def test_every_epoch_visits_every_clip_once():
    source = data.BuiltInSounds(10, 0.64)
    batches = data.Batches(source, 4, 20_480, seed=1)
    order = sum((batches.clips(step) for step in range(5)), [])                    # 20 clips: two epochs, one batch spans both
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert batches.clips(1) == data.Batches(source, 4, 20_480, seed=1).clips(1) == order[4:8]
    larger = data.Batches(source, 25, 20_480, seed=1).clips(0)                     # a batch larger than the data: 2.5 epochs
    assert sorted(larger[:10]) == sorted(larger[10:20]) == list(range(10)) and len(larger) == 25


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_pure_function_of_seed_and_step(recordings, workers):
    batches = data.Batches(data.AudioFiles(recordings), 5, 20_480, seed=3)
    loaded = list(data.make_loader(batches, range(2, 6), workers, torch.device("cpu")))
    for step, batch in zip(range(2, 6), loaded):
        again = data.Batches(data.AudioFiles(recordings), 5, 20_480, seed=3)[step]
        assert torch.equal(batch.waveforms, again.waveforms) and torch.equal(batch.filled, again.filled)
        assert all((w[n:] == 0).all() and w[:n].abs().max() > 0 for w, n in zip(batch.waveforms, batch.filled))
    other = data.Batches(data.AudioFiles(recordings), 5, 20_480, seed=4)[2]
    assert not torch.equal(loaded[0].waveforms, other.waveforms)


@pytest.mark.parametrize("seconds", [0.25, 0.64, 1.28, 2.56, 10.0])
def test_the_spectrogram_has_256_frames_and_no_empty_band(seconds):
    mel = data.LogMel(seconds)
    waveforms = torch.randn(2, data.hop_samples(seconds) * 256)
    assert mel(waveforms).shape == (2, 128, 256)
    assert (mel.spectrogram.mel_scale.fb.sum(0) > 0).all()
    assert mel(torch.zeros_like(waveforms)).isfinite().all()


def test_a_tone_lands_in_the_band_of_its_frequency():
    mel = data.LogMel(10.0)
    def slaney(hz):                                                                # linear to 1 kHz, then logarithmic
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)
    for hz in (300, 1000, 5000):
        tone = torch.sin(2 * torch.pi * hz * torch.arange(320_000) / 32_000)
        expected = (slaney(hz) - slaney(20)) / (slaney(16_000) - slaney(20)) * 129 - 1
        assert abs(mel(tone[None])[0, :, 128].argmax().item() - expected) <= 1


def test_mean_and_deviation_normalise_the_sound_not_the_padding(recordings):
    batches = data.Batches(data.AudioFiles(recordings), 4, 20_480, seed=0)
    mel = data.LogMel(0.64)
    mel.fit(batches, n_clips=12)
    values = [mel(batches[s].waveforms)[i, :, :math.ceil(batches[s].filled[i] / mel.hop)].flatten()
              for s in range(3) for i in range(4)]
    values = torch.cat(values)
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4


def test_built_in_sounds_are_pure_and_distinct():
    source = data.BuiltInSounds(36, 2.56)
    clips = [source.crop(i, 0.3, 81_920) for i in range(36)]
    assert all(torch.equal(clip, source.crop(i, 0.9, 81_920)) for i, clip in enumerate(clips[:3]))
    assert all(clip.shape == (81_920,) and clip.isfinite().all() and 0.001 < clip.abs().max() < 10 for clip in clips)
    assert not any(torch.equal(clips[0], clip) for clip in clips[1:])


# ---- masking.py ---------------------------------------------------------------------------------------------------------

def test_block_shapes_by_hand():
    assert masking.block_shapes() == [(3, 8), (4, 6)]                              # 24 of 128; aspects 1.33 and 0.75


@pytest.mark.parametrize("kind", ["block", "random"])
def test_masks_keep_their_promises(kind):
    context, targets = masking.make_masks(kind, 0.6, 2000, seed=0, step=0)
    assert (context.shape, targets.shape) == (((2000, 32), (2000, 4, 24)) if kind == "block" else ((2000, 51), (2000, 1, 77)))
    for visible, blocks in zip(context.tolist()[:200], targets.tolist()[:200]):
        assert len(set(visible)) == len(visible) and all(len(set(block)) == len(block) for block in blocks)
        assert not set(visible) & set(sum(blocks, []))
        for block in blocks if kind == "block" else []:
            rows, columns = [p // 16 for p in block], [p % 16 for p in block]
            shape = max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
            assert shape in [(3, 8), (4, 6)] and shape[0] * shape[1] == len(block)  # a whole rectangle
    as_target = torch.bincount(targets.flatten(), minlength=128).view(8, 16).double()
    as_context = torch.bincount(context.flatten(), minlength=128).view(8, 16).double()
    for count in (as_target, as_context):                                          # every patch, and no side preferred
        assert count.min() > 0
        for mirrored in (count.flip(0), count.flip(1)):
            assert ((count - mirrored).abs() < 5 * (count + mirrored).sqrt()).all()


def test_masks_are_a_pure_function_of_seed_and_step():
    first = masking.make_masks("block", 0, 8, seed=1, step=2)
    again, later, other = (masking.make_masks("block", 0, 8, s, t) for s, t in ((1, 2), (1, 3), (2, 2)))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], later[1]) and not torch.equal(first[1], other[1])


# ---- model.py -----------------------------------------------------------------------------------------------------------

def test_patches_lie_row_by_row():
    spectrogram = torch.arange(128 * 256.).view(1, 128, 256)
    patches = model.patchify(spectrogram)
    for row, column in ((0, 0), (3, 5), (7, 15)):
        square = spectrogram[0, row * 16:row * 16 + 16, column * 16:column * 16 + 16]
        assert torch.equal(patches[0, row * 16 + column], square.flatten())


def test_positions_are_sines_and_cosines():
    positions = model.sincos_positions(8, 16, 192)
    for row, column, k in ((0, 0, 0), (3, 7, 5), (7, 15, 47)):
        frequency = 10_000 ** (-k / 48)
        expected = [f(x * frequency) for x in (row, column) for f in (math.sin, math.cos)]
        assert torch.allclose(positions[row * 16 + column, [k, 48 + k, 96 + k, 144 + k]], torch.tensor(expected), atol=1e-5)
    assert torch.equal(model.sincos_positions(8, 40, 192).view(8, 40, 192)[:, :16].flatten(0, 1), positions)


def test_attention_against_a_slow_loop():
    torch.manual_seed(0)
    block, x = model.Block(12, 3), torch.randn(2, 5, 12)
    q, k, v = block.qkv(block.norm1(x)).split(12, dim=-1)
    mixed = torch.zeros(2, 5, 12)
    for b in range(2):
        for h in range(3):
            s = slice(4 * h, 4 * h + 4)
            for i in range(5):
                weights = torch.stack([q[b, i, s] @ k[b, j, s] / 2 for j in range(5)]).softmax(0)
                mixed[b, i, s] = sum(w * v[b, j, s] for j, w in enumerate(weights))
    y = x + block.project(mixed)
    assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-5)


@pytest.mark.parametrize("size, millions", [("tiny", 5.4), ("small", 21.4), ("base", 85.3)])
def test_sizes_and_initialisation(size, millions):
    torch.manual_seed(0)
    encoder = model.Encoder(*model.SIZES[size].values())
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions
    linears = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert all(not m.bias.any() for m in linears)
    assert all(abs(m.weight.std().item() - 0.02) < 0.001 and m.weight.abs().max() <= 2 for m in linears[1:])


@pytest.fixture(scope="module")
def jepa():
    torch.manual_seed(0)
    return model.AudioJEPA("tiny")


@pytest.mark.parametrize("kind", ["block", "random"])
def test_hidden_patches_cannot_reach_the_prediction(jepa, kind):
    context, targets = masking.make_masks(kind, 0.6, 2, seed=0, step=0)
    patches, hidden = torch.randn(2, 128, 256), torch.ones(2, 128, dtype=torch.bool)
    hidden.scatter_(1, context, False)
    changed = patches + 100 * hidden[..., None]
    latents = [jepa.encoder(p, context) for p in (patches, changed)]
    assert latents[0].shape == (2, context.shape[1], 192) and torch.equal(*latents)
    assert torch.equal(*(jepa.predictor(z, context, targets) for z in latents))
    assert not torch.equal(jepa.goals(patches), jepa.goals(changed))


def test_each_block_is_predicted_on_its_own(jepa):
    context, targets = masking.make_masks("block", 0, 2, seed=0, step=0)
    latents = torch.randn(2, 32, 192)
    together = jepa.predictor(latents, context, targets)
    for block in range(4):
        alone = jepa.predictor(latents, context, targets[:, block:block + 1])
        assert torch.allclose(together[:, block], alone[:, 0], atol=1e-5)


def test_the_loss_by_hand_and_where_its_gradient_goes(jepa):
    context, targets = masking.make_masks("block", 0, 2, seed=0, step=0)
    patches = torch.randn(2, 128, 256)
    loss, predictions, goals = jepa(patches, context, targets)
    for b, m, k in ((0, 0, 0), (1, 3, 23), (1, 2, 7)):
        assert torch.equal(goals[b, m, k], jepa.goals(patches)[b, targets[b, m, k]])
    gap = (predictions - goals).abs()
    assert torch.allclose(loss, torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean())
    loss.backward()
    assert all(p.grad is None for p in jepa.target.parameters()) and not goals.requires_grad
    assert all(p.grad is not None for p in [*jepa.encoder.parameters(), *jepa.predictor.parameters()])


def test_the_target_follows_the_encoder(jepa):
    before = [p.clone() for p in jepa.target.parameters()]
    with torch.no_grad():
        for p in jepa.encoder.parameters():
            p.add_(torch.randn_like(p))
    jepa.update_target(0.9)
    for old, new, goal in zip(before, jepa.target.parameters(), jepa.encoder.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * goal, atol=1e-6)
