"""Tests: each invariant is held against something independent (a closed form, a slow loop, a case worked by hand), and
both commands run as a user would run them. No GPU, no network, no data set needed; under three minutes on two cores."""

import csv
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

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
    (tmp_path / "b" / "._x.FLAC").touch()                                          # what macOS leaves beside x.FLAC
    (tmp_path / "b" / "again").symlink_to(tmp_path)                                # round and round: not followed
    (tmp_path / "b" / "root").symlink_to("/")                                      # nor through the whole disk
    (tmp_path / "a link").symlink_to(tmp_path / "b" / "c")                         # elsewhere: followed
    files = data.AudioFiles(tmp_path)
    found = {os.path.relpath(files.path(i), os.fsencode(tmp_path)) for i in range(len(files))}
    assert found == {name.encode() for name in [*names, "a link/y.Opus"]} | {b"bad\xff.wav"} and len(files) == len(found)
    assert all(files.name(i).isprintable() for i in range(len(files)))


@pytest.mark.parametrize("name", [b"with space.wav", b"quote'\".wav", b"new\nline.wav", b"not utf-8 \xff.wav"])
def test_files_with_odd_names_are_read(tmp_path, name):
    write_ramp(tmp_path / "plain.wav")
    os.rename(tmp_path / "plain.wav", os.path.join(os.fsencode(tmp_path), name))
    batch = data.Batches(data.AudioFiles(tmp_path), 1, 8000, seed=0)[0]
    assert not batch.failures and batch.filled == 8000


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_unusable(tmp_path):
    write_ramp(tmp_path / "a.wav")
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(data.InputError):
        data.read_audio(str(tmp_path / "a.wav"))


