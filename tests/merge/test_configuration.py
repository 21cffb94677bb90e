"""A configuration: every key is understood, or refused by name."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import examples
from merge_models import BASE, METHODS, census, configuration

from pyengine.checkpoint.open import open_checkpoint
from pyengine.errors import FileFormatError, InputError, PyengineError
from pyengine.merge.census_file import read_census
from pyengine.merge.configuration import parse_configuration, read_configuration
from pyengine.merge.settings import Place, Settings

CONFIG = open_checkpoint(BASE).config
EXPERTS = CONFIG.num_experts
Q_PROJ = Place("model.layers.1.self_attn.q_proj.weight", 1)
EXPERT = Place("model.layers.1.mlp.experts.2.gate_proj.weight", 1, 2)


def parsed(document):
    return parse_configuration(document, "m.yaml")


def settings(of_model, method="dare_ties", **more):
    return Settings(parsed(configuration(method, ["a"], own=of_model, **more)), CONFIG)


def changed(method="dare_ties", **keys):
    document = configuration(method, ["a"]) | copy.deepcopy(keys)
    return {key: value for key, value in document.items() if value is not None}


def own(**parameters):
    return {"models": [{"model": "a", "parameters": {"weight": 1, **parameters}}]}


# What is wrong: (the document, what the line must have).
WRONG = {
    "a method": (changed(merge_method="della"), "merge_method: want linear or task_arithmetic or ties"),
    "no method": (changed(merge_method=None), "merge_method: want linear or"),
    "slices": (changed(slices=[]), "slices: want `models`"),
    "modules": (changed(modules={}), "modules: want `models`"),
    "a template": (changed(chat_template="auto"), "chat_template: want none"),
    "an unknown key": (changed(base_modell="b"), "base_modell: want one of .*did you mean base_model"),
    "no models": (changed(models=None), "models: want a list, got None"),
    "one model": (changed("linear", models=[{"model": "a"}]), "models: want two models or more"),
    "a model twice": (
        changed(models=[{"model": "a"}, {"model": "a"}]),
        "models.1..model: want each model once",
    ),
    "a model of keys": (changed(models=[{"model": {"path": "a"}}]), "models.0..model: want a text"),
    "no base": (changed(base_model=None), "base_model: want a model, for dare_ties"),
    "the base's parameters": (
        changed(models=[{"model": str(BASE), "parameters": {"weight": 1}}, {"model": "a"}]),
        "models.0..parameters: want none of the base model",
    ),
    "float16": (changed(dtype="float16"), "dtype: want bfloat16 or float32, got 'float16'"),
    "a union": (changed(tokenizer_source="union"), "tokenizer_source: want base or a model"),
    "tokens": (changed(tokenizer={"source": "base", "tokens": {}}), "tokenizer.tokens: want one of source"),
    "two tokenizers": (
        changed(tokenizer={"source": "base"}, tokenizer_source="base"),
        "tokenizer: want it or tokenizer_source, got both",
    ),
    "a stranger's tokenizer": (changed(tokenizer_source="b"), "tokenizer_source: want a or .*, got 'b'"),
    "a seed": (changed(seed=-1), "seed: want an integer from 0"),
    "an unknown parameter": (changed(**own(densty=1)), r"models.0..parameters.densty: .* mean density"),
    "a shared one": (
        changed(**own(normalize=True)),
        r"parameters.normalize: want it in the parameters of the whole",
    ),
    "a density of linear": (
        changed("linear", **own(density=0.5)),
        "density: want none, for linear does not have it",
    ),
    "a density of task_arithmetic": (changed("task_arithmetic", **own(density=1)), "want none, for task_ar"),
    "lambda of linear": (
        changed("linear", models=[{"model": "a"}, {"model": "b"}], parameters={"lambda": 1}),
        "parameters.lambda: want none, for linear",
    ),
    "a density above 1": (changed(**own(density=1.5)), "density: want a density from 0 to 1, got 1.5"),
    "a gradient below 0": (changed(**own(density=[0.5, -0.1])), r"density\[1\]: want a density from 0 to 1"),
    "a weight of letters": (changed(**own(weight="much")), "weight: want a number, got 'much'"),
    "an infinite weight": (changed(**own(weight="inf")), "weight: want a number, got 'inf'"),
    "a weight beyond float32": (changed(**own(weight=1e39)), "weight: want a number that float32 holds"),
    "a boolean weight": (changed(**own(weight=True)), "weight: want a number, got True"),
    "an empty gradient": (changed(**own(weight=[])), "weight: want a value or several"),
    "a rule of nothing": (
        changed(**own(density=[{"filter": "mlp"}])),
        "want one of value, per_expert, census",
    ),
    "a rule of two": (
        changed(**own(density=[{"value": 1, "per_expert": [1]}])),
        "want one of value, per_expert, census",
    ),
    "a census of nothing": (changed(**own(density=[{"census": "c"}])), "want dead, living or both"),
    "dead without a census": (changed(**own(density=[{"value": 1, "dead": 0}])), "want dead, living or both"),
    "below alone": (changed(**own(density=[{"value": 1, "below": 0.1}])), "below: want it with a census"),
    "below 0": (
        changed(**own(density=[{"census": "c", "dead": 0, "below": 0}])),
        "below: want a part of the even share",
    ),
    "a range backwards": (changed(**own(density=[{"value": 1, "layers": "3-1"}])), "layers: want numbers"),
    "no layers": (changed(**own(density=[{"value": 1, "layers": []}])), "layers: want one number or more"),
    "rescale": (changed(parameters={"rescale": "l2"}), "rescale: want true, false, l1 or density, got 'l2'"),
    "rescale of ties": (changed("ties", parameters={"rescale": "density"}), "rescale: want l1, for ties"),
    "normalize": (changed(parameters={"normalize": 1}), "normalize: want true or false, got 1"),
    "per_expert of a flag": (
        changed(parameters={"normalize": [{"per_expert": [1]}]}),
        "normalize.0.: want value",
    ),
    "a transplant of a stranger": (changed(transplants=[{"model": "b"}]), "transplants.0..model: want a or"),
    "a transplant's value": (
        changed(transplants=[{"model": "a", "value": 1}]),
        "transplants.0..value: want one of",
    ),
    "other tensors": (changed(other_tensors=[{"filter": "mtp."}]), "other_tensors.0.: want `copy: MODEL` or"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_understood_is_one_line(what):
    document, message = WRONG[what]
    with pytest.raises(FileFormatError, match=message) as caught:
        parsed(document)
    assert str(caught.value).startswith("m.yaml: ")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "want YAML, got while parsing"),
        ("- 1", "want keys and values"),
        ("seed: 1\nseed: 2", "line 2: the key 'seed' twice"),
        ("1: 2", "a key 1"),
        ("a: !!python/object/apply:os.system [x]", "want YAML, got could not determine a constructor"),
        ("a: &a [*a]", "want"),
        (b"\xff", "want YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "m.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileFormatError, match=message):
        read_configuration(path)


@pytest.mark.parametrize("method", METHODS)
def test_mergekits_defaults(method):
    recipe = (
        settings({"weight": 1}, method, base_model=str(BASE)).recipe(Q_PROJ) if method != "linear" else None
    )
    if recipe is None:
        said = parsed(configuration("linear", ["a", "b"]))
        assert Settings(said, CONFIG).recipe(Q_PROJ).normalize
        return
    assert recipe.normalize == (method == "ties")
    assert recipe.rescale == ("l1" if method.startswith("dare") else None)
    assert recipe.scale == 1 and recipe.densities == (() if method == "task_arithmetic" else (1.0,))


@pytest.mark.parametrize(
    "gradient, layer, value",
    [
        ([0, 1], 0, 0),
        ([0, 1], 3, 1),
        ([0, 1], 1, 1 / 3),
        ([0, 0.2, 1], 1, (1 - 2 / 3) * 0 + 2 / 3 * 0.2),
        ([0.5], 2, 0.5),
        (["1e-3", 1], 0, 0.001),
        ([0, 1], None, 0),
    ],
)
def test_a_gradient_runs_over_the_layers(gradient, layer, value):
    """mergekit's: before and behind the layers it is at its start."""
    assert CONFIG.num_hidden_layers == 4
    found = settings({"weight": gradient}).recipe(Place("x", layer))
    assert found.weights == (value,)


