"""What chat prompts need beside a template's text: variables, files, messages as clients send them."""

import json
import shutil

import pytest
from chat_models import FAMILY, MODEL, assistant, user, with_template
from gguf.constants import GGUFValueType
from paths import CONVERTER
from rewrite import rewrite

pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("tokenizers", reason="needs the extra text")

import pyengine
from pyengine.errors import FileFormatError, InputError
from pyengine.text.chat import ChatTemplate, has_chat_template
from pyengine.text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(MODEL)


@pytest.fixture(scope="module")
def family():
    template = ChatTemplate(FAMILY)
    yield template
    template.close()


def system(text, role="system"):
    return {"role": role, "content": text}


# ---- the generation tag ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, want",
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}", "[q][a]"),
        ("{%- generation -%}\n {{ m.content }} \n{%- endgeneration -%}", "[q][a]"),
        ("{% generation %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endgeneration %}", "[q][]"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "[21][21]"),
    ],
)
def test_the_generation_tag_is_transparent(body, want):
    template = ChatTemplate("{% for m in messages %}[" + body + "]{% endfor %}")
    assert template.render([user("q"), assistant("a")], add_generation_prompt=False) == want


# ---- variables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [" }}{{ eos_token", "+ eos_token"])
def test_the_special_tokens_of_a_gguf(tmp_path, behind):
    path = with_template(tmp_path / "m.gguf", "{{ messages[0].content" + behind + " }}")
    template, tokenizer = ChatTemplate.open(path), Tokenizer.open(path)
    prompt = template.prompt(tokenizer, [user("the")])
    assert prompt.text == "the<|im_end|>"
    assert prompt.ids.tolist() == tokenizer.encode(prompt.text, special=True)  # 272, the control token
    assert prompt.ids[-1] == tokenizer.end_ids[0]
    spelled = template.prompt(tokenizer, [user("<|im_end|>")])
    assert spelled.ids.tolist() == [*tokenizer.encode("<|im_end|>"), 272]


def test_every_key_of_a_gguf_is_a_variable(tmp_path):
    keys = ["bos", "eos", "unknown", "seperator", "padding", "cls", "mask"]
    ids = {f"tokenizer.ggml.{key}_token_id": (i, GGUFValueType.UINT32) for i, key in enumerate(keys, 40)}
    path = rewrite(MODEL, tmp_path / "m.gguf", ids)
    template = ChatTemplate.open(path)
    names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
    tokens = pyengine.files.gguf.GGUF.open(path).metadata["tokenizer.ggml.tokens"]
    assert template.special_tokens == {name: tokens[i] for i, name in enumerate(names, 40)}
    ids["tokenizer.ggml.bos_token_id"] = (288, GGUFValueType.UINT32)
    with pytest.raises(FileFormatError, match="bos_token_id: want 0 to 287, got 288"):
        ChatTemplate.open(rewrite(MODEL, tmp_path / "n.gguf", ids))


@pytest.mark.parametrize("value, kind", [(-1, GGUFValueType.INT32), (2**32 - 1, GGUFValueType.UINT32)])
def test_a_token_that_a_gguf_lacks_is_not_a_variable(tmp_path, value, kind):
    path = rewrite(MODEL, tmp_path / "m.gguf", {"tokenizer.ggml.padding_token_id": (value, kind)})
    assert "pad_token" not in ChatTemplate.open(path).special_tokens
    assert Tokenizer.open(path).encode("the") == Tokenizer.open(MODEL).encode("the")


HUGE = {"model_max_length": 1000000000000000019884624838656}