def test_a_list_of_paths_is_relative_to_itself(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.wav\n\n\r\nsub/b.wav\r\n/abs/c.wav")
    files = data.AudioFiles(tmp_path / "list.txt")
    root = os.fsencode(tmp_path)
    assert [files.path(i) for i in range(len(files))] == [root + b"/a.wav", root + b"/sub/b.wav", b"/abs/c.wav"]


@pytest.mark.parametrize("make, says", [
    (lambda p: p / "absent", "no such folder"), (lambda p: p, "no audio here"),
    (lambda p: (p / "empty.txt").touch() or p / "empty.txt", "no audio here"),
    (lambda p: (p / "a.wav").touch() or p / "a.wav", "nor a text file")])
def test_data_that_is_not_there_is_told_in_a_line(tmp_path, make, says):
    with pytest.raises(data.InputError, match=says):
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
    mel.fit(batches)                                                               # 256 clips: 64 batches
    values = [spectrogram[:, :math.ceil(filled / mel.hop)].flatten() for batch in map(batches.__getitem__, range(64))
              for spectrogram, filled in zip(mel(batch.waveforms), batch.filled)]
    values = torch.cat(values)
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4


def test_built_in_sounds_are_pure_and_distinct():
    source = data.BuiltInSounds(36, 2.56)
    clips = [source.crop(i, 0.3, 81_920) for i in range(36)]
    assert all(torch.equal(clip, source.crop(i, 0.9, 81_920)) for i, clip in enumerate(clips[:3]))
    assert all(clip.shape == (81_920,) and clip.isfinite().all() and 0.001 < clip.abs().max() < 10 for clip in clips)
    assert not any(torch.equal(clips[0], clip) for clip in clips[1:])


# ---- masking.py ---------------------------------------------------------------------------------------------------------

def test_block_shapes_are_the_largest_family_of_one_area():
    families = {}
    for height in range(1, 9):
        for width in range(1, 17):
            if 0.15 <= height * width / 128 <= 0.20 and 0.75 <= (width / 16) / (height / 8) <= 1.5:
                families.setdefault(height * width, []).append((height, width))
    assert sorted(masking.BLOCK_SHAPES) == max(families.values(), key=len)


MASK_SHAPES = {"block": ((32,), (4, 24)), "random": ((51,), (1, 77))}              # of context and targets of one clip


@pytest.mark.parametrize("kind", masking.MASKS)
def test_masks_keep_their_promises(kind):
    context, targets = masking.make_masks(kind, 2000, seed=0, step=0)
    assert (context.shape[1:], targets.shape[1:]) == MASK_SHAPES[kind] and len(context) == len(targets) == 2000
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


@pytest.mark.parametrize("kind", masking.MASKS)
def test_masks_are_a_pure_function_of_seed_and_step(kind):
    first = masking.make_masks(kind, 8, seed=1, step=2)
    again, later, other = (masking.make_masks(kind, 8, s, t) for s, t in ((1, 2), (1, 3), (2, 2)))
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
    layer, x = model.Layer(12, 3), torch.randn(2, 5, 12)
    q, k, v = layer.qkv(layer.norm1(x)).split(12, dim=-1)
    mixed = torch.zeros(2, 5, 12)
    for b in range(2):
        for h in range(3):
            s = slice(4 * h, 4 * h + 4)
            for i in range(5):
                weights = torch.stack([q[b, i, s] @ k[b, j, s] / 2 for j in range(5)]).softmax(0)
                mixed[b, i, s] = sum(w * v[b, j, s] for j, w in enumerate(weights))
    y = x + layer.project(mixed)
    assert torch.allclose(layer(x), y + layer.mlp(layer.norm2(y)), atol=1e-5)


@pytest.mark.parametrize("size, millions", [("tiny", 5.4), ("small", 21.4), ("base", 85.3)])
def test_sizes_and_initialisation(size, millions):
    torch.manual_seed(0)
    encoder = model.Encoder(model.WIDTHS[size])
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions
    linears = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert all(not m.bias.any() for m in linears)
    deviations = [m.weight.std().item() * ((m.in_features + m.out_features) / 2) ** 0.5 for m in linears]
    assert deviations == [pytest.approx(1, abs=0.02)] * len(linears)


@pytest.fixture(scope="module")
def jepa():
    torch.manual_seed(0)
    return model.AudioJEPA("tiny")


@pytest.mark.parametrize("kind", masking.MASKS)
def test_hidden_patches_cannot_reach_the_prediction(jepa, kind):
    context, targets = masking.make_masks(kind, 2, seed=0, step=0)
    patches, hidden = torch.randn(2, 128, 256), torch.ones(2, 128, dtype=torch.bool)
    hidden.scatter_(1, context, False)
    changed = patches + 100 * hidden[..., None]
    latents = [jepa.encoder(p, context) for p in (patches, changed)]
    assert latents[0].shape == (2, context.shape[1], 192) and torch.equal(*latents)
    assert torch.equal(*(jepa.predictor(z, context, targets) for z in latents))
    assert not torch.equal(jepa.all_goals(patches), jepa.all_goals(changed))


def test_each_block_is_predicted_on_its_own(jepa):
    context, targets = masking.make_masks("block", 2, seed=0, step=0)
    latents = torch.randn(2, 32, 192)
    together = jepa.predictor(latents, context, targets)
    for block in range(4):
        alone = jepa.predictor(latents, context, targets[:, block:block + 1])
        assert torch.allclose(together[:, block], alone[:, 0], atol=1e-5)


def test_the_loss_by_hand_and_where_its_gradient_goes(jepa):
    context, targets = masking.make_masks("block", 2, seed=0, step=0)
    patches = torch.randn(2, 128, 256)
    loss, predictions, goals = jepa(patches, context, targets)
    for b, m, k in ((0, 0, 0), (1, 3, 23), (1, 2, 7)):
        assert torch.equal(goals[b, m, k], jepa.all_goals(patches)[b, targets[b, m, k]])
    gap = (predictions - goals).abs()
    distance = torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean()
    assert torch.allclose(loss, distance + model.redundancy(jepa.encoder(patches, context)))
    assert goals.mean(-1).abs().max() < 1e-4 and (goals.var(-1, correction=0) - 1).abs().max() < 1e-3
    loss.backward()
    assert all(p.grad is None for p in jepa.target.parameters()) and not goals.requires_grad
    assert all(p.grad is not None for p in [*jepa.encoder.parameters(), *jepa.predictor.parameters()])


@pytest.mark.parametrize("kind", masking.MASKS)
def test_compiled_the_loss_is_one_graph_for_every_step(jepa, kind):
    compiled = torch.compile(jepa, fullgraph=True, backend="eager")                # fullgraph: a graph that breaks is an error
    for step, stance in enumerate(["default", "fail_on_recompile", "fail_on_recompile"]):
        patches, masks = torch.randn(2, 128, 256), masking.make_masks(kind, 2, seed=0, step=step)
        with torch.compiler.set_stance(stance):
            assert torch.equal(compiled(patches, *masks)[0], jepa(patches, *masks)[0])


def test_redundancy_by_hand():
    ideal = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[None]             # unit variance, uncorrelated
    assert model.redundancy(ideal) == pytest.approx(0, abs=1e-4)
    assert model.redundancy(ideal * 0.5) == pytest.approx(0.5, abs=1e-3)           # both deviations half of what they should be
    assert model.redundancy(ideal[..., [0, 0]]) == pytest.approx(0.1 * 2 / 2, abs=1e-3)       # covariance 1, twice, over D = 2
    assert model.redundancy(ideal + 7) == pytest.approx(0, abs=1e-4)               # the mean is free


def test_the_target_follows_the_encoder(jepa):
    before = [p.clone() for p in jepa.target.parameters()]
    with torch.no_grad():
        for p in jepa.encoder.parameters():
            p.add_(torch.randn_like(p))
    jepa.update_target(0.9)
    for old, new, goal in zip(before, jepa.target.parameters(), jepa.encoder.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * goal, atol=1e-6)


# ---- README.md ------------------------------------------------------------------------------------------------------------

def test_the_readme_tells_the_shapes_that_there_are():
    """The ledger of one clip on its way, row by row, against the tensors themselves."""
    ledger = dict(re.findall(r"^\| (\w+) \| (\(.*?\)) \|.*$", (HERE / "README.md").read_text(), flags=re.M))
    waveform = torch.randn(1, data.hop_samples(10.0) * data.N_FRAMES)
    spectrogram = data.LogMel(10.0)(waveform)
    patches, (context, targets) = model.patchify(spectrogram), masking.make_masks("block", 1, seed=0, step=0)
    jepa = model.AudioJEPA("base")
    with torch.no_grad():
        latents = jepa.encoder(patches, context)
        loss, predictions, goals = jepa(patches, context, targets)
    stages = dict(waveform=waveform, spectrogram=spectrogram, patches=patches, context=context, targets=targets,
                  latents=latents, predictions=predictions, goals=goals)
    assert ledger == {name: str(tuple(tensor.shape[1:])) for name, tensor in stages.items()} | {"loss": str(tuple(loss.shape))}


def test_the_readme_shows_what_masking_draws(tmp_path):
    shown = re.findall(r"(?:    [#.1-4](?: [#.1-4]){15}\n){8}", (HERE / "README.md").read_text())
    done = run(["masking.py"], tmp_path)
    assert done.returncode == 0 and len(shown) == 1 and shown[0].replace("    ", "") in done.stdout


def test_the_readme_cites_lines_that_hold_what_it_says():
    cited = re.findall(r"`(\w+\.py):(\d+)` `([^`]+)`", (HERE / "README.md").read_text())
    assert len(cited) > 10
    there = [[i for i, line in enumerate((HERE / file).read_text().splitlines(), start=1) if fragment in line]
             for file, _, fragment in cited]
    moved = [(citation, lines) for citation, lines in zip(cited, there) if int(citation[1]) not in lines]
    assert not moved, f"README.md's table says these lines, which are now elsewhere: {moved}"


# ---- train.py: schedules, meters, settings --------------------------------------------------------------------------------

def test_schedules_by_hand():
    c = config(steps=1000, lr=1.0 / 2)
    assert train.learning_rate(0, c) == pytest.approx(0.5 / 51) and train.learning_rate(50, c) == pytest.approx(0.5)
    assert train.learning_rate(525, c) == pytest.approx(0.25) and train.learning_rate(999, c) < 1e-5
    assert train.momentum(0, c) == pytest.approx(1 - 1 / 21) and train.momentum(500, c) == pytest.approx(1 - 0.5 / 21)
    assert train.momentum(1000, c) == 1
    assert config(batch_size=64, model="small").lr == pytest.approx(3e-4 * 0.5 * 2)


def test_spread_by_a_slow_loop():
    torch.manual_seed(0)
    latents, patches = torch.randn(6, 2, 3, 5), torch.randint(0, 8, (6, 2, 3))
    deviations = []
    for n in range(8):
        here = latents[patches == n]
        if len(here) > 1:
            deviations.append(here.std(0, correction=0))
    assert train.spread(latents, patches) == pytest.approx(torch.stack(deviations).mean().item(), rel=1e-4)
    same = torch.randn(8, 5)[patches]                                              # a function of the position alone
    assert train.spread(same, patches) < 1e-3


@pytest.mark.parametrize("changes, says", [
    ({"steps": 0}, "--steps 0"), ({"lr": -1.0}, "--lr"), 
    ({"seconds": 0.01}, "--seconds"), ({"batch_size": 0}, "--batch-size 0"), ({"device": "tpu"}, "--device tpu"),
    ({"amp": "fp16"}, "--amp fp16"), ({"amp": "half"}, "--amp half"), ({"model": "huge"}, "--model huge"),
    ({"mask": "none"}, "--mask none"), ({"workers": -2}, "--workers"), ({"seed": -1}, "--seed"), ({"lr": math.nan}, "--lr"),
    ({"save_every": 0}, "--save-every"), ({"log_every": 0}, "--log-every"), ({"seconds": math.nan}, "--seconds")])
def test_bad_settings_are_refused_by_name(changes, says):
    with pytest.raises(train.InputError, match=says):
        config(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused():
    with pytest.raises(train.InputError, match="not on this machine"):
        config(device="cuda")


def test_flop_count_by_formula():
    c = config(batch_size=3)
    def transformer(tokens, width, depth):                                         # 2 FLOP a multiplication and addition
        return depth * (2 * tokens * 12 * width ** 2 + 4 * tokens ** 2 * width)
    def linear(tokens, wide, narrow):
        return 2 * tokens * wide * narrow
    target = linear(128, 256, 192) + transformer(128, 192, 12)
    context = 3 * transformer(32, 192, 12) + 2 * linear(32, 256, 192)              # backward twice forward; not into the input
    predictor = 3 * (4 * transformer(56, 96, 6) + linear(32, 192, 96) + 4 * linear(24, 96, 192))
    covariance = 3 * linear(32, 192, 192)
    assert train.step_flop(c) == pytest.approx(3 * (target + context + predictor + covariance), rel=1e-6)


# ---- train.py: runs -------------------------------------------------------------------------------------------------------

def log_rows(folder, name="ckpt.csv"):
    with open(folder / name, newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("clips_per_second", "waiting", "seconds_left")}
                for row in csv.DictReader(file)]


def same(a, b):
    """Whether two checkpoints hold the same values, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_settings(path):
    return {key: value for key, value in torch.load(path, weights_only=True).items() if key not in ("config", "log")}


@pytest.mark.parametrize("mask, workers", [("block", 0), ("random", 2)])
def test_resume_is_exact(recordings, tmp_path, mask, workers):
    """12 clips in batches of 5: 6 steps span an epoch; the saves fall on other steps in the two runs."""
    def go(name, steps_now, resume, save_every):
        c = config(data=str(recordings), out=str(tmp_path / f"{name}.pt"), mask=mask, steps=6, batch_size=5, log_every=1,
                   workers=workers, save_every=save_every)
        step, end = train.Trainer.update, [0]
        def update(trainer, number):
            step(trainer, number)
            end[0] += 1
            if end[0] == steps_now:
                os.kill(os.getpid(), signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Trainer, "update", update)
            return train.train(c, model.load_checkpoint(resume) if resume else None)
    assert go("whole", 99, None, 4) is None
    assert go("parts", 3, None, 2) == signal.SIGTERM
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 4      # the step after the signal was finished
    assert go("parts", 99, tmp_path / "parts.pt", 1000) is None
    assert same(without_settings(tmp_path / "whole.pt"), without_settings(tmp_path / "parts.pt"))
    assert log_rows(tmp_path, "whole.csv") == log_rows(tmp_path, "parts.csv") and len(log_rows(tmp_path, "whole.csv")) == 6


SHORT = ["--model", "tiny", "--seconds", "0.64", "--batch-size", "4", "--workers", "1", "--device", "cpu", "--log-every", "2"]


@pytest.fixture(scope="session")
def trained(recordings, tmp_path_factory):
    """A folder where `python train.py --data ...` has run for four steps."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(["train.py", "--data", recordings, *SHORT, "--steps", 4], folder)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout and "saved ckpt.pt at step 4" in done.stdout and "batch_size  4" in done.stdout
    return folder


def test_training_writes_a_checkpoint_with_plain_keys_and_a_log(trained):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 4 and checkpoint["config"]["seconds"] == 0.64
    plain = model.AudioJEPA("tiny")
    plain.encoder.load_state_dict(checkpoint["encoder"])
    plain.target.load_state_dict(checkpoint["target"])
    plain.predictor.load_state_dict(checkpoint["predictor"])
    assert [row["step"] for row in log_rows(trained)] == ["2", "4"]
    assert sorted(os.listdir(trained)) == ["ckpt.csv", "ckpt.pt"]


def test_the_built_in_sounds_need_no_data(tmp_path):
    done = run(["train.py", *SHORT, "--steps", 2, "--amp", "bf16", "--mask", "random"], tmp_path)
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr


def test_workers_may_be_spawned(recordings, tmp_path):
    """As on macOS and Windows, where processes cannot be forked."""
    (tmp_path / "start.py").write_text(
        "import multiprocessing, sys, train\nif __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n    sys.exit(train.main(sys.argv[1:]))\n")
    done = run([tmp_path / "start.py", "--data", recordings, *SHORT, "--steps", 2], tmp_path, PYTHONPATH=str(HERE))
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr


def test_an_error_of_any_kind_ends_the_workers_too(tmp_path):
    (tmp_path / "fail.py").write_text(
        "import data, torch\nbatches = data.Batches(data.BuiltInSounds(36, 0.64), 4, 20480, 0)\n"
        "loader = iter(data.make_loader(batches, range(99), 2, torch.device('cpu')))\nnext(loader)\n1 / 0\n")
    done = run([tmp_path / "fail.py"], tmp_path, timeout=30, PYTHONPATH=str(HERE))
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n"), done.stderr


def test_a_worker_that_the_system_kills_is_told_in_one_line(recordings, tmp_path, monkeypatch, capsys):
    update = train.Trainer.update
    def killing(trainer, step):
        update(trainer, step)
        multiprocessing.active_children()[0].kill()
    monkeypatch.setattr(train.Trainer, "update", killing)
    assert train.main(["--data", str(recordings), "--out", str(tmp_path / "c.pt"), *SHORT, "--steps", "99"]) == 1
    message = capsys.readouterr().err
    assert "out of memory, or a worker died" in message and len(message.splitlines()) == 1
    assert model.load_checkpoint(tmp_path / "c.pt")["step"] == 0


@pytest.mark.parametrize("flags, says", [
    ([], "ckpt.pt exists"), (["--resume", "ckpt.pt"], "ckpt.pt is complete"),
    (["--resume", "ckpt.pt", "--mask", "random", "--lr", "0.5"], "--mask random (it has block), --lr 0.5"),
    (["--resume", "ckpt.pt", "--steps", "9"], "--steps 9 (it has 4)"), (["--resume", "absent.pt"], "absent.pt: No such file"),
    (["--data", "absent", "--out", "new.pt"], "no such folder"), (["--data", ""], "--data is empty"),
    (["--steps", "0", "--out", "new.pt"], "--steps 0"),
    (["--out", "absent/new.pt", "--steps", "2", "--model", "tiny"], "absent is no folder"),
    (["--out", "new.csv"], "the log goes")])
def test_what_train_refuses_it_refuses_in_one_line(trained, flags, says):
    done = run(["train.py", *flags], trained)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
    assert sorted(os.listdir(trained)) == ["ckpt.csv", "ckpt.pt"]


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def damaged(kind, good, path):
    checkpoint = torch.load(good, weights_only=True) | {"step": 2}                 # not complete, so it could be resumed
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:100_000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "folder":
        path.mkdir()
    elif kind == "other":
        torch.save({"weights": torch.ones(2)}, path)
    elif kind == "malicious":
        torch.save(Malicious(), path)
    elif kind == "misfit":
        checkpoint["config"]["model"] = "small"
        torch.save(checkpoint, path)
    elif kind == "keys":
        del checkpoint["target"]
        torch.save(checkpoint, path)


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "folder", "other", "malicious", "misfit", "keys"])
def test_bad_checkpoints_are_told_in_one_line(trained, recordings, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    damaged(kind, trained / "ckpt.pt", tmp_path / "bad.pt")
    assert probe.main(["bad.pt", "--data", str(recordings), "--workers", "0"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert train.main(["--resume", "bad.pt"]) == 1
    errors += capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and errors[0].startswith("probe.py:") and errors[1].startswith("train.py:"), errors
    assert not os.path.exists("executed")


def start(command, cwd):
    return subprocess.Popen([sys.executable, "-u", str(HERE / command[0]), *map(str, command[1:])], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended without saying {text!r}")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(recordings, tmp_path, signum, code):
    process = start(["train.py", "--data", recordings, *SHORT, "--steps", 100_000], tmp_path)
    wait_for(process, "step 2/")
    os.killpg(process.pid, signum)                                                 # as a terminal does: the workers get it too
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code and "saved ckpt.pt" in rest and "Traceback" not in rest, rest
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] >= 2


def test_a_second_ctrl_c_ends_at_once(recordings, tmp_path):
    process = start(["train.py", "--data", recordings, *SHORT, "--model", "small", "--batch-size", 256], tmp_path)
    wait_for(process, "clips;")
    time.sleep(1)                                                                  # such a step takes half a minute on a CPU
    process.send_signal(signal.SIGINT)
    wait_for(process, "finishing this step")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT


def test_killed_at_any_moment_it_resumes_as_if_nothing_had_been(recordings, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    command = ["train.py", "--data", recordings, *SHORT, "--steps", 6, "--save-every", 1]
    assert train.main([*map(str, command[1:]), "--out", str(tmp_path / "whole" / "ckpt.pt")]) == 0
    process, rng = start(command, tmp_path / "killed"), np.random.default_rng(0)
    for _ in range(2):
        wait_for(process, "clips;")
        time.sleep(rng.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        process = start(["train.py", "--resume", "ckpt.pt"], tmp_path / "killed")
    process.communicate(timeout=120)
    assert same(without_settings(tmp_path / "whole" / "ckpt.pt"), without_settings(tmp_path / "killed" / "ckpt.pt"))
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "killed")


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    train.save_checkpoint({"a": torch.ones(3)}, str(tmp_path / "c.pt"))
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(train.InputError, match="No space left"):
        train.save_checkpoint({"a": torch.zeros(3)}, str(tmp_path / "c.pt"))
    assert os.listdir(tmp_path) == ["c.pt"] and torch.load(tmp_path / "c.pt", weights_only=True)["a"].sum() == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_reports_a_really_full_disk_as_an_error_that_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, mode, real=open: real("/dev/full", mode))
    monkeypatch.setattr(os, "remove", lambda path: None)
    with pytest.raises(train.InputError, match="cannot write"):
        train.save_checkpoint({"a": torch.zeros(3_000_000)}, str(tmp_path / "c.pt"))


def test_a_loss_that_is_not_finite_stops_before_the_weights(recordings, tmp_path, monkeypatch, capsys):
    gradients = train.Trainer.gradients
    def poisoned(trainer, waveforms, step):
        return gradients(trainer, waveforms * (math.nan if step == 3 else 1), step)
    monkeypatch.setattr(train.Trainer, "gradients", poisoned)
    out = tmp_path / "c.pt"
    assert train.main(["--data", str(recordings), "--out", str(out), *SHORT, "--steps", "9", "--save-every", "1"]) == 1
    message = capsys.readouterr().err
    clips = data.Batches(data.AudioFiles(recordings), 4, 20_480, 0).clips(3)
    assert "step 4 is nan" in message and all(data.AudioFiles(recordings).name(i) in message for i in clips)
    checkpoint = torch.load(out, weights_only=True)
    assert checkpoint["step"] == 3 and all(v.isfinite().all() for v in checkpoint["encoder"].values())


def test_of_several_losses_the_first_bad_one_is_blamed():
    batches = data.Batches(data.BuiltInSounds(36, 0.64), 4, 20_480, seed=0)
    with pytest.raises(data.InputError, match="step 12 is nan") as error:           # steps 11, 12 and 13, counted from 1
        train.check_finite([torch.tensor(x) for x in (1.0, math.nan, math.nan)], 12, batches)
    assert all(batches.source.name(i) in str(error.value) for i in batches.clips(11))


def test_gradients_that_are_not_finite_end_the_run_at_their_own_step(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    with pytest.raises(data.InputError, match="gradient of step 1"):
        train.train(config(data=str(recordings), out=str(tmp_path / "c.pt"), steps=2))
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 0


def test_the_bench_measures_and_writes_nothing(recordings, tmp_path):
    done = run(["train.py", "--data", recordings, *SHORT, "--steps", 2, "--bench", 2], tmp_path)
    assert done.returncode == 0 and not os.listdir(tmp_path), done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if "waiting" in line] == ["loader", "step", "both"]
    assert 0 < float(done.stdout.split("utilisation ")[1].split()[0]) < 2


def test_collapse_is_told_once(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "spread", lambda vectors, targets: 0.01)
    train.train(config(data=str(recordings), out=str(tmp_path / "c.pt"), steps=4, log_every=1))
    assert capsys.readouterr().out.count("this is collapse") == 1


# ---- broken audio ---------------------------------------------------------------------------------------------------------

def odd_file(kind, folder):
    """Make one odd file in `folder`; returns its path."""
    path, noise = folder / f"{kind}.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 40_000).astype(np.float32)
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is no sound")
    elif kind == "no samples":
        soundfile.write(path, noise[:0], 32_000)
    elif kind == "nan":
        soundfile.write(path, np.where(noise > 0.4, np.nan, noise), 32_000, subtype="FLOAT")
    elif kind == "inf":
        soundfile.write(path, np.where(noise > 0.4, np.inf, noise), 32_000, subtype="FLOAT")
    elif kind == "huge":
        soundfile.write(path, noise * 1e30, 32_000, subtype="FLOAT")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "absent":
        pass
    elif kind == "headless":
        path = folder / "headless.raw"
        path.write_bytes(noise.tobytes())
    elif kind == "unreadable rate":
        soundfile.write(path, noise, 32_000)
        path.write_bytes(path.read_bytes()[:24] + (4_000_000_000).to_bytes(4, "little") + path.read_bytes()[28:])
    elif kind == "one sample":
        soundfile.write(path, noise[:1], 32_000)
    elif kind == "silence":
        soundfile.write(path, noise * 0, 32_000)
    elif kind == "dc":
        soundfile.write(path, noise * 0 + 0.5, 32_000)
    elif kind in ("8 bit", "24 bit", "float"):
        soundfile.write(path, noise, 32_000, subtype={"8 bit": "PCM_U8", "24 bit": "PCM_24", "float": "FLOAT"}[kind])
    elif kind == "8 channels":
        soundfile.write(path, np.stack([noise] * 8, axis=1), 32_000)
    elif kind in ("192000", "4000", "22051", "987651"):
        soundfile.write(path, noise, int(kind))
    elif kind == "long header":                                                    # promises more samples than there are
        soundfile.write(path, noise, 32_000)
        path.write_bytes(path.read_bytes()[:-40_000])
    elif kind == "cut":
        path = folder / "cut.flac"
        soundfile.write(path, noise, 32_000)
        path.write_bytes(path.read_bytes()[:30_000])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "no samples", "nan", "inf", "huge", "folder", "dangling", "absent",
                                  "headless", "unreadable rate"])
def test_files_that_cannot_be_used_say_why(tmp_path, kind):
    with pytest.raises(data.InputError):
        data.read_audio(os.fsencode(odd_file(kind, tmp_path)), 0.3, 20_480)


@pytest.mark.parametrize("kind", ["one sample", "silence", "dc", "8 bit", "24 bit", "float", "8 channels", "192000", "4000",
                                  "22051", "987651", "long header"])
def test_odd_but_sound_files_are_read(tmp_path, kind):
    clip = data.read_audio(os.fsencode(odd_file(kind, tmp_path)), 0.0, 20_480)
    assert 1 <= len(clip) <= 20_480 and clip.abs().max() < 1.5
    assert data.LogMel(0.64)(F.pad(clip, (0, 20_480 - len(clip)))[None]).isfinite().all()


def test_usual_rates_are_not_rounded_and_no_kernel_is_giant():
    for rate in (8000, 11025, 12000, 16000, 22050, 24000, 37800, 44100, 48000, 88200, 96000, 176400, 192000):
        assert data.resampler(rate).orig_freq == rate
    assert max(data.resampler(rate).kernel.numel() for rate in (1001, 19_999, 44_099, 877_425)) < 3_000_000


def test_a_cut_flac_is_read_where_it_is_whole_and_refused_where_it_is_not(tmp_path):
    path = odd_file("cut", tmp_path)
    assert len(data.read_audio(str(path), 0.0, 4000)) == 4000
    with pytest.raises(data.InputError):
        data.read_audio(str(path), 0.999, 4000)


def test_unusable_files_are_replaced_reported_once_and_counted(recordings, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(40):
        soundfile.write(folder / f"good{i}.wav", np.random.default_rng(i).uniform(-0.1, 0.1, 9000), 16_000)
    odd_file("text", folder)
    train.train(config(data=str(folder), out=str(tmp_path / "c.pt"), steps=21, log_every=21))      # two epochs and a bit
    output = capsys.readouterr().out
    assert output.count("unusable: ") == 1 and "text.wav" in output
    batches = data.Batches(data.AudioFiles(folder), 4, 20_480, seed=0)
    failures = sum(len(batches[step].failures) for step in range(21))
    assert failures >= 2 and log_rows(tmp_path, "c.csv")[-1]["unusable"] == str(failures)
    first, again = (data.Batches(data.AudioFiles(folder), 41, 20_480, seed=0)[0] for _ in range(2))
    assert len(first.failures) == 1 and torch.equal(first.waveforms, again.waveforms) and (first.filled > 0).all()


@pytest.mark.parametrize("bad", [4, 40])
def test_too_many_unusable_files_end_the_run(tmp_path, monkeypatch, bad):
    for i in range(40):
        if i < bad:
            (tmp_path / f"{i}.wav").touch()
        else:
            soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).uniform(-0.1, 0.1, 9000), 16_000)
    guard = train.FailedReads(0, 50, str(tmp_path))
    batches = data.Batches(data.AudioFiles(tmp_path), 50, 20_480, seed=0)
    with pytest.raises(data.InputError, match="failed"):
        for step in range(25):
            guard.add(batches[step])
    reads = np.cumsum([50 + len(batches[step].failures) for step in range(25)])
    assert step == (0 if bad == 40 else np.flatnonzero(reads >= 1000)[0])          # at once if nothing can be read


