"""The sweep files of 06 and 07 have the variants they claim and change one thing at a time."""

import pytest

from cifar_lib import index
from cifar_lib.config import ROOT, config_of
from cifar_lib.config_yaml import read_yaml
from cifar_lib.reports import Report, read_summaries
from cifar_lib.study_experiments import check_parameters, load_preset
from cifar_lib.study_sweep import read_sweep
from cifar_lib.train import train

OVERFITTING, CHOICES = "params/06_overfitting", "params/07_choices"
AUGMENTATION = {"flip": "random", "translate": 4, "rotate": 10, "affine": 0.1}
OF_AN_OPTIMIZER = {"optimizer", "learning_rate", "momentum", "nesterov"}


def changes(config, other) -> dict:
    before = other.model_dump()
    return {k: v for k, v in config.model_dump().items() if v != before[k]}


def test_the_remedies_are_study_es_each_alone_and_the_pair_it_kept():
    sweep = read_sweep(f"{OVERFITTING}/remedies.yaml")
    plain = sweep.variants["vgg16-plain"]
    assert (plain.model, plain.width, plain.epochs, plain.n_train) == ("vgg16", None, 20, 10_000)
    assert (plain.flip, plain.translate, plain.measure_train) == ("none", 0, 2000)
    assert {name: changes(config, plain) for name, config in sweep.variants.items()} == {
        "vgg16-plain": {},
        "vgg16-augmentation": AUGMENTATION,
        "vgg16-weight-decay": {"weight_decay": 5e-5},
        "vgg16-dropout": {"dropout": 0.5},
        "vgg16-pair": AUGMENTATION | {"weight_decay": 5e-5},
    }
    assert set(map(tuple, sweep.seeds.values())) == {(0, 1, 2)}


def test_all_depths_are_plain_and_with_the_pair_at_one_width():
    sweep = read_sweep(f"{OVERFITTING}/depths.yaml")
    assert {config.width for config in sweep.variants.values()} == {0.5}
    assert "half width" in sweep.question
    for model in ("vgg11", "vgg16", "vgg19"):
        plain, pair = (sweep.variants[f"{model}-{name}"] for name in ("plain", "pair"))
        assert plain.model == model and plain.n_train == 10_000
        assert changes(pair, plain) == AUGMENTATION | {"weight_decay": 5e-5}
    assert len(sweep.variants) == 6


def test_at_half_width_the_remedies_are_the_same_and_plain_and_pair_those_of_the_depths():
    """So these are trained once, and paired by seed with each remedy alone."""
    names = ("remedies", "depths", "remedies-half")
    full, depths, half = (read_sweep(f"{OVERFITTING}/{name}.yaml") for name in names)
    plain, *others, best = half.variants
    for name in (plain, others[-1]):
        assert half.variants[name] == depths.variants[name]
    worth = {name: changes(half.variants[name], half.variants[plain]) for name in (*others, best)}
    for name in others:
        assert worth[name] == changes(full.variants[name], full.variants[plain])
    assert worth[best] == worth["vgg16-augmentation"] | worth["vgg16-dropout"]
    assert len(others) == 4 and best == "vgg16-best-pair" and "half width" in half.question
    assert half.seeds[plain] == depths.seeds[plain]


def test_the_plain_run_on_all_images_is_the_published_one():
    sweep = read_sweep(f"{OVERFITTING}/all-images.yaml")
    published = config_of(read_yaml(ROOT / "params/01_baseline/vgg16.yaml"))
    plain, pair = sweep.variants["vgg16-plain"], sweep.variants["vgg16-pair"]
    assert plain.fingerprint("data") == published.fingerprint("data")
    expected = AUGMENTATION | {"weight_decay": 5e-5, "measure_train": 2000}
    assert changes(pair, plain) == expected


@pytest.mark.parametrize(
    "name", ["remedies", "remedies-half", "depths", "all-images", "remedies-smoke"]
)
def test_a_variant_is_called_after_its_model(name):
    for variant, config in read_sweep(f"{OVERFITTING}/{name}.yaml").variants.items():
        assert variant.partition("-")[0] == config.model


def test_the_choices_are_those_that_study_e_compared():
    sweep = read_sweep(f"{CHOICES}/vgg16.yaml")
    default = sweep.variants["default"]
    assert (default.model, default.width, default.n_train) == ("vgg16", 0.5, 10_000)
    assert (default.optimizer, default.schedule, default.batch_size) == ("adam", "constant", 64)
    assert {c.optimizer for c in sweep.variants.values()} == {"adam", "rmsprop", "sgd"}
    schedules = {c.schedule for c in sweep.variants.values()}
    assert schedules == {"constant", "step", "exponential", "cosine"}
    assert {c.batch_size for c in sweep.variants.values()} == {16, 32, 64, 128}
    assert set(map(tuple, sweep.seeds.values())) == {(0, 1, 2)}
    assert "half width" in sweep.question.lower() and "10,000" in sweep.question


