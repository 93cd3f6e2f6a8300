"""Records of samples: no row is trained blind, none is trained or scored wrong, and what is odd is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dehvf_ds.data.records import check_record, read_record
from dehvf_ds.data.shards import DamagedSample, clean_text, decode_text, is_text

NAN = float("nan")
PROBLEM = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "natural science"}


def talk(question="What?", answer="A dog.", **fields):
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }


TURNS = talk()["conversations"]


def refused(record, has_picture=True, **members) -> DamagedSample:
    given = {"__url__": "a.tar: sample x", "json": json.dumps(record).encode(), **members}
    given |= {"jpg": b"j"} if has_picture else {}
    with pytest.raises(DamagedSample) as caught:
        read_record(given)
    message = str(caught.value)
    assert message.startswith("a.tar: sample x: ")
    assert message.isprintable()
    return caught.value


MARKS = ("<image>\nWhat?", "<IMAGE>\nWhat?", "What? <Image>", "<image-placeholder>What?", "<img>\nWhat?")
MARKS += ("<ImageHere>Hi.", "See <image_1>.", "Is <|image|> red?", "What is <|image_1|>?", "[IMG] Hi")
MARKS += ("<|vision_start|><|image_pad|><|vision_end|>Hi", "<im_start><im_end>Hi", "See <video>.", "<image>")
MARKS += ("Picture 1: <img>a.jpg</img>\nWhat?", "<IMG_CONTEXT>Hi", "<start_of_image>Hi", "< image >Hi")
MARKS += ("<image/>", "[image] What?", "<Img></Img> Hi")
FIELDS = ("image_url", "img_path", "imgs", "Image", "imagePath", "pictures", "photo", "media", "frames")
FIELDS += ("image_id", "video_path", "image-file", "file name", "image_base64", "image", "image_path")
FAILED = {"status": "failed_to_download", "error_message": "404"}
BLIND = [
    {"captions": ["A dog."]},
    {"caption": "A dog.", "url": "http://x", "status": "success"},
    {"caption": "A dog.", **FAILED},
    {"caption": "A dog.", "image": None},
    {"caption": "A dog.", "image_missing": True},
    talk(**FAILED, url="http://x"),
    *(talk(**{field: "a.jpg"}) for field in FIELDS),
    *(talk(image=value) for value in (7, NAN, False)),
    talk(images=["a.jpg"]),
    *(talk(mark) for mark in MARKS),
    {"conversations": [*TURNS, *talk("<image>\nWhat?")["conversations"]]},
    {"conversations": [{"from": "User", "value": "<image>"}, TURNS[1]]},
    *(PROBLEM | {"image": value} for value in ("image.png", {"bytes": "..", "path": None})),
    PROBLEM | {"question": "<image>\nWhich is it?"},
    PROBLEM | {"hint": "See <image>."},
    PROBLEM | {"images": ["image.png"]},
]


@pytest.mark.parametrize("record", BLIND, ids=str)
def test_no_row_is_trained_blind(record):
    error = refused(record, has_picture=False)
    assert error.reason == "without a picture"
    if record.get("status", "success") != "success":
        assert "its download: failed_to_download, 404" in str(error)


@pytest.mark.parametrize(
    "record",
    [
        *(talk(), talk(image=None), talk(image=""), talk(images=[])),
        talk(answer="Write <image> in HTML."),
        talk("Is <img> or <Image /> better, [image] aside?"),
        talk('Why <img src="a.jpg">?', image_size=3),
        talk("<image>\nWhat?", image="a.jpg", image_missing=True),
        *(PROBLEM, PROBLEM | {"image": None}, PROBLEM | {"image": ""}),
        PROBLEM | {"image": "image.png", "image_missing": True},
    ],
)
def test_text_only_rows_by_two_signs(record):
    members = {"json": json.dumps(record).encode(), "cls": b"?", "url": b"?", "meta.yaml": b"?"}
    assert read_record({**members, "__key__": "a"}).record == record
    for member in ("heic", "mp4", "svg", "bin", "image", "data", "feat.npy", "pt", "0"):
        error = refused(record, has_picture=False, **{member: b"?"})
        assert f".{member} is no kind of picture that is read" in str(error)


@pytest.mark.parametrize(
    "data", [b'{"caption": "a", "caption": "b"}', b'{"captions": ["a"], "x": {"y": 1, "y": 1}}']
)
def test_names_that_stand_twice(data):
    with pytest.raises(DamagedSample, match=r"the name '(caption|y)' stands twice") as caught:
        read_record({"__url__": "here", "json": data, "jpg": b"j"})
    assert caught.value.reason == "with an unreadable record"


SEVERAL = "caption of several lines in a .txt, read as one caption"
DIFFERS = "caption in a .txt that differs from its .json's, which is not read"
UNREAD = ".txt beside a record that has its own texts, not read"


@pytest.mark.parametrize(
    ("text", "record", "notes", "captions"),
    [
        (b"A dog.\n", {}, (), ["A dog.\n"]),
        (b"A dog.\n\nA cat.\n", {}, (SEVERAL,), ["A dog.\n\nA cat.\n"]),
        (b"A  dog.", {"caption": "A dog."}, (), ["A  dog."]),
        (b"A dog.", {"caption": "A cat."}, (DIFFERS,), ["A dog."]),
        (b"A dog.", {"captions": ["A cat."]}, (UNREAD,), ["A cat."]),
        (b"A dog.", talk(), (UNREAD,), None),
        (b"A dog.", PROBLEM, (UNREAD,), None),
    ],
)
def test_texts_beside_records(text, record, notes, captions):
    checked = read_record({"jpg": b"j", "txt": text, "json": json.dumps(record).encode()})
    assert (checked.notes, checked.record.get("captions")) == (notes, captions)


@pytest.mark.parametrize(
    ("record", "note"),
    [
        (talk(answer="<image>\nA dog."), "answer with a mark such as <image> in it, learnt as text"),
        (talk("<image> and <image>?"), "chat with several <image> for its one picture"),
        (talk(answer="NaN"), "answer that is the word nan or null"),
        ({"conversations": [TURNS[1], *TURNS]}, "turn of the assistant before a question dropped"),
        (
            PROBLEM | {"choices": ["a", "b", "b"]},
            "problem whose right choice stands twice among its choices",
        ),
        ({"captions": ["A dog.", ""]}, "empty caption beside others left out"),
        *(
            (
                {"captions": [text]},
                "text with U+FFFD or U+0080 to U+009F in it, a character that was lost before",
            )
            for text in ("Ein B\ufffdr.", "A dog\x92s bone", "and so on\x85")
        ),
    ],
)
def test_what_is_odd_in_a_usable_row_is_counted(record, note):
    checked = check_record(record, has_picture=True)
    assert checked.notes == (note,)
    # By this field the scores tell problems with a picture from others.
    assert checked.task != "scienceqa" or checked.record["image"]


@pytest.mark.parametrize("field", ["image", "images"])
def test_several_pictures_of_a_row(field):
    for images in (["a.jpg", "b.jpg"], ["a.jpg", "b.jpg", "c.jpg"]):
        assert refused(talk(**{field: images})).reason == "with several pictures"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"answer": 2}, "answer 2 is no number of its 2 choices"),
        *(({"answer": value}, f"answer {value!r}") for value in (-1, True, 1.0, NAN, "A", None, [1])),
        ({"choices": ["a", NAN]}, "a choice is float, not a text"),
        ({"choices": ["a", None]}, "a choice is NoneType, not a text"),
        ({"choices": ["a", " \u200b"]}, "a choice is ' \\u200b', not a text"),
        *(
            ({"choices": value}, "choices is not a list of 2 to 26")
            for value in (["a"], [], ["a"] * 27, "ab", {"a": 1, "b": 2}, 5)
        ),
        ({"question": None}, "question is NoneType, not a text"),
        ({"question": " "}, "question is ' ', not a text"),
        *(({name: NAN}, f"{name} is float, not a text") for name in ("hint", "lecture", "image_caption")),
        ({"solution": 5}, "solution is int, not a text"),
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
        *(talk(answer=value)["conversations"] for value in ("", " \n\ufeff", None, NAN)),
        talk("")["conversations"],
        *([TURNS[0], turn] for turn in ({"from": "gpt"}, {"from": "bot", "value": "x"}, {"value": "x"})),
        *([TURNS[0]], [TURNS[1]], [TURNS[0], *TURNS], [], {}, None, 5, "hello", ["hello"]),
    ],
)
def test_conversations_that_teach_nothing(turns):
    assert refused({"conversations": turns}).reason == "with an unusable conversation"


@pytest.mark.parametrize("caption", ["", " \n", "\ufeff", "\u200b", None, NAN, 3, True, [], ["a"], {}])
def test_captions_that_are_none(caption):
    assert refused({"captions": [caption]}).reason == "without a caption"
    if caption != ["a"]:
        assert refused({"caption": caption}).reason == "without a caption"
    for word in ("nan", "NaN", "None", "null", "<NA>"):
        assert refused({"caption": word}).reason == "without a caption"


@pytest.mark.parametrize(
    "text",
    [
        *("['A dog.', 'A cat.']", '["A dog.", "A cat."]', ' ["A dog.", null]\n', "['A dog.'\n 'A cat.']"),
        *("('A dog.', 'A cat.')", "b'A dog.'", "{'raw': 'A dog.'}", "[]"),
    ],
)
def test_a_list_of_captions_written_as_text_is_no_caption(text):
    """As Flickr30k's table on the hub has them in ``raw``."""
    for members in ({"txt": text.encode()}, {"json": json.dumps({"captions": ["Fine.", text]}).encode()}):
        with pytest.raises(DamagedSample, match="a list or another value written as text") as caught:
            read_record({"jpg": b"j", **members})
        assert caught.value.reason == "of damaged text"