def test_a_file_that_vanishes_is_replaced(tmp_path):
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).uniform(-0.1, 0.1, 9000), 16_000)
    batches = data.Batches(data.AudioFiles(tmp_path), 8, 20_480, seed=0)
    (tmp_path / "3.wav").unlink()
    assert {os.path.basename(name) for name, _ in batches[0].failures} == {"3.wav"}


# ---- probe.py -------------------------------------------------------------------------------------------------------------

def test_knn_by_hand():
    train_features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    labels = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    votes = probe.knn_scores(train_features, labels, torch.tensor([[2.0, 0.0]]))   # similarities 1, 0 and 0.6
    weights = [math.exp(s / 0.07) for s in (1, 0, 0.6)]
    assert torch.allclose(votes[0, 1], torch.tensor((weights[1] + weights[2]) / sum(weights)), rtol=1e-4)
    assert probe.accuracy(votes, torch.tensor([[1.0, 0]])) == 1


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_linear_probe_finds_the_minimum(multi_label):
    """At the minimum the gradient vanishes: X^T (p - y) / n + l2 W = 0, written out here."""
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5) * 3 + 1, F.one_hot(torch.arange(60) % 3).float()
    if multi_label:
        labels[::2, 0] = 1
    standard = (x - x.mean(0)) / x.std(0)
    probes = torch.cat([x, x.mean(0, keepdim=True), x.mean(0) + torch.diag(x.std(0))])
    logits = probe.linear_scores(x, labels, probes, 0.1, multi_label)
    weights = logits[61:] - logits[60]                                             # recovered from unit vectors
    p = logits[:60].sigmoid() if multi_label else logits[:60].softmax(1)
    assert (standard.T @ (p - labels) / 60 + 0.1 * weights).abs().max() < 2e-4
    assert (p - labels).mean(0).abs().max() < 2e-4


