from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dehvf_ds.data.records import check_record, read_record
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.data.text import clean_text, decode_text, is_text

NAN = float("nan")
PROBLEM = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "natural science"}
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
SEES = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def refused(record, has_picture=True, **members) -> DamagedSample:
    given = {"__url__": "a.tar: sample x", "json": json.dumps(record).encode(), **members}
    given |= {"jpg": b"j"} if has_picture else {}
    with pytest.raises(DamagedSample) as caught:
        read_record(given)
    message = str(caught.value)
    assert message.startswith("a.tar: sample x: ")
    assert message.isprintable()
    return caught.value


BLIND = {
    "caption": {"captions": ["A dog."]},
    "caption of img2dataset": {"caption": "A dog.", "url": "http://x", "status": "success"},
    "failed download": {"caption": "A dog.", "status": "failed_to_download", "error_message": "404"},
    "caption, image null": {"caption": "A dog.", "image": None},
    "caption, image_missing": {"caption": "A dog.", "image_missing": True},
    "chat, failed download": {
        **{"status": "failed_to_download", "error_message": "404"},
        **{"url": "http://x", "conversations": TURNS},
    },
    "chat, image": {"image": "a.jpg", "conversations": TURNS},
    "chat, images": {"images": ["a.jpg"], "conversations": TURNS},
    "chat, path": {"image_path": "a.jpg", "conversations": TURNS},
    "chat, <image>": {"conversations": SEES},
    "chat, <image> in a later turn": {"conversations": [*TURNS, *SEES]},
    "chat, Human": {"conversations": [{"from": "Human", "value": "<image>"}, TURNS[1]]},
    "chat, <video>": {"conversations": [{"from": "user", "value": "See <video>."}, TURNS[1]]},
    "chat, image a number": {"image": 7, "conversations": TURNS},
    "chat, image NaN": {"image": NAN, "conversations": TURNS},
    "chat, image false": {"image": False, "conversations": TURNS},
    "chat, other marks": {"conversations": [{"from": "human", "value": "What is <|image_1|>?"}, TURNS[1]]},
    "problem": PROBLEM | {"image": "image.png"},
    "problem, bytes": PROBLEM | {"image": {"bytes": "..", "path": None}},
    "problem, <image>": PROBLEM | {"question": "<image>\nWhich is it?"},
    "problem, hint": PROBLEM | {"hint": "See <image>."},
    "problem, images": PROBLEM | {"images": ["image.png"]},
}


FIELDS = ["image_url", "img_path", "imgs", "Image", "imagePath", "pictures", "photo", "media", "frames"]
FIELDS += ["image_id", "video_path", "image-file", "file name", "image_base64"]
BLIND |= {f"chat, {field}": {field: "a.jpg", "conversations": TURNS} for field in FIELDS}
BLIND |= {
    f"chat, {text}": {"conversations": [{"from": "human", "value": text}, TURNS[1]]}
    for text in (
        *("<IMAGE>\nWhat?", "What? <Image>", "<image-placeholder>What?", "<img>\nWhat?", "<ImageHere>Hi."),
        *("See <image_1>.", "Is <|image|> red?", "<|vision_start|><|image_pad|><|vision_end|>Hi", "[IMG] Hi"),
        *(
            "<im_start><im_end>Hi",
            "Picture 1: <img>a.jpg</img>\nWhat?",
            "<IMG_CONTEXT>Hi",
            "<start_of_image>Hi",
            "< image >Hi",
            "<image/>",
            "[image] What?",
            "<Img></Img> Hi",
        ),
    )
}


@pytest.mark.parametrize("name", BLIND)
def test_no_row_is_trained_blind(name):
    error = refused(BLIND[name], has_picture=False)
    assert error.reason == "without a picture"
    if "status" in BLIND[name] and name != "caption of img2dataset":
        assert "its download: failed_to_download, 404" in str(error)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": TURNS},
        {"conversations": TURNS, "image": None},
        {"conversations": TURNS, "image": ""},
        {"conversations": TURNS, "images": []},
        {"conversations": [TURNS[0], {"from": "gpt", "value": "Write <image> in HTML."}]},
        {
            "conversations": [
                {"from": "human", "value": "Is <img> or <Image /> better, [image] aside?"},
                TURNS[1],
            ]
        },
        {"conversations": [{"from": "human", "value": 'Why <img src="a.jpg">?'}, TURNS[1]], "image_size": 3},
        {"conversations": SEES, "image": "a.jpg", "image_missing": True},
        PROBLEM,
        PROBLEM | {"image": None},
        PROBLEM | {"image": ""},
        PROBLEM | {"image": "image.png", "image_missing": True},
    ],
)
def test_text_only_rows_by_two_signs(record):
    assert read_record({"json": json.dumps(record).encode()}).record == record


