"""Event datasets: splits, the cache of frames, batches and their augmentation."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from make_events import aedat2, load_small, moving_bars, random_rows, recordings
from train_tools import metrics, run_train

import empf
import eval
from empf.data.batches import Augment
from empf.data.event_frames import EventSettings, FrameSettings, event_frames_of_file
from empf.data.events import DVS_CIFAR10, EventBatches, EventSet, _slanted
from empf.data.load import load_test
from empf.deploy.origin import Origin
from empf.deploy.pack import load_packed


def numbers(events, folder, **settings):
    """(class, number in the file name) of each recording of a set, recognised by its frames."""
    found = {}
    for file in sorted(folder.rglob("*.aedat")):
        frames = event_frames_of_file(file, events.frames.shape[1], events.frames.shape[-1], **settings)
        found[frames.numpy().tobytes()] = (file.parent.name, int(file.stem.split("_")[-1]))
    assert len(found) == len(list(folder.rglob("*.aedat")))
    return [found[frames.float().numpy().tobytes()] for frames in events.frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recordings(tmp_path_factory.mktemp("events") / "dvs", classes=2, each=20)


def test_splits_by_number(folder, tmp_path):
    pairs = {}
    for split in ("first900", "test100", "random"):
        train, test = load_small(folder, split=split, cache=tmp_path)
        pairs[split] = numbers(train, folder), numbers(test, folder)
        for events, found in zip((train, test), pairs[split], strict=True):
            assert [events.class_names[label] for label in events.labels] == [name for name, _ in found]
            assert events.frames.dtype == torch.float16 and events.frames.shape[1:] == (3, 2, 8, 8)
            assert events.split == ("random, seed 0" if split == "random" else split)
        assert sorted(pairs[split][0] + pairs[split][1]) == sorted((f"class{c}", n) for c in (0, 1) for n in range(20))
    # by number, not by name, where 10 comes before 2; all classes in turn
    assert pairs["first900"][1] == [("class0", 18), ("class1", 18), ("class0", 19), ("class1", 19)]
    assert pairs["test100"][1] == [("class0", 0), ("class1", 0), ("class0", 1), ("class1", 1)]
    assert sorted(name for name, _ in pairs["random"][1]) == ["class0"] * 2 + ["class1"] * 2
    again = load_small(folder, split="random", seed=1, cache=tmp_path)[1]
    assert again.split == "random, seed 1"
    assert len({tuple(pairs[s][1]) for s in pairs} | {tuple(numbers(again, folder))}) == 4


def test_spec_limit_and_move(folder, tmp_path):
    train, test = load_small(folder, limit=3, cache=tmp_path)
    assert numbers(train, folder) == [("class0", 0), ("class1", 0), ("class0", 1)]
    assert (len(train), len(test)) == (3, 3)
    assert (train.spec.image_size, train.spec.num_classes, train.spec.channels) == (8, 2, 2)
    assert train.spec.name == DVS_CIFAR10.name == "dvs-cifar10"
    assert len(list((tmp_path).glob("*.npy"))) == 2  # 16 recordings each: not all 40 were decoded
    assert train.to("meta").frames.device.type == "meta"


def test_folders_of_frames_are_their_own_split(tmp_path):
    rng = np.random.default_rng(0)
    expected = {}
    for part, count in (("train", 3), ("val", 2)):
        for name in ("left", "right"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            frames = rng.integers(0, 9, (count, 3, 2, 8, 8))
            for i, f in enumerate(frames):
                np.save(tmp_path / "data" / part / name / f"{i}.npy", f)
            expected[part, name] = torch.from_numpy(frames).half()
    train, test = load_small(tmp_path / "data", cache=tmp_path / "cache")
    for events, part in ((train, "train"), (test, "val")):
        assert events.split == "folders" and events.class_names == ["left", "right"]
        for label, name in enumerate(events.class_names):
            assert torch.equal(events.frames[events.labels == label], expected[part, name])


def test_recordings_below_a_class_are_read_and_what_is_hidden_is_not(tmp_path):
    folder = recordings(tmp_path / "dvs", classes=2, each=20)
    (folder / "class0" / "monday" / "noon").mkdir(parents=True)
    for name in ("cifar10_class0_3.aedat", "cifar10_class0_19.aedat"):
        (folder / "class0" / name).rename(folder / "class0" / "monday" / "noon" / name)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "class1/.old"):
        (folder / hidden).mkdir()
        (folder / hidden / "1.aedat").write_bytes(b"damaged")
    (folder / "class1" / "._cifar10_class1_0.aedat").write_bytes(b"damaged")
    train, test = load_small(folder, cache=tmp_path / "cache")
    assert train.class_names == ["class0", "class1"] and (len(train), len(test)) == (36, 4)
    assert train.labels.bincount().tolist() == [18, 18] and test.labels.tolist() == [0, 1, 0, 1]


def test_errors_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*none: check the path given with --data"):
        load_small(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no recordings in .*: expected <class>/"):
        load_small(tmp_path)
    with pytest.raises(ValueError, match="split must be one of first900, test100, random, got '9:1'"):
        load_small(tmp_path, split="9:1")
    with pytest.raises(ValueError, match="limit must be at least 1 recording"):
        load_small(tmp_path, limit=0)
    recordings(tmp_path / "one", classes=2, each=1)
    with pytest.raises(ValueError, match="too few recordings for the split first900"):
        load_small(tmp_path / "one", cache=tmp_path / "cache")
    (tmp_path / "one" / "class0" / "1.npy").touch()
    with pytest.raises(ValueError, match=r"several kinds \(.aedat, .npy\): keep one"):
        load_small(tmp_path / "one", cache=tmp_path / "cache")
    recordings(tmp_path / "two" / "train", classes=2, each=1)
    recordings(tmp_path / "two" / "test", classes=3, each=1)
    with pytest.raises(ValueError, match="different classes: use the same folders in both"):
        load_small(tmp_path / "two", cache=tmp_path / "cache")


def test_what_has_no_effect_on_recordings_is_refused(tmp_path):
    recordings(tmp_path / "own" / "train", classes=2, each=2)
    recordings(tmp_path / "own" / "val", classes=2, each=2)
    with pytest.raises(ValueError, match="own is divided already: leave --split out"):
        load_small(tmp_path / "own", cache=tmp_path / "cache", split="random")
    for name in ("left", "right"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for number in range(2):
            np.save(tmp_path / "frames" / name / f"{number}.npy", np.zeros((3, 2, 8, 8)))
    for flag, value, why in (
        ("by", "time", "frames: leave --frames-by"),
        ("orientation", "mirrored", "no AEDAT 2.0: leave"),
    ):
        with pytest.raises(ValueError, match=f"frames holds {why}"):
            load_small(tmp_path / "frames", cache=tmp_path / "cache", **{flag: value})


def test_a_single_class_is_refused_and_an_empty_one_named(tmp_path):
    """Such as `train` without a `test` beside it."""
    recordings(tmp_path / "own" / "train", classes=2, each=4)
    with pytest.raises(ValueError, match="own has only the class 'train': give the folder in which each class"):
        load_small(tmp_path / "own", cache=tmp_path / "cache")
    (tmp_path / "own" / "train" / "none").mkdir()
    with pytest.warns(UserWarning, match="train has the classes 'none', of which there is no example"):
        load_small(tmp_path / "own" / "train", cache=tmp_path / "cache")


def event_set(count: int = 22, T: int = 3, side: int = 6, flip_dim: int = -1) -> EventSet:
    """Random frames, all of them different; recording i has the label i mod 10."""
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 99, (count, T, 2, side, side))).half()
    spec = replace(DVS_CIFAR10, image_size=side, crop_padding=1)
    return EventSet(frames, torch.arange(count) % 10, [str(i) for i in range(10)], spec, "first900", flip_dim)


ALL = Augment(flip=True, roll=2, crop=True, label_smoothing=0.1)


def epoch(batches, start=0):
    return [(e.clone(), t) for e, t in batches.iterate(start)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


def test_training_batches_are_a_pure_function_of_seed_epoch_and_number():
    batches = EventBatches(event_set(), 5, train=True, seed=3, augment=ALL)
    assert len(batches) == 4
    batches.set_epoch(2)
    whole = epoch(batches)
    assert all(e.shape == (3, 5, 2, 6, 6) and e.dtype == torch.float32 and e.is_contiguous() for e, _ in whole)
    other = EventBatches(event_set(), 5, train=True, seed=3, augment=ALL)
    other.set_epoch(2)
    assert same(epoch(other, start=2), whole[2:])
    other.set_epoch(3)
    assert not same(epoch(other), whole)
    assert not same(epoch(EventBatches(event_set(), 5, train=True, seed=4, augment=ALL)), whole)


def test_ranks_share_what_one_process_sees():
    whole = epoch(EventBatches(event_set(), 6, train=True, augment=ALL))
    parts = [epoch(EventBatches(event_set(), 2, train=True, augment=ALL, rank=r, world=3)) for r in range(3)]
    joined = [(torch.cat([e for e, _ in p], 1), torch.cat([t for _, t in p])) for p in zip(*parts, strict=True)]
    assert same(joined, whole)


@pytest.mark.parametrize("world", [1, 3])
def test_each_test_recording_comes_once_unchanged(world):
    data = event_set()
    parts = [EventBatches(data, 4, train=False, rank=r, world=world, augment=ALL) for r in range(world)]
    found = [epoch(p) for p in parts]
    assert [len(f) for f in found] == [len(p) for p in parts]
    batches = [b for f in found for b in f]
    assert torch.equal(torch.cat([e for e, _ in batches], 1), data.frames.transpose(0, 1).float())
    assert torch.equal(torch.cat([t for _, t in batches]), data.labels)
    assert same(epoch(parts[0], start=1), found[0][1:])


def augmented(augment: Augment, flip_dim: int = -1, epochs: int = 12):
    """(augmented, original) pairs [T, 2, H, W] of several epochs; labels are found by the order of the epoch."""
    data = event_set(20, flip_dim=flip_dim)
    changed = EventBatches(data, 20, train=True, augment=augment)
    plain = EventBatches(data, 20, train=True)
    for number in range(epochs):
        changed.set_epoch(number)
        plain.set_epoch(number)
        ((after, _),), ((before, _),) = epoch(changed), epoch(plain)
        yield from zip(after.unbind(1), before.unbind(1), strict=True)


@pytest.mark.parametrize("flip_dim", [-1, -2])
def test_flip(flip_dim):
    flipped = [torch.equal(a, b.flip(flip_dim)) for a, b in augmented(Augment(flip=True), flip_dim)]
    kept = [torch.equal(a, b) for a, b in augmented(Augment(flip=True), flip_dim)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))  # whole recordings, never single frames
    assert 90 < sum(flipped) < 150


def shifts(after, before, roll: bool, reach: int):
    """The shifts (y, x) within `reach` that turn one into the other, zeros or the other side coming in."""
    found, side = [], before.shape[-1]
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            moved = before.roll((y, x), (-2, -1))
            if not roll:
                moved = moved.clone()
                moved[..., : max(y, 0), :] = moved[..., side + min(y, 0) :, :] = 0
                moved[..., : max(x, 0)] = moved[..., side + min(x, 0) :] = 0
            if torch.equal(after, moved):
                found.append((y, x))
    return found


@pytest.mark.parametrize("augment", [Augment(roll=1), Augment(crop=True)])
def test_roll_and_crop_move_all_steps_alike(augment):
    seen = [shifts(a, b, augment.roll > 0, reach=2) for a, b in augmented(augment)]
    assert all(len(s) == 1 for s in seen)
    counts = {s: seen.count([s]) for (s,) in seen}
    assert set(counts) == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert min(counts.values()) > 10  # 240 recordings, 9 shifts


def test_frames_are_dropped_whole():
    emptied = []
    for after, before in augmented(Augment(drop=0.3), epochs=4):
        empty = (after == 0).flatten(1).all(1)
        assert torch.equal(after[~empty], before[~empty])
        emptied += empty.tolist()
    assert 0.2 < sum(emptied) / len(emptied) < 0.4


def test_a_square_is_cut_out_of_all_steps_alike():
    places = set()
    for after, before in augmented(Augment(cutout=2), epochs=4):
        hole = (after != before).flatten(0, 1).any(0)
        assert (after[:, :, hole] == 0).all() and 1 <= hole.sum() <= 4
        places.add(tuple(hole.nonzero()[0].tolist()))
    assert len(places) > 10


@pytest.mark.parametrize(("degrees", "turns"), [(90.0, 1), (-90.0, -1), (180.0, 2)])
def test_turning_is_exact_at_right_angles(degrees, turns):
    events = event_set(4).frames.transpose(0, 1).float()
    turned = _slanted(events, torch.full((4,), degrees), torch.zeros(4))
    torch.testing.assert_close(turned, events.rot90(turns, (-2, -1)), rtol=0, atol=1e-3)


def test_turned_and_slanted_events_stay_together():
    square = torch.zeros(3, 2, 2, 17, 33)
    square[..., 6:11, 14:19] = 1
    slanted = _slanted(square, torch.tensor([20.0, 0.0]), torch.tensor([0.0, 0.5]))
    assert torch.equal(slanted[0], slanted[2]) and slanted.sum() == pytest.approx(square.sum().item(), rel=0.03)
    rows = torch.arange(33.0)
    centres = [(slanted[0, 1, 0, y] * rows).sum() / slanted[0, 1, 0, y].sum() for y in (7, 9)]
    assert (centres[0] - centres[1]).abs() > 0.5  # the second one leans
    for augment in (Augment(rotate=15), Augment(shear=0.2)):
        assert sum(not torch.equal(a, b) for a, b in augmented(augment, epochs=1)) >= 19


def test_one_augmentation_leaves_the_draws_of_the_others_alone():
    both = list(augmented(Augment(flip=True, roll=1), epochs=2))
    rolled = [shifts(a, b, True, 1)[0] for a, b in augmented(Augment(roll=1), epochs=2)]
    flipped = [torch.equal(a, b.flip(-1)) for a, b in augmented(Augment(flip=True), epochs=2)]
    for (after, before), shift, flip in zip(both, rolled, flipped, strict=True):
        assert torch.equal(after, (before.flip(-1) if flip else before).roll(shift, (-2, -1)))


@pytest.mark.parametrize("orientation", ["transposed", "mirrored"])
def test_flip_mirrors_the_scene_in_both_orientations(tmp_path, orientation):
    """Left and right of the scene are those of `transposed`, where a column is 127 - y' of the address."""
    rows = random_rows(300)
    mirrored = [(x, 127 - y, bit, t) for x, y, bit, t in rows]
    for name in ("a", "b"):
        (tmp_path / "dvs" / name).mkdir(parents=True)
        for number, events in enumerate((rows, mirrored)):
            (tmp_path / "dvs" / name / f"{number}.aedat").write_bytes(aedat2(events))
    settings = dict(T=2, size=16, orientation=orientation, workers=1, cache=tmp_path / "cache", limit=1)
    scene, mirror = load_small(tmp_path / "dvs", **settings)
    batches = EventBatches(scene, 1, train=True, augment=Augment(flip=True))
    seen = set()
    for number in range(12):
        batches.set_epoch(number)
        ((events, _),) = epoch(batches)
        seen.add(next(i for i, s in enumerate((scene, mirror)) if torch.equal(events[:, 0], s.frames[0].float())))
    assert seen == {0, 1}