def test_ranking_metrics_by_hand():
    scores, labels = torch.tensor([[4.0], [3], [2], [1]]), torch.tensor([[1.0], [0], [1], [0]])
    found = probe.ranking_metrics(scores, labels)
    assert found["mAP"] == pytest.approx((1 / 1 + 2 / 3) / 2) and found["AUC"] == pytest.approx(3 / 4)
    assert found["d'"] == pytest.approx(math.sqrt(2) * 0.67448975)
    with_dead_class = probe.ranking_metrics(torch.cat([scores, scores], 1), torch.cat([labels, labels * 0], 1))
    assert with_dead_class == found


def test_ranking_metrics_by_a_slow_loop():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, (50, 3)), rng.integers(0, 2, (50, 3))      # many ties
    precisions, areas = [], []
    for s, y in zip(scores.T, labels.T):
        precisions.append(np.mean([y[s >= v].mean() for v in s[y == 1]]))
        areas.append(np.mean([(a > b) + 0.5 * (a == b) for a in s[y == 1] for b in s[y == 0]]))
    found = probe.ranking_metrics(torch.from_numpy(scores), torch.from_numpy(labels).float())
    assert found["mAP"] == pytest.approx(np.mean(precisions)) and found["AUC"] == pytest.approx(np.mean(areas))


