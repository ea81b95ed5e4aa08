"""Tests in the order of the chapters. Each test compares with an independent computation: a closed
form, a slow loop, or a case worked by hand. No GPU, no network and no data set is needed.
`pytest -q test_all.py -k "not command"` leaves out the tests that start the real commands."""

import contextlib
import copy
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import masking
import model
import probe
import train

FORMS = ("0.wav", 8000), ("1.flac", 44_100), ("2.OGG", 32_000), ("3.mp3", 16_000)
N = 20_480                                           # samples of 0.64 s, the length of our clips
TOY = dict(size="toy", seconds=0.64, mask="block", targets="all", positions="rotary", ema=0.9,
           warmup=0.05, optimizer="muon", batch_size=5, steps=3, lr=0.01, seed=3, device="cpu",
           amp="off", workers=0, log_every=1, save_every=1)
KINDS = [(targets, positions) for targets in model.TARGETS for positions in model.POSITIONS]
model.SIZES["toy"] = 64, 3                           # an encoder small enough to test by hand
signal.signal(signal.SIGINT, signal.default_int_handler)         # nohup has it ignored


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

    def windows(self, index, n_samples, start=0.0):
        if index in self.bad:
            raise data.UserError("no sound")
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
    return [f"--{key.replace('_', '-')}={value}" for key, value in (TOY | changes).items()]


@pytest.fixture
def go(recordings, tmp_path, monkeypatch):
    """A function that runs train.py on the recordings, and fits the log-mel to few of them."""
    monkeypatch.setattr(train, "CROPS_TO_FIT", 4)
    return lambda *given, out="ckpt.pt", **changes: train.main(
        [*flags(**{"data": recordings, "out": tmp_path / out} | changes), *given])