@pytest.mark.parametrize("member", ["heic", "mp4", "svg", "bin", "image", "data", "feat.npy", "pt", "0"])
def test_a_picture_that_is_not_read_is_no_text_only_row(member):
    error = refused({"conversations": TURNS}, has_picture=False, **{member: b"?"})
    assert f".{member} is no kind of picture that is read" in str(error)


@pytest.mark.parametrize("member", ["cls", "url", "md5", "meta.yaml"])
def test_members_beside_a_text_only_row_that_are_no_pictures(member):
    members = {"json": json.dumps({"conversations": TURNS}).encode(), member: b"?", "__key__": "a"}
    assert read_record(members).task == "chat"


@pytest.mark.parametrize(
    "data", [b'{"caption": "a", "caption": "b"}', b'{"captions": ["a"], "x": {"y": 1, "y": 1}}']
)
def test_names_that_stand_twice(data):
    with pytest.raises(DamagedSample, match=r"the name '(caption|y)' stands twice") as caught:
        read_record({"__url__": "here", "json": data, "jpg": b"j"})
    assert caught.value.reason == "with an unreadable record"


@pytest.mark.parametrize(
    ("members", "notes"),
    [
        ({"txt": b"A dog.\n"}, ()),
        ({"txt": b"A dog.\n\nA cat.\n"}, ("caption of several lines in a .txt, read as one caption",)),
        ({"txt": b"A  dog.", "json": b'{"caption": "A dog."}'}, ()),
        (
            {"txt": b"A dog.", "json": b'{"caption": "A cat."}'},
            ("caption in a .txt that differs from its .json's, which is not read",),
        ),
    ],
)
def test_texts_beside_records(members, notes):
    assert read_record({"jpg": b"j", **members}).notes == notes


OWN = [{"captions": ["A cat."]}, {"conversations": TURNS}, PROBLEM]


@pytest.mark.parametrize("record", OWN, ids=["captions", "chat", "problem"])
def test_a_txt_beside_a_record_with_texts_is_told_and_changes_nothing(record):
    checked = read_record({"jpg": b"j", "txt": b"A dog.", "json": json.dumps(record).encode()})
    alone = check_record(dict(record), has_picture=True)
    assert checked.task == alone.task
    assert checked.record.get("captions") == record.get("captions")
    assert checked.notes == (".txt beside a record that has its own texts, not read",)


def test_what_is_odd_in_a_usable_row_is_counted():
    marked = [TURNS[0], {"from": "gpt", "value": "<image>\nA dog."}]
    assert check_record({"conversations": marked}, has_picture=True).notes == (
        "answer with a mark such as <image> in it, learnt as text",
    )
    twice = [{"from": "human", "value": "<image> and <image>?"}, TURNS[1]]
    assert check_record({"conversations": twice}, has_picture=True).notes == (
        "chat with several <image> for its one picture",
    )
    null = [TURNS[0], {"from": "gpt", "value": "NaN"}]
    assert check_record({"conversations": null}, has_picture=False).notes == (
        "answer that is the word nan or null",
    )
    same = PROBLEM | {"choices": ["a", "b", "b"]}
    assert check_record(same, has_picture=False).notes == (
        "problem whose right choice stands twice among its choices",
    )


@pytest.mark.parametrize("images", [["a.jpg", "b.jpg"], ["a.jpg", "b.jpg", "c.jpg"]])
def test_several_pictures_of_a_row(images):
    for field in ("image", "images"):
        assert refused({field: images, "conversations": SEES}).reason == "with several pictures"


