"""One loop: it learns, repeats itself to the bit, resumes, stops early and refuses to go astray."""

import dataclasses

import pandas as pd
import pytest
import torch
from filelock import FileLock
from torch import nn

from cifar_lib import checkpoint, execution, results, study_runs, train_state
from cifar_lib import train as train_module
from cifar_lib.data import Splits
from cifar_lib.execution import Execution, choose_execution
from cifar_lib.predict_stage import evaluate_run
from cifar_lib.train import check_runnable, train


def history(run: results.Run) -> pd.DataFrame:
    return run.metrics.drop(columns="seconds")


def same_weights(a: results.Run, b: results.Run) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


class StopError(Exception):
    """Stands for a process that ends between two epochs."""


def stop_after(monkeypatch, epoch: int) -> None:
    save = checkpoint.save_checkpoint

    def save_then_stop(run_dir, state):
        save(run_dir, state)
        if state["epoch"] == epoch:
            raise StopError

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_then_stop)


def test_it_learns_and_leaves_a_whole_record(tmp_path, digits, tiny):
    run = train(tiny(epochs=6, learning_rate=0.1, tta="mirror"), 0, digits, tmp_path)
    assert run.metrics.train_loss.iloc[-1] < 0.7 * run.metrics.train_loss.iloc[0]
    result = run.summary["result"]
    assert result["test_accuracy"] > 0.3
    assert result["best_epoch"] == run.metrics.val_accuracy.idxmax() + 1
    assert result["val_accuracy"] == run.metrics.val_accuracy.max()
    assert result["epochs"] == 6 and result["seed"] == 0
    assert run.test_logits.shape == (len(digits.test), 10)
    accuracy = (run.test_logits.argmax(1) == digits.test.labels).double().mean().item()
    assert result["test_accuracy"] == accuracy
    assert result["test_accuracy_tta"] is not None
    assert {p.name for p in tmp_path.iterdir()} >= {
        "config.yaml", "metrics.csv", "last.pt", "previous.pt", "best.safetensors", "summary.json",
    }  # fmt: skip
    assert list(run.metrics) == results.METRIC_COLUMNS


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 0.2, "cutout": 8, "randaugment_ops": 1, "flip": "alternating"},
        {"ema_decay": 0.9, "optimizer": "adamw", "learning_rate": 0.01},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path, digits, tiny, monkeypatch, changes
):
    config = tiny(dropout=0.2, **changes)
    whole = train(config, 0, digits, tmp_path / "whole")
    stop_after(monkeypatch, 2)
    with pytest.raises(StopError):
        train(config, 0, digits, tmp_path / "cut")
    monkeypatch.undo()
    assert not results.is_finished(tmp_path / "cut")
    resumed = train(config, 0, digits, tmp_path / "cut")
    pd.testing.assert_frame_equal(history(whole), history(resumed), check_exact=True)
    assert same_weights(whole, resumed)
    assert torch.equal(whole.test_logits, resumed.test_logits)