@pytest.mark.parametrize(
    "config, more, want",
    [
        ({"eos_token": "<e>"}, {}, {"eos_token": "<e>"}),
        ({"eos_token": {"__type": "AddedToken", "content": "<e>"}}, {}, {"eos_token": "<e>"}),
        (
            {"bos_token": None, "pad_token": "<p>", "image_token": "<i>", "eos_token_id": 7},
            {},
            {"pad_token": "<p>", "image_token": "<i>"},
        ),
        ({"extra_special_tokens": {"audio": "<a>"}, "add_bos_token": True}, {}, {"audio": "<a>"}),
        ({"extra_special_tokens": ["<a>"]}, {}, {}),
        ({"bos_token": "<a>"}, {"bos_token": "<b>"}, {"bos_token": "<b>"}),
        ({"bos_token": "<a>", "added_tokens_decoder": {}}, {"bos_token": "<b>"}, {"bos_token": "<a>"}),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<e>", "pad_token": None},
            {},
            {"eos_token": "<e>", "unk_token": "<|endoftext|>"},
        ),
        ({"model_specific_special_tokens": {"audio_token": "<a>"}}, {}, {"audio_token": "<a>"}),
    ],
)
def test_the_special_tokens_of_a_directory(tmp_path, config, more, want):
    """And a limit of 31 digits, which transformers writes where there is none."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | HUGE))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(more))
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    template = ChatTemplate.open(tmp_path)
    assert template.special_tokens == want
    assert template.render([user("a")]) == want.get("eos_token", "")


@pytest.mark.parametrize("tokenizer_class", [None, "TokenizersBackend", "PreTrainedTokenizerFast"])
def test_what_the_files_do_not_name_is_that_of_the_models_class(tmp_path, tokenizer_class):
    """AutoTokenizer takes Qwen3_5Tokenizer for this model_type, whatever tokenizer_class says."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe_text"}))
    said = {"tokenizer_class": tokenizer_class, "pad_token": None, "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    template = ChatTemplate.open(tmp_path)
    assert template.special_tokens == dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>")
    assert template.render([user("a")]) == "<|endoftext|>"


@pytest.mark.parametrize("value", [["<e>", "<f>"], 7, True, {"content": None}, {}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_special_token_that_is_no_text(tmp_path, name, value):
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    (tmp_path / name).write_text(json.dumps({"eos_token": value, "add_bos_token": True}))
    with pytest.raises(FileFormatError, match=f"{name}: eos_token: want a token's text, got"):
        ChatTemplate.open(tmp_path)


@pytest.mark.golden
@pytest.mark.parametrize("bos", ["<|im_start|>", {"__type": "AddedToken", "content": "<|im_start|>"}, None])
@pytest.mark.parametrize("of_family", [False, True])
def test_the_special_tokens_are_transformers(tmp_path, bos, of_family):
    transformers = pytest.importorskip("transformers")
    from pyengine.text.gguf_vocabulary import export_tokenizer

    export_tokenizer(MODEL, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    said = json.loads(path.read_text()) | {"bos_token": bos, "image_token": "<|im_end|>"}
    if of_family:
        shutil.copy(CONVERTER / "config.json", tmp_path)
        del said["unk_token"], said["pad_token"]
    path.write_text(json.dumps(said))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatTemplate.open(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map


def test_a_config_of_transformers_loads(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages[0].content }}"} | HUGE)
    )
    assert ChatTemplate.open(tmp_path).render([user("hi")]) == "hi"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x", "a": ' + "9" * 5000 + "}")
    assert ChatTemplate.open(tmp_path).render([user("hi")]) == "x"
    (tmp_path / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(FileFormatError, match="the key 'a' twice"):
        ChatTemplate.open(tmp_path)


def test_options_are_variables_and_never_messages(family, tokenizer):
    template = ChatTemplate(PLAIN + "{{ note }}{{ eos_token }}", special_tokens={"eos_token": "<|im_end|>"})
    prompt = template.prompt(tokenizer, [user("a")], options={"note": "n", "eos_token": "<|im_start|>"})
    assert prompt.text == "[user]an<|im_start|>" and not any(map(tokenizer.is_special, prompt.ids))
    for name in ("messages", "chat_template"):
        with pytest.raises(InputError, match=f"template options: .* got '{name}'"):
            template.prompt(tokenizer, [user("a")], options={name: "x"})
    asked = template.prompt(tokenizer, [user("a")], options={"add_generation_prompt": False})
    assert asked.text == "[user]a<|im_end|>"


# ---- where templates stand ---------------------------------------------------------------------


def test_the_order_of_a_directorys_templates(tmp_path):
    """transformers': files of Jinja, tokenizer_config.json, and what old processors wrote."""
    (tmp_path / "chat_template.json").write_text('{"chat_template": "oldest"}')
    assert has_chat_template(tmp_path) and ChatTemplate.open(tmp_path).source == "oldest"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert ChatTemplate.open(tmp_path).source == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    template = ChatTemplate.open(tmp_path)
    assert template.sources == {"default": "new"} and template.where == str(tmp_path / "chat_template.jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert ChatTemplate.open(tmp_path).sources == {"default": "new", "tool_use": "tools"}


@pytest.mark.golden
@pytest.mark.parametrize("named", [True, False])
def test_the_order_is_transformers(tmp_path, named):
    transformers = pytest.importorskip("transformers")
    from pyengine.text.gguf_vocabulary import export_tokenizer

    export_tokenizer(MODEL, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"chat_template": templates if named else "one"})
    )

    def compare():
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = ChatTemplate.open(tmp_path)
        for tools in (None, [], [{"type": "function"}]):
            text = theirs.apply_chat_template([user("a")], tools=tools, tokenize=False)
            assert ours.render([user("a")], tools) == text

    compare()
    (tmp_path / "chat_template.json").write_text('{"chat_template": "oldest"}')
    compare()
    (tmp_path / "chat_template.jinja").write_text("new")
    compare()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t2")
    compare()


NAMED = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | tojson }}", "rag": "R"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_named_templates(tmp_path, tokenizer):
    values = {"tokenizer.chat_templates": (["tool_use", "rag"], GGUFValueType.ARRAY, GGUFValueType.STRING)}
    for name, text in NAMED.items():
        key = "tokenizer.chat_template" + (f".{name}" if name != "default" else "")
        values[key] = (text, GGUFValueType.STRING)
    path = rewrite(MODEL, tmp_path / "m.gguf", values)
    as_list = [{"name": name, "template": text} for name, text in NAMED.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": as_list}))
    for model in (path, tmp_path):
        template = ChatTemplate.open(model)
        assert template.sources == NAMED and template.source == NAMED["default"]
        assert template.render([user("a")]) == "Da"
        assert template.render([user("a")], TOOLS) == "T" + json.dumps(TOOLS)
        assert template.prompt(tokenizer, [user("a")], TOOLS).text == "T" + json.dumps(TOOLS)
        template.close()
    from pyengine.text.gguf_vocabulary import export_tokenizer

    (tmp_path / "out").mkdir()
    written = export_tokenizer(path, tmp_path / "out")
    assert {p.relative_to(tmp_path / "out").as_posix() for p in written if p.suffix == ".jinja"} == {
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
    }
    assert ChatTemplate.open(tmp_path / "out").sources == NAMED


@pytest.mark.parametrize(
    "value, message",
    [
        (["x"], "chat_template: want text, got list"),
        (7, "chat_template: want text, got int"),
        ([{"name": "default"}], "chat_template: want text, got list without a name and a template"),
        ([{"template": "x"}], "chat_template: want text, got list"),
        ({"default": 1}, "chat_template: want text, got dict"),
    ],
)
def test_templates_with_a_fault(tmp_path, value, message):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(FileFormatError, match=message) as error:
        ChatTemplate.open(tmp_path)
    assert "\n" not in str(error.value)


def test_other_faults_of_templates(tmp_path):
    with pytest.raises(InputError, match="want a chat template with the name default, got rag, tool_use"):
        ChatTemplate({"rag": "r", "tool_use": "t"}).render([user("a")])
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(FileFormatError, match="chat_template.jinja: file: want UTF-8, got byte 0xff at 2"):
        ChatTemplate.open(tmp_path)
    values = {"tokenizer.chat_templates": (["../x"], GGUFValueType.ARRAY, GGUFValueType.STRING)}
    values["tokenizer.chat_template.../x"] = ("t", GGUFValueType.STRING)
    from pyengine.text.gguf_vocabulary import export_tokenizer

    with pytest.raises(FileFormatError, match="tokenizer.chat_templates: want names of letters"):
        export_tokenizer(rewrite(MODEL, tmp_path / "m.gguf", values), tmp_path)


# ---- messages ----------------------------------------------------------------------------------

SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    "leading, role, text",
    [
        ([system("a"), system("b", "developer")], "system", "a\n\nb"),
        ([system("a"), system("b")], "system", "a\n\nb"),
        ([system("a", "developer"), system("b"), system("c")], "system", "a\n\nb\n\nc"),
        ([system("a", "developer"), system("b", "developer")], "developer", "a\n\nb"),
        ([system("a"), system(""), system(None), system("d")], "system", "a\n\nd"),
        ([system("a")], "system", "a"),
        ([system("a", "developer")], "developer", "a"),
    ],
)
def test_leading_instructions_are_one_message(tokenizer, leading, role, text):
    """OpenAI's clients send several, and most templates take one."""
    template = ChatTemplate(SYSTEM_FIRST)
    assert template.render([*leading, user("q")]) == f"[{role}]{text}[user]q"
    assert template.prompt(tokenizer, [*leading, user("q")]).text == f"[system]{text}[user]q"
    with pytest.raises(InputError, match="refuses them: late"):
        template.render([*leading, user("q"), system("late")])