def test_metrics_and_probe_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((80, 4)).round(1), rng.integers(0, 2, (80, 4))
    found = probe.ranking_metrics(torch.from_numpy(scores), torch.from_numpy(labels).float())
    assert found["mAP"] == pytest.approx(metrics.average_precision_score(labels, scores))
    assert found["AUC"] == pytest.approx(metrics.roc_auc_score(labels, scores))
    x, y = rng.standard_normal((90, 6)).astype(np.float32), rng.integers(0, 3, 90)
    standard = (x - x.mean(0)) / x.std(0, ddof=1)
    theirs = linear.LogisticRegression(C=1 / (0.1 * 90), tol=1e-6).fit(standard, y).decision_function(standard)
    ours = probe.linear_scores(torch.from_numpy(x), F.one_hot(torch.from_numpy(y)).float(), torch.from_numpy(x), 0.1, False)
    assert np.allclose(theirs - theirs.mean(1, keepdims=True), (ours - ours.mean(1, keepdim=True)).numpy(), atol=5e-3)


def labelled(groups, classes):
    return probe.Labelled(None, list(range(len(groups))), F.one_hot(torch.tensor(classes)).float(), groups)


def test_rounds_use_every_clip_once_as_test_and_never_for_training():
    stratified = probe.make_rounds(labelled([None] * 20, [0, 1] * 10))
    given = probe.make_rounds(labelled(["1", "2", "2", "3"] * 5, [0, 1] * 10))
    split = probe.make_rounds(labelled(["train"] * 12 + ["test"] * 8, [0, 1] * 10))
    assert [len(rounds) for rounds in (stratified, given, split)] == [5, 3, 1]
    for rounds in (stratified, given):
        assert sorted(torch.cat([test for _, _, test in rounds]).tolist()) == list(range(20))
    for train_part, valid, test in stratified + given + split:
        parts = [set(part.tolist()) for part in (train_part, valid, test)]
        assert parts[0] and not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    assert all((test % 2).sum() == 2 for _, _, test in stratified)                 # two clips of each class in each fold


