"""`ng.audit`, front to back: sabotage, improvement, nothing, too little, and bad requests."""

import copy
import json

import pytest
import torch
from _tables import TASK, A, B, BigramForCausalLM, Table, rows_graft, target, text

import neurograft as ng
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.report.report import Report


@pytest.fixture(scope="module")
def data():
    return {"gain": text(TASK, 48, 1), "keep": {"a": text(A, 48, 2), "b": text(B, 48, 3)}}


def base():
    """A model that knows all three languages, but is not sure enough of the task's."""
    logits = target()
    logits[TASK[0] : TASK[-1] + 1, : TASK[-1] + 1] *= 0.3
    return BigramForCausalLM(logits)


def improved(model, share=0.9):
    return rows_graft(model, list(TASK), target()[: TASK[-1] + 1] * torch.tensor([share] * 4 + [1.0] * 8))


def harmed(model, tokens=B):
    values = target()[list(tokens)].roll(1, dims=1)
    values[:, tokens[0] : tokens[-1] + 1] = -target()[list(tokens)][:, tokens[0] : tokens[-1] + 1]
    return rows_graft(model, list(tokens), values)


def test_an_improvement_ships(data):
    model = base()
    report = ng.audit(model, improved(model), **data)
    assert report.verdict == "ship", report.data["verdict"]
    assert report.exit_status == 0
    assert report.sentence.startswith("Ship: the task's likelihood rose by ")
    for name in ("a", "b"):
        assert report.data["domains"][name]["loss"]["measures"]["loss"]["change"]["value"] == 0.0


def test_sabotage_of_one_domain_is_flagged_and_named(data):
    model = base()
    both = improved(model) + harmed(model)
    report = ng.audit(model, both, **data)
    assert report.verdict == "do not ship"
    assert report.exit_status == 3
    states = {name: d["status"] for name, d in report.data["verdict"]["domains"].items()}
    assert states == {"a": "kept", "b": "lost"}
    assert "“b” lost" in report.sentence
    parts = ng.audit(model, [improved(model), harmed(model)], probes="none", **data)
    assert parts.verdict == "do not ship"  # several grafts at once are their sum


def test_a_worse_task_does_not_ship(data):
    model = base()
    report = ng.audit(model, harmed(model, TASK), probes="none", **data)
    assert report.verdict == "do not ship"
    assert "worse" in report.sentence


def test_nothing_is_nothing(data):
    model = base()
    report = ng.audit(model, Graft(), **data)
    assert report.verdict == "cannot tell"
    assert "makes no difference" in report.sentence
    for domain in report.data["domains"].values():
        for audit in domain.values():
            assert all(m["change"]["value"] == 0 for m in audit["measures"].values())


def test_too_little_is_not_decided(data):
    model = base()
    few = {k: [{"input_ids": v[0]["input_ids"][:4]}] for k, v in data["keep"].items()}
    report = ng.audit(model, improved(model), gain=data["gain"], keep=few, probes="none")
    assert (report.verdict, report.exit_status) == ("cannot tell", 0)
    assert "too few items" in report.sentence
    alone = ng.audit(model, improved(model), gain=data["gain"])
    assert alone.verdict == "cannot tell"
    assert "no kept domain" in alone.sentence
    loss_only = ng.audit(model, harmed(model), keep=data["keep"], probes="none")
    assert loss_only.verdict == "do not ship"


def test_a_graft_on_disk_and_a_tuned_model_say_the_same(data, tmp_path):
    model = base()
    graft = improved(model)
    graft.save(tmp_path / "graft")
    tuned = graft.apply(copy.deepcopy(model))
    live, path, whole = (ng.audit(model, c, **data).data for c in (graft, tmp_path / "graft", tuned))
    assert live["gain"] == path["gain"]
    assert live["domains"] == path["domains"]
    measured = (d["gain"]["measures"]["likelihood"]["change"] for d in (live, whole))
    assert len({json.dumps(m) for m in measured}) == 1


def test_the_same_seed_gives_the_same_report_and_another_one_does_not(data):
    model = base()
    one, two, other = (ng.audit(model, improved(model), seed=s, probes="none", **data) for s in (0, 0, 1))
    assert one.data == two.data
    assert one.data["gain"] != other.data["gain"]


def test_the_model_is_left_as_found(data):
    model = base().train()
    before = model.weight.detach().clone()
    ng.audit(model, harmed(model), **data)
    assert torch.equal(before, model.weight)
    assert model.training
    assert model.weight.requires_grad


def test_a_callable_decides_where_there_are_no_classes(data):
    model = base()

    def sure(net, batch):
        return net(batch["input_ids"]).logits.softmax(-1).max(-1).values.mean(1)

    report = ng.audit(model, improved(model), metrics={"sure": sure}, probes=["divergence"], **data)
    assert report.data["gain"]["by"] == "sure"
    assert report.verdict == "ship"
    assert set(report.data["domains"]["a"]) == {"loss", "divergence"}


def test_a_metric_stands_in_where_outputs_are_no_classes():
    model = Table([[0.0, 0.0], [0.0, 0.0]])
    rows = [{"states": torch.zeros(9, 1, 1), "rows": torch.tensor([r] * 9)} for r in (0, 1)]
    value = lambda net, batch: net(batch["rows"])[:, 0]  # noqa: E731
    graft = rows_graft(model, [1], [[-1.0, 0.0]])
    report = ng.audit(model, graft, gain=rows[:1], keep={"b": rows[1:]}, metrics=value, probes="none")
    assert report.verdict == "do not ship"
    with pytest.raises(RequestError, match="metrics=callable"):
        ng.audit(model, graft, gain=rows[:1])


def test_probes_may_be_ones_own(data):
    def rows(model, change, batches, *, seed=0):
        return {"measures": {}, "rows": sum(len(b["input_ids"]) for b in batches)}

    report = ng.audit(base(), Graft(), keep=data["keep"], probes=[rows, ("damage", {"by": "parameter"})])
    assert report.data["domains"]["a"]["rows"]["rows"] == 48
    assert report.data["domains"]["a"]["damage"]["by"] == "parameter"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gain": None, "keep": None}, "neither gain nor keep"),
        ({"probes": ["divergense"]}, "divergence"),
        ({"rules": {"tolerence": 0.1}}, "tolerance"),
        ({"rules": {"tolerance": "much"}}, "a value like"),
        ({"keep": {"a": []}}, "empty|no rows|at least"),
    ],
)
def test_bad_requests_name_the_way_out(data, change, says):
    model = base()
    with pytest.raises(RequestError, match=says):
        ng.audit(model, improved(model), **{**data, **change})
    assert torch.equal(model.weight, base().weight)


def test_another_base_is_refused(data):
    graft = improved(base())
    with pytest.raises(RequestError, match="other numbers"):
        ng.audit(BigramForCausalLM(target() + 1), graft, **data)


def test_reports_survive_their_file(data, tmp_path):
    model = base()
    report = ng.audit(model, improved(model), **data)
    page = report.save(tmp_path / "out")
    again = Report.load(tmp_path / "out")
    assert again.as_dict() == json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert again.html() == page.read_text(encoding="utf-8")
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]
    graft = report.recorded(improved(model))
    assert graft.save(tmp_path / "graft")
    assert Graft.load(tmp_path / "graft").card["audit"]["verdict"] == "ship"
    assert graft.identity == improved(model).identity
    with pytest.raises(RequestError, match="the graft that was audited"):
        report.recorded(harmed(model))
    assert again.judged({"tolerance": 0.0, "gain_above": 99.0}).verdict == "cannot tell"