def test_a_template_that_does_not_know_developer(family, tokenizer):
    assert family.render([system("a", "developer"), user("b")]) == family.render([system("a"), user("b")])
    with pytest.raises(InputError, match="no such role: king"):
        family.render([system("a", "king"), user("b")])


@pytest.mark.parametrize(
    "source, role",
    [
        (PLAIN, "system"),  # writes whatever role
        (
            "{% for m in messages if m.role in ('system', 'user') %}"
            "[{{ m.role }}]{{ m.content }}{% endfor %}",
            "system",
        ),
        (PLAIN.replace("{{ m.role }}", "{{ 'D' if m.role == 'developer' else m.role }}"), "D"),
        ("developer " + PLAIN, "system"),
    ],
)
def test_who_knows_developer(tokenizer, source, role):
    prompt = ChatTemplate(source).prompt(tokenizer, [system("a", "developer"), user("b")])
    assert prompt.text.endswith(f"[{role}]a[user]b")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_of_history(family, tokenizer, name):
    want = "<|im_start|>assistant\n<think>\nhm\n</think>\n\n"
    for message, content in (
        ({"role": "assistant", name: "hm"}, ""),
        (assistant(None, **{name: "hm"}), ""),
        (assistant("yes", **{name: "hm"}), "yes"),
    ):
        text = family.prompt(tokenizer, [user("a"), message, user("b")]).text
        assert want + content + "<|im_end|>" in text