def save_tone(path, pitch=400):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(2 * np.pi * pitch * np.arange(8000) / 16_000), 16_000)


def test_labels_are_found_in_every_layout(tmp_path):
    esc, flat, folders, split = (tmp_path / name for name in ("esc", "flat", "folders", "split"))
    for i in range(4):
        for folder in (esc / "audio", flat, folders / "ab"[i % 2], split / ("train", "test")[i // 2] / "ab"[i % 2]):
            save_tone(folder / f"{i}.wav")
    (esc / "meta").mkdir()
    rows = "".join(f"{i}.wav,{i % 2 + 1},{'ab'[i % 2]}\n" for i in range(4))
    (esc / "meta" / "esc50.csv").write_text("filename,fold,category\n" + rows)
    (flat / "labels.csv").write_text("filename,fold,category\n" + rows)
    for folder, groups in ((esc, ["1", "2"] * 2), (flat, ["1", "2"] * 2), (folders, [None] * 4),
                           (split, ["train", "train", "test", "test"])):
        found = probe.load_labelled(str(folder))
        by_file = sorted((os.path.basename(found.source.path(i)), tuple(label.tolist()), group)
                         for i, label, group in zip(found.indices, found.labels, found.groups))
        assert by_file == [(b"%d.wav" % i, ((1, 0), (0, 1))[i % 2], groups[i]) for i in range(4)]


def test_audioset_is_found_by_its_official_files(tmp_path, capsys):
    """Names as downloaders write them; identifiers that hold - and _; labels quoted; rows and clips left over."""
    header = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=3\n# YTID, start_seconds, end_seconds, labels\n"
    (tmp_path / "balanced_train_segments.csv").write_text(
        header + '-abc_DEF-12, 30.000, 40.000, "/m/a,/m/b"\nYYYYYYYYYYY, 0.000, 10.000, "/m/b,/m/unknown"\n')
    (tmp_path / "eval_segments.csv").write_text(
        header + 'a_b-c_d-e_f, 1.000, 11.000, "/m/a"\n00000000000, 0.000, 10.000, "/m/b"\n')
    (tmp_path / "unbalanced_train_segments.csv").write_text(header + 'unbalanced_, 0.000, 10.000, "/m/a"\n')
    (tmp_path / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/a,"Bark, loud"\n1,/m/b,Purr\n')
    for name in ("-abc_DEF-12_30.000.flac", "YYYYYYYYYYYY.wav", "a_b-c_d-e_f.wav", "zzzzzzzzzzz.wav", "Yunbalanced_.wav"):
        save_tone(tmp_path / "audio" / name)
    found = probe.load_labelled(str(tmp_path))
    by_file = {os.path.basename(found.source.path(i)): (label.tolist(), group)
               for i, label, group in zip(found.indices, found.labels, found.groups)}
    assert by_file == {b"-abc_DEF-12_30.000.flac": ([1, 1], "train"), b"YYYYYYYYYYYY.wav": ([0, 1], "train"),
                       b"a_b-c_d-e_f.wav": ([1, 0], "test")}
    output = capsys.readouterr().out
    assert "eval_segments.csv: 1 of 2 rows have a clip here" in output and "2 of 5 clips have no label" in output
    assert "unbalanced_train_segments.csv: 1 of 1 rows have a clip here; not used" in output
    (tmp_path / "class_labels_indices.csv").unlink()
    assert probe.load_labelled(str(tmp_path)).labels.shape == (3, 3)               # all classes that the rows name


def test_the_regularisation_is_chosen_by_the_loss_on_the_validation_part(monkeypatch):
    torch.manual_seed(0)
    data_set = labelled(["train"] * 30 + ["valid"] * 30 + ["test"] * 30, [0, 1] * 45)
    features, fit, calls = torch.randn(90, 20), probe.linear_scores, []
    features[:, 0] += 2 * data_set.labels[:, 0]
    monkeypatch.setattr(probe, "linear_scores", lambda *a: calls.append((a[3], a[2])) or fit(*a))
    probe.evaluate(features, data_set, probe.make_rounds(data_set))
    losses = {l2: F.cross_entropy(fit(features[:30], data_set.labels[:30], features[30:60], l2, False),
                                  data_set.labels[30:60]).item() for l2 in probe.L2_GRID}
    assert len(set(losses.values())) == 4 and calls[-1][0] == min(losses, key=losses.get)
    assert all(torch.equal(asked, features[30:60]) for _, asked in calls[:-1]) and torch.equal(calls[-1][1], features[60:])


def test_several_labels_a_clip_give_ranking_metrics():
    torch.manual_seed(0)
    labels = (torch.rand(60, 3) < 0.4).float()
    features = labels @ torch.randn(3, 8) + 0.1 * torch.randn(60, 8)               # the labels can be read off
    many = probe.Labelled(None, list(range(60)), labels, ["train"] * 40 + ["test"] * 20)
    results = probe.evaluate(features, many, probe.make_rounds(many))
    assert set(results["knn"]) == {"mAP", "AUC", "d'"} and results["linear"]["mAP"][0] > 0.9


def test_what_is_missing_from_labels_or_audio_is_said(tmp_path, capsys):
    save_tone(tmp_path / "a.wav")
    save_tone(tmp_path / "b.wav")
    (tmp_path / "labels.csv").write_text("filename,category\na.wav,x\nghost.wav,y\n")
    assert len(probe.load_labelled(str(tmp_path)).indices) == 1
    output = capsys.readouterr().out
    assert "1 of 2 rows name a file" in output and "1 of 2 clips have no label" in output
    (tmp_path / "labels.csv").write_text("filename,category\na,x\nb,y\n")
    with pytest.raises(data.InputError, match="with its ending"):
        probe.load_labelled(str(tmp_path))
    (tmp_path / "labels.csv").write_text("file,label\na.wav,x\n")
    with pytest.raises(data.InputError, match="no column filename, category"):
        probe.load_labelled(str(tmp_path))
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(data.InputError, match="no labels here"):
        probe.load_labelled(str(tmp_path))


@pytest.mark.parametrize("rows, says", [
    ("filename,category,split\na.wav,x,training\n", "split of a.wav is training"),
    ("filename,category\na.wav,x\na.wav,y\n", "several rows"), ("filename,category\nsame.wav,x\n", "several files")])
def test_a_table_that_could_be_read_in_two_ways_is_refused(tmp_path, rows, says):
    for name in ("a.wav", "1/same.wav", "2/same.wav"):
        save_tone(tmp_path / name)
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(data.InputError, match=says):
        probe.load_labelled(str(tmp_path))
    (tmp_path / "labels.csv").write_text("filename,category,split\na.wav,x,Train\n1/same.wav,y,TEST\n")
    assert probe.load_labelled(str(tmp_path)).groups == ["train", "test"]


def test_classes_of_one_clip_are_left_out(capsys):
    kept = probe.drop_rare(labelled([None] * 5, [0, 0, 1, 1, 2]))
    assert len(kept.indices) == 4 and kept.labels.shape == (4, 2) and "1 of 3 classes" in capsys.readouterr().out
    with pytest.raises(data.InputError, match="some have none"):
        probe.make_rounds(labelled(["1", None, "2"], [0, 1, 0]))
    with pytest.raises(data.InputError, match="too few clips to train on"):
        probe.make_rounds(labelled(["train", "test", "test"], [0, 1, 0]))
    with pytest.raises(data.InputError, match="dev, test, train"):
        probe.make_rounds(labelled(["train", "dev", "test"], [0, 1, 0]))
    with pytest.raises(data.InputError, match="nothing to tell apart"):
        probe.drop_rare(labelled([None] * 3, [0, 0, 1]))


def test_a_class_absent_from_training_counts_as_wrong():
    features = torch.randn(30, 4)
    lone = labelled([str(f) for f in [0] * 10 + [1] * 10 + [2] * 10], [0, 1] * 10 + [2] * 10)
    results = probe.evaluate(features, lone, probe.make_rounds(lone))
    assert results["linear"]["accuracy"][2] == results["knn"]["accuracy"][2] == 0


@pytest.mark.parametrize("command", ["train.py", "probe.py"])
def test_help_names_every_flag(command, tmp_path):
    done = run([command, "--help"], tmp_path)
    flags = set(re.findall(r'"(--[a-z-]+)"', (HERE / command).read_text()))
    assert done.returncode == 0 and not done.stderr and "ckpt.pt" in done.stdout
    if command == "train.py":
        flags |= {"--" + name.replace("_", "-") for name in vars(train.Config())}
    assert len(flags) >= 8 and all(flag in done.stdout for flag in flags)


def test_the_encoder_in_one_call(trained):
    encoder = model.load_encoder(trained / "ckpt.pt")
    assert encoder.output_dim == 8 * 192 and encoder.hop_seconds == pytest.approx(0.04)
    long = torch.randn(2, 50_000)                                                  # 3 windows of 20,480, 39.06 columns of 1,280
    embeddings = encoder(long, 32_000)
    assert embeddings.shape == (2, 40, 1536)
    assert torch.allclose(encoder(long[1], 32_000)[0], embeddings[1], atol=1e-4)   # whatever else is in the batch
    assert torch.allclose(encoder(long[:, :20_480], 32_000), embeddings[:, :16], atol=1e-4)
    assert encoder(np.random.randn(800), 8_000).shape == (1, 3, 1536)              # a tenth of a second: 2.5 columns
    with pytest.raises(ValueError):
        encoder(torch.ones(800, dtype=torch.int16), 8_000)
    tokens = encoder.encoder(model.patchify(encoder.mel(long[:, :20_480])))
    for row, column in ((0, 0), (5, 9)):
        assert torch.allclose(embeddings[0, column, row * 192:(row + 1) * 192], tokens[0, row * 16 + column], atol=1e-4)


def test_other_views_of_the_encoder(trained, tmp_path):
    """--encoder, --layer and --pool against the parts of the checkpoint that they name."""
    plain, waveform = model.Encoder(192), torch.randn(1, 20_480)
    plain.load_state_dict(torch.load(trained / "ckpt.pt", weights_only=True)["encoder"])
    view = model.load_encoder(trained / "ckpt.pt", "context", layer=3)
    x = plain.embed(model.patchify(view.mel(waveform))) + plain.positions
    for layer in plain.layers[:3]:
        x = layer(x)
    assert torch.allclose(view(waveform, 32_000)[0, 9].view(8, 192), x[0].view(8, 16, 192)[:, 9], atol=1e-4)
    with pytest.raises(data.InputError, match="no layer 13"):
        model.load_encoder(trained / "ckpt.pt", layer=13)
    save_tone(tmp_path / "a.wav")
    one = probe.Labelled(data.AudioFiles(tmp_path), [0], torch.eye(1), [None])
    time, mean = (probe.compute_features(one, {"view": view}, view.mel, 0, pool)[0]["view"] for pool in ("time", "mean"))
    assert mean.shape == (1, 192) and torch.allclose(mean, sum(time.split(192, dim=1)) / 8, atol=1e-5)


def test_the_encoder_as_x_ares_wants_it(trained, monkeypatch):
    monkeypatch.setenv("AUDIO_JEPA_CKPT", str(trained / "ckpt.pt"))
    assert [name for name in dir(probe) if name.endswith("Encoder")] == ["AudioJEPAEncoder"]       # it takes the only one
    encoder = probe.AudioJEPAEncoder()
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (32_000, 1536, pytest.approx(40))
    assert encoder(torch.randn(2, 50_000)).shape == (2, 40, 1536)


def test_padding_does_not_enter_the_features(trained, tmp_path):
    for name, seconds in (("short", 0.3), ("long", 1.9)):
        time_axis = np.arange(int(32_000 * seconds)) / 32_000
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.sin(2 * np.pi * 500 * time_axis), 32_000)
    encoder = model.load_encoder(trained / "ckpt.pt")
    source = data.AudioFiles(tmp_path)
    pair = probe.Labelled(source, [0, 1], torch.eye(2), [None, None])              # of 3 windows and of 1
    together, _ = probe.compute_features(pair, {"trained": encoder}, encoder.mel, 0)
    for i in range(2):
        alone = encoder(source.crop(i, 0.0, None), 32_000)[0].mean(0)
        assert torch.allclose(together["trained"][i], alone, atol=1e-4)
        frames = encoder.mel.log_mel(source.crop(i, 0.0, None)[None])[0]
        frames = ((frames - encoder.mel.mean) / encoder.mel.deviation)[:, :math.ceil(len(source.crop(i, 0.0, None)) / 80)]
        assert torch.allclose(together["log-mel"][i], torch.cat([frames.mean(1), frames.std(1, correction=0)]), atol=2e-3)


def test_mixed_precision_touches_the_encoder_alone(trained, tmp_path):
    for i in range(2):                                                             # resampled by a worker: in bf16 it would hiss
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).uniform(-0.5, 0.5, 40_000), 44_100)
    encoder = model.load_encoder(trained / "ckpt.pt")
    pair = probe.Labelled(data.AudioFiles(tmp_path), [0, 1], torch.eye(2), [None, None])
    off, bf16 = (probe.compute_features(pair, {"trained": encoder}, encoder.mel, 1, amp=amp)[0] for amp in ("off", "bf16"))
    assert torch.equal(off["log-mel"], bf16["log-mel"])
    assert 0 < (off["trained"] - bf16["trained"]).abs().max() < 0.5


