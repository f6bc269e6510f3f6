"""The continual matrix and its summaries, against numbers worked out by hand."""

import pytest
import torch

import neurograft as ng
from neurograft.core.prompts.collate import collator
from neurograft.pipeline.continual import Continual, continual

MATRIX = torch.tensor([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.9]])


def test_summaries_by_hand():
    run = Continual(("a", "b", "c"), MATRIX, torch.tensor([0.1, 0.1, 0.2]), torch.tensor([0.9, 0.9, 1.0]))
    assert run.average == pytest.approx((0.8 + 0.5 + 0.9) / 3)
    assert run.backward_transfer == pytest.approx(((0.8 - 0.9) + (0.5 - 0.8)) / 2)
    assert run.forgetting == pytest.approx(((0.9 - 0.8) + (0.8 - 0.5)) / 2)
    assert run.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert run.intransigence == pytest.approx((0.0 + 0.1 + 0.1) / 3)
    assert run.as_dict()["matrix"] == MATRIX.tolist()


def test_forgetting_counts_from_the_best_and_backward_transfer_from_the_diagonal():
    matrix = torch.tensor([[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.6, 0.5, 0.5]])
    run = Continual(("a", "b", "c"), matrix, torch.zeros(3))
    assert run.forgetting == pytest.approx((0.3 + 0.0) / 2)
    assert run.backward_transfer == pytest.approx((0.1 + 0.0) / 2)
    one = Continual(("a",), torch.tensor([[0.5]]), torch.zeros(1))
    assert (one.average, one.backward_transfer, one.forgetting, one.forward_transfer) == (0.5, 0.0, 0.0, 0.0)


def test_tasks_on_a_model(llama, pick, examples, unmoved):
    """Three tasks with conflicting answers, each tuned on top of the ones before; the model comes back."""

    def data(answer):
        rows = examples(llama, 4)
        for row in rows:
            row["labels"] = torch.where(row["labels"] < 0, -100, answer)
        return rows

    def likelihood(model, rows):
        with torch.no_grad():
            return -model(**collator(model)(rows)).loss.item()

    found = unmoved(llama)
    tasks = {str(a): (data(a), data(a)) for a in (5, 9, 17)}
    args = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-2}
    run = continual(
        llama, tasks, learn=lambda m, rows, name: ng.tune(m, rows, pick(m), args=args), score=likelihood, alone=True
    )
    found.check()
    assert run.matrix.shape == (3, 3)
    assert {t.dtype for t in (run.matrix, run.base, run.alone)} == {torch.float64}
    assert (run.matrix.diagonal() > run.base).all()
    assert run.forgetting > 0
    torch.testing.assert_close(run.alone[0], run.matrix[0, 0], rtol=0, atol=1e-6)
    with run.grafts[0].on(llama), run.grafts[2].on(llama), run.grafts[1].on(llama):
        last = [likelihood(llama, test) for _, test in tasks.values()]
    torch.testing.assert_close(torch.tensor(last, dtype=torch.float64), run.matrix[2], rtol=0, atol=1e-5)


def test_what_cannot_be_measured_is_said(llama):
    with pytest.raises(ng.RequestError, match="no tasks"):
        continual(llama, {}, learn=lambda *a: None, score=lambda *a: 0.0)
    with pytest.raises(ng.RequestError, match="returns no graft"):
        continual(llama, {"a": (0, 0)}, learn=lambda *a: None, score=lambda *a: 0.0, alone=True)
    with pytest.raises(ng.RunError, match="not finite"):
        continual(llama, {"a": (0, 0)}, learn=lambda *a: None, score=lambda *a: float("nan"))