def test_label_smoothing():
    ((_, targets),) = epoch(EventBatches(event_set(20), 20, train=True, augment=Augment(label_smoothing=0.1)))
    ((_, labels),) = epoch(EventBatches(event_set(20), 20, train=True))
    assert torch.allclose(targets.sum(1), torch.ones(20)) and torch.equal(targets.argmax(1), labels)
    assert torch.allclose(targets.amax(1), torch.tensor(0.91))


def test_wrong_arguments_of_batches():
    with pytest.raises(ValueError, match="22 training images do not fill one batch of 24: use a smaller"):
        EventBatches(event_set(), 12, train=True, world=2)
    with pytest.raises(ValueError, match="got batch_size=0"):
        EventBatches(event_set(), 0, train=False)
    with pytest.raises(ValueError, match="roll must not be negative, got -1"):
        Augment(roll=-1)
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1, got 2"):
        Augment(label_smoothing=2)


def test_evaluation_makes_frames_as_training_did(tmp_path, monkeypatch):
    """The flags of train.py reach the frames, and from config.json or the packed file those of eval.py."""
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        moving_bars(tmp_path / "data" / split, 16, T=2, seed=0)
    used = []
    monkeypatch.setattr(
        FrameSettings, "__post_init__", lambda s: used.append((s.T, s.size, s.by, s.orientation, s.resize))
    )
    run, packed, found = tmp_path / "run", tmp_path / "net.safetensors", tmp_path / "found.json"
    flags = ["--frames-by", "time", "--orientation", "mirrored", "--resize", "8bit", "--roll", "2", "--epochs", "1"]
    run_train("--dataset", "dvs-cifar10", "--data", tmp_path / "data", *flags, "--output-dir", run)
    assert json.loads((run / "config.json").read_text())["train"]["roll"] == 2
    recording = tmp_path / "data" / "test" / "left" / "0.aedat"
    for arguments in (
        [run, "--pack", packed, "--json", found],
        [packed, "--data", tmp_path / "data"],
        [run, "--stream", recording],
        [packed, "--stream", recording],
    ):
        before = len(used)
        eval.main([*map(str, arguments), "--threads", "1"])
        assert len(used) > before
    monkeypatch.undo()
    assert set(used) == {(2, 48, "time", "mirrored", "8bit")}
    assert json.loads(found.read_text())["accuracy"] == metrics(run)[-1]["accuracy"]