def test_a_stop_between_the_state_and_what_goes_with_it_loses_neither(
    tmp_path, digits, tiny, monkeypatch
):
    config = tiny(val_fraction=0.0)  # the last epoch is the best
    whole = train(config, 0, digits, tmp_path / "whole")
    stop_after(monkeypatch, 3)  # its state is saved, its weights and its history are not yet
    with pytest.raises(StopError):
        train(config, 0, digits, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(config, 0, digits, tmp_path / "cut")
    assert same_weights(whole, resumed)
    pd.testing.assert_frame_equal(history(whole), history(resumed), check_exact=True)


def test_seeds_differ_and_repeat(tmp_path, digits, tiny):
    first, again, other = (
        train(tiny(epochs=1), seed, digits, tmp_path / name)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_a_state_of_other_code_is_not_continued(tmp_path, digits, tiny, monkeypatch):
    stop_after(monkeypatch, 2)
    with pytest.raises(StopError):
        train(tiny(), 0, digits, tmp_path)
    monkeypatch.undo()
    starts = []
    real = train_module.train_epoch
    monkeypatch.setattr(
        train_module,
        "train_epoch",
        lambda state, *rest: (starts.append(state.epoch), real(state, *rest))[1],
    )
    weights = (tmp_path / "best.safetensors").read_bytes()
    with monkeypatch.context() as changed:
        changed.setattr(train_state, "training_code_sha256", lambda: "0" * 64)
        stop_after(changed, 1)
        with pytest.raises(StopError):
            train(tiny(), 0, digits, tmp_path)
    assert starts == [0]
    (kept,) = tmp_path.glob("other-*")
    assert (kept / "best.safetensors").read_bytes() == weights
    train(tiny(), 0, digits, tmp_path)  # back on the code before, whose state was kept
    assert starts == [0, 2]
    (kept_then,) = tmp_path.glob("other-*")
    assert kept_then != kept


def test_code_is_other_code_by_what_it_does_not_by_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "_PACKAGE", tmp_path / "cifar_lib")
    path = tmp_path / "cifar_lib/train.py"
    path.parent.mkdir()
    hashes = []
    for text in (
        'def f(x):\n    """Doubles."""\n    return 2 * x\n',
        "def f(x):  # doubles\n\n    return (\n        2 * x\n    )\n",
        "def f(x):\n    return 3 * x\n",
    ):
        path.write_text(text)
        hashes.append(execution.training_code_sha256.__wrapped__())
    path.rename(path.with_name("train_state.py"))
    hashes.append(execution.training_code_sha256.__wrapped__())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_micro_batches_add_up_to_the_batch(tmp_path, digits, tiny, monkeypatch):
    # Without batch norm, whose statistics are the micro-batch's, the sum is exact but for rounding.
    monkeypatch.setattr(
        train_state, "build_model", lambda _, k: nn.Sequential(nn.Flatten(), nn.Linear(3072, k))
    )
    config = tiny(epochs=2, learning_rate=0.001)
    whole = train(config, 0, digits, tmp_path / "whole")
    small = config.model_copy(update={"micro_batch_size": 10})
    parts = train(small, 0, digits, tmp_path / "parts")
    assert parts.metrics.train_loss.values == pytest.approx(whole.metrics.train_loss.values)
    for name, weights in whole.weights.items():
        assert torch.allclose(weights, parts.weights[name], atol=1e-5)
    assert parts.summary["config_fingerprint"] != whole.summary["config_fingerprint"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, digits, tiny, monkeypatch):
    real = train_module.augment_batch

    def broken(images, labels, index, *, epoch, **rest):
        x, y = real(images, labels, index, epoch=epoch, **rest)
        return (x * float("nan") if epoch == 1 else x), y

    monkeypatch.setattr(train_module, "augment_batch", broken)
    with pytest.raises(FloatingPointError, match=r"epoch 2, step 1 of 4.*learning_rate"):
        train(tiny(), 0, digits, tmp_path)
    assert checkpoint.load_checkpoint(tmp_path)["epoch"] == 1
    assert not results.is_finished(tmp_path)


def test_weights_that_go_astray_in_the_last_step_are_not_recorded(
    tmp_path, digits, tiny, monkeypatch
):
    real = train_module.train_epoch

    def broken(state, *rest):
        metrics = real(state, *rest)
        if state.epoch == 1:
            next(state.model.parameters()).data.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(train_module, "train_epoch", broken)
    with pytest.raises(FloatingPointError, match="weights .* not finite after epoch 2"):
        train(tiny(), 0, digits, tmp_path)
    assert checkpoint.load_checkpoint(tmp_path)["epoch"] == 1


def test_one_process_a_run(tmp_path, digits, tiny):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="another process is training this run"),
    ):
        train(tiny(), 0, digits, tmp_path)


