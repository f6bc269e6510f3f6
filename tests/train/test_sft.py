"""Training through TRL's SFTTrainer, whose fused head reads the weight past the module."""

import shutil

import pytest
import torch

import neurograft as ng
from neurograft.core.context import Step
from neurograft.train.asked import Asked
from neurograft.worlds.letters import letters
from neurograft.worlds.pico import pico

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

HEAD = "lm_head.weight"
CHOSEN = {
    HEAD: ("row", [5, 6, 30]),
    "model.layers.0.mlp.gate_proj.weight": ("row", [1, 40]),
    "model.layers.1.mlp.down_proj.weight": ("column", [0, 7]),
}


class GraftSFTTrainer(ng.GraftTrainerMixin, trl.SFTTrainer):
    pass


def rows(n=16):
    return datasets.Dataset.from_list([{"text": "abcdefgh"[i % 5 :] + "xyz 1"[: 1 + i % 4]} for i in range(n)])


def model_of(**config):
    return pico("llama", tie_word_embeddings=False, attention_dropout=0.1, **config)


def trainer_of(model, live, folder, objective=None, **more):
    options = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_length": 16,
        "logging_strategy": "no", "save_strategy": "no", "max_steps": 4, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **more,
    }  # fmt: skip
    return GraftSFTTrainer(
        model=model,
        mount=live,
        objective=objective,
        args=trl.SFTConfig(**options),
        train_dataset=rows(),
        eval_dataset=rows(4) if "eval_strategy" in more else None,
        processing_class=letters(),
    )


def run(pick, folder, chosen=CHOSEN, resume=None, model=None, **more):
    model = model_of() if model is None else model
    with ng.attach(model, pick(model, chosen)) as live:
        trainer = trainer_of(model, live, folder, **more)
        trainer.train(resume)
        return trainer, live.state_dict(), live.graft()


def test_rows_of_the_head_move_and_nothing_else(pick, tmp_path, only):
    model = model_of()
    where = pick(model, CHOSEN)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with ng.attach(model, where) as live:
        trainer = trainer_of(model, live, tmp_path, weight_decay=0.1)
        trainer.train()
        only(model, before, where)
        assert trainer.moved["tensors"] == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.lm_head) is torch.nn.Linear


def test_without_the_hand_over_the_head_is_missed_and_named(pick, tmp_path, monkeypatch):
    monkeypatch.setattr("neurograft.train.mixin.heads", lambda model: [])
    with pytest.raises(ng.RunError, match=r"no gradient reached lm_head\.weight"):
        run(pick, tmp_path)


def test_the_head_gets_the_dense_gradient(pick, tmp_path):
    """Under the fused head, against a twin with a trainable head."""
    found = {}
    for kind in ("slice", "dense"):
        model = pico("llama", tie_word_embeddings=False)
        chosen = {HEAD: CHOSEN[HEAD]} if kind == "slice" else {HEAD: ("row", range(64))}
        with ng.attach(model, pick(model, chosen), adapter=kind) as live:
            trainer = trainer_of(model, live, tmp_path, bf16=False, max_steps=1, max_grad_norm=0.0)
            kept = []
            trainer.add_callback(_Grab(live, kept))
            trainer.train()
            found[kind] = kept[0]
    torch.testing.assert_close(found["slice"], found["dense"][CHOSEN[HEAD][1]], rtol=0, atol=1e-7)


from transformers import TrainerCallback  # noqa: E402


class _Grab(TrainerCallback):
    def __init__(self, live, kept):
        self.live, self.kept = live, kept

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.kept.append(self.live.trained()[HEAD].grad.clone())


def test_objectives_run_on_the_fused_fields(pick, tmp_path):
    own, theirs, _ = run(pick, tmp_path)
    ours, mine, _ = run(pick, tmp_path, objective="auto")
    close = {"rtol": 0, "atol": 1e-5}  # padding is left out of our sum and zero in TRL's: another rounding
    torch.testing.assert_close(torch.tensor(ours.witness.losses), torch.tensor(own.witness.losses), **close)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-3)
    theirs, _, _ = run(pick, tmp_path, loss_type="dft")
    dft, _, _ = run(pick, tmp_path, objective="dft")
    torch.testing.assert_close(torch.tensor(dft.witness.losses), torch.tensor(theirs.witness.losses))
    eaft, _, _ = run(pick, tmp_path, objective=("eaft", {"top": None, "scale": 6.0}))
    assert 0.6 * sum(own.witness.losses) < sum(eaft.witness.losses) < 0.75 * sum(own.witness.losses)  # ln 64 / 6
    with pytest.raises(ng.RequestError, match="fused head"):
        run(pick, tmp_path, objective="eaft")
    with pytest.raises(ng.RequestError, match="loss_type beside"):
        run(pick, tmp_path, objective="auto", loss_type="dft")
    metrics = [h for h in ours.state.log_history if "entropy" in h or "mean_token_accuracy" in h]
    assert metrics or "entropy" in ours._metrics["train"]