def test_the_first_name_of_thinking_counts(family):
    text = family.render([user("a"), assistant("b", reasoning="no", reasoning_content="yes"), user("c")])
    assert "\nyes\n" in text and "no" not in text


@pytest.mark.parametrize(
    "template", [FAMILY, PLAIN, "{% for m in messages %}{{ '|' + m.content }}{% endfor %}"]
)
def test_null_content_is_empty(tokenizer, template):
    """W5; as of transformers 5.23, which drops what is null, and "" where a template needs a text."""
    chat = ChatTemplate(template)
    null = chat.prompt(tokenizer, [user("a"), assistant(None), user("b"), user(None)])
    empty = chat.prompt(tokenizer, [user("a"), assistant(""), user("b"), user("")])
    assert null.text == empty.text and null.ids.tolist() == empty.ids.tolist() and "None" not in null.text


def test_null_content_of_the_embedded_model():
    from pyengine.demo import demo

    template = ChatTemplate.open(demo.CHECKPOINT)
    text = template.render([user("a"), assistant(None), user("b")])
    assert text == template.render([user("a"), assistant(""), user("b")]) and "None" not in text


@pytest.mark.parametrize(
    "arguments, want", [("", "{}"), ("null", "{}"), (" {} ", "{}"), ('{"a":1}', '{"a": 1}'), (None, "{}")]
)
def test_arguments_of_a_tool_call(arguments, want):
    template = ChatTemplate(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    assert template.render([user("a"), assistant(None, tool_calls=[call])]) == want


@pytest.mark.parametrize(
    "arguments", ['{"a": 1', "[1]", "5", '"x"', "{'a': 1}", "[" * 9999, [1], 5, "\ud800"]
)
@pytest.mark.parametrize("flat", [False, True])
def test_broken_arguments_are_one_error(family, arguments, flat):
    call = {"name": "f", "arguments": arguments}
    calls = [{"function": {"name": "f", "arguments": {}}}, call if flat else {"function": call}]
    place = (
        r"messages\[1\]\.tool_calls\[1\]"
        + ("" if flat else r"\.function")
        + r"\.arguments: want JSON of an object"
    )
    with pytest.raises(InputError, match=place) as error:
        family.render([user("a"), assistant(None, tool_calls=calls), user("b")])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "call, field, got",
    [
        ({}, ".function", "None"),
        ({"id": "1", "type": "function"}, ".function", "None"),
        ({"function": None, "name": "f"}, ".function", "None"),
        ({"function": "f"}, ".function", "'f'"),
        ({"type": "custom", "custom": {"name": "f", "input": "x"}}, ".function", "None"),
        ({"function": {}}, ".function.name", "None"),
        ({"function": {"arguments": "{}"}}, ".function.name", "None"),
        ({"function": {"name": 5, "arguments": {}}}, ".function.name", "5"),
        ({"name": None, "arguments": {}}, ".name", "None"),
    ],
)
def test_a_tool_call_without_a_function_or_its_name(family, call, field, got):
    """A template would print nothing in its place, or fail somewhere else."""
    calls = [{"function": {"name": "f", "arguments": {}}}, call]
    with pytest.raises(InputError) as error:
        family.render([user("a"), assistant(None, tool_calls=calls), user("b")])
    assert str(error.value).startswith(f"messages[1].tool_calls[1]{field}: want ")
    assert str(error.value).endswith(f", got {got}")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_text(family, name):
    """Templates leave out in silence what is not."""
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]
    want = family.render([user("a"), assistant("b", reasoning_content="why"), user("c")])
    assert family.render([user("a"), assistant("b", **{name: parts}), user("c")]) == want
    for value in ({"a": 1}, 5, True, ["why"]):
        with pytest.raises(InputError, match=rf"messages\[1\]\.{name}(\[0\])?: want "):
            family.render([user("a"), assistant("b", **{name: value}), user("c")])


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}", "{% if false %}a{% endif %}"])
def test_a_template_that_makes_nothing(tokenizer, template):
    with pytest.raises(InputError, match="messages: want a prompt of at least one token, got none"):
        ChatTemplate(template).prompt(tokenizer, [user("")])


