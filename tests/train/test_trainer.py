"""Training through transformers.Trainer: tune, the mixin, checkpoints, resume, best model."""

import json
import shutil

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import neurograft as ng
from neurograft.core.grafts.delta import New
from neurograft.core.prompts.collate import collator
from neurograft.worlds.pico import pico, pico_batch


class GraftTrainer(ng.GraftTrainerMixin, Trainer):
    pass


FAST = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


def values(graft):
    return {n: d.tensors()["value"] for n, d in graft.deltas.items()}


def same(a, b):
    return a.identity == b.identity


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_tune_leaves_the_model_as_it_was(family, unmoved):
    model = pico(family)
    found = unmoved(model)
    data = [pico_batch(model, batch=2, seed=s) for s in range(4)]
    graft = ng.tune(model, data, args={**FAST, "activation_checkpointing": True, "max_steps": 2})
    found.check()
    assert graft.card["steps"] == len(graft.card["losses"]) == 2
    assert graft.card["moved"]["numbers"] > 1000
    before = model(**data[0]).logits
    with graft.on(model):
        assert (model(**data[0]).logits - before).abs().max() > 1e-3
    assert torch.equal(model(**data[0]).logits, before)
    json.dumps(graft.card)


def test_batch_statistics_belong_to_the_base(unmoved):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
    model = ResNetForImageClassification(config).eval()
    found = unmoved(model)
    data = [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])} for _ in range(4)]
    found.random = torch.random.get_rng_state()
    graft = ng.tune(model, data, args={**FAST, "max_steps": 2})
    found.check()
    assert all("running" not in n for n in graft.deltas)


def test_the_graft_is_what_was_live(llama, pick, examples, only, tmp_path):
    """Logits under the graft equal the last live ones bit for bit, also on a bfloat16 base with float32 masters."""
    for dtype in (torch.float32, torch.bfloat16):
        model = llama.to(dtype)
        where, batch = pick(model), collator(model)(examples(model)[:4])
        before = {k: v.clone() for k, v in model.state_dict().items()}
        args = TrainingArguments(str(tmp_path), report_to="none", save_strategy="no", use_cpu=True, **FAST)
        with ng.attach(model, where) as live:
            trainer = GraftTrainer(
                model=model, args=args, mount=live, train_dataset=examples(model), data_collator=collator(model)
            )
            trainer.train()
            only(model, before, where)
            assert all(p.dtype == torch.float32 for p in live.parameters())
            model.eval()
            seen = model(**batch).logits.detach()
            graft = live.graft()
        assert all(v.dtype == torch.float32 for v in values(graft).values())
        if dtype == torch.bfloat16:
            assert any((v != v.bfloat16().float()).any() for v in values(graft).values())
        with graft.on(model):
            assert torch.equal(model(**batch).logits, seen)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("objective", ["auto", "dft"])
def test_accumulation_equals_one_big_batch(objective, llama, pick, examples):
    def run(size, steps):
        args = {**FAST, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0.5}
        return ng.tune(llama, examples(llama), pick(llama), objective=objective, args=args)

    whole, parts = run(4, 1), run(1, 4)
    torch.testing.assert_close(
        torch.tensor(parts.card["losses"]), torch.tensor(whole.card["losses"]), rtol=0, atol=2e-6
    )
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=0, atol=2e-5)


def test_in_one_process_it_is_the_same_whether_labels_are_counted_over_processes(llama, pick, examples):
    def run(over):
        args = {**FAST, "average_tokens_across_devices": over, "gradient_accumulation_steps": 2}
        return ng.tune(llama, examples(llama), pick(llama), args=args)

    assert same(run(True), run(False))