def test_brackets_in_captions_are_text():
    texts = ["[sic] A dog", "(A dog.)", "[UNK]", '("A dog")', "b'day", "[A] 'x'", "{x}", "(1)"]
    assert check_record({"captions": texts}, has_picture=True).record["captions"] == texts


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00 half", "a\0b", "\x01", "\x1b[31mred", "\x7f"])
def test_damaged_text_is_refused_wherever_it_stands(text):
    records = [{"captions": ["Fine.", text]}, {"caption": text}, talk(text), talk(answer=text)]
    records += [PROBLEM | {field: text} for field in ("question", "hint", "solution")]
    records += [PROBLEM | {"choices": ["a", text]}]
    if text >= "\ud800" or "\ud83d" in text:
        # In any other field it would end what writes it.
        records += [{"captions": ["x"], "url": {"deep": [text]}}, {"captions": ["x"], text: 1}]
    for record in records:
        error = refused(record)
        assert error.reason == "of damaged text"
        assert "half an emoji" in str(error) or "a control character" in str(error)


def test_byte_order_marks_go_wherever_they_stand():
    record = check_record({"captions": ["\ufeffA dog\ufeff.", "Two."]}, has_picture=True).record
    assert record["captions"] == ["A dog.", "Two."]
    assert check_record(talk("\ufeffWhat?", "\ufeffA dog."), has_picture=False).record == talk()
    for members in ({"txt": "\ufeffA dog.".encode()}, {"json": b'\xef\xbb\xbf{"caption": "A dog."}'}):
        assert read_record({"jpg": b"j", **members}).record["captions"] == ["A dog."]


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
NAMES = ["captions", "caption", "conversations", "question", "choices", "answer", "hint", "image", "images"]


def taken_or_refused(data, has_picture):
    members = {"__url__": "here", "json": data, **({"png": b"p"} if has_picture else {})}
    checked, message = None, ""
    try:
        checked = read_record(members)
    except DamagedSample as error:
        message = str(error)
    assert "\n" not in message
    if checked is None:
        return
    assert has_picture or checked.task != "caption"
    json.dumps(checked.record, ensure_ascii=False).encode()


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "status"]), JSON), st.booleans())
def test_any_record_is_taken_or_refused_in_one_line(record, has_picture):
    taken_or_refused(json.dumps(record).encode(), has_picture)


@pytest.mark.parametrize("value", [b"[" * 100_000 + b"]" * 100_000, b"9" * 5000], ids=["deep", "huge"])
def test_json_that_python_does_not_parse(value):
    taken_or_refused(b'{"a": ' + value + b"}", has_picture=True)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("caffè".encode("latin-1"), "at byte 4, line 1 (0xe8): it may be Latin-1 or Windows-1252"),
        (b"a\nb\xff", "at byte 3, line 2 (0xff)"),
        (b"\xef\xbb\xbfab\xff", "at byte 5, line 1"),
        ("a,b".encode("utf-16"), "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 F > NEW"),
        *(
            ("image,caption".encode(f"utf-{kind}"), "it looks like UTF-16")
            for kind in ("16-le", "16-be", "32")
        ),
        (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "it is a Git LFS pointer"),
    ],
)
def test_other_encodings(data, part):
    with pytest.raises(ValueError, match=r"not UTF-8|not a text in UTF-8") as caught:
        decode_text(data, command="F")
    assert part in str(caught.value)
    assert decode_text(b"\xef\xbb\xbfa") == "a"