# ---- thinking, and the last message ------------------------------------------------------------


@pytest.mark.parametrize("reasoning", ["auto", "on", "off"])
@pytest.mark.parametrize("asked", [True, False])
def test_the_requests_options_win_over_the_default(family, tokenizer, reasoning, asked):
    prompt = family.prompt(tokenizer, [user("a")], reasoning=reasoning, options={"enable_thinking": asked})
    assert prompt.thinking is asked
    assert prompt.text == family.render([user("a")], enable_thinking=asked)


@pytest.mark.parametrize(
    "more", [{}, {"continue_final_message": True}, {"options": {"continue_final_message": True}}]
)
def test_the_last_assistant_message_is_continued(family, tokenizer, more):
    messages = [user("a"), assistant("The sky is ")]
    prompt = family.prompt(tokenizer, messages, **more)
    assert prompt.text.endswith("</think>\n\nThe sky is ") and prompt.text.count("<|im_start|>") == 2
    assert prompt.ids.tolist() == tokenizer.encode(prompt.text, special=True) and not prompt.thinking
    before = family.render(messages[:1], add_generation_prompt=False)
    assert prompt.ids[: prompt.boundaries[-1]].tolist() == tokenizer.encode(before, special=True)
    assert prompt.text == family.render(messages, continue_final_message=True)


