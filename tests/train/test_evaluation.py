"""What an evaluation between the steps leaves behind, and what it asks of callables."""

import pytest
import torch

import neurograft as ng


def test_the_card_of_a_seed_is_the_same_with_an_evaluation(llama, pick, examples, tmp_path):
    for name in "ab":
        args = {"eval_strategy": "epoch", "per_device_train_batch_size": 8}
        graft = ng.tune(llama, examples(llama), pick(llama), eval_dataset=examples(llama, 3), args=args)
        graft.save(tmp_path / name)
    assert graft.card["evaluations"][0].keys() == {"eval_loss", "epoch", "step"}
    for file in ("graft.json", "graft.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_callable_objective_is_evaluated(llama, pick, examples):
    """Its outputs are its own; metrics get the model's, without a second pass where there are none."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        return model(**batch).loss

    where, rows, kept = pick(llama), examples(llama), examples(llama, 4)
    args = {"eval_strategy": "epoch", "per_device_train_batch_size": 8}
    graft = ng.tune(llama, rows, where, objective=loss, eval_dataset=kept, args=args)
    assert len(calls) == 3
    usual = ng.tune(llama, rows, where, eval_dataset=kept, args=args)
    assert graft.card["evaluations"][0]["eval_loss"] == pytest.approx(usual.card["evaluations"][0]["eval_loss"])
    seen = []

    def score(found):
        seen.append(torch.as_tensor(found.predictions))
        return {}

    for objective in (loss, "auto"):
        ng.tune(llama, rows, where, objective=objective, eval_dataset=kept, args=args, compute_metrics=score)
    assert seen[0].shape == (4, 8, 64)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)


def test_the_best_model_may_be_of_the_units_before_a_turn(llama, pick, examples, tmp_path):
    """Four rows after the turn, three of each weight before it: the graft is what was live at step 2."""
    gate, scores = "model.layers.0.mlp.gate_proj.weight", iter([0.1, 0.9, 0.3, 0.2])

    def run(steps, **more):
        args = {"per_device_train_batch_size": 4, "max_steps": steps, "lr_scheduler_type": "constant"}
        return ng.tune(
            llama,
            examples(llama),
            pick(llama),
            schedule=("every", {"steps": 2}),
            reselect=lambda net, step: pick(net, {gate: ("row", range(30, 34))}),
            args={**args, **more.pop("args", {})},
            **more,
        )

    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best |= {"metric_for_best_model": "score", "load_best_model_at_end": True, "output_dir": str(tmp_path)}
    found = run(4, args=best, eval_dataset=examples(llama, 3), compute_metrics=lambda _: {"score": next(scores)})
    assert found.card["best"]["step"] == 2
    assert found.card["moved"] == {"tensors": 1, "numbers": 4 * 32}
    assert found.identity == run(2).identity