def test_the_first_rule_that_is_for_a_tensor():
    rules = [
        {"filter": "self_attn", "layers": "1-2", "value": 0.1},
        {"filter": "mlp", "experts": [2], "value": 0.2},
        {"value": 0.3},
    ]
    found = settings({"weight": rules})
    places = [Q_PROJ, Place(Q_PROJ.name, 3), EXPERT, Place(EXPERT.name, 1, 3)]
    assert [found.recipe(place).weights[0] for place in places] == [0.1, 0.3, 0.2, 0.3]
    found.check_all_used()


def test_a_models_own_parameters_come_first_and_the_wholes_stand_behind():
    found = settings({"weight": [{"filter": "mlp", "value": 2}]}, parameters={"weight": 0.5, "density": 0.25})
    assert found.recipe(EXPERT).weights == (2,) and found.recipe(Q_PROJ).weights == (0.5,)
    assert found.recipe(EXPERT).densities == (0.25,)


def test_a_rule_for_no_tensor_is_a_fault():
    found = settings({"weight": [{"filter": "mpl", "value": 2}, {"value": 1}]})
    found.recipe(EXPERT)
    with pytest.raises(
        FileFormatError, match=r"models\[0\].parameters.weight\[0\]: want a rule that is for some"
    ):
        found.check_all_used()


