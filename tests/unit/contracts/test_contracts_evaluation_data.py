"""Own texts and tasks are checked before anybody uploads or measures them."""

from __future__ import annotations

import json

import pytest

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.events import ModelVersionRegistered, VariantStarted
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.model import ModelFile
from slmops.contracts.profile import EDGE_SMALL
from slmops.contracts.prompts.evaluation_data import (
    FILE_LIMIT_BYTES,
    FILES_LIMIT,
    QUESTIONS_LIMIT,
    EvaluationData,
    check_data,
)
from slmops.contracts.prompts.texts import texts_in

KINDS = {"texts": "texts", "calibration": "calibration_texts", "tasks": "tasks"}
LONG = " ".join(f"word{number}" for number in range(200))
OTHER = " ".join(f"other{number}" for number in range(200))
QUESTION = '{"question": "Which?", "choices": ["a", "b"], "answer": 1}'


def file(path: str, content: bytes) -> ModelFile:
    return ModelFile(path=path, digest=digest_of(content), size_bytes=len(content))


def own(**contents: str | bytes) -> tuple[EvaluationData, dict[str, bytes]]:
    """Makes data of files that are named `texts__a_txt` for `texts/a.txt`."""
    named = {
        f"{kind}/{name.replace('_', '.')}": content.encode() if isinstance(content, str) else content
        for key, content in contents.items()
        for kind, name in [key.split("__")]
    }
    fields = {
        field: tuple(file(path, content) for path, content in named.items() if path.startswith(f"{folder}/"))
        for folder, field in KINDS.items()
    }
    return EvaluationData.model_validate(fields), named


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def test_texts_and_tasks_of_all_kinds_are_accepted() -> None:
    data, contents = own(
        texts__a_txt=LONG, texts__b_jsonl=lines("One.", "Two."), calibration__c_txt=OTHER, tasks__d_jsonl=QUESTION
    )
    check_data(data, contents)
    assert [f.path for f in data.files] == ["texts/a.txt", "texts/b.jsonl", "calibration/c.txt", "tasks/d.jsonl"]


def test_only_a_line_feed_ends_a_line_of_texts() -> None:
    texts = ("One\u2028line.", "Next\u0085line.\r")
    assert texts_in("a.jsonl", lines(*texts).encode()) == texts