def test_a_problem_with_a_picture_says_so():
    """By its field the scores tell problems with a picture from others."""
    checked = read_record({"jpg": b"j", "json": json.dumps(PROBLEM).encode()})
    assert checked.record["image"]
    assert checked.task == "scienceqa"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"answer": 2}, "answer 2 is no number of its 2 choices"),
        ({"answer": -1}, "answer -1"),
        ({"answer": True}, "answer True"),
        ({"answer": 1.0}, "answer 1.0"),
        ({"answer": NAN}, "answer nan"),
        ({"answer": "A"}, "answer 'A'"),
        ({"answer": None}, "answer None"),
        ({"answer": [1]}, r"answer [1]"),
        ({"choices": ["a", NAN]}, "a choice is float, not a text"),
        ({"choices": ["a", None]}, "a choice is NoneType, not a text"),
        ({"choices": ["a", 3]}, "a choice is int, not a text"),
        ({"choices": ["a", " \u200b"]}, "a choice is ' \\u200b', not a text"),
        ({"choices": ["a"]}, "choices is not a list of 2 to 26"),
        ({"choices": []}, "choices is not a list of 2 to 26"),
        ({"choices": ["a"] * 27}, "choices is not a list of 2 to 26"),
        ({"choices": "ab"}, "choices is not a list of 2 to 26"),
        ({"choices": {"a": 1, "b": 2}}, "choices is not a list of 2 to 26"),
        ({"question": None}, "question is NoneType, not a text"),
        ({"question": NAN}, "question is float, not a text"),
        ({"question": " "}, "question is ' ', not a text"),
        ({"hint": NAN}, "hint is float, not a text"),
        ({"lecture": NAN}, "lecture is float, not a text"),
        ({"solution": 5}, "solution is int, not a text"),
        ({"image_caption": NAN}, "image_caption is float, not a text"),
        ({"subject": "sport"}, "subject 'sport' is none of"),
        ({"grade": 4}, "grade 4 is none of"),
        *(({name: ...}, f"lacks {name}") for name in PROBLEM),
    ],
)
def test_problems_are_checked_as_the_scorer_does(change, part):
    record = {name: value for name, value in (PROBLEM | change).items() if value is not ...}
    for has_picture in (False, True):
        error = refused(record, has_picture)
        assert part in str(error)
        assert error.reason == "with an unusable problem"


@pytest.mark.parametrize(
    "turns",
    [
        [TURNS[0], {"from": "gpt", "value": ""}],
        [TURNS[0], {"from": "gpt", "value": " \n\ufeff"}],
        [{"from": "human", "value": ""}, TURNS[1]],
        [TURNS[0], {"from": "gpt", "value": None}],
        [TURNS[0], {"from": "gpt", "value": NAN}],
        [TURNS[0], {"from": "gpt"}],
        [TURNS[0], {"from": "bot", "value": "x"}],
        [TURNS[0], {"from": None, "value": "x"}],
        [TURNS[0]],
        [TURNS[1]],
        [],
        {},
        None,
        "hello",
        ["hello"],
        [TURNS[0], TURNS[0], TURNS[1]],
    ],
)
def test_conversations_that_teach_nothing(turns):
    assert refused({"conversations": turns}).reason == "with an unusable conversation"


def test_a_dropped_turn_is_noted():
    checked = check_record({"conversations": [TURNS[1], *TURNS]}, has_picture=False)
    assert checked.notes == ("turn of the assistant before a question dropped",)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " \n",
        "\ufeff",
        "\u200b",
        None,
        NAN,
        3,
        1.5,
        True,
        [],
        ["a"],
        {},
        "nan",
        "NaN",
        "None",
        "null",
        "<NA>",
    ],
)
def test_captions_that_are_none(caption):
    for record in ({"captions": [caption]}, {"caption": caption}):
        if record == {"caption": ["a"]}:
            continue
        assert refused(record).reason == "without a caption"
    kept = check_record({"captions": ["A dog.", ""]}, has_picture=True)
    assert (kept.record["captions"], kept.notes) == (["A dog."], ("empty caption beside others left out",))


@pytest.mark.parametrize(
    "text",
    [
        "['A dog.', 'A cat.']",
        '["A dog.", "A cat."]',
        ' ["A dog.", null]\n',
        "['A dog.'\n 'A cat.']",
        "('A dog.', 'A cat.')",
        "b'A dog.'",
        "{'raw': 'A dog.'}",
        "[]",
    ],
)
def test_a_list_of_captions_written_as_text_is_no_caption(text):
    """As Flickr30k's table on the hub has them in ``raw``."""
    for members in ({"txt": text.encode()}, {"json": json.dumps({"captions": ["Fine.", text]}).encode()}):
        with pytest.raises(DamagedSample, match="a list or another value written as text") as caught:
            read_record({"jpg": b"j", **members})
        assert caught.value.reason == "of damaged text"


