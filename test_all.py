"""Tests in the order of the chapters. Each rule is held against something independent: a closed
form, a slow loop, or a case worked by hand. No GPU, no network and no data set is needed.
`pytest -q test_all.py -k "not command"` leaves out the tests that start the real commands."""

import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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

KINDS = {"block": ((32,), (4, 24)), "random": ((51,), (1, 77)),      # masks: shapes (C,), (M, K)
         "columns": ((64,), (1, 64))}
N = 20_480                                           # samples of 0.64 s, the length of our clips
TOY = dict(model="toy", seconds=0.64, mask="block", batch_size=5, steps=3, lr=0.01, seed=3,
           device="cpu", amp="off", workers=0, log_every=1, save_every=1)
model.SIZES["toy"] = 64, 4                           # an encoder small enough to test by hand
for number in data.STOP_SIGNALS: signal.signal(number, signal.default_int_handler)     # if nohup

# ---- helpers -----------------------------------------------------------------------------------

class Numbers(data.BuiltInSounds):
    """A source of 50 clips. A window of a clip holds two numbers: its index and its position."""
    bad, name, __len__ = (), staticmethod("clip {}".format), lambda self: 50
    def windows(self, index, n_samples, position=0.0):
        if index in self.bad:
            raise data.InputError("no sound")
        yield torch.tensor([index, position])

def write_tone(path, pitch=400, seconds=0.5, rate=32_000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.1 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate)

@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """12 short recordings in three folders, of several formats, rates and numbers of channels."""
    folder, forms = tmp_path_factory.mktemp("some recordings"), (
        ("0.wav", 0.3, 8000), ("1.flac", 0.9, 44_100, 2), ("2.OGG", 1.5), ("3.mp3", 0.6, 16_000))
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

def test_a_crop_is_the_slice_of_the_file_that_its_position_names(tmp_path):
    ramp = np.linspace(0, 0.9, 96_000, dtype=np.float32)             # samples that tell their place
    soundfile.write(tmp_path / "a.wav", np.stack([ramp, 0 * ramp], 1), 32_000, subtype="FLOAT")
    files = data.AudioFiles(tmp_path)                                # two channels, to be averaged
    for position in (0.0, 0.5, 0.999999):
        start, crop = int(position * 88_001), next(files.windows(0, 8000, position))
        assert crop.tolist() == (ramp[start:start + 8000] / 2).tolist()
    assert torch.cat(list(files.windows(0, 7001))).tolist() == (ramp / 2).tolist()

def test_files_are_found_once_in_any_spelling_and_through_links(tmp_path):
    names = ["a.wav", "b/x.FLAC", "b/c/y z.Opus", "new\nline.aiff", "\udcff.mp3"]
    for name in [*names, "no.txt", "b/wav", "b/._x.FLAC", "../side/1/once.wav", "../side/2/no"]:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).touch()
    links = [("top/b/again", "top"), ("top/b/root", "/"), ("top/elsewhere", "side")]
    for link, goal in links + [(f"side/{n}/{i}", "side") for n in (1, 2) for i in range(9)]:
        (tmp_path / link).symlink_to(tmp_path / goal)          # followed blindly, 9 ** depth paths
    files = data.AudioFiles(tmp_path / "top")
    found = {os.path.relpath(os.fsdecode(files.path(i)), files.root.decode()) for i in range(6)}
    assert found == {*names, "elsewhere/1/once.wav"} and len(files) == 6
    assert all(files.name(i).isprintable() for i in range(6)), "a name is not escaped"

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
    files = data.AudioFiles(tmp_path)
    for i in range(9):
        try:
            good = next(files.windows(i, N)).isfinite().all()
        except (data.InputError, StopIteration):
            good = False
        assert good == ("good" in files.name(i)), files.name(i)

