"""Resuming where a run ended, and with optimizers that remember part of a tensor."""

import shutil

import pytest
from transformers import TrainingArguments

import neurograft as ng

FAST = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("schedule", [None, ("every", {"steps": 2})])
def test_a_run_resumed_at_its_end_makes_no_further_step(schedule, llama, pick, examples, tmp_path):
    """Three steps an epoch, five steps in all: the Trainer itself would make a sixth one."""
    gate = "model.layers.0.mlp.gate_proj.weight"

    def run(**more):
        return ng.tune(
            llama,
            examples(llama, 11),
            pick(llama),
            schedule=schedule,
            reselect=(lambda net, step: pick(net, {gate: ("row", [step, step + 9])})) if schedule else None,
            args={**FAST, "max_steps": 5, "output_dir": str(tmp_path), "weight_decay": 0.1},
            **more,
        )

    straight, resumed = run(), run(resume_from_checkpoint=True)
    assert resumed.identity == straight.identity
    assert resumed.card["steps"] == straight.card["steps"] == 5
    assert resumed.card["losses"] == straight.card["losses"]
    # Of units that were turned to, it cannot be said what they were before: nothing moved since.
    assert resumed.card["moved"] == ({"tensors": 0, "numbers": 0} if schedule else straight.card["moved"])


@pytest.mark.parametrize("options", [{"of": "SGD", "momentum": 0.9}, {"moments": "drop"}, {"strict": False}])
def test_an_optimizer_with_moments_of_a_part_resumes(options, llama, pick, examples, tmp_path):
    def run(**more):
        args = {**FAST, "max_steps": 4, "output_dir": str(tmp_path)}
        return ng.tune(llama, examples(llama), pick(llama), optimizer=("gradient_masked", options), args=args, **more)

    straight = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-3")
    resumed = run(resume_from_checkpoint=True)
    assert resumed.identity == straight.identity
    assert resumed.card["losses"] == straight.card["losses"]


def test_a_training_without_a_step_is_said(llama, pick, examples, tmp_path):
    with pytest.raises(ng.RequestError, match="training of no step"):
        ng.tune(llama, examples(llama), pick(llama), args={"num_train_epochs": 0})
    settings = TrainingArguments(str(tmp_path), num_train_epochs=0, report_to=[], use_cpu=True)
    with pytest.raises(ng.RunError, match="made no step"):
        ng.tune(llama, examples(llama), pick(llama), args=settings)