def test_the_log_says_the_norm_of_the_gradient_of_those_awake(llama, pick, examples, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, logging_steps=1, save_strategy="no", **FAST)
    norms = []

    class Watched(GraftTrainer):
        def _clip_grad_norm(self, model):
            out = super()._clip_grad_norm(model)
            held = [p.grad for p in self.mount.parameters() if p.grad is not None]
            norms.append((len(held), float(out)))
            return out

    with ng.attach(llama, pick(llama)) as live:
        trainer = Watched(
            model=llama, args=args, mount=live, train_dataset=examples(llama), data_collator=collator(llama),
            schedule=("stages", {"parts": [("*gate*", 2), ("*", 9)]}), objective="auto",
        )  # fmt: skip
        trainer.train()
    assert [count for count, _ in norms] == [1, 1, 3, 3]
    said = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert said == pytest.approx([norm for _, norm in norms])
    assert min(said) > 0


def test_accumulation_for_a_classifier():
    """The stock Trainer neither counts labels nor divides here, and takes steps k times too long."""
    model = pico("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [{k: v[0] for k, v in pico_batch(model, batch=1, seed=s).items()} for s in range(8)]

    def run(size, steps):
        args = {"max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        args |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        return ng.tune(model, rows, optimizer="SGD", args=args)

    whole, parts = run(8, 1), run(2, 4)
    assert whole.card["losses"] == pytest.approx(parts.card["losses"], abs=1e-5)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=0, atol=1e-5)


def test_rows_of_mean_ctc_count_alike_in_uneven_batches():
    """torch's "mean" is one over rows, so a last batch of one row must not weigh as much as one of two."""
    still = [f"{part}_dropout" for part in ("hidden", "attention", "activation", "feat_proj", "final")]
    quiet = {"layerdrop": 0.0, "apply_spec_augment": False, **dict.fromkeys(still, 0.0)}
    model = pico("wav2vec2", ctc_loss_reduction="mean", **quiet)
    rows = [{k: v[0] for k, v in pico_batch(model, batch=1, seed=s).items()} for s in range(5)]
    for row in rows[2:]:
        row["labels"][1:] = -100

    def run(size, steps, told):
        args = {"max_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        args |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
        return ng.tune(model, rows, optimizer="SGD", eval_dataset=rows, args=args, callbacks=[Noted(told)])

    told = []
    whole, parts = run(5, 1, told), run(2, 3, told)
    assert whole.card["losses"] == pytest.approx(parts.card["losses"], rel=1e-5)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=0, atol=1e-4)
    with whole.on(model), torch.no_grad():
        alone = [float(model(**{k: v[None] for k, v in row.items()}).loss) for row in rows]
    assert told == pytest.approx([sum(alone) / 5] * 2, rel=1e-3)  # each row of an evaluation stands for itself


class Noted(TrainerCallback):
    """Notes evaluation losses."""

    def __init__(self, told):
        self.told = told

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.told.append(metrics["eval_loss"])


def test_checkpointing_changes_nothing_and_costs_no_extra_gradients(llama, pick, examples, monkeypatch):
    kinds = [{}, {"activation_checkpointing": True}]
    kinds += [{"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}]
    hooks = []

    def run(more):
        step = GraftTrainer.training_step

        def spied(self, *args, **kwargs):
            hooks.append(len(getattr(self.model, "_require_grads_hooks", [])))
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ng.GraftTrainerMixin, "training_step", spied)
        graft = ng.tune(llama, examples(llama), pick(llama), args={**FAST, "max_steps": 2, **more})
        monkeypatch.undo()
        return graft

    plain, light, reentrant = [run(more) for more in kinds]
    assert same(plain, light)
    assert same(plain, reentrant)
    assert hooks == [0, 0, 0, 0, 1, 1]  # only the reentrant kind needs gradients at the embedding


class Scripted:
    """A metric that says what it was told."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, prediction):
        return {"score": next(self.values)}


def test_evaluation_and_the_best_model(llama, pick, examples, tmp_path):
    args = {**FAST, "output_dir": str(tmp_path), "eval_strategy": "steps", "save_strategy": "steps"}
    args |= {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "score", "load_best_model_at_end": True}
    args |= {"save_total_limit": 1}  # the Trainer's rule: the best one alone is left in the end
    graft = ng.tune(
        llama,
        examples(llama),
        pick(llama),
        args=args,
        eval_dataset=examples(llama, 4),
        compute_metrics=Scripted([0.1, 0.9, 0.3, 0.2]),
    )
    assert graft.card["best"] == {"metric": 0.9, "step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    short = ng.tune(llama, examples(llama), pick(llama), args={**FAST, "lr_scheduler_type": "linear"})
    from neurograft.train.checkpoint import tensors

    kept = tensors(tmp_path / "checkpoint-2")
    assert all(torch.equal(kept[n], v) for n, v in values(graft).items())
    assert not same(graft, short)
    assert len(graft.card["evaluations"]) == 4
    assert graft.card["evaluations"][0]["eval_loss"] > 0


def test_losses_that_count_no_labels_are_averaged_over_the_batches_there_are(llama, pick, examples):
    """Three batches an epoch in windows of two: the second window holds one."""

    def one(model, batch):
        loss = model(**batch).loss
        return 1 + loss - loss.detach()

    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    graft = ng.tune(llama, examples(llama, 11), pick(llama), objective=one, args=args)
    assert graft.card["losses"] == [1.0, 1.0]


def test_the_card_says_what_an_anchor_was_asked_on(llama, pick, examples):
    rows = examples(llama)
    anchor = [("kl", {"weight": 0.5, "data": rows[:2]}), "kl"]
    graft = ng.tune(llama, rows, pick(llama), anchor=anchor, args={**FAST, "max_steps": 1})
    said = [(a["path"].rpartition(".")[2], a["weight"], a["own_data"]) for a in graft.card["anchors"]]
    assert said == [("kl", 0.5, True), ("kl", 1.0, False)]


def test_rows_of_any_length_are_padded_and_the_padding_does_not_count(llama, pick, examples):
    """Rows of three lengths, the last batch a short one, against batches padded by hand to a greater length."""
    rows = [row for n in (4, 7, 6) for row in examples(llama, 3, length=n)]
    args = {"per_device_train_batch_size": 4, "num_train_epochs": 1}

    def joined(batch):
        made = {}
        for name, pad in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
            made[name] = torch.full((len(batch), 9), pad)
            for i, row in enumerate(batch):
                made[name][i, : len(row[name])] = row[name]
        return made

    usual, wide = (ng.tune(llama, rows, pick(llama), args=args, data_collator=c) for c in (None, joined))
    assert len(usual.card["losses"]) == 3
    assert usual.card["losses"] == pytest.approx(wide.card["losses"], abs=1e-5)


@pytest.mark.parametrize(("optimizer", "asks"), [(None, 1), (("mezo", {"eps": 1e-2}), 2)])
def test_an_anchor_sees_all_of_its_data_in_turn(optimizer, asks, llama, pick, examples):
    """Over micro-batches and steps alike, and none of it in an evaluation; mezo asks twice about a batch."""
    seen = []

    def near(step):
        seen.append(int(step.batch["input_ids"][0, 0]))
        return step.mean(-step.log_probs)

    rows = examples(llama, 3)
    for i, row in enumerate(rows):
        row["input_ids"] = torch.full_like(row["input_ids"], 10 + i)
    own = [{k: v[None] for k, v in row.items()} for row in rows]
    args = {**FAST, "gradient_accumulation_steps": 2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    kept = examples(llama, 2)
    more = {"optimizer": optimizer, "args": args, "eval_dataset": kept}
    ng.tune(llama, examples(llama), pick(llama), anchor=(near, {"data": own}), **more)
    assert len(seen) == 6 * asks
    drawn = seen[::asks]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == [10, 11, 12]
    assert all(seen[i::asks] == drawn for i in range(asks))


def settings(folder, **more):
    return {
        **FAST, "max_steps": 6, "gradient_accumulation_steps": 2, "output_dir": str(folder),
        "save_strategy": "steps", "save_steps": 2, "bf16": True, "use_cpu": True, "warmup_steps": 1, **more,
    }  # fmt: skip


@pytest.mark.parametrize("adapter", ["slice", "lora"])
def test_resumed_equals_uninterrupted(adapter, pick, examples, tmp_path):
    """bfloat16 base, float32 masters, dropout, accumulation, a schedule, an anchor on data of its own."""
    model = pico("llama", dtype=torch.bfloat16, attention_dropout=0.1)
    parts = [("*gate*", 2), ("*", 9)]

    def run(**more):
        return ng.tune(
            model,
            examples(model),
            pick(model),
            adapter=adapter,
            anchor=("kl", {"weight": 0.1, "data": examples(model, 10)[7:]}),
            schedule=("stages", {"parts": parts, "moments": "drop"}),
            args=settings(tmp_path),
            **more,
        )

    straight = run()
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-4")
    files = {p.name: p.stat().st_size for p in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" not in files
    assert files["neurograft.safetensors"] < 30_000
    resumed = run(resume_from_checkpoint=True)
    assert resumed.card["losses"] == straight.card["losses"]
    assert same(straight, resumed)
    assert len(straight.card["losses"]) == 6
    with pytest.raises(ng.RequestError, match="the same schedule"):
        ng.tune(
            model, examples(model), pick(model), adapter=adapter, args=settings(tmp_path), resume_from_checkpoint=True
        )


def test_half_written_checkpoints_are_skipped_aloud_or_refused(llama, pick, examples, tmp_path):
    def run(resume=None, chosen=None):
        return ng.tune(
            llama, examples(llama), pick(llama, chosen), args=settings(tmp_path), resume_from_checkpoint=resume
        )

    with pytest.raises(ng.RequestError, match="no complete checkpoint"):
        run(True)
    straight = run()
    (tmp_path / "checkpoint-6" / "neurograft.complete.json").unlink()
    spoiled = tmp_path / "checkpoint-4" / "optimizer.pt"
    spoiled.write_bytes(spoiled.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"checkpoint-6: it was not finished") as seen:
        resumed = run(True)
    assert any("checkpoint-4: optimizer.pt was truncated" in str(w.message) for w in seen)
    assert same(straight, resumed)
    assert set(resumed.card["skipped_checkpoints"]) == {"checkpoint-4", "checkpoint-6"}
    (tmp_path / "checkpoint-4" / "neurograft.complete.json").unlink()
    with pytest.raises(ng.RequestError, match="not finished"):
        run(str(tmp_path / "checkpoint-4"))
    with pytest.raises(ng.RequestError, match=r"differs|shape"):
        run(str(tmp_path / "checkpoint-2"), {"model.layers.0.mlp.gate_proj.weight": ("row", [2])})
    for folder in tmp_path.iterdir():
        (folder / "neurograft.complete.json").unlink(missing_ok=True)
    with pytest.raises(ng.RequestError, match="no complete checkpoint"):
        run(True)


def test_old_checkpoints_go_only_after_the_new_one_is_complete(llama, pick, examples, tmp_path, monkeypatch):
    from neurograft.train import checkpoint

    seen = []
    mark = checkpoint.mark

    def spied(folder):
        seen.append(sorted(p.name for p in tmp_path.iterdir()))
        mark(folder)

    monkeypatch.setattr(checkpoint, "mark", spied)
    ng.tune(llama, examples(llama), pick(llama), args=settings(tmp_path, save_total_limit=1))
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-6"]


def test_a_stock_trainer_with_the_callback(llama, pick, examples, tmp_path):
    """The Trainer's checkpoint is the base's format with current values; the graft lies beside it."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_steps=2, weight_decay=0.1, **FAST)
    with ng.attach(llama, pick(llama)) as live:
        trainer = Trainer(
            model=llama,
            args=args,
            train_dataset=examples(llama),
            data_collator=collator(llama),
            callbacks=[ng.GraftCallback(live, card={"note": "mine"})],
        )
        trainer.train()
        now = {k: v.clone() for k, v in llama.state_dict().items()}
        graft = live.graft()
    kept = ng.Graft.load(tmp_path / "checkpoint-4" / "graft")
    assert same(kept, graft)
    assert kept.card["note"] == "mine"
    loaded, report = type(llama).from_pretrained(tmp_path / "checkpoint-4", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(v, now[k]) for k, v in loaded.state_dict().items())
    assert "neurograft" not in " ".join(now)
    with pytest.raises(ng.RequestError, match="detached"):
        Trainer(model=llama, args=args, train_dataset=examples(llama), callbacks=[ng.GraftCallback(live)]).train()


def test_a_new_head_and_protected_units(pick, unmoved):
    model = pico("bert")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    where, guard = pick(model, {name: ("row", [1, 2, 3])}), pick(model, {name: ("row", [2])})
    found = unmoved(model)
    data = [pico_batch(model, seed=s) for s in range(4)]
    graft = ng.tune(model, data, where, protect=guard, new=("classifier",), args={**FAST, "weight_decay": 0.1})
    found.check()
    assert {n for n, d in graft.deltas.items() if isinstance(d, New)} == {"classifier.weight", "classifier.bias"}
    assert graft.deltas[name].region.ids.tolist() == [1, 3]
    assert "classifier.weight" not in graft.base
    assert graft.card["moved"]["tensors"] == 3


def test_new_tokens(pick, examples):
    base = pico("llama", vocab_size=60, tie_word_embeddings=False)
    grown = pico("llama", vocab_size=60, tie_word_embeddings=False)
    rows = [{k: v.clamp(max=59) for k, v in e.items()} for e in examples(base)]
    for row in rows:
        row["labels"][row["labels"] < 0] = -100
        row["input_ids"][3:5] = torch.tensor([60, 61])
        row["labels"][4:6] = torch.tensor([60, 61])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grown.resize_token_embeddings(62)
    added = {"model.embed_tokens.weight": 60, "lm_head.weight": 60}
    batch = collator(grown)(rows[:2])
    graft = ng.tune(grown, rows, pick(grown), new=added, args=FAST)
    assert {n: d.after for n, d in graft.deltas.items() if isinstance(d, New)} == added
    with graft.on(grown):
        seen = grown(**batch).logits
    with graft.on(base):
        assert torch.equal(base(**batch).logits, seen)
    assert base(input_ids=batch["input_ids"].clamp(max=59)).logits.shape[-1] == 60


class Anything(torch.nn.Module):
    """A model that says nothing of what it takes, as wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **inputs):
        return self.inner(*args, **inputs)


def test_a_model_that_takes_anything_gets_every_column_and_others_those_they_name():
    model = pico("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [{k: v[0] for k, v in pico_batch(model, batch=1, seed=s).items()} for s in range(4)]
    plain, wrapped = (ng.tune(m, rows, args={**FAST, "max_steps": 2}) for m in (model, Anything(model)))
    assert wrapped.card["losses"] == plain.card["losses"]
    assert wrapped.deltas.keys() == {f"inner.{n}" for n in plain.deltas}
    seen = []

    def told(step):
        seen.append((sorted(step.extra), "weight" in step.batch))
        return step.outputs.loss

    heavy = [{**row, "weight": torch.tensor(float(i))} for i, row in enumerate(rows)]
    ng.tune(model, heavy, objective=told, args={**FAST, "max_steps": 1})
    assert seen == [(["weight"], False)]


def test_what_several_devices_or_processes_cannot_do_is_refused(llama, pick, examples, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **FAST)
    with ng.attach(llama, pick(llama)) as live:
        trainer = GraftTrainer(model=llama, args=args, mount=live, optimizer="mezo", objective="auto")
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        with pytest.raises(ng.RequestError, match="in 2 processes"):
            trainer.create_optimizer()
        monkeypatch.undo()
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(ng.RequestError, match="several devices in one process"):
            trainer._conductor(None, None)


def test_optimizers_and_objectives_by_name(llama, pick, examples):
    args = {**FAST, "max_steps": 2}

    def run(**more):
        return ng.tune(llama, examples(llama), pick(llama), args=args, **more)

    usual, explicit = run(), run(optimizer=("AdamW", {"fused": True}), objective="likelihood")
    assert same(usual, explicit)
    assert explicit.card["optimizer"] == {"path": "torch.optim.AdamW", "options": {"fused": True}}
    assert not same(usual, run(optimizer=("sgd", {"momentum": 0.9})))
    assert not same(usual, run(objective="dft"))
    other = run(objective=lambda model, batch: model(**batch).loss)
    assert "lambda" in other.card["objective"]["path"]
    assert not same(usual, run(seed=1))


def test_requests_that_cannot_be_served(llama, pick, examples, tmp_path, unmoved):
    rows, where, found = examples(llama), pick(llama), unmoved(llama)
    for match, more in {
        "learning_rates": {"args": {"learning_rates": 1}},
        "place for them": {"args": {"save_strategy": "steps"}},
        "optimizer 'adamx'": {"optimizer": "adamx"},
        "momentun": {"optimizer": ("SGD", {"momentun": 0.9})},
        "weight decay": {"optimizer": "Rprop", "args": {"weight_decay": 0.1}},
        "objective 'dtf'": {"objective": "dtf"},
        "alfa": {"objective": ("dft", {"alfa": 1})},
        "adapter 'slize'": {"adapter": "slize"},
        "no_such": {"new": ("no_such",)},
        "label_smoothing_factor beside": {"args": {"label_smoothing_factor": 0.1}},
        "args of type list": {"args": ["max_steps"]},
        "go together": {"args": {"load_best_model_at_end": True, "eval_strategy": "steps"}, "eval_dataset": rows},
        "without examples": {"args": {"eval_strategy": "epoch"}},
        "LBFGS": {"optimizer": "LBFGS"},
        "weight 'much'": {"anchor": ("pull", {"weight": "much"})},
        "weight nan": {"anchor": ("pull", {"weight": float("nan")})},
    }.items():
        with pytest.raises(ng.RequestError, match=match):
            ng.tune(llama, rows, where, **{"args": FAST, **more})
        found.check()
    with pytest.raises(ng.RequestError, match="no selection"):
        ng.tune(llama, rows, adapter=("slice", {"tied": "both"}))
    with pytest.raises(ng.RunError, match="did not move"):
        ng.tune(llama, rows, where, args={**FAST, "learning_rate": 0.0})
    with pytest.raises(ng.RunError, match="loss is inf"):
        ng.tune(llama, rows, where, args=FAST, objective=lambda m, b: m(**b).loss / 0.0)
    found.check()
    with ng.attach(llama, where) as live:
        pass
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ng.RequestError, match="detached"):
        GraftTrainer(model=llama, args=args, mount=live)
    with pytest.raises(ng.RequestError, match="another model"), ng.attach(pico("llama"), None) as other:
        GraftTrainer(model=llama, args=args, mount=other)


def test_a_selection_and_the_graft_survive_their_files(llama, pick, examples, tmp_path):
    path = pick(llama).save(tmp_path / "where.safetensors")
    graft = ng.tune(llama, examples(llama), path, args=FAST)
    assert graft.card["selection"]["digest"] == pick(llama).digest
    assert same(ng.Graft.load(graft.save(tmp_path / "graft")), graft)
    with ng.attach(llama, pick(llama)) as live:
        args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, save_strategy="no", **FAST)
        trainer = GraftTrainer(
            model=llama, args=args, mount=live, train_dataset=examples(llama), data_collator=collator(llama)
        )
        trainer.train()
        trainer.save_model(tmp_path / "mine")
        assert same(ng.Graft.load(tmp_path / "mine"), live.graft())