def test_half_of_the_short_clips_are_followed_by_other_clips_until_the_crop_is_full(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", np.full(100, i / 8 + 0.125), 32_000, subtype="FLOAT")
    crops = [data.Crops(data.AudioFiles(tmp_path), 250, seed=0).read(i)[0] for i in range(400)]
    assert {len(crop) for crop in crops} == {100, 250}
    assert 150 < sum(len(crop) == 100 for crop in crops) < 250
    assert {*sum((crop[::50].tolist() for crop in crops), [])} == {0.125, 0.25, 0.375, 0.5}
    assert any(crop[0] != crop[100] for crop in crops if len(crop) == 250)

def drawn(seed, crops):
    """The indices and positions of some crops of a run over 50 clips."""
    return [tuple(data.Crops(Numbers(), 2, seed).read(i)[0].tolist()) for i in crops]

def test_every_epoch_takes_every_clip_once_in_an_order_of_its_own():
    first, second, other = ([index for index, _ in drawn(seed, range(start, start + 50))]
                            for seed, start in ((1, 0), (1, 50), (2, 0)))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second, "every epoch has the same order"
    assert first != other, "the epoch's order ignores the seed"

def test_crops_start_anywhere_and_depend_on_seed_and_number_alone():
    positions = [position for _, position in drawn(1, range(400))]
    counts, _ = np.histogram(positions, bins=4, range=(0, 1))
    assert counts.min() > 60 and max(positions) < 1, "crops do not start evenly along a file"
    assert drawn(1, range(90, 110)) == drawn(1, range(200))[90:110]
    assert not {p for _, p in drawn(2, range(400))} & {*positions}, "crops ignore the seed"

@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_crops_of_their_steps_padded_with_silence(recordings, workers):
    crops = data.Crops(data.AudioFiles(recordings), N, seed=3)
    batches = torch.stack([*data.load_batches(crops, 5, range(2, 5), workers, False)])
    for i, waveform in enumerate(batches.view(15, N), start=10):
        crop, _ = crops.read(i)
        assert torch.equal(waveform[:len(crop)], crop) and not waveform[len(crop):].any()

@pytest.mark.parametrize("bad", [1, 4, 50])
def test_files_that_fail_are_replaced_and_told_once_and_many_stop_the_run(bad, capsys, monkeypatch):
    monkeypatch.setattr(Numbers, "bad", range(bad))
    crops, clips = data.Crops(Numbers(), 2, seed=0), []
    try:
        clips += data.load_batches(crops, 50, range(40), 0, False)
        assert bad == 1 and torch.cat(clips)[:, 0].min() == 1 and crops.failures >= 40
    except data.InputError as error:
        assert bad > 1 and "of the last 1,000 reads failed" in str(error)
    assert capsys.readouterr().out.count("unusable: clip 0: no sound") == 1

@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
def test_workers_that_lack_shared_memory_stop_the_run_at_once(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=64 << 20))
    with pytest.raises(data.InputError, match="--workers 0.*--shm-size"):
        next(data.load_batches(data.Crops(Numbers(), 1_000_000, 0), 32, range(9), 2, False))

@pytest.mark.parametrize("seconds", [0.64, 10.0])
def test_a_spectrogram_has_256_frames_and_a_tone_is_loudest_in_its_band(seconds):
    mel, time = data.LogMel(seconds), torch.arange(data.hop_samples(seconds) * 256) / 32_000
    def mels(hertz):                                 # Slaney: linear to 1 kHz, then logarithmic
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)
    for hertz in (300, 1000, 5000):
        band = (mels(hertz) - mels(20)) / (mels(16_000) - mels(20)) * 129 - 1
        spectrogram, = mel(torch.sin(2 * torch.pi * hertz * time)[None])
        assert spectrogram.shape == (128, 256) and abs(spectrogram[:, 128].argmax() - band) <= 1
    assert mel.spectrogram.mel_scale.fb.sum(0).all(), "a band is empty"