def test_an_objective_may_read_the_fused_outputs(pick, tmp_path):
    def mine(step):
        assert step.outputs is step.predictions
        return step.mean(-step.outputs.log_probs[step.outputs.label_mask])

    own, usual = (run(pick, tmp_path, objective=o, max_steps=1)[0].witness.losses for o in (mine, "likelihood"))
    assert own == usual


def test_an_anchor_with_data_of_its_own_is_asked_about_them(pick, tmp_path):
    """Replay under the fused head: not about the batch of the step, whose fused outputs are at hand."""
    seen = []

    def likelihood(step):
        seen.append((step.batch["input_ids"].shape, step.log_probs.numel()))
        return step.mean(-step.log_probs)

    own = {"input_ids": torch.full((1, 9), 5), "labels": torch.full((1, 9), 5)}
    asked = Asked.of("likelihood", (likelihood, {"weight": 0.5, "data": [own]}))
    model = pico("llama", tie_word_embeddings=False)
    expected = -Step(model.eval(), own).log_probs.mean()
    trainer, _, _ = run(pick, tmp_path, model=model, objective=asked, max_steps=1, bf16=False)
    plain, _, _ = run(pick, tmp_path, model=model, objective="likelihood", max_steps=1, bf16=False)
    assert seen == [((1, 9), 8)] * 2
    assert trainer.witness.losses[0] - plain.witness.losses[0] == pytest.approx(0.5 * expected.item(), abs=1e-3)


def test_resumed_equals_uninterrupted_and_the_best_model_is_loaded(pick, tmp_path):
    """bfloat16 autocast and activation checkpointing are TRL's defaults."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 9,
    }
    base = {"model": None, "objective": ("dft", {"alpha": 0.5}), **options}
    straight, ends, graft = run(pick, tmp_path / "a", **base)
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    resumed, again, regraft = run(pick, tmp_path / "a", resume=True, **base)
    assert straight.witness.losses == resumed.witness.losses
    assert all(torch.equal(ends[n], again[n]) for n in ends)
    assert graft.identity == regraft.identity
    best, kept, _ = run(
        pick, tmp_path / "b", **{**base, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
                                "greater_is_better": False},
    )  # fmt: skip
    from neurograft.train.checkpoint import tensors

    folder = best.state.best_model_checkpoint
    assert folder.endswith("checkpoint-2")  # this loss rises with the probability
    assert all(torch.equal(kept[n], v) for n, v in tensors(tmp_path / "b" / "checkpoint-2").items())
    assert not torch.equal(kept[HEAD], ends[HEAD])


LAYOUTS = {"rows": ("row", [5, 6, 30]), "columns": ("column", [0, 9]), "entries": ("weight", range(3, 2048, 37))}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_beside_its_weight_trains_as_in_place(layout, tied, pick, tmp_path):
    """The fused head reads the weight past the module; the base is not written, nor is anything left on the module."""
    reached = {}
    for route in ("in-place", "side"):
        model = pico("llama", tie_word_embeddings=tied, dtype=torch.float64)
        name = "model.embed_tokens.weight" if tied else HEAD
        where = pick(model, {name: LAYOUTS[layout], "model.layers.1.mlp.down_proj.weight": ("column", [0, 7])})
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with ng.attach(model, where, route=route, tied="both" if tied else "refuse") as live:
            trainer = trainer_of(model, live, tmp_path, bf16=False, weight_decay=0.0)
            trainer.train()
            assert trainer.moved["tensors"] == 2
            written = any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert written is (route == "in-place")
            after = trainer.evaluate(trainer.train_dataset)["eval_loss"]
            reached[route] = [*trainer.witness.losses, after], live.state_dict(), live.graft()
        assert type(model.lm_head) is torch.nn.Linear
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    (losses, values, graft), (theirs, found, other) = reached["in-place"], reached["side"]
    torch.testing.assert_close(theirs, losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-9)
    assert graft.base == other.base


def test_an_adapter_around_the_head_is_refused(pick, tmp_path):
    model = model_of()
    with (
        ng.attach(model, adapter="lora", targets=["lm_head"]) as live,
        pytest.raises(ng.RequestError, match="fused head"),
    ):
        trainer_of(model, live, tmp_path)
    where, head = pick(model, {HEAD: ("row", [3])}), model.lm_head
    model.lm_head = torch.nn.Linear(32, 64, bias=False)
    model.lm_head.weight = torch.nn.Parameter((head.weight.detach() * 100).round().to(torch.int8), False)
    model.lm_head.dequantize = lambda: head.weight.detach()
    with ng.attach(model, where, route="side") as live, pytest.raises(ng.RequestError, match="fused head"):
        trainer_of(model, live, tmp_path)
    model.lm_head = head
    with ng.attach(model, pick(model), adapter="lora") as live:
        trainer = trainer_of(model, live, tmp_path, objective="likelihood")
        trainer.train()
        assert trainer.moved["tensors"] == 6
