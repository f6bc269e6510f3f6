"""A unit's page in a terminal."""

from neurograft.cli.unit_page import lines

FOUND = {
    "unit": {"site": "mlp/neuron", "id": 7, "kind": "neuron", "at": "act", "layer": 0},
    "writes": {"raised": [{"token": " Paris", "id": 1, "logit": 0.5}], "lowered": []},
    "activity": {"tokens": 1200, "rate_above_0": 0.25, "smallest": -0.5, "largest": 2.0},
    "exemplars": [
        {"peak": 2, "positions": [0, 1, 2], "tokens": ["in", " the", " city"], "activations": [-1.0, 0.8, 2.0]},
        {"peak": 1, "positions": [0, 1], "tokens": None, "activations": [0.0, 1.5]},
    ],
    "partners": [{"id": 3, "correlation": -0.5}],
    "description": [{"text": "places"}, {"text": "towns"}],
    "silence": {"sentence": "No better than random."},
}


def test_the_page_says_what_was_found_and_marks_the_strongest_token():
    made = lines(FOUND)
    text = [str(line) for line in made]
    assert text[0] == "mlp/neuron:7"
    assert text[1:9] == [
        "described as          places",
        "or as                 towns",
        "active                above 0 at 25.0 % of 1,200 places",
        "activation            \u22120.5 to 2",
        "its weights raised    Paris",
        "moves with            3 (\u22120.5)",
        "when silenced         No better than random.",
        "",
    ]
    assert text[9] == "       2  in the «city»"
    assert [span.style for span in made[9].spans] == ["on grey23", "bold on blue"]
    assert text[10] == "     1.5  at place 1 of 2"


def test_a_unit_without_data_has_a_short_page():
    assert [str(line) for line in lines({"unit": FOUND["unit"], "writes": None})] == ["mlp/neuron:7"]