LAST = "{% if loop.last and add_generation_prompt %}[now]{% endif %}"  # so that the prompts part here


@pytest.mark.parametrize("ask, want", [("", False), ("<think>\n", True), ("<think>\n\n</think>\n\n", False)])
@pytest.mark.parametrize("text", ["a", "what is <think> for?", "and </think>", "<think></think>"])
def test_a_tag_that_a_message_spells_begins_no_thinking(tokenizer, text, ask, want):
    template = ChatTemplate(
        "{% for m in messages %}" + LAST + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}" + ask + "{% endif %}"
    )
    assert template.prompt(tokenizer, [user(text)]).thinking is want
    continued = template.prompt(tokenizer, [user(text), assistant("<think>\nso")])
    assert continued.thinking


def test_what_is_continued(family, tokenizer):
    closed = family.prompt(tokenizer, [user("a"), assistant("b")], continue_final_message=False)
    assert closed.text.endswith("b<|im_end|>\n<|im_start|>assistant\n<think>\n") and closed.thinking
    anew = family.prompt(tokenizer, [user("a"), assistant("b")], add_generation_prompt=True)
    assert anew.text == closed.text
    history = family.prompt(tokenizer, [user("a"), assistant("b")], add_generation_prompt=False)
    assert history.text.endswith("b<|im_end|>\n")
    thought = family.prompt(
        tokenizer, [user("a"), assistant(None, reasoning="so ")], continue_final_message="reasoning_content"
    )
    assert thought.text.endswith("<think>\nso ") and thought.thinking
    empty = family.prompt(tokenizer, [user("a"), assistant(None, reasoning_content="so")])
    assert empty.text.endswith("<think>\nso\n</think>\n\n") and not empty.thinking
    named = family.prompt(tokenizer, [user("a b ")], continue_final_message=True)
    assert named.text.endswith("user\na b")  # which the template trims
    call = {"function": {"name": "f", "arguments": {}}}
    called = family.prompt(tokenizer, [user("a"), assistant("", tool_calls=[call])])
    assert called.text.endswith("<|im_start|>assistant\n<think>\n")
    marked = family.prompt(
        tokenizer, [user("CONTINUE_FINAL_MESSAGE_TAG "), assistant("b CONTINUE_FINAL_MESSAGE_TAG c")]
    )
    assert marked.text.endswith("b CONTINUE_FINAL_MESSAGE_TAG c")


@pytest.mark.parametrize(
    "template, more, message",
    [
        (
            FAMILY,
            dict(continue_final_message=True, add_generation_prompt=True),
            "without add_generation_prompt, got both",
        ),
        (
            FAMILY,
            dict(continue_final_message=3),
            "continue_final_message: want true, false or a field's name",
        ),
        (
            FAMILY,
            dict(continue_final_message="name"),
            r"messages\[1\].name: want a text to continue, got none",
        ),
        (FAMILY, dict(continue_final_message="role"), r"messages\[1\].role: want a text to continue"),
        (FAMILY, dict(add_generation_prompt="x"), "add_generation_prompt: want true or false, got 'x'"),
        ("{{ messages[0].content }}", {}, "the last message as it is: it cannot be continued"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", {}, "it cannot be continued"),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", {}, "it cannot be continued"),
    ],
)
def test_what_cannot_be_continued_is_one_error(tokenizer, template, more, message):
    with pytest.raises(InputError, match=message) as error:
        ChatTemplate(template).prompt(tokenizer, [user("a"), assistant("bcd")], **more)
    assert "\n" not in str(error.value)