@pytest.mark.parametrize(
    ("contents", "where", "what"),
    [
        ({"texts__a_txt": LONG.encode("utf-16")}, "texts/a.txt line 1", "not UTF-8"),
        ({"texts__a_txt": LONG.encode() + b"\n\xff"}, "texts/a.txt line 2", "not UTF-8"),
        ({"texts__a_txt": "\ufeff" + LONG}, "texts/a.txt", "byte order mark"),
        ({"texts__a_txt": LONG + "\n\n\0"}, "texts/a.txt line 3", "NUL"),
        ({"texts__a_txt": " \n "}, "texts/a.txt", "empty"),
        ({"texts__a_txt": "A few words."}, "texts/a.txt", "fewer than 256 bytes"),
        ({"texts__a_jsonl": lines(LONG) + "\n{'text': 1}"}, "texts/a.jsonl line 3", "not valid JSON"),
        ({"texts__a_jsonl": '{"text": "a", "text": "b"}'}, "texts/a.jsonl line 1", "'text' occurs twice"),
        ({"texts__a_jsonl": '["a"]'}, "texts/a.jsonl line 1", "not a JSON object"),
        ({"texts__a_jsonl": lines(LONG) + '{"txt": "a"}'}, "texts/a.jsonl line 2", "unknown field 'txt'"),
        ({"texts__a_jsonl": '{"text": " "}'}, "texts/a.jsonl line 1", "field text"),
        ({"texts__a_jsonl": '{"text": 3}'}, "texts/a.jsonl line 1", "field text"),
        ({"texts__a_jsonl": lines(LONG, "x", LONG)}, "texts/a.jsonl line 3", "same as texts/a.jsonl line 1"),
        ({"texts__a_txt": LONG, "texts__b_txt": f"{LONG}\n"}, "texts/b.txt", "same as texts/a.txt"),
        ({"texts__a_txt": LONG, "calibration__b_txt": LONG}, "calibration/b.txt", "same as texts/a.txt"),
        ({"texts__a_txt": LONG, "calibration__b_txt": f"So. {LONG}"}, "texts/a.txt", "100.0% .* in calibration/b.txt"),
        (
            {"texts__a_jsonl": lines(OTHER, LONG), "calibration__b_jsonl": lines("Unrelated.", f"So. {LONG}")},
            "texts/a.jsonl line 2",
            "most of it in calibration/b.jsonl line 2",
        ),
        ({"tasks__a_jsonl": ""}, "tasks/a.jsonl", "no questions"),
        ({"tasks__a_jsonl": f"\n{QUESTION}\n{QUESTION}"}, "tasks/a.jsonl line 3", "line 2 is asked again"),
        ({"tasks__a_jsonl": '{"prompt": "Which?", "anwser": "a"}'}, "tasks/a.jsonl line 1", "answer: Field required"),
        ({"tasks__a_jsonl": QUESTION[:-1] + ', "hint": "b"}'}, "tasks/a.jsonl line 1", "hint: Extra inputs"),
        ({"tasks__a_jsonl": QUESTION.replace("1}", "2}")}, "tasks/a.jsonl line 1", "answer 2 is not the index"),
        ({"tasks__a_txt": QUESTION, "tasks__a_jsonl": QUESTION}, None, "several task files have the name 'a'"),
        ({"texts__a_txt": LONG, "texts__A_txt": OTHER}, "texts/A.txt", "two files have the name texts/a.txt"),
        (
            {"tasks__a_jsonl": "\n".join(QUESTION.replace("Which", f"Which {n}") for n in range(QUESTIONS_LIMIT + 1))},
            "tasks/a.jsonl",
            "1001 questions",
        ),
        ({"texts__a_txt": "x" * (FILE_LIMIT_BYTES + 1)}, "texts/a.txt", "bytes, 4194304 are allowed"),
        ({f"texts__{n}_txt": LONG + str(n) for n in range(FILES_LIMIT + 1)}, None, "65 texts and tasks"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_cannot_be_used_is_refused_with_its_place(
    contents: dict[str, str | bytes], where: str | None, what: str
) -> None:
    with pytest.raises(InvalidMessage, match=what) as refusal:
        check_data(*own(**contents))
    assert refusal.value.where == where


def test_files_of_a_kind_replace_those_of_the_version() -> None:
    version, _ = own(texts__a_txt=LONG, tasks__b_jsonl=QUESTION)
    request, _ = own(texts__c_txt=OTHER)
    assert [f.path for f in version.replaced_by(request).files] == ["texts/c.txt", "tasks/b.jsonl"]
    assert version.replaced_by(None) == version


def test_texts_and_tasks_are_part_of_the_work_and_documents_without_them_keep_theirs() -> None:
    """A job of the release before has the same id as before, and so does its cached result."""
    job = OptimizeJob(
        model="smollm2",
        version="1.0.0",
        digest=digest_of(b"model"),
        format="gguf",
        files=(file("model.gguf", b"model"),),
        profile=EDGE_SMALL,
        recipes=("int8",),
    )
    first, second = own(texts__a_txt=LONG)[0], own(texts__a_txt=OTHER)[0]
    jobs = [job, *(job.model_copy(update={"data": data}) for data in (first, second))]
    assert len({each.work for each in jobs}) == len({each.source for each in jobs}) == 3
    assert job.model_copy(update={"data": EvaluationData()}).work == job.work
    before = job.model_dump(mode="json", by_alias=True, exclude={"data"})
    assert OptimizeJob.model_validate(before).work == job.work


@pytest.mark.parametrize("kind", [ModelVersionRegistered, VariantStarted])
def test_an_event_of_the_release_before_is_read(kind: type[ModelVersionRegistered | VariantStarted]) -> None:
    from contract.wire_examples import EVENTS

    example = next(event for event in EVENTS if type(event) is kind)
    assert kind.model_validate(example.model_dump(mode="json", exclude={"data"})).data is None