def test_forcing_a_run_leaves_one_that_is_being_trained(tmp_path, digits, tiny, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    config = tiny()
    name = f"0-{config.fingerprint(digits.info.sha256)}"
    folder = tmp_path / "runs/mine" / name
    folder.mkdir(parents=True)
    (folder / checkpoint.LAST).write_text("hours of work")
    with (
        FileLock(folder / ".lock"),
        pytest.raises(ValueError, match="another process is training this run"),
    ):
        study_runs.runs(config, [0], experiment="mine", splits=digits, force=True)
    assert (folder / checkpoint.LAST).read_text() == "hours of work"


def test_images_too_small_for_the_network_are_refused_before_data_is_read(tiny):
    with pytest.raises(ValueError, match="low_resolution 24: too small for vgg16"):
        check_runnable(tiny(model="vgg16", low_resolution=24, low_resolution_epochs=1))
    check_runnable(tiny(model="vgg16", low_resolution=24, low_resolution_epochs=0))
    check_runnable(tiny(model="resnet18", low_resolution=24, low_resolution_epochs=1))


def test_whitening_sees_every_class_of_a_sorted_folder(digits, tiny):
    order = digits.train.labels.argsort()
    images = digits.train.images[order].float()
    images[: len(order) // 2] = images[: len(order) // 2].mean()  # the first classes: flat
    train_set = dataclasses.replace(digits.train, images=images.to(torch.uint8))
    splits = dataclasses.replace(digits, train=train_set)
    config = tiny(model="speed_net", width=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state, "WHITENING_IMAGES", 100)
        state = train_state.TrainState.start(config, 0, splits, choose_execution(config))
    # Of flat pictures alone every variance is 0, and each filter as long as the epsilon lets it.
    lengths = state.model.whitening.weight.flatten(1).norm(dim=1)
    assert lengths.max() / lengths.min() > 2


def test_early_stopping_ends_a_run_that_does_not_improve(tmp_path, digits, tiny):
    run = train(tiny(epochs=10, learning_rate=1e-9, early_stopping=2), 0, digits, tmp_path)
    assert len(run.metrics) < 10
    assert run.summary["result"]["epochs"] - run.summary["result"]["best_epoch"] == 2


def test_without_validation_the_last_epoch_is_taken(tmp_path, digits, tiny):
    n = len(digits.test)
    empty = digits.val.subset(torch.zeros(0, dtype=torch.int64))
    splits = dataclasses.replace(digits, val=empty)
    run = train(tiny(val_fraction=0.0, epochs=2), 0, splits, tmp_path)
    result = run.summary["result"]
    assert result["val_accuracy"] is None and result["best_epoch"] == 2
    assert 0 <= result["test_accuracy"] <= 1 and len(run.test_logits) == n


def test_the_test_set_is_read_after_the_last_epoch_alone(tmp_path, digits, tiny, evaluated):
    splits = Splits(digits.train, digits.val, digits.test, digits.info)
    train(tiny(epochs=2), 0, splits, tmp_path)
    assert evaluated == [len(digits.val), len(digits.val), len(digits.test)]


def test_a_saved_run_evaluates_to_what_it_said(tmp_path, digits, tiny):
    run = train(tiny(ema_decay=0.5), 0, digits, tmp_path)
    again = evaluate_run(results.load_run(tmp_path), digits)
    assert again["test_accuracy"] == run.summary["result"]["test_accuracy"]


def test_averaged_weights_are_the_ones_evaluated(tmp_path, digits, tiny):
    plain = train(tiny(epochs=2), 0, digits, tmp_path / "plain")
    averaged = train(tiny(epochs=2, ema_decay=0.99), 0, digits, tmp_path / "averaged")
    assert not same_weights(plain, averaged)
    assert plain.metrics.train_loss.equals(averaged.metrics.train_loss)
    assert not plain.metrics.val_loss.equals(averaged.metrics.val_loss)


@pytest.mark.parametrize(("small", "epochs_small"), [(16, 0), (16, 1), (0, 1)])
def test_each_resolution_is_compiled_as_an_epoch_will_run_it(
    digits, tiny, monkeypatch, small, epochs_small
):
    """On CUDA a graph's gradients must be gone before it runs again."""
    config = tiny(compile=True, low_resolution=small, low_resolution_epochs=epochs_small)
    state = train_state.TrainState.start(config, 0, digits, choose_execution(config))
    seen = []

    def compiled(model, **_):
        def forward(x):
            gone = all(p.grad is None for p in model.parameters())
            seen.append((x.shape[-1], model.training, gone))
            return model(x)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    state.model.eval()  # as an evaluation before may leave it
    train_module._compile(state, choose_execution(config))
    sizes = {32, 16} if small and epochs_small else {32}
    assert {size for size, *_ in seen} == sizes and len(seen) == len(sizes)
    assert all(training and gone for _, training, gone in seen)
    assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.parametrize("patience", [0, 2])
def test_weights_of_an_epoch_that_no_state_knows_are_not_taken_for_the_best(
    tmp_path, digits, tiny, monkeypatch, caplog, patience
):
    """The last state is torn, and what it knew comes out otherwise the second time."""
    reached = {1: 0.3, 2: 0.2, 3: 0.5}
    real = train_module.validate
    monkeypatch.setattr(
        train_module,
        "validate",
        lambda state, *rest: real(state, *rest) | {"val_accuracy": reached[state.epoch + 1]},
    )

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(train_module.results, "save_summary", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(epochs=3, early_stopping=patience), 0, digits, tmp_path)
    assert results.epoch_of_weights(tmp_path) == 3
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[100] ^= 255
    (tmp_path / "last.pt").write_bytes(content)
    reached[3] = 0.1
    run = train(tiny(epochs=3, early_stopping=patience), 0, digits, tmp_path)
    saved = run.summary["result"]
    assert saved["best_epoch"] == results.epoch_of_weights(tmp_path) == 2
    assert saved["val_accuracy"] == 0.2 and saved["epochs"] == 3
    assert "the weights of epoch 1, the best, are lost: those of epoch 2 stand" in caplog.text


def test_a_run_whose_best_weights_were_deleted_ends_with_those_at_hand(tmp_path, digits, tiny):
    run = train(tiny(epochs=3, learning_rate=1e-9), 0, digits, tmp_path)
    assert run.summary["result"]["best_epoch"] < 3
    (tmp_path / results.WEIGHTS).unlink()
    (tmp_path / results.SUMMARY).unlink()
    again = train(tiny(epochs=3, learning_rate=1e-9), 0, digits, tmp_path)
    assert again.summary["result"]["best_epoch"] == results.epoch_of_weights(tmp_path) == 3


def test_a_run_that_went_on_on_another_machine_has_no_time_of_its_own(
    tmp_path, digits, tiny, monkeypatch, caplog
):
    with monkeypatch.context() as there:
        stop_after(there, 1)
        there.setattr(train_state, "describe_hardware", lambda _: {"name": "that machine"})
        with pytest.raises(StopError):
            train(tiny(epochs=2), 0, digits, tmp_path)
    with monkeypatch.context() as here:
        stop_after(here, 2)
        with pytest.raises(StopError):
            train(tiny(epochs=3), 0, digits, tmp_path / "one")
    moved = train(tiny(epochs=2), 0, digits, tmp_path).summary["result"] | {"other_load": 0.0}
    assert moved["machines"] == 2 and not results.alone(moved)
    assert caplog.text.count("that machine") == 1
    stayed = train(tiny(epochs=3), 0, digits, tmp_path / "one").summary["result"]
    assert stayed["machines"] == 1 and results.alone(stayed | {"other_load": 0.0})


def test_a_run_that_another_process_finishes_meanwhile_keeps_its_state(
    tmp_path, digits, tiny, monkeypatch
):
    train(tiny(epochs=2), 0, digits, tmp_path)
    told = (tmp_path / results.SUMMARY).read_bytes()
    (tmp_path / results.SUMMARY).unlink()

    def too_early(folder, preset):
        (folder / results.SUMMARY).write_bytes(told)  # just after it was looked for

    monkeypatch.setattr(study_runs, "finished_run", too_early)
    monkeypatch.setattr(train_module, "train_epoch", None)  # nothing is trained again
    run = study_runs.complete_run(tmp_path, tiny(epochs=2), 0, digits, "full")
    assert run.summary["result"]["epochs"] == 2


def test_the_code_of_a_training_is_written_alike_by_every_python():
    """Of ast's own dump that is not so: versions differ in fields that are empty."""
    tree = execution.ast.parse("def f(x: int = 0) -> None:\n    return [] if x else f'{x:.1f}'")
    assert execution._text_of(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x', "
        "annotation=Name(id='int', ctx=Load()))], defaults=[Constant(value=0)]), "
        "body=[Return(value=IfExp(test=Name(id='x', ctx=Load()), body=List(ctx=Load()), "
        "orelse=JoinedStr(values=[FormattedValue(value=Name(id='x', ctx=Load()), conversion=-1, "
        "format_spec=JoinedStr(values=[Constant(value='.1f')]))])))], returns=Constant())])"
    )


def test_fp32_on_a_gpu_is_recorded_as_what_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    there = [Execution(torch.device("cuda"), dtype) for dtype in (torch.float32, torch.bfloat16)]
    for capability, fp32 in (((8, 0), "tf32"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        assert [execution.describe_hardware(e)["precision"] for e in there] == [fp32, "bf16"]
    here = Execution(torch.device("cpu"), torch.float32)
    assert execution.describe_hardware(here)["precision"] == "fp32"


def test_images_with_a_channel_that_is_the_same_everywhere_are_refused(tmp_path, digits, tiny):
    flat = digits.train.images.clone()
    flat[:, 1] = 7
    splits = dataclasses.replace(digits, train=dataclasses.replace(digits.train, images=flat))
    with pytest.raises(ValueError, match=r"a channel that is the same everywhere .*, 0\.0, "):
        train(tiny(), 0, splits, tmp_path / "run")


def test_early_stopping_without_a_validation_image_is_refused(tmp_path, digits, tiny):
    none = dataclasses.replace(digits, val=digits.val.subset(torch.arange(0)))
    with pytest.raises(ValueError, match="early_stopping: val_fraction leaves no"):
        train(tiny(early_stopping=2, val_fraction=0.2), 0, none, tmp_path)


def test_without_a_compiler_one_line_says_so(digits, tiny, monkeypatch):
    def compiled(model, **_):
        def forward(x):
            raise torch._dynamo.exc.TorchDynamoException("no working C++\ncompiler found")

        return forward

    config = tiny(compile=True)
    state = train_state.TrainState.start(config, 0, digits, choose_execution(config))
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(ValueError, match=r"^compile true: no working C\+\+ compiler found; set"):
        train_module._compile(state, choose_execution(config))


def test_a_process_compiles_as_often_as_it_likes(digits, tiny, monkeypatch):
    """Beyond Dynamo's limit of compilations a model's code would run as it is."""
    compiled = []
    plain, seen = torch.compile, lambda graph, _: compiled.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda model, **_: plain(model, backend=seen))
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        state = train_state.TrainState.start(
            tiny(compile=True), 0, digits, choose_execution(tiny())
        )
        compiled.clear()
        train_module._compile(state, choose_execution(tiny()))
        assert len(compiled) == 1


@pytest.mark.long
def test_a_compiled_model_trains_alike(tmp_path, digits, tiny):
    plain = train(tiny(epochs=1), 0, digits, tmp_path / "plain")
    compiled = train(tiny(epochs=1, compile=True), 0, digits, tmp_path / "compiled")
    assert compiled.metrics.train_loss[0] == pytest.approx(plain.metrics.train_loss[0], rel=0.01)
    assert compiled.summary["result"]["compile_seconds"] > 0
    assert plain.weights.keys() == compiled.weights.keys()


def test_bf16_trains_where_the_processor_has_it(tmp_path, digits, tiny):
    run = train(tiny(precision="bf16"), 0, digits, tmp_path)
    assert run.summary["hardware"]["precision"] == "bf16"
    assert run.metrics.train_loss.iloc[-1] < run.metrics.train_loss.iloc[0]


def test_what_has_no_deterministic_gradient_on_cuda_is_refused(monkeypatch, tiny):
    cuda = Execution(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(train_module, "choose_execution", lambda _: cuda)
    with pytest.raises(ValueError, match=r"^deterministic true: speed_net"):
        train_module.check_runnable(tiny(model="speed_net", deterministic=True))


def test_fp16_on_a_cpu_is_refused(tmp_path, digits, tiny):
    with pytest.raises(ValueError, match="precision: got 'fp16'"):
        train(tiny(precision="fp16", device="cpu"), 0, digits, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused(tmp_path, digits, tiny):
    with pytest.raises(ValueError, match="device: got 'cuda'"):
        train(tiny(device="cuda"), 0, digits, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"compile": True, "micro_batch_size": 25}])
def test_the_same_loop_trains_on_cuda(tmp_path, digits, tiny, changes):
    config = tiny(device="cuda", precision="auto", epochs=6, **changes)
    run = train(config, 0, digits, tmp_path)
    assert run.metrics.train_loss.iloc[-1] < run.metrics.train_loss.iloc[0]