# ---- tools and documents -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, shown",
    [
        (PLAIN, False),
        (PLAIN + "{% if tools %}You have tools.{% endif %}", False),
        ("{# tools #}" + PLAIN + "{{ tools is defined }}{{ tools | length if tools else 0 }}", False),
        (PLAIN + "{{ tools | tojson }}", True),
        (PLAIN + "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}", True),
        (PLAIN + "{% if messages | length > 1 %}{{ tools }}{% endif %}", True),
        (FAMILY, True),
    ],
)
def test_tools_that_a_template_cannot_show_are_refused(tokenizer, template, shown):
    """W6: found by rendering, and not in the source."""
    chat = ChatTemplate(template)
    messages = [user("a"), assistant("b"), user("c")]
    if shown:
        assert "f" in chat.prompt(tokenizer, messages, TOOLS).text
    else:
        with pytest.raises(InputError) as error:
            chat.prompt(tokenizer, messages, TOOLS)
        assert str(error.value) == "tools: the chat template shows no tools"
        with pytest.raises(InputError, match="tools: the chat template shows no tools"):
            chat.prompt(tokenizer, messages, options={"tools": TOOLS})
    assert chat.prompt(tokenizer, messages, []).text.startswith(chat.prompt(tokenizer, messages).text[:9])
    with pytest.raises(InputError, match="tools: want a list of objects"):
        chat.prompt(tokenizer, messages, "f")
    chat.close()


def test_documents_that_a_template_cannot_show_are_refused(family, tokenizer):
    documents = [{"title": "T", "text": "body"}]
    with pytest.raises(InputError, match="documents: the chat template shows no documents"):
        family.prompt(tokenizer, [user("a")], documents=documents)
    chat = ChatTemplate(PLAIN + "{% for d in documents %}{{ d.text }}{% endfor %}{{ documents is defined }}")
    assert chat.prompt(tokenizer, [user("a")], documents=documents).text == "[user]abodyTrue"
    with pytest.raises(InputError, match="documents: want a list of objects"):
        chat.prompt(tokenizer, [user("a")], documents=["x"])


def test_the_embedded_model_shows_no_tools():
    from pyengine.demo import demo

    model = pyengine.load(demo.CHECKPOINT, threads=1)
    with pytest.raises(InputError, match="tools: the chat template shows no tools"):
        model.generate([user("a")], 1, tools=TOOLS)


@pytest.mark.parametrize("depth", [500, 900, 2000, 20000])
def test_values_nested_deep_are_rendered_or_one_error(family, depth):
    deep = []
    for _ in range(depth):
        deep = [deep]
    for more in (dict(x=deep), dict(tools=[{"a": deep}])):
        try:
            assert "<|im_start|>user\na" in family.render([user("a")], **more)
        except InputError as error:
            assert str(error).startswith("messages: ") and "\n" not in str(error)
    assert family.render([user("a")]).startswith("<|im_start|>user\na")


def test_a_directory_of_transformers_chats(tmp_path):
    """The fixture's own tokenizer_config.json has a limit of 31 digits."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(CONVERTER / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": "{{ messages[0].content + eos_token }}", "eos_token": "<|im_end|>"} | HUGE
        )
    )
    tokenizer = Tokenizer.open(tmp_path)
    prompt = ChatTemplate.open(tmp_path).prompt(tokenizer, [user("the")])
    assert prompt.ids.tolist() == tokenizer.encode("the<|im_end|>", special=True)
