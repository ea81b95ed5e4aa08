"""Tests in the order of the chapters. Each rule is held against something independent: a closed
form, a slow loop, or a case worked by hand. No GPU, no network and no data set is needed.
`pytest -q test_all.py -k "not command"` leaves out the tests that start the real commands."""

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

import data
import masking
import model
import probe
import train

FORMS = ("0.wav", 8000), ("1.flac", 44_100), ("2.OGG", 32_000), ("3.mp3", 16_000)
HIDDEN = {"block": 64, "random": 77}                 # patches that each kind of mask hides
N = 20_480                                           # samples of 0.64 s, the length of our clips
TOY = dict(model="toy", seconds=0.64, mask="block", optimizer="muon", batch_size=5, steps=3,
           lr=0.01, seed=3, device="cpu", amp="off", workers=0, log_every=1, save_every=1)
model.SIZES["toy"] = 64, 2                           # an encoder small enough to test by hand
for number in data.STOP_SIGNALS:                     # nohup has some ignored
    signal.signal(number, signal.default_int_handler)


# ---- helpers -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, alone or after others."""
    torch.manual_seed(0)


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
    for i in range(12):
        name, rate = FORMS[i % 4]
        write_tone(folder / "abc"[i // 4] / name, 200 + 300 * i, 0.3 + 0.1 * i, rate, 1 + i % 2)
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


@pytest.mark.parametrize("rate", [8000, 32_000])
def test_a_crop_is_the_slice_of_the_file_that_its_start_names(tmp_path, rate):
    ramp = np.linspace(0, 0.9, 3 * rate, dtype=np.float32)           # samples that tell their place
    channels = np.stack([0.6 * ramp, 0 * ramp, 0.9 * ramp], axis=1)  # 0.5 on average
    soundfile.write(tmp_path / "a.wav", channels, rate, subtype="FLOAT")
    files = data.AudioFiles(tmp_path)
    for start in (0.0, 0.5, 0.999999):
        crop = next(files.windows(0, 8000, start))                   # a quarter of a second
        first = int(start * (2.75 * rate + 1)) / (3 * rate - 1) * 0.45
        assert crop[4000].item() == pytest.approx(first + 0.45 * 0.125 / 3, abs=1e-4)
    whole = torch.cat([*files.windows(0, 7001)])
    assert 95_900 < len(whole) <= 96_000 and whole[-100] == pytest.approx(0.45, abs=1e-3)


def test_files_are_found_once_in_any_spelling_and_through_links_or_are_listed(tmp_path, capsys):
    top, many = tmp_path / "top", [f"many/{i:02}.wav" for i in range(30)]
    names = {"a.wav", "b/x.FLAC", "b/c/y.Opus", "new\nl.aiff", "\udcff.mp3", *many}
    for name in [*names, "no.m4a", "b/wav", "b/._x.FLAC", "../side/once.wav"]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    for link, goal in (("b/up", "top"), ("b/root", "/"), ("link", "side"), ("link/up", "top")):
        (top / link).symlink_to(tmp_path / goal)
    files = data.AudioFiles(top)
    found = [os.path.relpath(os.fsdecode(files.path(i)), top) for i in range(len(files))]
    assert {*found} == names | {"link/once.wav"} and len(found) == 36
    assert [name for name in found if name in many] == many, "the order is that of the disk"
    assert all(files.name(i).isprintable() for i in range(36)), "a name is not escaped"
    assert "left out as no audio that we can read: 1 .m4a, 1 .flac" in capsys.readouterr().out
    (top / "list.txt").write_bytes(b"\xef\xbb\xbfa.wav\n\n\r\nsub/b \xff.wav\r\n/abs/c.wav")
    listed, here = data.AudioFiles(top / "list.txt"), os.fsencode(top)
    expected = [here + b"/a.wav", here + b"/sub/b \xff.wav", b"/abs/c.wav"]
    assert [listed.path(i) for i in range(len(listed))] == expected
    names, prints = [f"{i}.wav" for i in range(3000)], set()
    for names[1500] in ("1500.wav", "other.wav"):
        (top / "list.txt").write_text("\n".join(names))
        prints.add(data.AudioFiles(top / "list.txt").fingerprint)
    assert len(prints) == 2, "two sets of files have one fingerprint"


def test_a_file_is_either_read_or_refused(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    for name, samples, rate in (
            ("good eight", np.stack([noise] * 8, 1), 192_000), ("good sample", noise[:1], 32_000),
            ("none", noise[:0], 32_000), ("slow", noise, 1),
            ("NaN", noise + np.nan, 32_000), ("big", noise * 1e30, 32_000), ("odd", noise, 44_101)):
        soundfile.write(tmp_path / f"{name}.wav", samples, rate, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    os.mkfifo(tmp_path / "pipe.wav")                 # to open it would block for ever
    files = data.AudioFiles(tmp_path)
    for i in range(len(files)):
        try:
            good = next(files.windows(i, N)).isfinite().all()
        except data.InputError:
            good = False
        assert good == ("good" in files.name(i)), files.name(i)


def lying_flac(path, claimed, share=1.0):
    """Write 4 s of noise whose header claims `claimed` samples, and of its bytes only a share."""
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 128_000), 32_000)
    content = bytearray(path.read_bytes())
    content[22:26] = claimed.to_bytes(4, "big")      # in FLAC's block STREAMINFO
    path.write_bytes(content[:int(share * len(content))])


@pytest.mark.parametrize("claimed, share, heard", [(0, 1, 4), (900_000, 1, 4), (128_000, 0.4, 1.6)])
def test_a_file_whose_header_lies_gives_what_it_holds(tmp_path, claimed, share, heard):
    lying_flac(tmp_path / "a.flac", claimed, share)
    files, windows = data.AudioFiles(tmp_path), []
    with pytest.raises(data.InputError, match="decoded of the .* s that its header claims"):
        windows.extend(files.windows(0, N))
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
    followers = {(crop[0].item(), crop[100].item()) for crop in crops if len(crop) == 250}
    assert len(followers) == 16, "some file never follows some other one"


def test_an_epoch_has_every_clip_once_in_random_order_and_from_a_random_start():
    one, two = ([data.Crops(Numbers(), 2, seed).read(i)[0].tolist() for i in range(400)]
                for seed in (1, 2))
    epochs = [[clip for clip, _ in crops] for crops in (one[:50], one[50:100], two[:50])]
    assert all(sorted(epoch) == [*range(50)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 3, "the order ignores the epoch or the seed"
    starts, others = ({start for _, start in crops} for crops in (one, two))
    assert not starts & others, "the starts ignore the seed"
    counts, _ = np.histogram([*starts], bins=4, range=(0, 1))
    assert counts.min() > 60 and max(starts) < 1, "crops do not start evenly along a file"


@pytest.mark.parametrize("bad", [1, 4, 50])
def test_files_that_fail_are_replaced_and_told_once_and_many_stop_the_run(bad, capsys, monkeypatch):
    monkeypatch.setattr(Numbers, "bad", range(bad))
    crops, mel, batches = data.Crops(Numbers(), 2, seed=0), data.LogMel(0.64), []
    if bad == 50:
        with pytest.raises(data.InputError, match="20 files in a row cannot be read"):
            next(data.load_batches(crops, 50, range(40), 0, False))
    else:
        batches.extend(data.load_batches(crops, 50, range(40), 0, False))
        assert len(batches) == 40 and torch.cat(batches)[:, 0].min() == bad, "a bad file was used"
    told = capsys.readouterr().out.splitlines()
    assert "unusable: clip " in told[0] and len(told) == len({*told})
    if bad == 1:
        mel.fit(crops)
    else:
        with pytest.raises(data.InputError, match="one in twenty.*unusable: clip .*: no sound"):
            mel.fit(crops)


@pytest.mark.parametrize("seconds", [0.64, 10.0])
def test_the_log_mel_is_the_logarithm_of_a_short_time_spectrum_in_triangular_bands(seconds):
    mel, hop = data.LogMel(seconds), round(seconds * 125)
    waveform = 0.01 * torch.randn(1, 256 * hop)
    spectrogram, size, n_fft = mel.log_mel(waveform), int(2.5 * hop), mel.spectrogram.n_fft
    assert spectrogram.shape == (1, 128, 256)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    piece = waveform[0, 100 * hop - size // 2:][:size].numpy() * window  # its centre is frame 100's
    power = np.abs(np.fft.rfft(piece, n_fft)) ** 2 / (window ** 2).sum()
    mels = np.linspace(0.3, 15 + 27 * math.log(16, 6.4), 130)    # Slaney's, of 20 Hz to 16 kHz
    edges = np.where(mels < 15, 200 * mels / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    for band in (5, 40, 90, 127):
        rise, fall = np.diff(edges[band:band + 3])
        from_middle = np.arange(n_fft // 2 + 1) * 32_000 / n_fft - edges[band + 1]
        triangle = np.minimum(1 + from_middle / rise, 1 - from_middle / fall).clip(0)
        expected = math.log((power * triangle).sum() + 1e-6)
        assert spectrogram[0, band, 100] == pytest.approx(expected, abs=0.01)
    assert np.allclose(mel.log_mel(torch.zeros(1, N)), math.log(1e-6)), "the floor is not 1e-6"
    assert mel.spectrogram.mel_scale.fb.sum(0).all(), "a band is empty"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel.log_mel(waveform), spectrogram), "autocast is on inside"


def test_built_in_sounds_play_their_order_in_a_key_of_their_own():
    source, keys = data.BuiltInSounds(), []
    for i in [*range(6), *range(24, 30)]:            # sines, whose loudest frequency is the pitch
        clip = next(source.windows(i, 40_960))
        frames = clip.unfold(0, 1280, 320) * torch.hann_window(1280)
        peaks = torch.fft.rfft(frames, 16_384).abs().argmax(1) * 32_000 / 16_384
        semitones = 12 * (peaks / peaks.min()).log2()
        runs = [(note, len([*run])) for note, run in itertools.groupby(semitones.round().tolist())]
        notes = [note for note, length in runs if length >= 3]
        heard, order = notes[notes.index(0):], [*source.orders[i % 6]]
        assert len(notes) >= 9 and heard == (order * 4)[:len(heard)] and source.label(i) == i % 6
        high = torch.fft.rfft(clip)[15_000:].abs()   # above 11.7 kHz
        assert high.median() > 0.1, "there is no noise"
        keys.append(peaks.min().log2())
        assert torch.equal(clip, next(source.windows(i, 40_960))), "it is not a function of i"
    assert len({tuple(order) for order in source.orders}) == 6 and np.std(keys) > 1 / 12


def test_patches_lie_row_by_row():
    spectrogram = torch.arange(128 * 256.).view(1, 128, 256)
    square = spectrogram[0, 3 * 16:4 * 16, 5 * 16:6 * 16]
    assert torch.equal(data.patchify(spectrogram)[0, 3 * 16 + 5], square.flatten())


# ---- masking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, low, high", [("block", 0.3, 0.7), ("random", 0.54, 0.66)])
def test_masks_hide_every_patch_about_as_often_and_every_step_has_its_own(kind, low, high):
    visible, hidden = masking.make_masks(kind, 2000, seed=0, step=0)
    shares = hidden.flatten().bincount(minlength=128) / 2000
    assert hidden.shape == (2000, HIDDEN[kind]) and low < shares.min() and shares.max() < high
    both = torch.cat([visible, hidden], dim=1)
    assert torch.equal(both.sort(1).values, torch.arange(128).expand(2000, -1))
    seen = {tuple(masking.make_masks(kind, 8, seed, step)[1].flatten().tolist())
            for seed in range(6) for step in (0, 1, 2, 100, 1000, 10_000) for _ in range(2)}
    assert len(seen) == 36, "two steps or seeds share their masks, or a step has several"


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


def test_a_hidden_patch_is_drawn_where_it_lies():
    lines = masking.draw(torch.randn(128, 256), torch.tensor([0, 17])).splitlines()
    assert [line[:9].count("?") for line in lines] == [0] * 12 + [4] * 4
    assert lines[-1][:4] == lines[-4][4:8] == "????", "rows go up, and columns to the right"


# ---- model -------------------------------------------------------------------------------------


def positions(width):
    """The codes of the places of all patches, number by number: (128, width)."""
    return torch.tensor([[wave(place / 10_000 ** (k / (width // 4))) for place in divmod(n, 16)
                          for wave in (math.sin, math.cos) for k in range(width // 4)]
                         for n in range(128)])


def through_layers(net, tokens, places):
    """What each layer of a net computes from the tokens (n, width) of one clip."""
    outputs, angles = [tokens], model.rotations(8, 16, tokens.shape[1] // net.layers[0].heads)
    for layer in net.layers:
        outputs.append(layer(outputs[-1][None], angles[None, places])[0])
    return outputs[1:]


def loss_by_hand(jepa, patches, visible, hidden):
    """The loss clip by clip, written out. A change of the loss must be made here, too."""
    encoder, predictor, target_encoder = jepa.encoder, jepa.predictor, jepa.target_encoder
    wide, narrow, losses = positions(64), positions(32), []
    for x, seen, gone in zip(patches, visible, hidden, strict=True):
        context = encoder.embed(x[seen]) + wide[seen]
        latents = encoder.norm(through_layers(encoder, context, seen)[-1])
        tokens = torch.cat([predictor.mask_token + narrow[gone],     # attention minds no order
                            predictor.embed(latents) + narrow[seen]])
        tokens = through_layers(predictor, tokens, torch.cat([gone, seen]))[-1]
        predictions = predictor.project(predictor.norm(tokens[:len(gone)]))
        layers = through_layers(target_encoder, target_encoder.embed(x) + wide, range(128))
        total = sum(F.layer_norm(layer.T, (128,)).T for layer in layers)     # over patches
        gap = (predictions - F.layer_norm(total, (64,))[gone].detach()).abs()
        losses.append(torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", HIDDEN)
def test_the_loss_by_hand_and_in_float32_under_autocast(kind):
    torch.manual_seed(0)
    jepa = model.AudioJEPA("toy")
    for weights in jepa.parameters():                # no trivial ones, and two different encoders
        weights.data += 0.1 * torch.randn_like(weights)
    patches, (visible, hidden) = torch.randn(2, 128, 256), masking.make_masks(kind, 2, 0, 0)
    visible = visible[:, torch.randperm(visible.shape[1])]
    loss, _, targets = jepa(patches, visible, hidden)
    assert torch.allclose(loss, loss_by_hand(jepa, patches, visible, hidden), rtol=1e-5)
    assert not targets.requires_grad, "the targets have a gradient"
    with torch.autocast("cpu", torch.bfloat16):
        loss, predictions, targets = jepa(patches, visible, hidden)
    assert {loss.dtype, predictions.dtype, targets.dtype} == {torch.float32}
    wanted = targets[torch.arange(2)[:, None], hidden].double()
    assert loss.item() == pytest.approx(F.smooth_l1_loss(predictions.double(), wanted).item(), 1e-5)


def turned(x, places):
    """Queries or keys (n, 2 k) of patches, as complex numbers turned according to their columns."""
    k = x.shape[1] // 2
    angles = torch.tensor([[n % 16 * 10_000 ** (-i / k) for i in range(k)] for n in places])
    pairs = (x[:, :k] + 1j * x[:, k:]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=1)


def test_a_layer_is_attention_head_by_head_and_then_an_mlp():
    torch.manual_seed(0)
    layer, x, places = model.Layer(24, 3), torch.randn(1, 5, 24), [0, 3, 17, 90, 127]
    layer.norm2.weight.data.fill_(2)                 # unlike the other norm
    q, k, v = (part[0].split(8, dim=-1) for part in layer.qkv(layer.norm1(x)).split(24, dim=-1))
    heads = [(turned(q[h], places) @ turned(k[h], places).T / math.sqrt(8)).softmax(-1) @ v[h]
             for h in range(3)]
    y = x + layer.project(torch.cat(heads, dim=-1))
    up, _, down = layer.mlp
    inner = up(layer.norm2(y))
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2        # GELU
    z = layer(x, model.rotations(8, 16, 8)[None, places])
    assert up.out_features == 4 * 24 and torch.allclose(z, y + down(inner), atol=1e-5)


def test_the_base_model_has_the_size_of_the_papers_and_all_of_it_learns():
    with torch.device("meta"):
        jepa = model.AudioJEPA("base")
    millions = [sum(p.numel() for p in net.parameters()) / 1e6
                for net in (jepa.encoder, jepa.predictor)]
    assert millions == pytest.approx([85.4, 11.3], abs=0.3)
    fixed = {name.split(".")[0] for name, p in jepa.named_parameters() if not p.requires_grad}
    assert fixed == {"target_encoder"}


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
    """On the device "meta", whose tensors have a shape, but no numbers."""
    mel, jepa = data.LogMel(0.64).to("meta"), model.AudioJEPA("toy").to("meta")
    visible = hidden = torch.zeros(2, 64, dtype=torch.int64, device="meta")
    with mock.patch.object(torch, "autocast"):       # which does not know this device
        patches = data.patchify(mel(torch.empty(2, N, device="meta")))
    assert {tensor.device.type for tensor in jepa(patches, visible, hidden)} == {"meta"}
    jepa.update_target_encoder(0.9)


# ---- train -------------------------------------------------------------------------------------


def test_the_ten_most_similar_of_twelve_clips_vote_whatever_their_length():
    angles = torch.linspace(0, 3, 12)
    features = torch.stack([angles.cos(), angles.sin()], 1) * (1 + 5 * angles[:, None])
    weights = (angles[:10].cos() / 0.07).exp()
    expected = torch.stack([weights[k::3].sum() for k in range(3)]) / weights.sum()
    votes = train.knn_scores(features, torch.eye(3).repeat(4, 1), torch.tensor([[7.0, 0.0]]))
    assert torch.allclose(votes[0], expected, rtol=1e-4), "kNN does not compare by cosine"


@pytest.mark.parametrize("telling, low, high", [(True, 1, 1), (False, 0.08, 0.26)])
def test_the_knn_of_the_log_asks_other_clips_for_what_the_target_encoder_tells(telling, low, high):
    number_of_clip = torch.arange(240.0)[:, None, None].expand(240, 128, 256)
    torch.manual_seed(0)

    def target_encoder(patches):                     # latents that tell the order of a clip, or not
        angle = patches[..., :1] % 6 if telling else 6 * torch.rand(len(patches), 1, 1)
        return torch.cat([angle.cos(), angle.sin()], dim=2).expand(-1, 128, 2)

    run = argparse.Namespace(crops=data.Crops(data.BuiltInSounds(), 1000, 0),
                             mel=mock.Mock(return_value=number_of_clip, mean=torch.zeros(())),
                             model=argparse.Namespace(target_encoder=target_encoder))
    assert low <= train.knn_of_orders(run) <= high


def watched_run(recordings, path, **changes):
    """Three steps of the real loop: its checkpoints, and the (inputs, output) of some modules."""
    saves, write = [], torch.save
    calls = {data.LogMel: [], model.AudioJEPA: [], torch.nn.Linear: []}

    def remember(module, inputs, output):
        calls.get(type(module), []).append((inputs, output))

    def save(content, file):
        saves.append(copy.deepcopy(content))
        write(content, file)

    hook = torch.nn.modules.module.register_module_forward_hook(remember)
    with mock.patch.object(torch, "save", save):
        assert train.main(flags(data=recordings, out=path, **changes)) == 0
    hook.remove()
    mel, jepa, linear = calls.values()
    return argparse.Namespace(path=path, saves=saves, mel=mel, model=jepa, linear=linear)


@pytest.fixture(scope="module")
def run(recordings, tmp_path_factory):
    return watched_run(recordings, tmp_path_factory.mktemp("run") / "ckpt.pt")


# Of the steps of such a run: its learning rates, and what the target encoder keeps.
RATES = [0.01 / 1.15, *(0.005 * (1 + math.cos(math.pi * (t - 0.15) / 2.85)) for t in (1, 2))]
KEPT = [1 - 0.5 * (1 + math.cos(math.pi * t / 3)) / 1.3 for t in range(3)]


def test_a_run_has_the_weights_crops_and_masks_of_its_seed_and_a_log_mel_fitted_to_sound(
        run, recordings):
    torch.manual_seed(3)
    assert same(model.AudioJEPA("toy").encoder.state_dict(), run.saves[0]["encoder"])
    crops, mel = data.Crops(data.AudioFiles(recordings), N, seed=3), data.LogMel(0.64)
    mel.load_state_dict(run.saves[0]["mel"])
    values = torch.cat([mel(crops.read(i, fill=False)[0][None]).flatten() for i in range(256)])
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4, "the log-mel is not fitted"
    for step, (waveforms, spectrograms) in enumerate(run.mel):
        padded = [F.pad(crop, (0, N - len(crop))) for crop in
                  (crops.read(5 * step + i)[0] for i in range(5))]
        assert torch.equal(*waveforms, torch.stack(padded)), f"step {step} has wrong crops"
        patches, *masks = run.model[step][0]
        assert torch.equal(patches, data.patchify(spectrograms))
        assert same(masks, [*masking.make_masks("block", 5, 3, step)]), f"step {step}: wrong masks"


def test_the_rows_of_the_log_are_those_of_their_steps(run):
    rows = probe.read_csv(run.path.with_suffix(".csv"), ["knn"])
    for step, (row, ((_, _, hidden), output)) in enumerate(zip(rows, run.model, strict=True)):
        loss, predictions, targets = output
        wanted, means = targets[torch.arange(5)[:, None], hidden], targets.mean(0)[hidden]
        missed = (predictions - wanted).square().sum() / (means - wanted).square().sum()
        expected = {"step": step + 1, "loss": loss.item(), "lr": RATES[step],
                    "momentum": KEPT[step], "explained": 1 - missed.item(),
                    "spread": targets.var(0, correction=0).sqrt().mean().item()}
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert train.learning_rate(24, argparse.Namespace(steps=1000, lr=1)) == pytest.approx(25 / 51)


def test_a_run_whose_targets_are_alike_is_warned_once(tmp_path, capsys):
    config = argparse.Namespace(out=str(tmp_path / "a.pt"), steps=9, batch_size=4)
    log, row = train.Log(config), dict(lr=1, momentum=1, loss=1, explained=0, knn="")
    for step, spread in enumerate((0.5, 0.05, 0.05)):
        log.next_batch(iter([torch.zeros(4, 1)]))
        log.start = before = time.perf_counter() - 100           # a step of 4 clips took 100 s
        log.write(row | {"step": step, "spread": spread})
        said = capsys.readouterr().out
        assert ("warning: all clips" in said) == (step == 1)
        assert ("0:15:00", "0:13:20", "0:11:40")[step] in said, "the time left is wrong"
        assert log.start > before and log.clips == 0, "the clock was not reset"


@pytest.mark.parametrize("kind, share", [("muon", 0.1), ("adamw", 1)])
def test_every_step_of_a_run_by_hand(run, kind, share, recordings, tmp_path):
    if kind == "adamw":
        run = watched_run(recordings, tmp_path / "ckpt.pt", optimizer="adamw")
    jepa, matrices, others = model.AudioJEPA("toy"), [], []
    for name, weights in [*jepa.encoder.named_parameters(), *jepa.predictor.named_parameters()]:
        (matrices if weights.ndim == 2 and "layers" in name else others).append(weights)
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0),
                  torch.optim.Muon(matrices, weight_decay=0.05) if kind == "muon" else
                  torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=0.05)]
    for step, (before, after) in enumerate(itertools.pairwise(run.saves[:4])):
        for name, part in jepa.named_children():
            part.load_state_dict(before[name])
        jepa.zero_grad()
        loss_by_hand(jepa, *run.model[step][0]).backward()
        for optimizer, part_of_rate in zip(optimizers, (share, 1), strict=True):
            optimizer.param_groups[0]["lr"] = part_of_rate * RATES[step]
            optimizer.step()
        for net in ("encoder", "predictor"):
            for name, new in getattr(jepa, net).state_dict().items():
                error = (after[net][name] - new).norm() / (new - before[net][name]).norm()
                by_muon = kind == "muon" and "layers" in name and new.ndim == 2      # in bf16
                assert error < (0.03 if by_muon else 1e-3), (step, name)
        for name, new in after["target_encoder"].items():
            old, fast = before["target_encoder"][name], after["encoder"][name]
            expected = KEPT[step] * old + (1 - KEPT[step]) * fast
            assert torch.allclose(new, expected, atol=1e-5), f"the EMA of step {step} is wrong"


def test_fp16_is_used_and_a_step_that_overflows_is_skipped(recordings, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 60, backoff_factor=2.0 ** -50)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, enabled: enabled and scaler)
    run = watched_run(recordings, tmp_path / "ckpt.pt", amp="fp16", steps=2)
    assert run.linear[0][1].dtype == torch.float16, "--amp is ignored"
    start, first, second = (save["encoder"] for save in run.saves)
    assert same(start, first) and not same(first, second)


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_compiled_model_is_one_graph_for_all_steps(go, monkeypatch, kind):
    graphs, torch_compile = [], torch.nn.Module.compile
    monkeypatch.setenv("CXX", sys.executable)        # train.py looks for a compiler
    monkeypatch.setattr(model.AudioJEPA, "compile", lambda jepa: torch_compile(
        jepa, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    torch.compiler.reset()
    assert go("--compile", mask=kind) == 0 and len(graphs) == 1, f"compiled {len(graphs)} times"


@pytest.mark.parametrize("signums, changes", [
    ([signal.SIGINT], {"amp": "fp16"}), ([signal.SIGTERM], {"mask": "random"}),
    ([signal.SIGINT, signal.SIGHUP], {"optimizer": "adamw"})])
def test_a_signal_saves_and_resuming_is_exact(go, tmp_path, monkeypatch, signums, changes):
    assert go(steps=5, out="whole.pt", **changes) == 0
    make_masks = train.make_masks

    def interrupted(kind, n_clips, seed, step):
        for signum in signums * (step == 2):
            os.kill(os.getpid(), signum)
        return make_masks(kind, n_clips, seed, step)

    monkeypatch.setattr(train, "make_masks", interrupted)
    monkeypatch.setattr(sys, "stdout", sys.stdout)   # SIGHUP closes both
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert go(steps=5, workers=2, save_every=99, **changes) == 128 + signums[-1]
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    assert train.main(["--resume", str(tmp_path / "ckpt.pt")]) == 0
    assert same(outcome(tmp_path / "whole.pt"), outcome(tmp_path / "ckpt.pt")), "it is not exact"


@pytest.mark.parametrize("error", [None, ConnectionResetError, EOFError])
def test_a_worker_that_dies_ends_the_run_in_one_line(go, monkeypatch, capsys, error):
    read = data.Crops.read
    monkeypatch.setattr(data.Crops, "read", lambda crops, i: (
        read(crops, i) if i < 22 else os.kill(os.getpid(), signal.SIGKILL)))
    if error:                                        # if it dies while it hands over a batch
        monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", mock.Mock(side_effect=error))
    assert go(workers=1, steps=50) == 1
    error, = capsys.readouterr().err.splitlines()
    assert "DataLoader worker" in error and "fewer --workers" in error
    assert re.search(r"ckpt.pt holds step \d+; --resume goes on", error)


def test_a_bug_in_a_worker_shows_its_traceback_and_ends_the_worker(go, monkeypatch):
    read = data.Crops.read
    monkeypatch.setattr(data.Crops, "read", lambda crops, i: (
        read(crops, i) if i < 22 else torch.ones(2) @ torch.ones(3)))
    with pytest.raises(RuntimeError, match="size"):
        go(workers=1, steps=50)
    assert not multiprocessing.active_children()     # one that is left keeps the command waiting


def test_a_nan_stops_the_run_and_the_last_checkpoint_is_good(go, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda step, config: (0.01, math.nan)[step])
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
    assert go() == 1 and "disk full" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["ckpt.csv", "ckpt.pt"] and len({*files}) == 3
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1


def test_a_checkpoint_of_no_step_may_be_overwritten_but_no_log(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(train, "learning_rate", None)
        go()
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 0 and go(steps=1) == 0
    (tmp_path / "ckpt.pt").unlink()
    assert go(steps=1) == 1, "the log of another run was overwritten"


@pytest.mark.parametrize("cuda, given, expected", [
    (False, {}, ("sounds", "tiny", 1.28, "block", "muon", 16, 0.01, 1000)),
    (False, {"data": "x"}, ("laptop", "tiny", 1.28, "block", "muon", 16, 0.005, 2000)),
    (True, {"data": "x"}, ("paper", "base", 10, "random", "adamw", 256, 3e-4, 100_000))])
def test_the_recipe_is_that_of_the_machine_and_the_data(cuda, given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config, _ = train.resolve(given | {"amp": "off", "out": "a new file"}, None)
    assert (config.recipe, config.model, config.seconds, config.mask, config.optimizer,
            config.batch_size, config.lr, config.steps) == expected


@pytest.fixture(scope="module")
def bad(run):
    """The folder of the run, with another checkpoint, of step 1, and much that is none."""
    folder, half = run.path.parent, run.saves[1]
    for name, content in (("empty", b""), ("text", b"no.wav\n" * 12), ("binary", b"RIFF\0\0\0\0"),
                          ("cut", run.path.read_bytes()[:100_000]),
                          ("pickle", b"cbuiltins\nopen\n(S'executed'\nS'w'\ntR.")):
        (folder / name).write_bytes(content)
    sick = half | {"target_encoder": {"norm.bias": torch.tensor([0.0, math.nan])}}
    for name, content in (("half", half), ("sick", sick), ("old", {"format": "audio-jepa 1"}),
                          ("cuda", half | {"config": half["config"] | {"device": "cuda"}})):
        torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize("given, says", [
    ("", "ckpt.pt exists"), ("--resume=ckpt.pt --steps=9", "no run can be made longer"),
    ("--resume=", "not a ch"), ("--resume=half --lr=1 --steps=9", "leave out --lr, --steps"),
    ("--out=a.pt --data=", "no such folder"), ("--resume=half --data=text", "not the files"),
    ("--resume=absent", "No such file"), ("--resume=cuda", "--device cpu --no-compile"),
    ("--out=no/a.pt", "choose"), ("--out=a.csv", "choose"), ("--out=a.pt --compile", "apt install"),
    ("--out=a.pt --data=absent", "no such folder"), ("--out=a.pt --data=text", "one in twenty"),
    ("--out=a.pt --data=empty", "no audio here"), ("--out=a.pt --data=binary", "neither a folder"),
    ("--resume=empty", "not a ch"), ("--resume=text", "not a ch"), ("--resume=cut", "not a ch"),
    ("--resume=pickle", "not a ch"), ("--resume=old", "not a ch"), ("--resume=sick", "NaN")])
def test_what_cannot_work_is_refused_in_one_line(bad, monkeypatch, capsys, given, says):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("CXX", "no compiler")
    assert train.main(given.split()) == 1
    error, = capsys.readouterr().err.splitlines()
    assert says in error and not {"a.pt", "a.csv", "executed"} & {*os.listdir()}


# ---- probe -------------------------------------------------------------------------------------


def test_the_encoder_in_one_call(run):
    encoder, untrained = (probe.load_encoder(run.path, trained) for trained in (True, False))
    assert same(encoder.encoder.state_dict(), run.saves[-1]["target_encoder"])
    assert same(untrained.encoder.state_dict(), run.saves[0]["encoder"])
    assert encoder.mel.mean == untrained.mel.mean == run.saves[-1]["mel"]["mean"] != 0
    long = torch.randn(2, 50_000)                    # 3 windows of 20,480, 39.06 columns of 1,280
    embeddings, patches = encoder(long, 32_000), data.patchify(encoder.mel(long[:, N:2 * N]))
    assert embeddings.shape == (2, 40, encoder.output_dim) == (2, 40, 8 * 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=train.find_amp("cpu") == "bf16"):
        latents = encoder.encoder(patches)[0].view(8, 16, 64)[:, 4].flatten().float()
    assert torch.allclose(embeddings[0, 20], latents, atol=0.1), "column 4 of window 1 is wrong"
    low, high = (encoder(tone(3000, 0.57, rate), rate)[0] for rate in (8000.0, 32_000))
    assert low.shape == high.shape == (15, 512), "14.25 columns make 15"
    assert F.cosine_similarity(low, high)[2:-3].mean() > 0.95, "not resampled, or not well"


@pytest.mark.parametrize("waveform, rate, says", [
    (torch.zeros(64_000, 2), 44_100, "waveform.mean"), (torch.zeros(0, 9), 44_100, "finite"),
    (torch.full((900,), math.nan), 44_100, "finite"), (torch.zeros(900), 0.5, "whole number"),
    (torch.full((900,), 1e9), 44_100, "finite"), (torch.zeros(1, 1, 900), 44_100, "finite"),
    (torch.zeros(900).short(), 44_100, "finite"), (torch.zeros(900), 44_101, "resample")])
def test_a_waveform_that_cannot_be_meant_is_refused(run, waveform, rate, says):
    with pytest.raises(data.InputError, match=says):
        probe.load_encoder(run.path)(waveform, rate)


def test_the_encoder_is_frozen_until_it_is_thawed(run):
    encoder, waveform = probe.load_encoder(run.path), torch.randn(2, N)
    assert not encoder(waveform, 32_000).requires_grad
    encoder.requires_grad_(True)
    encoder(waveform, 32_000).square().mean().backward()
    assert all(weights.grad.any() for weights in encoder.parameters()), "a weight has no gradient"
    with pytest.raises(data.InputError, match="float32"):
        encoder.half()(waveform, 32_000)


def test_features_are_mean_and_std_over_sound_alone_read_by_windows(
        run, tmp_path, monkeypatch, capsys):
    for i in range(9):
        write_tone(tmp_path / f"{i}.wav", pitch=100 + 50 * i, seconds=0.2 + 0.15 * i)
    write_tone(tmp_path / "long.wav", seconds=6)     # 10 windows, in three batches
    (tmp_path / "text.wav").write_text("no sound")
    lying_flac(tmp_path / "zcut.flac", 128_000, 0.4)
    decode, source = mock.Mock(wraps=data.decode), data.AudioFiles(tmp_path)
    monkeypatch.setattr(data, "decode", decode)
    monkeypatch.setattr(probe, "WINDOWS_AT_ONCE", 4)
    encoders = {"untrained": probe.load_encoder(run.path, trained=False),
                "trained": probe.load_encoder(run.path)}
    with pytest.raises(data.InputError, match="several checkpoints"):
        stranger = mock.Mock(mel=data.LogMel(0.64))
        probe.compute_features(source, range(12), encoders | {"stranger": stranger})
    features = probe.compute_features(source, range(12), encoders)
    assert {call.args[1] for call in decode.mock_calls} == {N}, "it read more than a window at once"
    assert capsys.readouterr().out.count("unusable from here on") == 2
    assert {*features["trained"]} == {*range(12)} - {10}
    for index in (0, 5, 8, 9):
        windows = [*source.windows(index, N)]
        series = {"log-mel": torch.cat([encoders["trained"].mel(x[None])[0].mT for x in windows])}
        series |= {name: net(torch.cat(windows), 32_000)[0] for name, net in encoders.items()}
        for name, x in series.items():
            expected = torch.cat([x.double().mean(0), x.double().std(0, correction=0)]).float()
            assert torch.allclose(features[name][index], expected, atol=0.03), (name, index)


def test_deviations_of_loud_steady_features_are_not_lost(run, monkeypatch):
    ripple = torch.linspace(-1e-3, 1e-3, 256).expand(1, 128, 256)
    monkeypatch.setattr(data.LogMel, "forward", lambda mel, x: -50 + ripple.repeat(len(x), 1, 1))
    source, encoder = data.BuiltInSounds(), probe.load_encoder(run.path)
    features = probe.compute_features(source, [0], {"trained": encoder})["log-mel"][0]
    assert features[128:] == pytest.approx(ripple[0, 0].std(correction=0).item(), rel=1e-3)


TABLE = "\ufefffilename,fold,category\n{0}0.wav,1.0,a\n{0}1,2,b\n"


@pytest.mark.parametrize("tables, clips", [
    ({"meta/esc50.csv": TABLE.format("")}, {"audio/0": (["a"], "1"), "audio/1": (["b"], "2")}),
    ({"labels.csv": TABLE.format("D:\\x\\au\\")}, {"au/0": (["a"], "1"), "au/1": (["b"], "2")}),
    ({"labels.csv": "filename,category,split\n0,a; b,Train\n1,b,TEST\n2,a,val\n"},
     {"0": (["a", "b"], "train"), "1": (["b"], "test"), "2": (["a"], "valid")}),
    ({"labels.csv": "filename,category\nabsent/1.wav,c\nx/1.wav,a\nx/2.wav,b\n"},
     {"x/1": (["a"], None), "x/2": (["b"], None)}),
    ({}, {"a/c/0": (["a"], None), "b/1": (["b"], None), "2": None}),
    ({}, {"Train/a/0": (["a"], "train"), "validation/b/1": (["b"], "valid"),
          "test/b/1": (["b"], "test")}),
    ({"csv/balanced_train_segments.csv": '# YTID\n-b-d_f-h_jk, 0, 9, "a,b"\n',
      "csv/eval_segments.csv": 'YYYYYYYYYYY, 0, 9, "b,c"\nabsent, 0, 9, "a"\n',
      "csv/class_labels_indices.csv": "index,mid\n0,a\n1,b\n"},
     {"-b-d_f-h_jk_30.0": (["a", "b"], "train"), "YYYYYYYYYYYY": (["b"], "test"), "z": None})])
def test_labels_are_found_in_every_layout(tmp_path, capsys, tables, clips):
    for name, text in (tables | {f"{clip}.wav": "" for clip in clips}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    source, indices, labels, folds = probe.load_labelled(str(tmp_path))
    paths = [os.path.relpath(os.fsdecode(source.path(i)), tmp_path) for i in indices]
    found = dict(zip(paths, zip(labels, folds, strict=True), strict=True))
    assert found == {f"{clip}.wav": row for clip, row in clips.items() if row}
    said = f"2 classes (a, b); {len(clips) - len(found)} files without a label, "
    assert said + f"{int('absent' in str(tables))} rows without a file" in capsys.readouterr().out


@pytest.mark.parametrize("name, text, says", [
    ("labels.csv", "filename,category\nx.wav,a\n", "'x.wav'.*'0.wav'"),
    ("labels.csv", "filename,category\n0.wav,a\n0,b\n", "several files or rows"),
    ("labels.csv", "filename,category\n1,a\n", "several files or rows"),
    ("labels.csv", "name,category\n0.wav,a\n", "no column filename"),
    ("labels.csv", "filename,category,split\n0.wav,a,dev\n", "the split 'dev'"),
    ("eval_segments.csv", "YYYYYYYYYYY, 0, 9, b\n", "balanced_train_segments.csv and eval"),
    ("labels.csv a/labels.csv", "filename,category\n0.wav,a\n", "name the folder of one"),
    ("README.txt", "", "no label fits an audio file")])
def test_labels_that_do_not_fit_are_refused(tmp_path, name, text, says):
    (tmp_path / "a").mkdir()
    for clip in ("0.wav", "1.wav", "1.flac"):
        (tmp_path / clip).touch()
    for path in name.split():
        (tmp_path / path).write_text(text)
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


def test_the_built_in_sounds_have_a_class_for_each_order_and_a_fifth_of_them_tests():
    _, indices, labels, folds = probe.load_labelled(None)
    assert indices == [*range(2400)] and labels == [[c] for c in "012345"] * 400
    assert folds == ["train"] * 1920 + ["test"] * 480


def test_what_is_too_little_to_probe_is_said(capsys):
    with pytest.raises(data.InputError, match="too few clips"):
        probe.make_rounds(torch.eye(2), ["train", "test"])
    probe.make_rounds(torch.eye(2)[[0] * 8 + [1]], [*"111222113"])
    assert "warning: 1 classes of test fold 3 have no clip" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [F.cross_entropy, probe.binary_cross_entropy])
def test_the_linear_probe_ends_where_the_gradient_on_the_training_clips_is_zero(loss):
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5) * 3 + 1, torch.eye(3).repeat(20, 1)
    labels[::2, 0] = labels[::2, 0] if loss is F.cross_entropy else 1
    units = x.mean(0) + torch.cat([torch.zeros(1, 5), torch.diag(x.std(0, correction=0))])
    scores = probe.linear_scores(x, labels, torch.cat([x, units]), 0.1, loss)
    p = scores[:60].softmax(1) if loss is F.cross_entropy else scores[:60].sigmoid()
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    gradient = standard.T @ (p - labels) / 60 + 0.1 * (scores[61:] - scores[60])
    assert gradient.abs().max() < 2e-4 and (p - labels).mean(0).abs().max() < 2e-4


def test_average_precision_by_a_slow_loop_with_ties():
    scores, labels = torch.randint(6, (50, 4)), torch.randint(2, (50, 4)).float()
    labels[:, 3] = 0                                 # a class without clips does not count
    expected = np.mean([np.mean([y[s >= value].mean().item() for value in s[y == 1]])
                        for s, y in zip(scores.T[:3], labels.T[:3], strict=True)])
    assert probe.mean_average_precision(scores, labels) == pytest.approx(expected)


def test_the_regularisation_is_chosen_on_the_valid_clips_alone(monkeypatch):
    torch.manual_seed(0)
    x, labels, loss = torch.randn(90, 20), torch.eye(2).repeat(45, 1), F.cross_entropy
    x[:60, 0] += 2 * labels[:60, 0]                  # a rule that does not hold for the test clips
    train_part, *others = torch.arange(90).split(30)
    best = [min(probe.L2_STRENGTHS, key=lambda l2, part=part: loss(probe.linear_scores(
        x[train_part], labels[train_part], x[part], l2, loss), labels[part])) for part in others]
    fit, knn = mock.Mock(wraps=probe.linear_scores), mock.Mock(wraps=probe.knn_scores)
    monkeypatch.setattr(probe, "linear_scores", fit)
    monkeypatch.setattr(probe, "knn_scores", knn)
    probe.evaluate(x, labels, [(train_part, *others)])
    assert fit.call_args.args[3] == best[0] != best[1], "chosen on the test clips"
    assert torch.equal(fit.call_args.args[0], x[:60]), "not fitted on the clips of train and valid"
    assert len(knn.call_args.args[0]) == 60, "the clips of train and valid do not all vote"


@pytest.mark.parametrize("several, metric, chance", [(0, "accuracy", 0.48), (1, "mAP", 0.65)])
def test_the_table_shows_what_is_known_of_each_row(
        run, tmp_path, monkeypatch, capsys, several, metric, chance):
    """Two rows tell the labels, one of them beside a feature so large that it must be scaled."""
    torch.manual_seed(0)
    kinds = torch.randint(3, (120,))
    rows = [f"{i:03}.wav,{'abc'[kind]}{';d' * (several * i % 2)},{i % 4}" for i, kind
            in enumerate(kinds)]
    (tmp_path / "labels.csv").write_text("\n".join(["filename,category,fold", *rows]))
    for row in rows:
        (tmp_path / row[:7]).touch()
    truth = torch.cat([F.one_hot(kinds), torch.arange(120)[:, None] % 2], dim=1).float()
    values = {"log-mel": torch.randn(120, 8), "untrained": truth,
              "trained": torch.cat([*[truth] * 6, 1000 * torch.randn(120, 1)], dim=1)}

    def compute_features(source, indices, encoders): # of all clips but 0, as if it were unreadable
        assert same(encoders["trained"].encoder.state_dict(), run.saves[-1]["target_encoder"])
        return {name: dict(enumerate(x[1:], start=1)) for name, x in values.items()}

    monkeypatch.setattr(probe, "compute_features", compute_features)
    make_rounds = mock.Mock(wraps=probe.make_rounds)
    monkeypatch.setattr(probe, "make_rounds", make_rounds)
    given = [str(run.path), "--data", str(tmp_path), "--json", str(tmp_path / "table")]
    assert probe.main(given) == 0
    said, table = capsys.readouterr().out, json.loads((tmp_path / "table").read_text())["results"]
    largest = truth[1:, :3 + several].mean(0).max()
    assert f"119 clips, {3 + several} classes, {largest:.0%} of the clips" in said
    assert f"{metric} in %" in said
    assert make_rounds.call_args.args[1] == [*"0123" * 30][1:]
    for name, scores in table.items():
        low, high = (0.2, chance) if name == "log-mel" else (0.99, 1)
        means = [np.mean(scores[column]) for column in ("linear", "kNN")]
        assert low < min(means) and max(means) <= high and len(scores["kNN"]) == 4, (name, means)
        shown, = re.findall(rf"(?m)^{name} +([\d.]+) \+- +[\d.]+ +([\d.]+) \+-", said)
        assert [*map(float, shown)] == pytest.approx([100 * mean for mean in means], abs=0.051)
    assert probe.main(given) == 1 and "choose a new file" in capsys.readouterr().err


# ---- the README --------------------------------------------------------------------------------

with open(os.path.join(os.path.dirname(__file__), "README.md"), encoding="utf-8") as readme:
    README = readme.read()


def test_the_snippets_of_the_readme_run_as_they_stand(run, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pt").symlink_to(run.path)
    (tmp_path / "recordings").symlink_to(recordings)
    words = "arabic-speech-commands-dataset/dataset/{}/0000000{}_NO_0{}.wav"
    digits = "free-spoken-digit-dataset/recordings/{}_{}_0.wav"
    for path in ["sonic-pi/etc/samples/drum.flac", "ESC-50/audio/1-a.wav", "ESC-50/audio/2-b.wav",
                 *(digits.format(i, name) for i in range(3) for name in ("ann", "bob", "cyd")),
                 *(words.format(word, i, take) for word in ("go", "up") for i in (1, 2, 3, 4, 5, 6)
                   for take in (1, 2, 4))]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "ESC-50/meta").mkdir()
    (tmp_path / "ESC-50/meta/esc50.csv").write_text(
        "filename,fold,category,esc10\n1-a.wav,1,dog,True\n2-b.wav,2,cat,False\n")
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, names)
    assert torch.equal(names["embeddings"], names["AudioJEPAEncoder"]()(names["waveform"]))
    assert all(map(os.path.isfile, np.load("vectors.npz")["names"]))
    assert np.load("vectors.npz")["vectors"].shape == (12, 2 * 512)
    tables = {folder: {row["filename"]: (row["category"], row["fold"]) for row in probe.read_csv(
        f"{folder}/labels.csv", [])} for folder in ("hour/digits", "hour/esc10", "words")}
    assert tables["hour/digits"]["2-2_cyd_0.wav"] == ("2", "3") and len(tables["hour/digits"]) == 9
    assert tables["hour/esc10"] == {"dog-1-a.wav": ("dog", "1")} and len(tables["words"]) == 8
    assert tables["words"]["go-00000004_NO_01.wav"] == ("go", "3")


@pytest.mark.skipif(not os.path.isdir("../shared/data/fsdd"), reason="needs ../shared")
def test_the_readme_gives_digits_and_words_the_folds_of_the_tables(tmp_path):
    shared, names = os.path.abspath("../shared"), {}
    code, = re.findall(r"```python\n(import csv.*?)digits = ", README, re.S)
    exec(code, names)
    for folder, parse, n_folds in (
            ("data/fsdd", lambda file: file.stem.split("_")[:2], 6),
            ("unheard/arabic", lambda file: file.stem.split("_NO_")[0].rsplit("-", 1), 5)):
        rows = probe.read_csv(f"{shared}/{folder}/labels.csv", ["fold"])
        files = [names["Path"](shared, folder, row["filename"]) for row in rows]
        names["copy_labelled"](files, tmp_path / folder, parse, n_folds)
        written = probe.read_csv(tmp_path / folder / "labels.csv", ["fold"])
        assert [(row["category"], row["fold"]) for row in written] == [
            (row["category"], row["fold"]) for row in rows], folder


def test_the_diagram_and_the_commands_of_the_readme_name_what_exists():
    diagram, = re.findall(r"```mermaid\nflowchart(.*?)```", README, re.S)
    boxes = re.findall(r'[\[(]"(\w+)', diagram)
    known = {*dir(data), *dir(masking), *dir(model), *dir(model.AudioJEPA), *dir(F), "waveform"}
    assert len(boxes) > 6 and {*boxes} <= known, {*boxes} - known
    commands = re.findall(r"python (train|probe)\.py([^`#\n]*)", README)
    assert len(commands) > 5
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
            (["train.py", *flags(model="tiny", steps=3, amp="bf16", data=odd / "recordings",
                                 log_every=2)], 0,
             "saved ckpt.pt at step 3"),
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