@pytest.mark.parametrize(
    ("sweep", "recipe", "reductions"),
    [
        ("07_choices/study-a", "01_baseline/study-a-20", {"n_train": 10_000}),
        (
            "03_improved/learning-rate",
            "03_improved/resnet18",
            {"n_train": 10_000, "epochs": 10},
        ),
        (
            "04_final/leave-one-out",
            "04_final/resnet18-sgd",
            {"n_train": 10_000, "epochs": 10, "width": 0.5, "early_stopping": 0, "tta": "none"},
        ),
        (
            "04_final/sgd-rate",
            "04_final/resnet18-sgd",
            {"n_train": 10_000, "epochs": 10, "width": 0.5, "early_stopping": 0, "tta": "none"},
        ),
        (
            "04_final/whitening",
            "04_final/small",
            {"n_train": 20_000, "epochs": 4, "val_fraction": 0.1, "tta": "none"},
        ),
        (
            "04_final/transfer",
            "04_final/efficientnet-128",
            {"n_train": 10_000, "epochs": 4, "image_size": 64, "tta": "none"},
        ),
    ],
)
def test_a_sweep_is_about_its_own_recipe_but_for_its_reductions(sweep, recipe, reductions):
    default = read_sweep(f"params/{sweep}.yaml").variants["default"]
    config = config_of(read_yaml(ROOT / f"params/{recipe}.yaml"))
    assert changes(default, config) == reductions


@pytest.mark.parametrize(
    "name",
    [f"{CHOICES}/{name}" for name in ("vgg16", "study-a", "choices-smoke")]
    + ["params/04_final/sgd-rate", "params/04_final/whitening", "params/04_final/transfer"],
)
def test_one_thing_is_changed_at_a_time(name):
    sweep = read_sweep(f"{name}.yaml")
    default = sweep.variants.pop("default")
    for variant, config in sweep.variants.items():
        field, _, value = variant.partition("=")
        allowed = {"optimizer": OF_AN_OPTIMIZER, "schedule": {"schedule", "step_epochs", "gamma"}}
        assert set(changes(config, default)) <= allowed.get(field, {field}), variant
        assert str(getattr(config, field)) == value and value != str(getattr(default, field))


@pytest.mark.parametrize(
    ("name", "given"),  # optimisers whose rate is their source's, not searched
    [
        ("07_choices/vgg16", set()),
        ("07_choices/choices-smoke", set()),
        ("02_speed/ablations", {"muon"}),
    ],
)
def test_the_rates_compared_stand_in_the_search_and_else_it_is_the_comparison(name, given):
    sweep, search = (read_sweep(f"params/{name}{suffix}.yaml") for suffix in ("", "-search"))
    default = sweep.variants["default"]
    searched = {(c.optimizer, c.learning_rate) for c in search.variants.values()}
    compared = {(c.optimizer, c.learning_rate) for c in sweep.variants.values()}
    assert {optimizer for optimizer, _ in compared - searched} == given
    assert len(searched) == len(search.variants)
    assert all(set(changes(c, default)) <= OF_AN_OPTIMIZER for c in search.variants.values())
    assert {len(seeds) for seeds in search.seeds.values()} == {1}
    optimizers = [c for v, c in sweep.variants.items() if v.partition("=")[0] in OF_AN_OPTIMIZER]
    by_optimizer = {c.optimizer: changes(c, default) for c in [default, *optimizers]}
    for config in search.variants.values():
        rate = {"learning_rate": config.learning_rate}
        assert changes(config, default) | rate == by_optimizer[config.optimizer] | rate


def test_study_es_final_model_is_what_it_says():
    values = read_yaml(ROOT / "params/04_final/vgg16.yaml")
    check_parameters(values, ROOT / "notebooks/04_final.ipynb", "vgg16.yaml")
    config = config_of(values)
    assert (config.model, config.epochs, config.optimizer) == ("vgg16", 50, "adam")
    assert (config.learning_rate, config.weight_decay, config.schedule) == (0.001, 5e-5, "cosine")
    assert config.rotate and config.affine and config.flip == "random" and config.n_train is None
    assert values["reported_accuracy"] == 0.9228
    shared = {k: getattr(config, k) for k in AUGMENTATION}
    assert shared == AUGMENTATION


def test_the_full_preset_has_both_notebooks_before_the_comparison():
    labels = [experiment.label for experiment in load_preset("full")]
    assert {
        "06_overfitting/remedies",
        "06_overfitting/remedies-half",
        "06_overfitting/depths",
        "06_overfitting/all-images",
        "07_choices/vgg16",
        "07_choices/study-a",
        "04_final/vgg16",
    } <= set(labels)
    assert labels[-1] == "05_compare/compare"


def test_a_sweeps_answer_stands_at_the_top_of_its_notebook(tmp_path, digits, tiny, monkeypatch):
    monkeypatch.setattr("cifar_lib.reports.ROOT", tmp_path)
    runs = {"plain": [train(tiny(epochs=1), 0, digits, tmp_path / "run")]}
    report = Report("out/06_x/remedies", "06_x", "remedies", "full", "What helps?")
    report.finish_sweep(runs, digits.info, answer=["plain: alone", "nothing was shown"])
    assert index.answer(read_summaries("out"), "06_x").splitlines() == [
        "- **remedies**: What helps? ([executed](../reports/full/06_x/remedies/executed.ipynb))",
        "  - plain: alone",
        "  - nothing was shown",
    ]