def same(a, b):
    """Whether two things that can be saved are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def outcome(path):
    """Everything that a run computed, from its checkpoint, without its speed."""
    checkpoint = torch.load(path, weights_only=True) | {"config": None}
    for row in checkpoint["log"]:
        del row["clips/s"], row["waiting"], row["left"]
    return checkpoint


def read_rows(path):
    return probe.read_csv(path, [])


def command(cwd, name, *given, **changes):
    """Start a command in the folder `cwd` as a user would, with a group of processes of its own."""
    arguments = [sys.executable, "-u", os.path.join(os.path.dirname(__file__), name), *given]
    return subprocess.Popen(arguments, cwd=cwd, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | changes)


# ---- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 32_000])
def test_a_window_is_the_slice_of_the_file_that_its_start_names(tmp_path, rate):
    ramp = np.linspace(0, 0.9, 3 * rate, dtype=np.float32)           # samples that tell their place
    channels = np.stack([0.6 * ramp, 0 * ramp, 0.9 * ramp], axis=1)  # 0.5 on average
    soundfile.write(tmp_path / "a.wav", channels, rate, subtype="FLOAT")
    files = data.AudioFiles(tmp_path)
    for start in (0.0, 0.5, 0.999999):                               # the last whole window
        window = next(files.windows(0, 8000, start))                 # a quarter of a second
        first = 2.75 * rate if start > 0.9 else int(start * (2.75 * rate + 1))
        center = (first + rate / 8) / (3 * rate - 1) * 0.45
        assert window[4000].item() == pytest.approx(center, abs=3e-6 if rate == 32_000 else 1e-4)
    whole = torch.cat([*files.windows(0, 7001)])
    assert 95_900 < len(whole) <= 96_000 and whole[-100] == pytest.approx(0.45, abs=1e-3)


def test_files_are_found_once_in_order_through_links_and_hidden_ones_are_skipped(tmp_path, capsys):
    top, many = tmp_path / "top", [f"many/{i:02}.wav" for i in range(30)]
    names = {"a.wav", "b/x.FLAC", "b/c/y.Opus", "new\nl.aiff", "\udcff.mp3", *many}
    for name in [*names, "no.m4a", "b/wav", "b/._x.FLAC", ".Trash/x.wav", "b/.c/x.wav",
                 "../side/once.wav", "../side/n"]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    for link, goal in (("b/up", "top"), ("link", "side"), ("link/up", "top")):
        (top / link).symlink_to(tmp_path / goal)
    for root in (top, f"{top}/"):
        files = data.AudioFiles(root)
        found = [files.name(i) for i in range(len(files))]
        assert {*found} == names | {"link/once.wav"} and len(found) == 36
        assert [name for name in found if name in many] == many, "the order is that of the disk"
        assert ": 36 audio files; 4 other files ignored" in capsys.readouterr().out
    prints = {files.fingerprint}
    for old, new in (("a.wav", "b.wav"), ("many/15.wav", "many/99.wav")):
        (top / old).rename(top / new)
        prints.add(data.AudioFiles(top).fingerprint)
    assert len(prints) == 3, "two sets of files have one fingerprint"


@pytest.mark.parametrize("name, samples, rate, expected", [
    ("eight channels.wav", np.full((6000, 8), 0.5), 192_000, 1000), ("one.wav", [0.5], 32_000, 1),
    ("gsm.wav", np.full(8000, 0.5), 8000, N), ("none.wav", [], 32_000, "no samples"),
    ("slow.wav", [0.5] * 9, 1, "cannot resample"), ("odd.wav", [0.5] * 9, 44_101, "cannot res"),
    ("nan.wav", [0.5, math.nan], 32_000, "NaN"), ("inf.wav", [0.5, -math.inf], 32_000, "NaN"),
    ("integers.wav", [3000.0, 0], 32_000, "beyond 100"), ("text.wav", None, 0, "Error opening")])
def test_a_file_is_either_read_or_refused(tmp_path, name, samples, rate, expected):
    if samples is None:
        (tmp_path / name).write_text("no sound")
    else:
        soundfile.write(tmp_path / name, np.array(samples, dtype=float), rate,
                        subtype="GSM610" if name == "gsm.wav" else "FLOAT")
    files = data.AudioFiles(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(data.UserError, match=expected):
            next(files.windows(0, N, 0.5))
    else:
        window = next(files.windows(0, N, 0.5))
        assert len(window) == expected and window.abs().max() == pytest.approx(0.5, abs=0.25)
        if name == "gsm.wav":                        # cannot seek
            assert torch.equal(window, next(files.windows(0, N)))


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.ogg", "a.mp3"])
def test_a_file_that_was_cut_is_read_as_far_as_it_goes(tmp_path, name):
    path, heard = tmp_path / name, 0
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 128_000), 32_000)
    path.write_bytes(path.read_bytes()[:os.path.getsize(path) // 2])
    with contextlib.suppress(data.UserError):
        for window in data.AudioFiles(tmp_path).windows(0, 8000):
            heard += len(window) / 32_000
    assert 1.4 < heard < 2.2                         # of 4 s


def test_half_of_the_short_clips_are_followed_by_other_clips_until_the_crop_is_full(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", np.full(100, i / 8 + 0.125), 32_000, subtype="FLOAT")
    reader = data.Crops(data.AudioFiles(tmp_path), 250, seed=0)
    crops = [reader.read(i)[0] for i in range(400)]
    assert {len(crop) for crop in crops} == {100, 250}
    assert 150 < sum(len(crop) == 100 for crop in crops) < 250
    assert {*sum((crop[::50].tolist() for crop in crops), [])} == {0.125, 0.25, 0.375, 0.5}
    followers = {(crop[0].item(), crop[100].item()) for crop in crops if len(crop) == 250}
    assert len(followers) == 16, "some file never follows some other one"
    for i, crop in enumerate(crops):
        assert torch.equal(reader.read(i, fill=False)[0], crop[:100]), "another crop without fill"
        assert torch.equal(reader[i][0], F.pad(crop, (0, 250 - len(crop))))


def test_files_shorter_than_a_frame_are_skipped_and_reported(tmp_path, capsys):
    for i in range(9):                               # 6 good ones lack half a frame of a crop
        write_tone(tmp_path / f"good{i}.wav", seconds=0.10641)
        write_tone(tmp_path / f"{i % 2}.wav", seconds=0.001)
    crops = data.Crops(data.AudioFiles(tmp_path), N, seed=0)
    batches = [*data.load_batches(crops, 5, range(8), 0, False)]
    assert len(batches) == 8 and torch.cat(batches)[:, 1000:3000].square().mean(1).min() > 0.001
    said = capsys.readouterr().out.splitlines()[1:]
    assert sorted(said) == [f"skipped '{i}.wav': shorter than one frame" for i in range(2)]


def test_an_epoch_has_every_clip_once_in_random_order_and_from_a_random_start():
    one, two, other = ([data.Crops(Numbers(2), 2, seed).read(i, fill)[0].tolist()
                        for i in range(400)] for seed, fill in ((1, True), (2, True), (1, False)))
    assert one == other, "without fill, a crop begins elsewhere"
    epochs = [[clip for clip, _ in crops] for crops in (one[:50], one[50:100], two[:50])]
    assert all(sorted(epoch) == [*range(50)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 3, "the order ignores the epoch or the seed"
    starts, others = ({start for _, start in crops} for crops in (one, two))
    assert not starts & others, "the starts ignore the seed"
    counts, _ = np.histogram([*starts], bins=4, range=(0, 1))
    assert counts.min() > 60 and max(starts) < 1, "crops do not start evenly along a file"


def test_files_that_fail_are_replaced_and_reported_once_and_many_stop_the_run(capsys, monkeypatch):
    monkeypatch.setattr(Numbers, "bad", range(4))
    batches = [*data.load_batches(data.Crops(Numbers(2), 2, seed=0), 50, range(40), 0, False)]
    assert len(batches) == 40 and torch.cat(batches)[:, 0].min() == 4, "a bad file was used"
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == [f"skipped 'clip {i}': no sound" for i in range(4)]
    monkeypatch.setattr(Numbers, "bad", range(50))
    with pytest.raises(data.UserError, match="20 files in a row cannot be read"):
        next(data.load_batches(data.Crops(Numbers(2), 2, seed=0), 50, range(40), 0, False))


@pytest.mark.parametrize("seconds", [0.64, 10.0])
def test_the_log_mel_is_the_logarithm_of_a_short_time_spectrum_in_triangular_bands(seconds):
    mel, hop = data.LogMel(seconds), round(seconds * 125)
    waveform = 0.01 * torch.randn(1, 256 * hop)
    spectrogram, size = mel.log_mel(waveform), int(2.5 * hop)
    assert spectrogram.shape == (1, 128, 256) and mel.clip_samples == 256 * hop
    assert mel.log_mel(waveform[:, :10 * hop + 1]).shape == (1, 128, 11)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    piece = waveform[0, 100 * hop - size // 2:][:size].numpy() * window  # its center is frame 100's
    power = np.abs(np.fft.rfft(piece, mel.n_fft)) ** 2 / (window ** 2).sum()
    mels = np.linspace(0.3, 15 + 27 * math.log(16, 6.4), 130)    # Slaney's, of 20 Hz to 16 kHz
    edges = np.where(mels < 15, 200 * mels / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    for band in (5, 40, 90, 127):
        rise, fall = np.diff(edges[band:band + 3])
        from_middle = np.arange(mel.n_fft // 2 + 1) * 32_000 / mel.n_fft - edges[band + 1]
        triangle = np.minimum(1 + from_middle / rise, 1 - from_middle / fall).clip(0)
        expected = math.log((power * triangle).sum() + 1e-6)
        assert spectrogram[0, band, 100] == pytest.approx(expected, abs=0.01)
    assert np.allclose(mel.log_mel(torch.zeros(1, N)), math.log(1e-6)), "the floor is not 1e-6"
    assert mel.filters.sum(1).all(), "a band is empty"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel.log_mel(waveform), spectrogram), "autocast is on inside"


def test_built_in_sounds_play_their_order_in_a_key_of_their_own():
    source, keys = data.BuiltInSounds(40_960), []
    for i in [*range(6), *range(24, 30)]:            # sines, whose loudest frequency is the pitch
        clip, = source.windows(i, 10 ** 6)
        frames = clip.unfold(0, 1280, 320) * torch.hann_window(1280)
        peaks = torch.fft.rfft(frames, 16_384).abs().argmax(1) * 32_000 / 16_384
        semitones = 12 * (peaks / peaks.min()).log2()
        runs = [(note, len([*run])) for note, run in itertools.groupby(semitones.round().tolist())]
        notes = [note for note, length in runs if length >= 3]
        heard, order = notes[notes.index(0):], [*source.orders[i % 6]]
        assert len(notes) >= 9 and heard == (order * 4)[:len(heard)] and source.labels[i] == i % 6
        high = torch.fft.rfft(clip)[15_000:].abs()   # above 11.7 kHz
        assert len(clip) == 40_960 and high.median() > 0.1, "there is no noise"
        keys.append(peaks.min().log2())
        assert torch.equal(clip[:99], next(source.windows(i, 99))), "it is not a function of i"
    assert len({tuple(order) for order in source.orders}) == 6 and np.std(keys) > 1 / 12


def test_patches_lie_row_by_row():
    spectrogram = torch.arange(128 * 256.).view(1, 128, 256)
    square = spectrogram[0, 3 * 16:4 * 16, 5 * 16:6 * 16]
    assert torch.equal(data.patchify(spectrogram)[0, 3 * 16 + 5], square.flatten())


# ---- masking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", masking.MASKS)
def test_every_patch_is_visible_or_hidden_and_every_step_has_its_own_masks(kind):
    visible, hidden = masking.make_masks(kind, 2000, seed=0, step=0)
    both = torch.cat([visible, hidden], dim=1)
    assert torch.equal(both.sort(1).values, torch.arange(128).expand(2000, -1))
    seen = {tuple(masking.make_masks(kind, 8, seed, step)[1].flatten().tolist())
            for seed in range(6) for step in (0, 1, 2, 100, 1000, 10_000) for _ in range(2)}
    assert len(seen) == 36, "two steps or seeds share their masks, or a step has several"


def test_random_masks_hide_half_of_the_patches_independently_of_their_place():
    _, hidden = masking.make_masks("random", 2000, seed=0, step=0)
    grid = torch.zeros(2000, 128).scatter_(1, hidden, 1).view(-1, 8, 16)
    assert hidden.shape == (2000, 64)
    assert grid.mean(0).sub(0.5).abs().max() < 0.05
    for neighbour in (grid.roll(1, dims=1), grid.roll(1, dims=2)):
        assert (grid * neighbour).mean().item() == pytest.approx(64 / 128 * 63 / 127, abs=0.01)


def test_blocks_are_two_columns_of_all_rows_and_every_arrangement_is_as_likely_as_another():
    _, hidden = masking.make_masks("block", 10_000, seed=0, step=0)
    grid = torch.zeros(10_000, 128).scatter_(1, hidden, 1).view(-1, 8, 16)
    assert (grid == grid[:, :1]).all(), "a block lacks a row"
    columns = ["".join(map(str, row)) for row in grid[:, 0].int().tolist()]
    runs = {len(run) for text in columns for run in re.findall("1+", text)}
    assert runs == {2, 4, 6, 8}, "a block is not two columns wide"
    # Of the 495 ways to place 4 blocks among 8 single columns, 165 begin with a block.
    assert sum(text[0] == "1" for text in columns) / 10_000 == pytest.approx(1 / 3, abs=0.02)
    assert len({*columns}) == 495


def test_a_hidden_patch_is_drawn_where_it_lies():
    lines = masking.draw(torch.randn(128, 256), torch.tensor([0, 17])).splitlines()
    assert [line[:9].count("?") for line in lines] == [0] * 12 + [4] * 4
    assert lines[-1][:4] == lines[-4][4:8] == "????", "rows go up, and columns to the right"


# ---- model -------------------------------------------------------------------------------------


def position_embeddings(width):
    """The position embeddings of all patches, number by number: (128, width)."""
    return torch.tensor([[wave(place / 10_000 ** (k / (width // 4))) for place in divmod(n, 16)
                          for wave in (math.sin, math.cos) for k in range(width // 4)]
                         for n in range(128)])


def angles(width, positions, places):
    """The angles of rotary positions, number by number: (places, width / 2)."""
    k = width // 2
    return torch.tensor([[(positions == "rotary") * (n % 16) * 10_000 ** (-i / k)
                          for i in range(k)] for n in places])


def through_layers(net, tokens, positions, places):
    """What each layer of a net computes from the tokens (n, width) of one clip."""
    outputs, angle = [tokens], angles(tokens.shape[1] // net.layers[0].heads, positions, places)
    for layer in net.layers:
        rotation = torch.stack([angle.cos(), angle.sin()], 1)
        outputs.append(layer(outputs[-1][None], rotation[None])[0])
    return outputs[1:]


def loss_by_hand(jepa, kind, patches, visible, hidden):
    """The loss clip by clip, written out. A change of the loss must be made here, too."""
    encoder, predictor, target_encoder = jepa.encoder, jepa.predictor, jepa.target_encoder
    wide, narrow, losses, (targets, positions) = *map(position_embeddings, (64, 32)), [], kind
    for x, seen, gone in zip(patches, visible.tolist(), hidden.tolist(), strict=True):
        context = encoder.embed(x[seen]) + wide[seen]
        latents = encoder.norm(through_layers(encoder, context, positions, seen)[-1])
        tokens = torch.cat([predictor.mask_token + narrow[gone],     # attention ignores the order
                            predictor.project_in(latents) + narrow[seen]])
        tokens = through_layers(predictor, tokens, positions, gone + seen)[-1]
        predictions = predictor.project_out(predictor.norm(tokens[:len(gone)]))
        layers = through_layers(target_encoder, target_encoder.embed(x) + wide, positions,
                                range(128))
        goal = (target_encoder.norm(layers[-1]) if targets == "last" else
                sum(F.layer_norm(layer.T, (128,)).T for layer in layers))    # over patches
        gap = (predictions - F.layer_norm(goal, (64,))[gone].detach()).abs()
        losses.append(torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("targets, positions", KINDS)
@pytest.mark.parametrize("mask", masking.MASKS)
def test_the_loss_by_hand_and_in_float32_under_autocast(mask, targets, positions):
    jepa = model.AudioJEPA("toy", positions, targets)
    for weights in jepa.parameters():                # no trivial ones, and two different encoders
        weights.data += 0.1 * torch.randn_like(weights)
    patches, (visible, hidden) = torch.randn(2, 128, 256), masking.make_masks(mask, 2, 0, 0)
    visible = visible[:, torch.randperm(visible.shape[1])]
    loss, _, all_targets = jepa(patches, visible, hidden)
    expected = loss_by_hand(jepa, (targets, positions), patches, visible, hidden)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert not all_targets.requires_grad, "the targets have a gradient"
    with torch.autocast("cpu", torch.bfloat16):
        loss, predictions, all_targets = jepa(patches, visible, hidden)
    assert {loss.dtype, predictions.dtype, all_targets.dtype} == {torch.float32}
    wanted = all_targets[torch.arange(2)[:, None], hidden].double()
    assert loss.item() == pytest.approx(F.smooth_l1_loss(predictions.double(), wanted).item(), 1e-5)


def turned(x, places):
    """Queries or keys (n, 2 k) of patches, as complex numbers turned according to their columns."""
    pairs = torch.complex(*x.chunk(2, dim=1)) * torch.exp(1j * angles(x.shape[1], "rotary", places))
    return torch.cat([pairs.real, pairs.imag], dim=1)


def test_a_layer_is_attention_head_by_head_and_then_an_mlp():
    layer, x, places = model.Layer(24, 3), torch.randn(1, 5, 24), [0, 3, 17, 90, 127]
    layer.norm2.weight.data.fill_(2)                 # unlike the other norm
    q, k, v = (part[0].split(8, dim=-1) for part in layer.qkv(layer.norm1(x)).split(24, dim=-1))
    heads = [(turned(q[h], places) @ turned(k[h], places).T / math.sqrt(8)).softmax(-1) @ v[h]
             for h in range(3)]
    y = x + layer.project(torch.cat(heads, dim=-1))
    up, _, down = layer.mlp
    inner = up(layer.norm2(y))
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2        # GELU
    z = layer(x, model.rotations(8, "rotary")[None, places])
    assert up.out_features == 4 * 24 and torch.allclose(z, y + down(inner), atol=1e-5)


def test_the_base_model_has_the_size_of_the_papers_and_all_of_it_learns():
    with torch.device("meta"):
        jepa = model.AudioJEPA("base", "fixed", "last")
    millions = [sum(p.numel() for p in net.parameters()) / 1e6
                for net in (jepa.encoder, jepa.predictor)]
    assert millions == pytest.approx([85.4, 11.3], abs=0.3)
    fixed = {name.split(".")[0] for name, p in jepa.named_parameters() if not p.requires_grad}
    assert fixed == {"target_encoder"}
    assert [layer.heads for net in (jepa.encoder, jepa.predictor) for layer in net.layers] == (
        [12] * 18), "the paper has 12 heads in 12 + 6 layers"
    with pytest.raises(AssertionError, match="100 is not a multiple of 64"):
        model.Encoder(100, 1, "fixed")


def test_weights_are_xaviers():
    torch.manual_seed(1)
    jepa = model.AudioJEPA("toy", "fixed", "last")
    for module in [*jepa.encoder.modules(), *jepa.predictor.modules()]:
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any()
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert same(jepa.encoder.state_dict(), jepa.target_encoder.state_dict())


@pytest.mark.parametrize("targets, positions", KINDS[::3])
def test_all_tensors_of_the_method_are_on_the_device_of_its_inputs(targets, positions):
    """On the device "meta", whose tensors have a shape, but no values."""
    mel, jepa = data.LogMel(0.64).to("meta"), model.AudioJEPA("toy", positions, targets).to("meta")
    visible = hidden = torch.zeros(2, 64, dtype=torch.int64, device="meta")
    with mock.patch.object(torch, "autocast"):       # which does not know this device
        patches = data.patchify(mel(torch.empty(2, N, device="meta")))
    assert {tensor.device.type for tensor in jepa(patches, visible, hidden)} == {"meta"}
    jepa.update_target_encoder(0.9)


# ---- train -------------------------------------------------------------------------------------


def watched_run(recordings, path, **changes):
    """Three steps of the real loop: its checkpoints, the (inputs, output) of some modules, and the
    gradients that its optimisers were given."""
    saves, write, gradients = [], torch.save, []
    calls = {data.LogMel: [], model.AudioJEPA: [], torch.nn.Linear: []}

    def remember(module, inputs, output):
        calls.get(type(module), []).append((inputs, output))

    def save(content, path):
        saves.append(copy.deepcopy(content))
        write(content, path)

    def before_step(optimizer, *_):
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    hooks = (torch.nn.modules.module.register_module_forward_hook(remember),
             register_optimizer_step_pre_hook(before_step))
    with mock.patch.object(torch, "save", save):
        assert train.main(flags(data=recordings, out=path, **changes)) == 0
    for hook in hooks:
        hook.remove()
    mel, jepa, linear = calls.values()
    return SimpleNamespace(path=path, saves=saves, mel=mel, model=jepa, linear=linear,
                           gradients=gradients)


@pytest.fixture(scope="module")
def run(recordings, tmp_path_factory):
    return watched_run(recordings, tmp_path_factory.mktemp("run") / "ckpt.pt")


# Of the steps of such a run: its learning rates, and the momentum of its target encoder.
RATES = [0.01 / 1.15, *(0.005 * (1 + math.cos(math.pi * (t - 0.15) / 2.85)) for t in (1, 2))]


def momentum(step, ema):
    return 1 - (1 - ema) * 0.5 * (1 + math.cos(math.pi * step / 3))


def test_a_run_has_the_weights_crops_and_masks_of_its_seed_and_a_log_mel_fitted_to_sound(
        run, recordings):
    torch.manual_seed(3)
    jepa = model.AudioJEPA("toy", "rotary", "all")
    assert same(jepa.encoder.state_dict(), run.saves[0]["encoder"])
    crops, mel = data.Crops(data.AudioFiles(recordings), N, seed=3), data.LogMel(0.64)
    mel.load_state_dict(run.saves[0]["mel"])
    values = torch.cat([mel(crops.read(i, fill=False)[0][None]).flatten() for i in range(256)])
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4, "the log-mel is not fitted"
    for step, (waveforms, spectrograms) in enumerate(run.mel):
        expected = torch.stack([crops[5 * step + i][0] for i in range(5)])
        assert torch.equal(*waveforms, expected), f"step {step} has wrong crops"
        patches, *masks = run.model[step][0]
        assert torch.equal(patches, data.patchify(spectrograms))
        assert same(masks, [*masking.make_masks("block", 5, 3, step)]), f"step {step}: wrong masks"


def test_the_rows_of_the_log_are_those_of_their_steps(run):
    rows = read_rows(f"{run.path}.csv")
    for step, (row, ((_, _, hidden), output)) in enumerate(zip(rows, run.model, strict=True)):
        loss, predictions, targets = output
        wanted, means = targets[torch.arange(5)[:, None], hidden], targets.mean(0)[hidden]
        missed = (predictions - wanted).square().sum() / (means - wanted).square().sum()
        expected = {"step": step + 1, "loss": loss.item(), "lr": RATES[step],
                    "ema": momentum(step, 0.9), "explained": 1 - missed.item(),
                    "spread": targets.var(0, correction=0).sqrt().mean().item()}
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
    config = SimpleNamespace(steps=1000, lr=1, warmup=0.05)
    assert train.learning_rate(24, config) == pytest.approx(25 / 51)


def test_a_run_whose_targets_are_alike_is_warned_once(tmp_path, capsys):
    log = train.Log(SimpleNamespace(out=str(tmp_path / "a.pt"), steps=9, batch_size=4))
    for step, spread in enumerate((0.5, 0.05, 0.05)):
        log.next_batch(iter([torch.zeros(4, 1)]))
        log.start = before = time.perf_counter() - 100           # a step of 4 clips took 100 s
        log.write(step, {"spread": spread, f"meter {step}": 1.0})
        said = capsys.readouterr().out
        assert ("warning: all clips" in said) == (step == 1)
        assert ("0:15:00", "0:13:20", "0:11:40")[step] in said, "the time left is wrong"
        assert log.start > before and log.clips == 0, "the clock was not reset"
    rows = read_rows(tmp_path / "a.pt.csv")          # a meter was added, another one removed
    assert [row["meter 1"] for row in rows] == ["", "1.0", ""] and float(rows[0]["clips/s"]) < 0.05


def error(new, old, expected):
    """How far a tensor moved to the wrong place, relative to its movement."""
    return ((new - expected).norm() / (expected - old).norm()).item()


@pytest.mark.parametrize("optimizer, share, kind, ema", [
    ("muon", 0.1, ("all", "rotary"), 0.9), ("adamw", 1, ("last", "fixed"), 0.996)])
def test_every_step_of_a_run_by_hand(run, optimizer, share, kind, ema, recordings, tmp_path):
    if optimizer == "adamw":
        run = watched_run(recordings, tmp_path / "ckpt.pt", optimizer="adamw", ema=ema,
                          targets=kind[0], positions=kind[1])
    jepa, matrices, others = model.AudioJEPA("toy", *kind[::-1]), [], []
    for name, weights in [*jepa.encoder.named_parameters(), *jepa.predictor.named_parameters()]:
        (matrices if weights.ndim == 2 and "layers" in name else others).append(weights)
    optimizers = [torch.optim.Muon(matrices, weight_decay=0.05) if optimizer == "muon" else
                  torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=0.05),
                  torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0)]
    for step, (before, after) in enumerate(itertools.pairwise(run.saves[:4])):
        for name, part in jepa.named_children():
            part.load_state_dict(before[name])
        jepa.zero_grad()
        loss_by_hand(jepa, kind, *run.model[step][0]).backward()
        for i, (mine, part_of_rate) in enumerate(zip(optimizers, (1, share), strict=True)):
            given, parameters = run.gradients[2 * step + i], mine.param_groups[0]["params"]
            assert max(map(error, given, map(torch.zeros_like, given),
                           (p.grad for p in parameters))) < 1e-3, "a gradient is wrong"
            for p, gradient in zip(parameters, given, strict=True):
                p.grad = gradient                    # Muon, in bf16, would amplify a rounding error
            mine.param_groups[0]["lr"] = part_of_rate * RATES[step]
            mine.step()
        for net in ("encoder", "predictor"):
            for name, new in getattr(jepa, net).state_dict().items():
                assert error(after[net][name], before[net][name], new) < 1e-3, (step, name)
        for name, new in after["target_encoder"].items():
            old, kept = before["target_encoder"][name], momentum(step, ema)
            expected = kept * old.double() + (1 - kept) * after["encoder"][name].double()
            assert error(new, old, expected) < 0.01, f"the EMA of step {step} is wrong"
    rotations = probe.load_encoder(run.path).vit.rotations
    assert rotations[:, 1].any() == (kind[1] == "rotary"), "the probe has other positions"


def test_fp16_is_used_and_a_step_that_overflows_is_skipped(recordings, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 60, backoff_factor=2.0 ** -50)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, enabled: enabled and scaler)
    run = watched_run(recordings, tmp_path / "ckpt.pt", amp="fp16", steps=2)
    assert run.linear[0][1].dtype == torch.float16, "--amp is ignored"
    start, first, second = (save["encoder"] for save in run.saves)
    assert same(start, first) and not same(first, second)


@pytest.mark.parametrize("mask", masking.MASKS)
def test_a_compiled_model_is_one_graph_for_all_steps(go, monkeypatch, mask):
    graphs, torch_compile = [], torch.nn.Module.compile
    monkeypatch.setattr(model.AudioJEPA, "compile", lambda jepa: torch_compile(
        jepa, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    torch.compiler.reset()
    assert go("--compile=on", mask=mask) == 0 and len(graphs) == 1, f"compiled {len(graphs)} times"


@pytest.mark.parametrize("changes", [
    {"amp": "fp16"}, {"mask": "random", "workers": 2}, {"optimizer": "adamw", "targets": "last",
                                                        "positions": "fixed", "save_every": 2}])
def test_an_interrupted_run_says_how_to_resume_and_resuming_is_exact(
        go, tmp_path, monkeypatch, capsys, changes):
    assert go(steps=5, out="whole.pt", **changes) == 0
    with monkeypatch.context() as patch:
        masks = [masking.make_masks(changes.get("mask", "block"), 5, 3, i) for i in range(3)]
        make_masks = mock.Mock(side_effect=[*masks, KeyboardInterrupt])
        patch.setattr(train, "make_masks", make_masks)
        assert go(steps=5, **changes) == 130
    step, path = 2 if "save_every" in changes else 3, tmp_path / "ckpt.pt"
    assert (f"ckpt.pt holds step {step} of 5; to continue: python train.py --resume {path}"
            in capsys.readouterr().err)
    assert probe.load_checkpoint(path)["step"] == step
    assert train.main(["--resume", str(path), "--workers", "1"]) == 0
    assert same(outcome(tmp_path / "whole.pt"), outcome(path)), "it is not exact"
    assert outcome(path)["scaler"].get("_growth_tracker") == (5 if changes == {"amp": "fp16"} else
                                                              None), "the scaler is not saved"


def test_a_batch_of_one_clip_has_neither_spread_nor_explained(go, tmp_path):
    assert go(batch_size=1, steps=1) == 0
    assert not {"spread", "explained"} & read_rows(tmp_path / "ckpt.pt.csv")[0].keys()


def test_a_nan_stops_the_run_and_the_last_checkpoint_is_good(go, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda step, config: (0.01, math.nan)[step])
    assert go() == 1 and "at step 2 are NaN" in capsys.readouterr().err
    assert probe.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1


def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(go, tmp_path, monkeypatch, capsys):
    write = torch.save

    def save(content, path):
        write(content, path)
        if content["step"] == 2:
            raise RuntimeError("disk full\nmore")

    monkeypatch.setattr(torch, "save", save)
    assert go() == 1 and capsys.readouterr().err.endswith("disk full\n")
    assert probe.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1


def test_what_exists_is_not_overwritten_and_a_failed_set_up_leaves_nothing(
        go, tmp_path, monkeypatch, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "ckpt.pt").symlink_to(tmp_path / "disk/real.pt")
    with monkeypatch.context() as patch:             # while it sets up, a second run begins
        patch.setattr(train, "set_up", lambda config, _: patch.undo() or sys.exit(go()))
        with pytest.raises(SystemExit, match="1"):
            go()
    assert "choose another --out" in capsys.readouterr().err and not os.listdir(tmp_path / "disk")
    assert go(steps=1) == 0 and os.listdir(tmp_path / "disk") == ["real.pt"]
    assert (tmp_path / "ckpt.pt").is_symlink() and go(steps=1) == 1, "it was overwritten"
    (tmp_path / "ckpt.pt").unlink()
    (tmp_path / "disk/real.pt").unlink()
    assert go(steps=1) == 1, "the log of another run was overwritten"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.wav").write_text("no sound")
    assert go(out="new.pt", data=tmp_path / "bad") == 1
    assert "20 files in a row" in capsys.readouterr().err and not (tmp_path / "new.pt").exists()


@pytest.mark.parametrize("cuda, given, expected", [
    (False, {}, "sounds tiny 1.28 block rotary all 0.99 muon 0.01 0.05 16 1000"),
    (False, {"data": "x"}, "laptop tiny 1.28 block rotary all 0.995 muon 0.005 0.05 16 2000"),
    (True, {"data": "x"}, "paper base 10.0 random fixed last 0.996 adamw 0.0003 0.01 256 100000"),
    (True, {"recipe": "laptop", "ema": 0.5},
     "laptop tiny 1.28 block rotary all 0.5 muon 0.005 0.05 16 2000")])
def test_the_recipe_is_that_of_the_machine_and_the_data(cuda, given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config, _ = train.resolve(given | {"amp": "off"}, None)
    values = [vars(config)[name] for name in ("recipe", *train.METHOD)]
    assert " ".join(map(str, values[:-2])) == expected and values[-2:] == [0, "off"]


@pytest.fixture(scope="module")
def bad(run):
    """The folder of the run, with another checkpoint, of step 1, and much that is none."""
    folder, half = run.path.parent, run.saves[1]
    for name, content in (("empty", b""), ("text", b"no.wav\n" * 12),
                          ("cut", run.path.read_bytes()[:100_000]),
                          ("pickle", b"cbuiltins\nopen\n(S'executed'\nS'w'\ntR.")):
        (folder / name).write_bytes(content)
    sick = half | {"target_encoder": {"norm.bias": torch.tensor([0.0, math.nan])}}
    for name, content in (("half", half), ("sick", sick), ("old", {"format": "audio-jepa 4"}),
                          ("cuda", half | {"config": half["config"] | {"device": "cuda"}})):
        torch.save(content, folder / name)
    (folder / "no audio").mkdir()
    return folder


@pytest.mark.parametrize("given, says", [
    ("", "ckpt.pt or its log exists: choose another --out"), ("--resume=", "not a checkpoint"),
    ("--resume=half --data=.", "not the files"), ("--resume=half --out=ckpt.pt", "exists"),
    ("--resume=absent", "No such file"), ("--resume=cuda", "use --device cpu"),
    ("--out=no/a.pt", "No such file"), ("--out=a.pt --data=absent", "no such folder"),
    ("--out=a.pt --data=text", "no such folder"), ("--out=a.pt --data=no audio", "no audio files"),
    ("--resume=empty", "not a checkpoint"), ("--resume=text", "not a checkpoint"),
    ("--resume=cut", "not a checkpoint"), ("--resume=pickle", "not a checkpoint"),
    ("--resume=old", "not a checkpoint of this version"), ("--resume=sick", "NaN"),
    *((f"--out=a.pt --{name}=0", "must be positive") for name in (
        "batch-size", "steps", "seconds", "lr", "save-every")),
    *((f"--out=a.pt --{name}=-1", "must be positive") for name in ("seed", "workers", "warmup")),
    *((f"--resume=half --{name}={value}".replace("batch_", "batch-"), "leave out --")
      for name, value in {**TOY, "recipe": "laptop"}.items()
      if name not in ("device", "workers", "log_every", "save_every"))])
def test_what_cannot_work_is_refused_in_one_line(bad, monkeypatch, capsys, given, says):
    monkeypatch.chdir(bad)
    write_tone(bad / "x.wav")
    assert train.main([part for part in re.split(" (?=--)", given) if part]) == 1
    error, = capsys.readouterr().err.splitlines()
    assert says in error and not {"a.pt", "a.pt.csv", "executed"} & {*os.listdir()}


# ---- probe -------------------------------------------------------------------------------------


def test_the_encoder_in_one_call(run):
    encoder, untrained = (probe.load_encoder(run.path, trained) for trained in (True, False))
    assert same(encoder.vit.state_dict(), run.saves[-1]["target_encoder"])
    assert same(untrained.vit.state_dict(), run.saves[0]["encoder"])
    assert encoder.mel.mean == untrained.mel.mean == run.saves[-1]["mel"]["mean"] != 0
    assert (encoder.step, untrained.step, encoder.hop_seconds) == (3, 0, 0.04)
    long = torch.randn(2, 50_000)                    # 3 windows of 20,480, 39.06 columns of 1,280
    embeddings, patches = encoder(long, 32_000), data.patchify(encoder.mel(long[:, N:2 * N]))
    assert embeddings.shape == (2, 40, encoder.output_dim) == (2, 40, 8 * 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=probe.find_amp("cpu") == "bf16"):
        latents = encoder.vit(patches)[0].view(8, 16, 64)[:, 4].flatten().float()
    assert torch.allclose(embeddings[0, 20], latents, atol=0.1), "column 4 of window 1 is wrong"
    low, high = (encoder(tone(3000, 0.57, rate), rate)[0] for rate in (8000.0, 32_000))
    assert low.shape == high.shape == (15, 512), "14.25 columns make 15"
    assert F.cosine_similarity(low, high)[2:-3].mean() > 0.95, "not resampled, or not well"


@pytest.mark.parametrize("waveform, rate, says", [
    (torch.zeros(64_000, 2), 44_100, "shape"), (torch.zeros(0, 9), 44_100, "shape"),
    (torch.full((900,), math.nan), 44_100, "floats"), (torch.zeros(900), 0.5, "cannot resample 0"),
    (torch.full((900,), 3000.0), 44_100, "-1 to 1"), (torch.zeros(1, 1, 900), 44_100, "shape"),
    (torch.zeros(900).short(), 44_100, "torch.int16"), (torch.zeros(900), 44_101, "resample"),
    (torch.zeros(0), 44_100, "shape")])
def test_a_waveform_that_cannot_be_meant_is_refused(run, waveform, rate, says):
    with pytest.raises(data.UserError, match=says):
        probe.load_encoder(run.path)(waveform, rate)


def test_the_encoder_is_frozen_until_it_is_unfrozen(run):
    encoder, waveform = probe.load_encoder(run.path), torch.randn(2, N)
    assert not encoder(waveform, 32_000).requires_grad
    encoder.requires_grad_(True)
    encoder(waveform, 32_000).square().mean().backward()
    assert all(weights.grad.any() for weights in encoder.parameters()), "a weight has no gradient"


def test_features_are_mean_and_std_over_all_windows_of_what_can_be_read(
        run, tmp_path, monkeypatch, capsys):
    for i in range(5):
        write_tone(tmp_path / f"{i}.wav", pitch=100 + 50 * i, seconds=0.01 + 0.25 * i)
    write_tone(tmp_path / "long.wav", seconds=6)     # 10 windows, in five pieces
    (tmp_path / "text.wav").write_text("no sound")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 128_000)
    soundfile.write(tmp_path / "zcut.flac", noise, 32_000)
    content = (tmp_path / "zcut.flac").read_bytes()
    (tmp_path / "zcut.flac").write_bytes(content[:len(content) * 2 // 5])    # 1.6 of 4 s
    monkeypatch.setattr(probe, "WINDOWS_AT_ONCE", 2)
    source, encoder = data.AudioFiles(tmp_path), probe.load_encoder(run.path)
    encoders = {"untrained": probe.load_encoder(run.path, trained=False), "trained": encoder}
    capsys.readouterr()
    read, features = probe.compute_features(source, [6, 7, 0, 3, 5], encoders)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "skipped 'text.wav'" in said[0] and "cut short 'zcut" in said[1]
    assert read == [1, 2, 3, 4] and all(x.isfinite().all() for x in features.values())
    with pytest.raises(data.UserError, match="no clip"):
        probe.compute_features(source, [6], encoders)
    for row, index in enumerate((7, 0, 3, 5)):
        windows = [*itertools.islice(source.windows(index, 2 * N), None if index < 7 else 1)]
        series = {"log-mel": torch.cat([encoder.mel(x[None])[0].mT for x in windows])}
        series |= {name: net(torch.cat(windows), 32_000)[0] for name, net in encoders.items()}
        for name, x in series.items():
            expected = torch.cat([x.double().mean(0), x.double().std(0, correction=0)]).float()
            assert torch.allclose(features[name][row], expected, atol=0.03), (name, index)


def test_deviations_of_loud_steady_features_are_not_lost():
    ripple = torch.linspace(-1e-3, 1e-3, 256)[None, :, None]
    assert probe.pool(ripple - 50)[0, 1] == pytest.approx(ripple.std(correction=0).item(), rel=1e-3)


TABLE = "\ufefffilename,fold,category\n{0}0.wav,1.0,a\n{0}1,2,b\n"


@pytest.mark.parametrize("tables, clips", [
    ({"meta/esc50.csv": TABLE.format("")}, {"audio/0": (["a"], "1"), "audio/1": (["b"], "2")}),
    ({"labels.csv": TABLE.format("au/"), "meta/esc50.csv": "filename,category\n0.wav,c\n"},
     {"au/0": (["a"], "1"), "au/1": (["b"], "2"), "b/1": None}),
    ({"labels.csv": "filename,category,split\n0,a; b,Train\n1,b,TEST\n2,a,val\n"},
     {"0": (["a", "b"], "train"), "1": (["b"], "test"), "2": (["a"], "valid")}),
    ({"labels.csv": "filename,category,fold\n0.mp3,a,Train\n1,b,Testing\n"},
     {"0": (["a"], "train"), "1": (["b"], "test")}),
    ({"labels.csv": "filename,category\nabsent/1.wav,c\nx/1.wav,a\n1.wav,b\n"},
     {"x/1": (["a"], None), "1": (["b"], None)}),
    ({"labels.csv": unicodedata.normalize("NFC", "filename,category\né.wav,a\nó,b\n")},
     {unicodedata.normalize("NFD", "x/é"): (["a"], None), "ó": (["b"], None)}),
    ({}, {"a/c/0": (["a"], None), "b/1": (["b"], None), "2": None}),
    ({}, {"Training/a/0": (["a"], "train"), "validation/b/1": (["b"], "valid"),
          "test/b/1": (["b"], "test")}),
    ({"balanced_train_segments.csv": '# YTID\n-b-d_f-h_jk, 0, 9, "a,b"\n',
      "eval_segments.csv": 'YYYYYYYYYYY, 0, 9, "b"\nabsent, 0, 9, "a"\n'},
     {"-b-d_f-h_jk_30.0": (["a", "b"], "train"), "x/YYYYYYYYYYYY": (["b"], "test"), "z": None})])
def test_labels_are_found_in_every_layout(tmp_path, capsys, tables, clips):
    for name, text in (tables | {f"{clip}.wav": "" for clip in clips}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    source, indices, labels, groups = probe.load_labelled(str(tmp_path), N)
    names = [source.name(i) for i in indices]
    found = dict(zip(names, zip(labels, groups, strict=True), strict=True))
    assert found == {f"{clip}.wav": row for clip, row in clips.items() if row}
    said = capsys.readouterr().out
    assert f"2 classes such as a, b; {len(clips) - len(found)} files without a label, " in said
    unused = re.search(r"(\d) rows without a file or a class(.*)", said).groups()
    assert unused[0] == str(int("absent" in str(tables))) and (unused[0] == "1") == (
        "absent" in unused[1])
    used = next(iter(tables), "folder names (no labels.csv)")
    assert f"labels from {used}: {len(found)} clips" in said
    assert ("warning: no folds" in said) == ({*groups} == {None})


@pytest.mark.parametrize("name, text, says", [
    ("labels.csv", "filename,category\nx.wav,a\n", "'x.wav'.*'0.wav'"),
    ("labels.csv", "filename,category\n0.wav,a\n0,b\n", "fits several files"),
    ("labels.csv", "filename,category\n1,a\n", "fits several files"),
    ("labels.csv", "name,category\n0.wav,a\n", "no column filename"),
    ("labels.csv", "filename,category\n0.wav,caf\xe9\n", "in UTF-8"),
    ("eval_segments.csv", "YYYYYYYYYYY, 0, 9, b\n", "balanced_train_segments.csv"),
    ("README.txt", "", "no label fits an audio file")])
def test_labels_that_do_not_fit_are_refused(tmp_path, name, text, says):
    for clip in ("0.wav", "1.wav", "1.flac"):
        (tmp_path / clip).touch()
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises((data.UserError, FileNotFoundError), match=says):
        probe.load_labelled(str(tmp_path), N)


@pytest.mark.parametrize("groups, rounds", [
    ([None] * 20, 5), ([*"1223"] * 5, 3), (["train"] * 9 + ["valid"] * 3 + ["test"] * 8, 1)])
def test_the_parts_of_a_round_share_no_clip_and_every_fold_is_tested_once(groups, rounds):
    made, again = (probe.make_rounds(torch.eye(2).repeat(10, 1), groups) for _ in range(2))
    assert same(made, again), "the rounds depend on more than the labels and groups"
    tested = sum((test.tolist() for *_, test in made), [])
    assert len(made) == rounds and len(tested) == len({*tested}) == (20 if rounds > 1 else 8)
    for indices in made:
        assert sorted(torch.cat(indices).tolist()) == [*range(20)] and all(map(len, indices))
        kinds = [{groups[i] for i in part.tolist()} for part in indices]
        assert rounds == 5 or not (kinds[0] | kinds[1]) & kinds[2], "a test clip is trained on"
        assert rounds > 1 or kinds == [{"train"}, {"valid"}, {"test"}]
        assert rounds < 5 or sum(i % 2 for i in indices[2].tolist()) == 2, "a class lacks in a fold"


def test_the_built_in_sounds_have_a_class_for_each_order_and_a_fifth_of_them_tests():
    source, indices, labels, groups = probe.load_labelled(None, 99)
    assert indices == [*range(2400)] and labels == [[c] for c in "012345"] * 400
    assert groups == ["train"] * 1920 + ["test"] * 480 and len(next(source.windows(7, 999))) == 99


@pytest.mark.parametrize("labels, groups, says", [
    (torch.eye(2), ["train", "test"], "too few clips"), (torch.ones(9, 1), [*"123"] * 3, "classes"),
    (torch.eye(2).repeat(5, 1), [*"12121212"] + [None] * 2, "give every clip"),
    (torch.eye(2).repeat(5, 1), ["train", "test"] * 4 + ["1", "2"], "give every clip"),
    (torch.eye(2).repeat(5, 1), ["test"] * 10, "give every clip")])
def test_what_is_too_little_to_probe_is_refused(labels, groups, says):
    with pytest.raises(data.UserError, match=says):
        probe.make_rounds(labels, groups)


def test_what_may_mislead_is_printed(tmp_path, capsys):
    probe.make_rounds(torch.eye(2)[[0] * 8 + [1]], [*"111222113"])
    assert "warning: 1 classes of test fold 3 have no clip" in capsys.readouterr().out
    for folder in ("Dog", "dog"):
        write_tone(tmp_path / folder / "0.wav")
    probe.load_labelled(tmp_path, N)
    assert "differ only in upper and lower case" in capsys.readouterr().out


def test_features_are_scaled_by_the_reference_and_none_by_a_deviation_near_zero():
    reference = torch.randn(200, 9) * torch.tensor([1.0] * 6 + [9, 1e-4, 0]) + 5
    scaled, query = probe.standardize(reference, reference + 1)
    std = reference.std(0, correction=0)
    expected = 1 / std.clamp(min=0.05 * np.quantile(std, 0.9))
    assert torch.allclose(scaled[:, :7], ((reference - reference.mean(0)) / std)[:, :7], atol=1e-5)
    assert torch.allclose(query - scaled, expected.expand(200, 9), rtol=1e-3)


def test_bands_without_sound_in_training_do_not_drown_the_others():
    """As of recordings at 8 kHz, where the clips to classify have faint noise above 4 kHz."""
    labels = torch.eye(2).repeat(100, 1)
    x = torch.cat([labels.repeat(1, 3) + 0.1 * torch.randn(200, 6), 1e-4 * torch.randn(200, 20)], 1)
    x[100:, 6:] += 0.02
    rounds = [(torch.arange(80), torch.arange(80, 100), torch.arange(100, 200))]
    assert probe.evaluate(x, labels, rounds, several=False) == ([1.0], [1.0])


@pytest.mark.parametrize("loss", [F.cross_entropy, probe.binary_cross_entropy])
def test_the_linear_probe_ends_where_the_gradient_on_the_training_clips_is_zero(loss, monkeypatch):
    x, labels = torch.randn(60, 5), torch.eye(3).repeat(20, 1)
    labels[::2, 0] = labels[::2, 0] if loss is F.cross_entropy else 1
    units = torch.cat([torch.zeros(1, 5), torch.eye(5)])
    monkeypatch.setattr(probe, "L2_STRENGTHS", [0.1])
    scores = probe.linear_scores(x, labels, torch.cat([x, units]), 12, loss)
    p = scores[:60].softmax(1) if loss is F.cross_entropy else scores[:60].sigmoid()
    gradient = x.T @ (p - labels) / 60 + 0.1 * (scores[61:] - scores[60])
    assert gradient.abs().max() < 2e-4 and (p - labels).mean(0).abs().max() < 2e-4


def test_the_ten_most_similar_of_twelve_clips_vote_whatever_their_length():
    angle = torch.linspace(0, 3, 12)
    features = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 5 * angle[:, None])
    weights = (angle[:10].cos() / 0.07).exp()
    expected = torch.stack([weights[k::3].sum() for k in range(3)]) / weights.sum()
    votes = probe.knn_scores(features, torch.eye(3).repeat(4, 1), torch.tensor([[7.0, 0.0]]))
    assert torch.allclose(votes[0], expected, rtol=1e-4), "kNN does not compare by cosine"


@pytest.mark.parametrize("telling, low, high", [(True, 1, 1), (False, 0.08, 0.26)])
def test_the_knn_of_the_log_asks_other_clips_for_what_the_encoder_tells(telling, low, high):
    number_of_clip = torch.arange(240.0)[:, None, None].expand(240, 128, 256)
    mel = mock.Mock(return_value=number_of_clip, mean=torch.zeros(()), clip_samples=1000)

    def vit(patches):                                # latents that tell the order of a clip, or not
        angle = patches[..., :1] % 6 if telling else 6 * torch.rand(len(patches), 1, 1)
        return torch.cat([angle.cos(), angle.sin()], dim=2).expand(-1, 128, 2)

    assert low <= probe.knn_of_orders(mel, vit) <= high


def test_average_precision_by_a_slow_loop_with_ties():
    scores, labels = torch.randint(6, (50, 4)), torch.randint(2, (50, 4)).float()
    labels[:, 3] = 0                                 # a class without clips does not count
    expected = np.mean([np.mean([y[s >= value].mean().item() for value in s[y == 1]])
                        for s, y in zip(scores.T[:3], labels.T[:3], strict=True)])
    assert probe.mean_average_precision(scores, labels) == pytest.approx(expected)


def test_the_regularisation_is_chosen_on_the_valid_clips_alone(monkeypatch):
    x, labels, loss = torch.randn(90, 120), torch.eye(2).repeat(45, 1), F.cross_entropy
    x[:60, 0] += 9 * labels[:60, 0]                  # a rule that does not hold for the test clips
    train_part, valid, test = torch.arange(90).split(30)
    reference, query = probe.standardize(x[:60], x[60:])
    scaled = torch.cat([reference, query])

    def best(part):                                  # without a basis, each fit from zero
        losses = []
        for l2 in probe.L2_STRENGTHS:
            weights = probe.fit(torch.zeros(2, 121), F.pad(scaled[:30], (0, 1), value=1),
                                labels[:30], l2, loss)
            scores = F.pad(scaled[part], (0, 1), value=1) @ weights.T
            losses.append(loss(scores, labels[part]))
        return probe.L2_STRENGTHS[np.argmin(losses)]

    fit, knn = mock.Mock(wraps=probe.fit), mock.Mock(wraps=probe.knn_scores)
    monkeypatch.setattr(probe, "knn_scores", knn)
    expected = best(valid)
    assert expected != best(test)
    monkeypatch.setattr(probe, "fit", fit)
    probe.evaluate(x, labels, [(train_part, valid, test)], several=False)
    assert [len(call.args[1]) for call in fit.call_args_list] == [30] * 4 + [60]
    assert fit.call_args.args[3] == expected, "chosen on the test clips"
    assert same(knn.call_args.args[::2], (reference, query)), "valid clips do not vote"


@pytest.mark.parametrize("several, metric, chance", [(0, "accuracy", 0.48), (1, "mAP", 0.65)])
def test_the_table_shows_what_is_known_of_each_row(
        run, tmp_path, monkeypatch, capsys, several, metric, chance):
    """Two rows tell the labels, one of them beside a feature so large that it must be scaled."""
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
        assert same(encoders["trained"].vit.state_dict(), run.saves[-1]["target_encoder"])
        return [*range(1, 120)], {name: x[1:] for name, x in values.items()}

    monkeypatch.setattr(probe, "compute_features", compute_features)
    monkeypatch.setattr(probe, "make_rounds", mock.Mock(wraps=probe.make_rounds))
    assert probe.main([str(run.path), "--data", str(tmp_path)]) == 0
    assert probe.make_rounds.call_args.args[1] == [*"0123" * 30][1:]
    said = capsys.readouterr().out
    assert f"{run.path}: step 3 of 3\n" in said and "untrained\n" not in said
    largest = truth[1:, :3 + several].mean(0).max()
    assert f"119 clips, {3 + several} classes, the largest with {largest:.0%} of the clips" in said
    assert f"{metric} in %" in said and "over 4 round(s)" in said
    assert several == ("; 60 have several labels; " in said)
    for name in values:
        low, high = (20, 100 * chance) if name == "log-mel" else (99, 100)
        shown, = re.findall(rf"(?m)^{name} +([\d.]+) \+- +[\d.]+ +([\d.]+) \+-", said)
        assert low <= min(map(float, shown)) and max(map(float, shown)) <= high, (name, shown)


def test_a_probe_that_cannot_work_is_refused_before_the_features(bad, monkeypatch, capsys, run):
    torch.save(run.saves[0], bad / "zero")
    monkeypatch.chdir(bad)
    monkeypatch.setattr(probe, "compute_features", None)
    write_tone(bad / "one class/a/0.wav")
    for given, says in (("half --data=one class", "too few clips or classes"), ("old", "not a che"),
                        ("absent", "No such file"), ("half --data=absent", "no such folder"),
                        ("half --vectors=text", "choose a new file"),
                        ("half --vectors=no/a.npz", "choose a new file")):
        assert probe.main(re.split(" (?=--)", given)) == 1
        error, = capsys.readouterr().err.splitlines()
        assert says in error
    assert probe.main(["zero", "--data", "absent"]) == 1
    assert "step 0 of 3\nwarning: this encoder is untrained" in capsys.readouterr().out


def test_vectors_of_a_folder_without_labels(run, recordings, tmp_path, capsys):
    folder, path = tmp_path / "recordings", tmp_path / "out.npz"
    folder.symlink_to(recordings)
    (tmp_path / "bad.wav").write_text("no sound")
    assert probe.main([str(run.path), "--data", str(tmp_path), "--vectors", str(path)]) == 0
    assert "names and vectors of 12 files" in capsys.readouterr().out
    table, encoder = np.load(path), probe.load_encoder(run.path)
    assert [*table["names"]] == [f"recordings/{x}/{name}" for x in "abc" for name, _ in FORMS]
    assert table["vectors"].shape == (12, 2 * encoder.output_dim)
    waveform = next(data.AudioFiles(tmp_path).windows(5, 10 * N))    # "bad.wav" is file 0
    assert np.allclose(table["vectors"][4], probe.pool(encoder(waveform, 32_000))[0], atol=1e-5)


# ---- the README and the commands ---------------------------------------------------------------

with open(os.path.join(os.path.dirname(__file__), "README.md"), encoding="utf-8") as readme:
    README = readme.read()


def test_the_snippets_of_the_readme_run_as_they_stand(run, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hour.pt").symlink_to(run.path)
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings/more").symlink_to(recordings)
    write_tone(tmp_path / "recordings/a.wav", channels=2)
    for given in re.findall(r"python probe\.py (hour.pt .*--vectors.*)", README):
        assert probe.main(given.split()) == 0
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, names)
    waveform = torch.randn(2, N)
    assert torch.equal(names["AudioJEPAEncoder"]()(waveform), names["encoder"](waveform, 32_000))
    assert len(names["similarity"]) == 13 and names["similarity"].argmax() == 0
    assert names["embeddings"].shape == (1, 13, 512)             # 0.5 s


def test_the_diagram_and_the_commands_of_the_readme_name_what_exists():
    diagram, = re.findall(r"```mermaid\nflowchart(.*?)```", README, re.S)
    boxes = re.findall(r'[\[(]"(\w+)', diagram)
    known = {*dir(data), *dir(masking), *dir(model), *dir(model.AudioJEPA), *dir(F), "waveform"}
    assert len(boxes) > 6 and {*boxes} <= known, {*boxes} - known
    commands = re.findall(r"python (train|probe)\.py([^`#\n]*)", README)
    assert len(commands) > 5
    for script, given in commands:
        if script == "train" and "--help" not in given:
            assert {"out", "resume"} & train.parse(given.split()).keys(), "ckpt.pt may exist"
        else:
            assert {*re.findall("--[a-z]+", given)} <= {"--data", "--help", "--vectors"}, given


def test_the_commands_train_draw_and_probe_from_a_folder_with_odd_names(recordings, tmp_path):
    odd = tmp_path / "a folder \udcff"
    odd.mkdir()
    (odd / "recordings").symlink_to(recordings)
    (odd / "labels.csv").write_text("filename,category\n" + "".join(
        f"recordings/{x}/{name},{x}\n" for x in "abc" for name, _ in FORMS))
    for arguments, code, says in (
            (["train.py", *flags(size="tiny", steps=3, amp="bf16", data=odd, log_every=2)], 0,
             "ckpt.pt holds step 3 of 3"),
            (["train.py"], 1, "train.py: ckpt.pt or its log exists"), (["masking.py"], 0, "?▓"),
            (["probe.py", "ckpt.pt"], 0, "12 clips"), (["train.py", "--help"], 0, "sounds")):
        process = command(odd, *arguments, PYTHONIOENCODING="ascii")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code and says in output and "Traceback" not in output, output
    assert len(read_rows(odd / "ckpt.pt.csv")) == 2


def test_the_commands_work_where_print_goes_nowhere_or_into_a_notebook(run, monkeypatch, tmp_path):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        data.make_output_printable()
        assert train.main(["--resume", str(run.path), "--data=absent"]) == 1
        assert probe.main([str(run.path), "--data=absent"]) == 1


def test_a_command_that_is_killed_or_stopped_at_any_moment_resumes_exactly(recordings, tmp_path):
    given = flags(size="tiny", data=recordings, steps=15, workers=1)
    assert train.main([*given, "--out", str(tmp_path / "whole.pt")]) == 0
    process = command(tmp_path, "train.py", *given)
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, -15)):
        assert any(re.match(r" +\d+ +0\.", line) for line in process.stdout), "it reached no step"
        os.killpg(process.pid, signum)               # as a terminal does: the worker gets it, too
        said, _ = process.communicate(timeout=300)
        assert process.returncode == code and "Traceback" not in said
        process = command(tmp_path, "train.py", "--resume", "ckpt.pt")
    assert "Traceback" not in process.communicate(timeout=300)[0] and process.returncode == 0
    assert same(outcome(tmp_path / "whole.pt"), outcome(tmp_path / "ckpt.pt"))