@pytest.mark.parametrize(
    "text", ["[sic] A dog", "(A dog.)", "[UNK]", '("A dog")', "b'day", "[A] 'x'", "{x}", "(1)"]
)
def test_brackets_in_captions_are_text(text):
    assert check_record({"captions": [text]}, has_picture=True).record["captions"] == [text]


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00 half", "a\0b", "\x01", "\x1b[31mred", "\x7f"])
@pytest.mark.parametrize(
    "of",
    [
        lambda text: {"captions": ["Fine.", text]},
        lambda text: {"caption": text},
        lambda text: {"conversations": [{"from": "human", "value": text}, TURNS[1]]},
        lambda text: {"conversations": [TURNS[0], {"from": "gpt", "value": text}]},
        lambda text: PROBLEM | {"question": text},
        lambda text: PROBLEM | {"choices": ["a", text]},
        lambda text: PROBLEM | {"hint": text},
        lambda text: PROBLEM | {"solution": text},
    ],
)
def test_damaged_text_is_refused_wherever_it_stands(text, of):
    error = refused(of(text))
    assert error.reason == "of damaged text"
    assert "half an emoji" in str(error) or "a control character" in str(error)


def test_half_an_emoji_in_any_field():
    assert refused({"captions": ["x"], "url": {"deep": ["\ud83d"]}}).reason == "of damaged text"
    assert refused({"captions": ["x"], "\ud83d": 1}).reason == "of damaged text"


def test_marks_go_wherever_they_stand():
    record = {"captions": ["\ufeffA dog\ufeff.", "Two."]}
    assert check_record(record, has_picture=True).record["captions"] == ["A dog.", "Two."]
    chat = {
        "conversations": [{"from": "human", "value": "\ufeffWhat?"}, {"from": "gpt", "value": "\ufeffA dog."}]
    }
    assert check_record(chat, has_picture=False).record["conversations"] == TURNS
    members = {"jpg": b"j", "txt": "\ufeffA dog.".encode()}
    assert read_record(members).record["captions"] == ["A dog."]
    assert read_record({"jpg": b"j", "json": b'\xef\xbb\xbf{"caption": "A dog."}'}).record["captions"] == [
        "A dog."
    ]


@settings(deadline=None)
@given(st.text())
def test_clean_text_can_be_written_and_is_clean(text):
    try:
        cleaned = clean_text(text)
    except ValueError:
        assert any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text)
        return
    cleaned.encode()
    assert clean_text(cleaned) == cleaned
    assert cleaned == text.replace("\ufeff", "")
    assert is_text(cleaned) == is_text(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.just("<image>"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "a"]), inner)
    ),
    max_leaves=6,
)
FIELDS = [
    "captions",
    "caption",
    "conversations",
    "question",
    "choices",
    "answer",
    "hint",
    "image",
    "images",
    "status",
]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.booleans())
def test_any_record_is_taken_or_refused_in_one_line(record, has_picture):
    members = {
        "__url__": "here",
        "json": json.dumps(record).encode(),
        **({"png": b"p"} if has_picture else {}),
    }
    checked = message = None
    try:
        checked = read_record(members)
    except DamagedSample as error:
        message = str(error)
    if checked is None:
        assert message is not None
        assert "\n" not in message
        return
    assert has_picture or checked.task != "caption"
    json.dumps(checked.record, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("caffè".encode("latin-1"), "at byte 4, line 1 (0xe8): it may be Latin-1 or Windows-1252"),
        (b"a\nb\xff", "at byte 3, line 2 (0xff)"),
        (b"\xef\xbb\xbfab\xff", "at byte 5, line 1"),
        (
            "image,caption".encode("utf-16"),
            "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 F > NEW",
        ),
        ("image,caption".encode("utf-16-le"), "it looks like UTF-16"),
        ("image,caption".encode("utf-16-be"), "it looks like UTF-16"),
        ("image,caption".encode("utf-32"), "it looks like UTF-16"),
    ],
)
def test_other_encodings(data, part):
    with pytest.raises(ValueError, match="not UTF-8") as caught:
        decode_text(data, command="F")
    assert part in str(caught.value)
    assert decode_text(b"\xef\xbb\xbfa") == "a"


def test_what_is_no_text_is_named():
    with pytest.raises(ValueError, match=r"not a text in UTF-8: it is a Git LFS pointer; .* git lfs pull"):
        decode_text(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_lost_characters_are_noted():
    for text in ("Ein B\ufffdr.", "A dog\x92s bone", "and so on\x85"):
        checked = check_record({"captions": [text]}, has_picture=True)
        assert checked.record["captions"] == [text]
        assert checked.notes == (
            "text with U+FFFD or U+0080 to U+009F in it, a character that was lost before",
        )