def test_a_tensor_without_a_weight_is_a_fault():
    found = settings({"weight": [{"filter": "mlp", "value": 2}]})
    with pytest.raises(FileFormatError, match=f"a: {Q_PROJ.name}: want a weight for .*, got none: no rule"):
        found.recipe(Q_PROJ)


def test_weights_that_add_up_to_zero_where_they_divide():
    document = configuration("ties", ["a", "b"])
    document["models"][1]["parameters"] = {"weight": [{"filter": "mlp", "value": -0.6}, {"value": 1}]}
    found = Settings(parsed(document), CONFIG)
    found.recipe(Q_PROJ)
    with pytest.raises(
        InputError, match=f"m.yaml: a: {EXPERT.name}: want weights that do not add up to zero"
    ):
        found.recipe(EXPERT)


def test_a_base_of_linear_is_a_model_like_the_others():
    said = parsed(configuration("linear", ["a"]) | {"base_model": "b", "parameters": {"weight": 0.25}})
    assert said.models == ("a", "b") and said.base == "b" and said.tokenizer == "b"
    assert Settings(said, CONFIG).recipe(Place("x", 0)).weights == (0.6, 0.25)


@pytest.mark.parametrize("keys", [{"tokenizer_source": "a"}, {"tokenizer": {"source": "a"}}])
def test_whose_tokenizer(keys):
    assert parsed(changed(**keys)).tokenizer == "a" and parsed(changed()).tokenizer == str(BASE)


FULL = {
    "merge_method": "dare_ties",
    "base_model": "b",
    "models": [
        {
            "model": "a",
            "parameters": {"weight": [0, 1], "density": [{"filter": "x", "layers": [1], "value": 1}]},
        },
        {"model": "c", "parameters": {"weight": [{"census": [[1] * 6] * 4, "dead": 0, "living": 1}]}},
    ],
    "parameters": {"normalize": False, "rescale": "l1", "lambda": 1, "weight": [{"per_expert": [1] * 6}]},
    "dtype": "float32",
    "seed": 3,
    "transplants": [{"model": "a", "experts": ["1-2"], "census": [[1] * 6] * 4, "below": 0.5}],
    "other_tensors": [{"filter": "v", "leave_out": True}],
}
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
anything = st.recursive(
    plain, lambda part: st.lists(part, max_size=2) | st.dictionaries(st.text(max_size=3), part)
)


@pytest.mark.slow
@given(st.data(), anything)
@examples(300)
def test_any_value_in_any_place_is_understood_or_refused(data, value):
    document = copy.deepcopy(FULL)
    place = document
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        found = Settings(parsed(document), CONFIG)
        found.transplant(EXPERT)
        found.recipe(EXPERT)
        found.check_all_used()
    except PyengineError:
        pass


# ---- experts -----------------------------------------------------------------------------------