def test_the_probe_command_prints_three_rows(trained, recordings, tmp_path):
    done = run(["probe.py", trained / "ckpt.pt", "--json", tmp_path / "t.json", "--workers", 0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ["log-mel", "untrained", "trained"]
    results = json.loads((tmp_path / "t.json").read_text())["results"]
    assert set(results) == {"log-mel", "untrained", "trained"} and 0 <= min(results["trained"]["knn"]["accuracy"]) <= 1


def test_the_probe_leaves_out_what_it_cannot_read(trained, tmp_path, capsys):
    for i in range(12):
        save_tone(tmp_path / "ab"[i % 2] / f"{i}.wav", 300 + 900 * (i % 2))
    (tmp_path / "a" / "broken.wav").write_text("no sound")
    assert probe.main([str(trained / "ckpt.pt"), "--data", str(tmp_path), "--workers", "0"]) == 0
    output = capsys.readouterr().out
    assert "unusable, left out" in output and "12 clips, 2 classes" in output


def test_a_class_that_unreadable_clips_make_rare_is_left_out_of_features_and_labels(trained, tmp_path):
    def linear(folder):
        flags = ["--data", str(folder), "--workers", "0", "--json", str(tmp_path / "t")]
        assert probe.main([str(trained / "ckpt.pt"), *flags]) == 0
        return json.loads((tmp_path / "t").read_text())["results"]["trained"]["linear"]["accuracy"]
    for i in range(20):
        save_tone(tmp_path / "clips" / "bc"[i % 2] / f"{i}.wav", (300, 3000)[i % 2] + 10 * i)
    without = linear(tmp_path / "clips")
    save_tone(tmp_path / "clips" / "a" / "1.wav")
    (tmp_path / "clips" / "a" / "0.wav").write_text("no sound")
    assert linear(tmp_path / "clips") == without and min(without) > 0.9


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_real_recordings_are_read():
    files = data.AudioFiles(REAL)
    batch = data.Batches(files, 16, 81_920, seed=0)[0]
    assert len(files) == 3595 and not batch.failures and data.LogMel(2.56)(batch.waveforms).isfinite().all()