def test_the_log_mel_stays_in_float32_under_autocast():
    mel, waveforms = data.LogMel(0.64), torch.randn(2, N)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mel(waveforms)
    assert torch.equal(inside, mel(waveforms)), "autocast is on inside"

def test_built_in_sounds_play_their_order_and_all_orders_play_the_same_notes():
    source, names = data.BuiltInSounds(), {}
    for i in range(24):                              # all pairs of an order and a timbre
        order, timbre = source.labels(i)
        clip, = source.windows(i, 16 * 2560)
        power = torch.fft.rfft(torch.hann_window(2560) * clip.view(16, 2560)).abs() ** 2
        lowest = (power > 0.3 * power.amax(1, keepdim=True)).int().argmax(1)     # partial, 12.5 Hz
        gaps = 12 * (lowest / lowest.min()).log2() - torch.tensor(4 * source.orders[order])
        names.setdefault(order, set()).add(tuple(source.orders[order]))
        assert gaps.abs().max() < 1.5, (timbre, gaps)
    assert len(set.union(*names.values())) == 6 and len({source.labels(i) for i in range(24)}) == 24

def test_patches_lie_row_by_row():
    spectrogram = torch.arange(128 * 256.).view(1, 128, 256)
    for row, column in ((0, 0), (3, 5), (7, 15)):
        square = spectrogram[0, row * 16:row * 16 + 16, column * 16:column * 16 + 16]
        assert torch.equal(data.patchify(spectrogram)[0, row * 16 + column], square.flatten())