def test_own_recordings_are_evaluated_and_followed_as_they_were_trained(tmp_path, monkeypatch, capsys):
    """Frames and classes are those of the training, for runs and packed files; other recordings are tested whole."""
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    recordings(tmp_path / "own", classes=3, each=10)
    flags = ["--dataset", tmp_path / "own", "--image-size", "16", "--frames-by", "time", "--epochs", "1"]
    run_train(*flags, "--arch", "vgg_snn", "--batch-size", "9", "--lr", "0.05", "--output-dir", tmp_path / "run")
    origin = Origin.of(empf.load(tmp_path / "run"))
    assert origin.frames() == {"by": "time", "orientation": "upright", "resize": "area"} and origin.images == 30
    packed = tmp_path / "net.safetensors"
    eval.main([str(tmp_path / "run"), "--pack", str(packed), "--threads", "1"])
    for place in ("new", "new2/test"):  # without the first class
        recordings(tmp_path / place, classes=3, each=4)
        shutil.rmtree(tmp_path / place / "class0")
    spec = {"spec": origin.spec(load_packed(packed).config), "classes": origin.classes, "trained_on": (30, None)}
    files = (tmp_path / "new").rglob("*.aedat")
    sums = sorted(event_frames_of_file(file, 2, 16, **origin.frames())[0].sum().item() for file in files)
    for place in ("new", "new2"):
        settings = EventSettings(2, 16, **origin.frames())
        test = load_test(str(tmp_path / "own"), tmp_path / place, events=settings, **spec)
        assert test.labels.bincount().tolist() == [0, 4, 4] and test.class_names == ["class0", "class1", "class2"]
        assert sorted(f[0].float().sum().item() for f in test.frames) == pytest.approx(sums)
    for network in (tmp_path / "run", packed):
        for flags, images in (([], 3), (["--data", tmp_path / "new"], 8)):
            capsys.readouterr()
            eval.main([str(network), *map(str, flags), "--threads", "1", "--json", "-"])
            assert json.loads(capsys.readouterr().out)["images"] == images