def test_a_number_per_expert():
    numbers = [0.1 * e for e in range(CONFIG.num_experts)]
    found = settings({"weight": 1, "density": [{"per_expert": numbers}, {"value": 1}]})
    assert found.recipe(EXPERT).densities == (numbers[2],) and found.recipe(Q_PROJ).densities == (1,)
    with pytest.raises(FileFormatError, match="per_expert: want 6 numbers, one per expert, got 1"):
        settings({"weight": 1, "density": [{"per_expert": [1]}]})


def write_census(path, document):
    import json

    path.write_text(json.dumps(document))
    return str(path)


def test_a_census_and_its_dead_experts(tmp_path):
    path = write_census(tmp_path / "c.json", census(4, EXPERTS, dead={(1, 2), (1, 3)}))
    rules = [{"census": path, "dead": 0.0, "living": 0.5}, {"value": 0.9}]
    found = settings({"weight": 1, "density": rules})
    places = [EXPERT, Place("x", 1, 4), Place("x", 0, 2), Q_PROJ]
    assert [found.recipe(place).densities[0] for place in places] == [0, 0.5, 0.5, 0.9]
    living = settings({"weight": 1, "density": [{"census": path, "per_living": 0.8}, {"value": 1}]})
    assert living.recipe(Q_PROJ).densities == (0.8 * (4 / 6),) and living.recipe(Place("x", 0)).densities == (
        0.8,
    )
    found = settings({"weight": 1}, transplants=[{"model": str(BASE), "census": path}])
    assert found.transplant(EXPERT) == str(BASE) and found.transplant(Place("x", 1, 4)) is None


def test_how_few_tokens_are_dead(tmp_path):
    """Fewer than `below` times the mean of the layer."""
    document = census(4, EXPERTS)
    for e, tokens in enumerate([49, 50, 1000, 1000, 1000, 2901]):
        document["layers"][0]["experts"][e]["tokens"] = tokens
    path = write_census(tmp_path / "c.json", document)
    rules = [{"census": path, "dead": 0.0, "living": 1.0}]
    found = settings({"weight": 1, "density": rules})
    assert [found.recipe(Place("x", 0, e)).densities[0] for e in range(3)] == [0, 1, 1]
    with_more = [{"census": path, "below": 1.0, "dead": 0.0, "living": 1.0}]
    found = settings({"weight": 1, "density": with_more})
    assert [found.recipe(Place("x", 0, e)).densities[0] for e in (2, 5)] == [1, 1]


def spoilt_census(spoil):
    document = census(4, EXPERTS)
    spoil(document)
    return document


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.pop("layers"), "layers: want a list, got None"),
        (lambda c: c["layers"].pop(), "layers: want 4 of them, as the model has, got none of layer 3"),
        (lambda c: c["layers"][1].update(layer=9), r"layers\[1\].layer: want 0 to 3, .* got 9"),
        (lambda c: c["layers"][1].update(layer=0), r"layers\[1\].layer: want each number once, got 0 twice"),
        (
            lambda c: c["layers"][1]["experts"].pop(3),
            r"layers\[1\].experts: want 6 of them, .* none of expert 3",
        ),
        (
            lambda c: c["layers"][2]["experts"][0].update(tokens=-1),
            r"layers\[2\].experts\[0\].tokens: want an integer",
        ),
        (lambda c: c["layers"][2]["experts"][0].update(tokens=1.5), r"tokens: want an integer of at least 0"),
    ],
)
def test_a_census_of_another_model(tmp_path, spoil, message):
    path = write_census(tmp_path / "c.json", spoilt_census(spoil))
    with pytest.raises(FileFormatError, match=message):
        read_census(path, 4, EXPERTS)


def test_a_layer_that_saw_nothing(tmp_path):
    path = write_census(tmp_path / "c.json", census(4, EXPERTS, dead={(2, e) for e in range(EXPERTS)}))
    with pytest.raises(FileFormatError, match=r"layers\[2\]: want a layer that has seen tokens"):
        settings({"weight": 1, "density": [{"census": path, "dead": 0}]})


@pytest.mark.parametrize("what, number, count", [("layers", 4, 4), ("experts", 6, 6)])
def test_a_layer_or_an_expert_that_the_models_lack(what, number, count):
    with pytest.raises(
        FileFormatError, match=f"{what}: want {what} below {count}, as the models have, got {number}"
    ):
        settings({"weight": [{what: number, "value": 1}]})