# ---- masking -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_visible_and_hidden_patches_are_distinct_and_any_patch_can_be_either(kind):
    visible, hidden = masking.make_masks(kind, 1000, seed=0, step=0)
    assert (visible.shape[1:], hidden.shape[1:]) == KINDS[kind] and len(visible) == len(hidden)
    assert {*visible.flatten().tolist()} == {*hidden.flatten().tolist()} == {*range(128)}
    for seen, blocks in zip(visible.tolist(), hidden.tolist()):
        assert len({*seen}) == len(seen) and not {*seen} & {*sum(blocks, [])}
        for block in blocks:
            shape = len({patch // 16 for patch in block}), len({patch % 16 for patch in block})
            assert len({*block}) == len(block) and (kind == "random" or shape in {
                "block": ((3, 8), (4, 6)), "columns": ((8, 8),)}[kind])

@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_a_pure_function_of_seed_and_step(kind):
    first = masking.make_masks(kind, 8, seed=1, step=2)
    assert same(first, masking.make_masks(kind, 8, seed=1, step=2))
    assert not same(first, masking.make_masks(kind, 8, 1, 3)), "every step has the same masks"
    assert not same(first, masking.make_masks(kind, 8, 2, 2)), "masks ignore the seed"

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
    targets = targets_by_hand(jepa, patches)[torch.arange(len(patches))[:, None, None], hidden]
    gap = (predictions - targets).abs()
    return torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean()

@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(jepa, kind):
    inputs = torch.randn(2, 128, 256), *masking.make_masks(kind, 2, seed=0, step=0)
    assert torch.allclose(jepa(*inputs)[0], loss_by_hand(jepa, *inputs), rtol=1e-5)

def test_targets_are_the_normalised_layers_of_the_target_encoder(jepa):
    inputs = torch.randn(2, 128, 256), *masking.make_masks("block", 2, seed=0, step=0)
    targets = jepa(*inputs)[2]
    assert not targets.requires_grad, "the targets have a gradient"
    assert torch.allclose(targets, targets_by_hand(jepa, inputs[0]), atol=1e-4)

def turned(x, places):
    """Queries or keys (n, 2 k) of patches, as complex numbers turned according to their columns."""
    k = x.shape[1] // 2
    angles = torch.tensor([[n % 16 * math.pi / 2 * 20 ** (-i / k) for i in range(k)]
                           for n in places])
    pairs = (x[:, :k] + 1j * x[:, k:]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=1)

def test_a_layer_is_attention_head_by_head_and_then_an_mlp():
    torch.manual_seed(0)
    layer, x, places = model.Layer(24, 3), torch.randn(1, 5, 24), [0, 3, 17, 90, 127]
    q, k, v = (part[0].split(8, dim=-1) for part in layer.qkv(layer.norm1(x)).split(24, dim=-1))
    heads = [(turned(q[h], places) @ turned(k[h], places).T / math.sqrt(8)).softmax(-1) @ v[h]
             for h in range(3)]
    y = x + layer.project(torch.cat(heads, dim=-1))
    z = layer(x, model.rotations(8, 16, 8)[None, places])
    assert torch.allclose(z, y + layer.mlp(layer.norm2(y)), atol=1e-5)

def test_the_encoder_gives_every_patch_its_own_position_in_any_order(jepa):
    patches, encoder, codes = torch.randn(2, 128, 256), jepa.encoder, positions(64)
    visible, _ = masking.make_masks("random", 2, seed=0, step=0)
    for latents, seen in ((encoder(patches, visible), visible),
                          (encoder(patches), torch.arange(128).expand(2, -1))):
        x = torch.stack([encoder.embed(x[n]) + codes[n] for x, n in zip(patches, seen)])
        for layer in encoder.layers:
            x = layer(x, model.rotations(8, 16, 64)[seen])
        expected = encoder.norm(x)
        assert torch.allclose(latents, expected, atol=1e-4), "a patch lacks its own position"

@pytest.mark.parametrize("kind", KINDS)
def test_the_predictor_by_a_slow_loop_over_blocks(jepa, kind):
    (visible, hidden), net = masking.make_masks(kind, 2, seed=0, step=0), jepa.predictor
    latents, codes = torch.randn(2, visible.shape[1], 64), positions(32)
    predictions = net(latents, visible, hidden)
    for b, m in np.ndindex(hidden.shape[:2]):
        x = torch.cat([net.mask_token + codes[hidden[b, m]],         # attention minds no order
                       net.embed(latents[b]) + codes[visible[b]]])[None]
        for layer in net.layers:
            x = layer(x, model.rotations(8, 16, 32)[None, torch.cat([hidden[b, m], visible[b]])])
        expected = net.project(net.norm(x[0, :hidden.shape[2]]))
        assert torch.allclose(predictions[b, m], expected, atol=1e-4), "wrong tokens or positions"

def test_all_tensors_of_the_method_are_on_the_device_of_its_inputs():
    """On CUDA, without CUDA: fake tensors have a device and a shape, but no numbers."""
    mel, jepa, fake = data.LogMel(0.64), model.AudioJEPA("toy"), FakeTensorMode()
    with fake, torch.device("cuda"):
        for module in [*mel.modules(), *jepa.modules()]:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = torch.nn.Parameter(torch.empty(tensor.shape))
        visible, hidden = (torch.zeros(2, *shape, dtype=torch.int64) for shape in KINDS["block"])
    with fake:
        patches = data.patchify(mel(torch.empty(2, N, device="cuda")))
        assert {tensor.device.type for tensor in jepa(patches, visible, hidden)} == {"cuda"}
        jepa.update_target_encoder(0.9)
        with pytest.raises(RuntimeError, match="[Dd]evice"):
            jepa(patches, visible.cpu(), hidden)

# ---- train -------------------------------------------------------------------------------------

def test_spread_and_explained_at_their_ends():
    targets, hidden = torch.randn(6, 8, 5), torch.arange(12).view(6, 1, 2) % 7
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

@pytest.fixture(scope="module")
def run(recordings, tmp_path_factory):
    """Three steps of the real loop: its checkpoints, and what reached log-mel and model."""
    path, save = tmp_path_factory.mktemp("run") / "ckpt.pt", train.save_checkpoint
    saves, calls = [], {data.LogMel: [], model.AudioJEPA: []}
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: calls.get(type(module), []).append(inputs))
    with mock.patch.object(train, "save_checkpoint", lambda content, path: (
            saves.append(copy.deepcopy(content)), save(content, path))):
        assert train.main(flags(data=recordings, out=path)) == 0
    hook.remove()
    heard, seen = calls.values()
    return argparse.Namespace(path=path, saves=saves, heard=heard, seen=seen)

def weights_of(checkpoint):
    """All weights in a checkpoint, by their names in AudioJEPA."""
    return {f"{part}.{name}": weights for part in ("encoder", "predictor", "target_encoder")
            for name, weights in checkpoint[part].items()}

def test_every_step_of_a_run_takes_its_own_crops_and_masks(run, recordings):
    crops = data.Crops(data.AudioFiles(recordings), N, seed=3)
    for step, ((waveforms,), (_, *masks)) in enumerate(zip(run.heard[:3], run.seen)):
        expected = torch.stack([crops[5 * step + i][0] for i in range(5)])
        assert torch.equal(waveforms, expected), f"step {step} has wrong crops"
        assert same(masks, [*masking.make_masks("block", 5, 3, step)]), f"step {step}: wrong masks"

def test_the_log_mel_of_a_run_is_fitted_to_the_sound_of_256_crops_not_to_padding(run, recordings):
    crops, mel = data.Crops(data.AudioFiles(recordings), N, seed=3), data.LogMel(0.64)
    mel.load_state_dict(run.saves[0]["mel"])
    values = torch.cat([mel(crops.read(i)[0][None]).flatten() for i in range(256)])
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4, "the log-mel is not fitted"
    assert torch.equal(run.seen[0][0], data.patchify(mel(*run.heard[0])))

def test_the_learning_rate_of_a_run_follows_its_schedule(run):
    rates = [group["lr"] for save in run.saves[1:4] for group in save["optimizer"]["param_groups"]]
    assert train.learning_rate(24, argparse.Namespace(steps=1000, lr=1)) == pytest.approx(25 / 51)
    late = [0.005 * (1 + math.cos(math.pi * (step - 0.15) / 2.85)) for step in (1, 2)]
    assert rates == pytest.approx(np.repeat([0.01 / 1.15, *late], 2)), "no schedule"

def test_the_target_encoder_of_a_run_follows_by_the_momentum_of_each_step(run):
    assert same(run.saves[0]["target_encoder"], run.saves[0]["encoder"])
    for step, (before, after) in enumerate(zip(run.saves[:3], run.saves[1:])):
        keep = 1 - 0.5 * (1 + math.cos(math.pi * step / 3)) / 1.3
        for name, new in after["target_encoder"].items():
            expected = keep * before["target_encoder"][name] + (1 - keep) * after["encoder"][name]
            assert torch.allclose(new, expected, atol=1e-5), f"the EMA of step {step} is wrong"

def test_every_step_of_a_run_is_adamw_on_the_gradient_of_the_loss(run):
    jepa = model.AudioJEPA("toy")
    learned = [pair for pair in jepa.named_parameters() if pair[1].requires_grad]
    learned.sort(key=lambda pair: pair[1].ndim < 2)  # the optimiser has matrices first
    for t, (before, after) in enumerate(zip(run.saves[:3], run.saves[1:]), start=1):
        jepa.load_state_dict(weights_of(before))
        jepa.zero_grad()
        loss_by_hand(jepa, *run.seen[t - 1]).backward()
        lr, state = after["optimizer"]["param_groups"][0]["lr"], after["optimizer"]["state"]
        for i, (name, w) in enumerate(learned):
            last = before["optimizer"]["state"].get(i, {"exp_avg": 0, "exp_avg_sq": 0})
            mean, square = state[i]["exp_avg"], state[i]["exp_avg_sq"]
            assert torch.allclose(mean, 0.9 * last["exp_avg"] + 0.1 * w.grad, atol=1e-5) and \
                torch.allclose(square, 0.95 * last["exp_avg_sq"] + 0.05 * w.grad ** 2, atol=1e-5), \
                f"step {t}: the gradient of {name} is not that of the loss"
            move = mean / (1 - 0.9 ** t) / ((square / (1 - 0.95 ** t)).sqrt() + 1e-8)
            expected = w - lr * 0.05 * (w.ndim > 1) * w - lr * move
            assert torch.allclose(weights_of(after)[name], expected, atol=1e-6), \
                f"step {t}: AdamW, or its weight decay, is wrong for {name}"

def test_fp16_is_used_and_a_step_that_overflows_is_skipped(go, monkeypatch):
    saves, attention, dtypes = [], F.scaled_dot_product_attention, set()
    scaler = torch.amp.GradScaler("cpu", init_scale=2. ** 60, backoff_factor=2. ** -50)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v: dtypes.add(q.dtype) or attention(q, k, v))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, enabled: enabled and scaler)
    monkeypatch.setattr(train, "save_checkpoint", lambda *a: saves.append(copy.deepcopy(a[0])))
    assert go(amp="fp16", steps=2) == 0
    assert dtypes == {torch.float16}, "--amp is ignored"
    assert [same(a["encoder"], b["encoder"]) for a, b in zip(saves, saves[1:3])] == [True, False]

@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_one_graph_for_all_steps(go, monkeypatch, kind):
    graphs, torch_compile = [], torch.nn.Module.compile
    monkeypatch.setattr(model, "range", lambda n: range(1), raising=False)     # a layer is enough
    monkeypatch.setenv("CXX", sys.executable)        # train.py looks for a compiler
    monkeypatch.setattr(model.AudioJEPA, "compile", lambda jepa: torch_compile(
        jepa, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    torch.compiler.reset()
    assert go("--compile", mask=kind) == 0 and len(graphs) == 1, f"compiled {len(graphs)} times"

@pytest.mark.parametrize("signum, workers, mask", [
    (signal.SIGINT, 0, "block"), (signal.SIGTERM, 2, "random"), (signal.SIGHUP, 1, "block")])
def test_a_signal_saves_even_while_the_run_waits_for_data_and_resuming_is_exact(
        go, tmp_path, monkeypatch, signum, workers, mask):
    read, places, pid, armed = data.AudioFiles.windows, [], os.getpid(), tmp_path / "armed"
    def slow(files, index, n_samples, place):
        places.append(place)
        if armed.exists() and place == places[12]:   # in the third batch
            armed.unlink()
            os.kill(pid, signum)
            time.sleep(1)
        return read(files, index, n_samples, place)
    monkeypatch.setattr(data.AudioFiles, "windows", slow)
    monkeypatch.setattr(sys, "stdout", sys.stdout)   # SIGHUP closes it
    assert go(mask=mask, steps=4, out="whole.pt") == 0
    armed.touch()
    assert go(mask=mask, steps=4, workers=workers, save_every=99) == 128 + signum
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] in (range(3) if workers else [2])
    assert train.main(["--resume", str(tmp_path / "ckpt.pt")]) == 0
    assert same(outcome(tmp_path / "whole.pt"), outcome(tmp_path / "ckpt.pt")), "it is not exact"

def test_a_nan_stops_the_run_and_the_last_checkpoint_is_good(go, tmp_path, monkeypatch, capsys):
    factors, smooth_l1 = iter((1, math.nan)), F.smooth_l1_loss
    monkeypatch.setattr(F, "smooth_l1_loss", lambda *a: next(factors) * smooth_l1(*a))
    assert go() == 1 and "at step 2 are NaN" in capsys.readouterr().err
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1

def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    train.save_checkpoint({"old": 1}, tmp_path / "a.pt")
    save = mock.Mock(side_effect=[OSError(28, "disk full"), RuntimeError("disk full")])
    monkeypatch.setattr(torch, "save", save)
    for _ in range(2):
        with pytest.raises(data.InputError, match="disk full"):
            train.save_checkpoint({"new": 1}, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"] and torch.load(tmp_path / "a.pt") == {"old": 1}
    assert len({call.args[1].name for call in save.call_args_list}) == 2, "both in the same file"

@pytest.fixture(scope="module")
def bad(run):
    """The folder of the run, with another checkpoint, of step 1, and much that is none."""
    folder, sick = run.path.parent, copy.deepcopy(run.saves[1])
    sick["target_encoder"]["norm.bias"][0] = math.nan
    for name, content in (("empty", b""), ("text", b"no.wav\n" * 12), ("binary", b"RIFF\0\0\0\0"),
                          ("cut", run.path.read_bytes()[:100_000]),
                          ("pickle", b"cbuiltins\nopen\n(S'executed'\nS'w'\ntR.")):
        (folder / name).write_bytes(content)
    for name, content in (("half", run.saves[1]), ("sick", sick), ("other", {}),
                          ("old", {"format": "audio-jepa 1"})):
        torch.save(content, folder / name)
    return folder

@pytest.mark.parametrize("given, says", [
    ("", "ckpt.pt exists"), ("--resume=ckpt.pt", "is complete"), ("--resume=", "need a path"),
    ("--resume=half --mask=random --lr=1", "leave out --lr, --mask"), ("--data=", "need a path"),
    ("--resume=half --data=text", "not the files"), ("--resume=absent", "No such file"),
    ("--out=no/a.pt", "choose"), ("--out=a.csv", "choose"), ("--out=a.pt --compile", "apt install"),
    ("--out=a.pt --data=absent", "no such folder"),
    ("--out=a.pt --data=empty", "no audio here"), ("--out=a.pt --data=binary", "neither a folder"),
    ("--resume=empty", "not a ch"), ("--resume=text", "not a ch"), ("--resume=cut", "not a ch"),
    ("--resume=other", "not a ch"), ("--resume=pickle", "not a ch"), ("--resume=sick", "NaN"),
    ("--resume=old", "older version")])
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
    assert not torch.equal(other.encoder.embed.weight, encoder.encoder.embed.weight)
    long = torch.randn(2, 50_000)                    # 3 windows of 20,480, 39.06 columns of 1,280
    embeddings, patches = encoder(long, 32_000), data.patchify(encoder.mel(long[:, N:2 * N]))
    assert embeddings.shape == (2, 40, encoder.output_dim) == (2, 40, 8 * 64)
    latents = encoder.encoder(patches)[0].view(8, 16, 64)[:, 4].flatten()
    assert torch.allclose(embeddings[0, 20], latents, atol=1e-4), "column 4 of window 1 is wrong"
    assert encoder(np.random.randn(800), 8000).shape == (1, 3, 512)             # 2.5 columns

def test_labels_are_found_in_every_layout(tmp_path):
    table = "\ufefffilename,fold,category\n0.wav,1,a\n1.wav,2,b\n2.wav,1,a\n3.wav,2,b\n"
    for path, text in (("esc/meta/esc50.csv", table), ("table/labels.csv", table),
                       ("set/balanced_train_segments.csv", '# YTID\n-b-d_f-h_jk, 0, 9, "a,b"\n'),
                       ("set/eval_segments.csv", 'YYYYYYYYYYY, 0, 9, "b,c"\nabsent, 0, 9, "a"\n'),
                       ("set/class_labels_indices.csv", "index,mid\n0,a\n1,b\n")):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(text)
    for i, split in enumerate(("train", "train", "test", "test")):
        for name in ("esc/audio/{0}", "table/{0}", "folders/{1}/{0}", "split/{2}/{1}/{0}",
                     ("set/-b-d_f-h_jk_30.0", "set/YYYYYYYYYYYY", "set/zzzzzzzzzzz", "set/z")[i]):
            write_tone(tmp_path / (name.format(i, "ab"[i % 2], split) + ".wav"))
    for layout, groups in (("esc", "1212"), ("table", "1212"), ("folders", [None] * 4),
                           ("split", ["train", "train", "test", "test"]), ("set", ())):
        source, indices, found, questions = probe.load_labelled(str(tmp_path / layout))
        found = {os.path.basename(source.path(i)).decode(): [names, group] for i, names, group
                 in zip(indices, questions["class"], found)}
        expected = {f"{i}.wav": [["ab"[i % 2]], group] for i, group in enumerate(groups)}
        assert found == (expected or {"-b-d_f-h_jk_30.0.wav": [["a", "b"], "train"],
                                      "YYYYYYYYYYYY.wav": [["b"], "test"]}), layout

@pytest.mark.parametrize("groups, rounds", [
    ([None] * 20, 5), ([*"1223"] * 5, 3), (["train"] * 9 + ["valid"] * 3 + ["test"] * 8, 1)])
def test_the_parts_of_a_round_share_no_clip_and_every_fold_is_tested_once(groups, rounds):
    made = probe.make_rounds(torch.eye(2).repeat(10, 1), groups)
    tested = sum((test.tolist() for *_, test in made), [])
    assert len(made) == rounds and len(tested) == len({*tested}) == (20 if rounds > 1 else 8)
    for parts in made:
        assert sorted(torch.cat(parts).tolist()) == [*range(20)] and all(map(len, parts))
        kinds = [{groups[i] for i in part.tolist()} for part in parts]
        assert rounds == 5 or not (kinds[0] | kinds[1]) & kinds[2], "a test clip is trained on"
        assert rounds > 1 or kinds == [{"train"}, {"valid"}, {"test"}]

def test_a_feature_is_mean_and_std_over_sound_alone_read_by_windows(run, tmp_path, monkeypatch):
    write_tone(tmp_path / "a.wav", seconds=0.3)
    write_tone(tmp_path / "b.wav", seconds=30)
    (tmp_path / "c.wav").write_text("no sound")
    source, read, asked = data.AudioFiles(tmp_path), soundfile.SoundFile.read, set()
    encoder = probe.load_encoder(run.path)
    monkeypatch.setattr(soundfile.SoundFile, "read",
                        lambda file, n, **how: asked.add(n) or read(file, n, **how))
    features, readable = probe.compute_features(source, range(3), {"trained": encoder})
    assert readable == [True, True, False] and asked == {N}, "more than a window was read at once"
    for i, feature in enumerate(features["trained"]):
        embeddings, = encoder(torch.cat(list(source.windows(i, N))), 32_000)
        expected = torch.cat([embeddings.mean(0), embeddings.std(0, correction=0)])
        assert torch.allclose(feature, expected, atol=2e-3), "padding entered"

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
                        for s, y in zip(scores.T[:3], labels.T[:3])])
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

def test_the_commands_train_draw_and_probe_from_a_folder_with_spaces(recordings, tmp_path):
    (tmp_path / "a folder").mkdir()
    for arguments, code, says in (
            (["train.py", *flags(model="tiny", steps=2, amp="bf16")], 0, "saved ckpt.pt at step 2"),
            (["train.py"], 1, "train.py: ckpt.pt exists"), (["masking.py"], 0, "patches visible"),
            (["probe.py", "ckpt.pt", f"--data={recordings}", "--json=table"], 0, "12 clips")):
        output, _ = (process := command(tmp_path / "a folder", *arguments)).communicate(timeout=300)
        assert process.returncode == code and says in output and "Traceback" not in output, output
    results = json.loads((tmp_path / "a folder/table").read_text(), parse_constant=pytest.fail)
    assert [*results["results"]["class"]] == ["log-mel", "untrained", "trained"]
    assert len((tmp_path / "a folder/ckpt.csv").read_text().splitlines()) == 3

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
